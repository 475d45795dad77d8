"""``cryorecon export``: results in the formats of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cryorecon.cli.console import console

if TYPE_CHECKING:
    from cryorecon.run.export import MapEdits, Source

_TABLE_FORMATS = ("relion", "cryosparc", "cryodrgn")
_SUFFIXES = {
    "relion": (".star",),
    "cryosparc": (".cs",),
    "chimerax": (".cxc",),
    "mrc": (".mrc", ".map"),
}
_EXAMPLES = """Examples:

cryorecon export job001 -o particles.star --to relion --relion30

cryorecon export J12/particles.cs --passthrough J12/passthrough.cs -o particles.star --to relion

cryorecon export job001 -o drgn --to cryodrgn

cryorecon export job001 -o other_hand.mrc --to mrc --flip --resample 3 --crop 128"""


def export_command(
    source: Annotated[
        Path, typer.Argument(help="Job directory of abinitio, a STAR or .cs file, or an MRC map.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File to write; for cryodrgn a folder.")
    ],
    to: Annotated[
        Literal["relion", "cryosparc", "cryodrgn", "chimerax", "mrc"],
        typer.Option("--to", help="STAR; .cs; poses.pkl and ctf.pkl; .cxc script; MRC map."),
    ],
    flip: Annotated[
        bool, typer.Option("--flip", help="The other hand: of poses, and of maps (not chimerax).")
    ] = False,
    relion30: Annotated[
        bool, typer.Option("--relion30", help="relion: columns of RELION 3.0, no optics table.")
    ] = False,
    resample: Annotated[
        float | None, typer.Option(help="mrc: new voxel size [A/px].", min=1e-3)
    ] = None,
    lowpass: Annotated[
        float | None, typer.Option(help="mrc: low-pass, half gain at this resolution [A].", min=0.0)
    ] = None,
    crop: Annotated[
        int | None, typer.Option(help="mrc: new box side, after --resample [px].", min=2)
    ] = None,
    invert: Annotated[bool, typer.Option("--invert", help="mrc: contrast inverted.")] = False,
    project: Annotated[Path | None, typer.Option(help="Folder of the image paths.")] = None,
    passthrough: Annotated[
        Path | None, typer.Option(help="More fields of the same particles (.cs), joined by uid.")
    ] = None,
) -> None:
    """Write particles, poses and maps for RELION, cryoSPARC, cryoDRGN or ChimeraX."""
    _check_usage(to, flip, relion30, [resample, lowpass, crop, invert or None], passthrough)
    if output.suffix not in _SUFFIXES.get(to, (output.suffix,)):
        raise typer.BadParameter(
            f"--to {to} writes {' or '.join(_SUFFIXES[to])} files, not {output}"
        )
    # torch takes seconds to load: only when the command runs.
    from cryorecon.run import export

    found = export.find_source(source)
    if to == "chimerax":
        level = export.to_chimerax(found, output)
        console.print(f"{output}  contour level {level:.4g}", markup=False)
    elif to == "mrc":
        edits = export.MapEdits(invert, flip, lowpass, resample, crop)
        _export_map(found, output, edits, project)
    else:
        _export_table(found, output, to, flip, relion30, project, passthrough)


def _check_usage(
    to: str, flip: bool, relion30: bool, edits: list[object], passthrough: Path | None
) -> None:
    if relion30 and to != "relion":
        raise typer.BadParameter("--relion30 goes with --to relion")
    if any(edit is not None for edit in edits) and to != "mrc":
        raise typer.BadParameter("--resample, --lowpass, --crop and --invert go with --to mrc")
    if flip and to == "chimerax":
        raise typer.BadParameter("--flip does not go with --to chimerax; export the map first")
    if passthrough is not None and to not in _TABLE_FORMATS:
        raise typer.BadParameter("--passthrough goes with particle formats")


def _export_map(source: Source, output: Path, edits: MapEdits, project: Path | None) -> None:
    """The map and half maps, and for the other hand the poses that belong to it."""
    from cryorecon.io.particles import read_particles
    from cryorecon.run import export

    star = output.with_suffix(".star")
    # Before anything is written: poses that cannot be read must not leave a lone map.
    particles = read_particles(source.table, project) if edits.flip and source.table else None
    for path in export.to_mrc(source, output, edits):
        console.print(str(path), markup=False)
    if particles is not None:
        export.to_relion(particles, star, flip=True, old=not particles.has_optics_table)
        console.print(f"{star}  poses for the map of this hand", markup=False)


def _export_table(
    source: Source,
    output: Path,
    to: str,
    flip: bool,
    relion30: bool,
    project: Path | None,
    passthrough: Path | None,
) -> None:
    from cryorecon.io.particles import read_particles
    from cryorecon.run import export

    particles = read_particles(source.need_table(), project, passthrough=passthrough)
    count = f"{len(particles)} particles"
    if to == "relion":
        export.to_relion(particles, output, flip=flip, old=relion30)
        console.print(f"{output}  {count}", markup=False)
    elif to == "cryosparc":
        export.to_cryosparc(particles, output, flip=flip)
        console.print(f"{output}  {count}", markup=False)
    else:
        for path in export.to_cryodrgn(particles, output, flip=flip):
            console.print(f"{path}  {count}, in the order of {particles.path}", markup=False)


export_command.__doc__ = f"{export_command.__doc__}\n\n{_EXAMPLES}"
