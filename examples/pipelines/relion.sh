#!/usr/bin/env bash
# RELION's projections -> a first map and poses by cryorecon -> RELION's local refinement of both.
#
#     bash examples/pipelines/relion.sh OUT [N] [BOX]
#
# Needs cryorecon, and relion_project and relion_refine of RELION 3.1 on the PATH. Prints pose errors
# and FSC against the truth before and after RELION's part. With your own particles begin at step 2.
set -euo pipefail

out=${1:?give an output folder}
n=${2:-500}
box=${3:-32}
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
threads=${THREADS:-2}
mkdir -p "$out"
cd "$out"

# 1. Particles as RELION projects them: stack/particles.star knows the poses, stack/blind.star does not.
if [ ! -e stack/blind.star ]; then
    "$python" "$here/benchmarks/make_relion_stack.py" stack --n "$n" --box "$box" --snr 0.3
fi

# 2. Map and poses from nothing but images and CTF.
cryorecon abinitio stack/blind.star -o InitialModel/cryorecon --diameter 70 --overwrite

# 3. RELION goes on from both: five iterations about the poses that are there.
mkdir -p Refine3D
relion_refine --o Refine3D/run --i InitialModel/cryorecon/run_data.star \
    --ref InitialModel/cryorecon/initial_model.mrc --firstiter_cc --ini_high 10 --iter 5 --K 1 \
    --tau2_fudge 4 --ctf --flatten_solvent --zero_mask --particle_diameter 70 --norm --scale --pad 2 \
    --sigma_ang 2 --healpix_order 4 --oversampling 1 --offset_range 3 --offset_step 1 \
    --dont_combine_weights_via_disc --preread_images --pool 30 --j "$threads" --random_seed 1 \
    > Refine3D/run.out

# 4. What that brought.
for poses in InitialModel/cryorecon/run_data.star Refine3D/run_it005_data.star; do
    cryorecon compare-poses "$poses" stack/particles.star
done
for map in InitialModel/cryorecon/initial_model.mrc Refine3D/run_it005_class001.mrc; do
    cryorecon fsc "$map" stack/map.mrc --align
done
