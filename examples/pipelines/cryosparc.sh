#!/usr/bin/env bash
# cryoSPARC's particles -> a first map and poses by cryorecon -> files that cryoSPARC and RELION take.
#
#     bash examples/pipelines/cryosparc.sh PARTICLES.cs DIAMETER OUT [PASSTHROUGH.cs]
#
# Run it in the cryoSPARC project's folder: image paths are relative to it. Ends with a check that no
# particle was lost or renamed on the way.
set -euo pipefail

particles=${1:?give a .cs file of particles}
diameter=${2:?give the diameter in angstrom}
out=${3:?give an output folder}
mkdir -p "$out"

# 1. Fields that the file lacks (often ctf/* or blob/*) are in the passthrough file of the same job.
cryorecon export "$particles" ${4:+--passthrough "$4"} -o "$out/input.star" --to relion

# 2. Two engines that search in unlike ways, and how far they agree.
cryorecon abinitio "$out/input.star" -o "$out/abinitio" --method all --diameter "$diameter"

# 3. Back: Import Result Group takes the .cs file, Import 3D Volumes the map.
cryorecon export "$out/abinitio" -o "$out/particles.cs" --to cryosparc
cryorecon export "$out/abinitio" -o "$out/particles.star" --to relion

# 4. The same particles in the same order?
cryorecon compare-poses "$out/abinitio/run_data.star" "$out/particles.star" --json
