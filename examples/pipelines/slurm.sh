#!/usr/bin/env bash
#SBATCH --job-name=cryorecon
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
# A map and poses on the processors of a SLURM allocation, one process a GPU (or PROCESSES a node):
#
#     sbatch examples/pipelines/slurm.sh PARTICLES.star OUT [options of abinitio]
#
# Submitted again, or requeued after a time limit or a dead node, it goes on from the last state. The
# folder must be on a disk that all nodes share.
set -euo pipefail

particles=${1:?give a STAR file of particles}
out=${2:?give a job folder}
shift 2
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-2}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-$processes} / processes))}

# Since SLURM 22.05 a step no longer takes the cores of its job by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-}
[ -n "$SRUN_CPUS_PER_TASK" ] || unset SRUN_CPUS_PER_TASK

# As a step also on one node: steps hear of the time limit, the script itself does not.
launch=(srun --ntasks-per-node=1 torchrun)
if [ "${SLURM_NNODES:-1}" -gt 1 ]; then
    # Not through head: a list that it cuts short would end the script.
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    launch+=(--nnodes "$SLURM_NNODES" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID"
        --rdzv-endpoint "${hosts%%$'\n'*}:${PORT:-29500}")
else
    launch+=(--standalone)
fi
launch+=(--nproc-per-node "$processes")

if [ -e "$out/job.yaml" ]; then
    exec "${launch[@]}" -m cryorecon abinitio --continue "$out"
fi
exec "${launch[@]}" -m cryorecon abinitio "$particles" -o "$out" "$@"
