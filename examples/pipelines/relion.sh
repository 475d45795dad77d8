#!/usr/bin/env bash
# RELION's projections -> a first map and poses by cryorecon -> RELION's local refinement of both.
#
#     bash examples/pipelines/relion.sh OUT [N] [BOX]
#
# Needs cryorecon, and relion_project and relion_refine_mpi of RELION 3.1 on the PATH. Prints pose errors
# and FSC against the truth before and after RELION's part. With your own particles begin at step 2.
set -euo pipefail

out=${1:?give an output folder}
n=${2:-500}
box=${3:-32}
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
threads=${THREADS:-1}
mkdir -p "$out"
cd "$out"

# 1. Particles as RELION projects them: stack/particles.star knows the poses, stack/blind.star does not.
if [ ! -e stack/blind.star ]; then
    "$python" "$here/benchmarks/make_relion_stack.py" stack --n "$n" --box "$box" --snr 0.3
fi

# 2. A map of half the particles, and the poses of all as a search reads them. Without --subset and
#    --no-refine-all cryorecon refines them itself, which leaves RELION little to do on such images.
cryorecon abinitio stack/blind.star -o InitialModel/cryorecon --diameter 70 --overwrite \
    --subset $((n / 2)) --no-refine-all --halves none

# 3. RELION goes on from both: gold-standard refinement about the poses that are there.
mkdir -p Refine3D
mpirun --allow-run-as-root --oversubscribe -n 3 relion_refine_mpi --o Refine3D/run \
    --i InitialModel/cryorecon/run_data.star --ref InitialModel/cryorecon/initial_model.mrc \
    --firstiter_cc --ini_high 10 --auto_refine --split_random_halves --low_resol_join_halves 40 \
    --ctf --flatten_solvent --zero_mask --norm --scale --particle_diameter 70 --pad 2 \
    --sigma_ang 3 --healpix_order 4 --auto_local_healpix_order 4 --oversampling 1 \
    --offset_range 3 --offset_step 1 --dont_combine_weights_via_disc --preread_images --pool 30 \
    --j "$threads" --random_seed 1 > Refine3D/run.out

# 4. What that brought.
for poses in InitialModel/cryorecon/run_data.star Refine3D/run_data.star; do
    cryorecon compare-poses "$poses" stack/particles.star
done
for map in InitialModel/cryorecon/initial_model.mrc Refine3D/run_class001.mrc; do
    cryorecon fsc "$map" stack/map.mrc --align
done
