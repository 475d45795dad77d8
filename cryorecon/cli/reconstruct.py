"""``cryorecon reconstruct``: a map from poses that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryorecon.cli.console import console, count_progress


def reconstruct_command(
    particles: Annotated[Path, typer.Argument(help="Particle STAR or .cs file with poses.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Map to write (.mrc).")],
    halves: Annotated[
        bool, typer.Option("--halves", help="Also half maps (rlnRandomSubset, else random).")
    ] = False,
    wiener: Annotated[
        float, typer.Option(help="Regularisation, as a fraction of a shell's mean weight.")
    ] = 1e-3,
    padding: Annotated[int, typer.Option(help="Oversampling of the transform.")] = 2,
    project: Annotated[Path | None, typer.Option(help="Folder of the image paths.")] = None,
    seed: Annotated[int, typer.Option(help="For random half sets.")] = 0,
) -> None:
    """Backproject particles with the poses and CTFs in their file."""
    # torch takes seconds to load: only when the command runs.
    import torch

    from cryorecon.io.mrc import write_map
    from cryorecon.io.particles import read_particles
    from cryorecon.maps.fsc import fsc_curve, resolution_at
    from cryorecon.run.load import half_sets
    from cryorecon.run.reconstruct import reconstruct

    source = read_particles(particles, project)
    half = half_sets(source, torch.Generator().manual_seed(seed)) if halves else None
    with count_progress("Backprojecting", "images") as progress:
        result = reconstruct(source, half=half, wiener=wiener, padding=padding, progress=progress)
    pixel = source.pixel_size_angst
    write_map(output, result.volume.numpy(), pixel)
    console.print(f"[bold]{output}[/]  {source.box} px at {pixel:g} A")
    if result.halves is None:
        return
    for number, volume in enumerate(result.halves, 1):
        name = output.with_name(f"{output.stem}_half{number}_unfil.mrc")
        write_map(name, volume.numpy(), pixel)
        console.print(str(name))
    curve = fsc_curve(*result.halves)
    resolution = resolution_at(curve, 0.143, source.box, pixel)
    console.print(f"FSC 0.143 between the half maps, unmasked, poses as given: {resolution:.2f} A")
