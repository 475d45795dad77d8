"""``cryorecon demo``: the main job on the built-in molecule."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

from cryorecon.cli.console import console, count_progress, prepare_folder
from cryorecon.run.simulate_config import SimulateConfig


def demo_command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder.")] = Path("demo"),
    n: Annotated[int, typer.Option("--n", help="Particles.")] = 2000,
    box: Annotated[int, typer.Option(help="Box side in pixels; 76.8 A wide.")] = 64,
    snr: Annotated[float, typer.Option()] = 0.1,
    seed: Annotated[int, typer.Option()] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    """Simulate adenylate kinase (PDB 4AKE, chain A), find its map from scratch, and judge it.

    The truth is used at the end only, for the FSC and the pose errors.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.run.demo import run_demo
    from cryorecon.run.simulate import simulate

    prepare_folder(output, overwrite)
    config = SimulateConfig(
        n_particles=n, box=box, pixel_size_angst=76.8 / box, snr=snr, shift_angst=3.6, seed=seed
    )
    with (
        as_file(files("cryorecon") / "data" / "4ake_chain_a_heavy.pdb") as model,
        count_progress("Simulating 4AKE", "images") as progress,
    ):
        simulate(model, output / "simulated", config, progress)
    for line in run_demo(output, seed, console):
        console.print(line, markup=False)
