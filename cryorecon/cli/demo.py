"""``cryorecon demo``: the main job on the built-in molecule."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

from cryorecon.cli.command import INPUT, examples
from cryorecon.cli.console import count_progress, messages, prepare_folder, print_json, use_threads
from cryorecon.cli.options import Folder, Json, N, Overwrite, Seed, Snr, Threads, option
from cryorecon.run.simulate_config import SimulateConfig

EXAMPLES = examples(
    ("two minutes on a laptop", "cryorecon demo"),
    ("fewer, clearer particles", "cryorecon demo -o demo500 -n 500 --snr 0.5"),
    ("how far the result is from the truth, for a script", "cryorecon demo --overwrite --json"),
)


def demo_command(
    output: Folder = Path("demo"),
    n: N = 2000,
    box: Annotated[int, option(INPUT, "Side of the images, 76.8 A wide [px].", metavar="PX")] = 64,
    snr: Snr = 0.1,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Simulate adenylate kinase (PDB 4AKE, chain A), find its map from scratch, and judge it.

    The truth is used at the end only, for the FSC and the pose errors.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.run.demo import run_demo
    from cryorecon.run.simulate import simulate

    use_threads(threads)
    told = messages(json)
    prepare_folder(output, overwrite)
    config = SimulateConfig(
        n_particles=n, box=box, pixel_size_angst=76.8 / box, snr=snr, shift_angst=3.6, seed=seed
    )
    with (
        as_file(files("cryorecon") / "data" / "4ake_chain_a_heavy.pdb") as model,
        count_progress("Simulating 4AKE", "images") as progress,
    ):
        simulate(model, output / "simulated", config, progress)
    found = run_demo(output, seed, told)
    for line in found.lines:
        told.print(line, markup=False)
    if json:
        print_json(found.figures)
