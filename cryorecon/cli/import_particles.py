"""``cryorecon import``: cryoDRGN's files as a STAR file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryorecon.cli.command import examples
from cryorecon.cli.console import messages, print_json
from cryorecon.cli.options import CtfFile, Json, Overwrite, PosesFile, Project, argument
from cryorecon.cli.options import output as output_option

EXAMPLES = examples(
    (
        "a stack with the pickles of cryoDRGN",
        "cryorecon import particles.mrcs --ctf-file ctf.pkl --poses poses.pkl -o particles.star",
    ),
    (
        "many stacks, one a line",
        "cryorecon import stacks.txt --ctf-file ctf.pkl -o particles.star",
    ),
    (
        "poses that cryoDRGN found, back into the STAR file",
        "cryorecon import particles.star --poses drgn/pose.pkl -o with_poses.star",
    ),
)


def import_command(
    particles: Annotated[
        Path,
        argument("Stack (.mrcs), list of stacks (.txt), or a STAR or .cs file.", "PARTICLES"),
    ],
    output: Annotated[Path, output_option("File to write (.star).", "FILE")],
    ctf: CtfFile = None,
    poses: PosesFile = None,
    project: Project = None,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a RELION STAR file from a stack with cryoDRGN's ctf.pkl and poses.pkl.

    Poses of cryoDRGN may also go into a STAR or .cs file of the same images, in the same order.
    """
    if output.suffix != ".star":
        raise typer.BadParameter(f"STAR files end in .star, not as {output}")
    if ctf is None and poses is None:
        raise typer.BadParameter("give --ctf-file, --poses or both")
    # torch takes seconds to load: only when the command runs.
    from cryorecon.io.cryodrgn import with_poses
    from cryorecon.io.particles import read_particles
    from cryorecon.run.export import to_relion

    found = read_particles(particles, project, ctf=ctf)
    found = found if poses is None else with_poses(found, poses)
    old = particles.suffix == ".star" and not found.has_optics_table
    to_relion(found, output, flip=False, old=old, overwrite=overwrite)
    messages(json).print(f"{output}  {len(found)} particles", markup=False)
    if json:
        print_json({"files": [output], "particles": len(found)})
