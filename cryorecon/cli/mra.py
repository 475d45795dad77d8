"""``cryorecon mra``: multireference alignment in one dimension, by the method of moments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cryorecon.cli.console import console, count_progress, prepare_folder
from cryorecon.errors import CryoreconError
from cryorecon.io.files import make_folder

if TYPE_CHECKING:
    from cryorecon.engines.mra_training import TrainingConfig

mra_app = typer.Typer(
    name="mra",
    help="A signal from noisy, circularly shifted copies of it: multireference alignment in 1-D.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Output = Annotated[Path, typer.Option("-o", "--output", help="Folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite")]
Seed = Annotated[int, typer.Option(help="One seed gives one result on one machine.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Rarely needed settings, as key=value; repeatable."),
]
Recipe = Annotated[
    Literal["ours", "paper"],
    typer.Option(
        help="paper: moments over frequencies, fixed pairs, squared error, rates 1e-4, 1e-5, 1e-6."
    ),
]


@mra_app.command("solve")
def solve_command(
    observations: Annotated[
        Path, typer.Argument(help="NumPy file (.npy), shape (observations, points).")
    ],
    output: Output,
    method: Annotated[
        Literal["direct", "spectral", "encoder"],
        typer.Option(help="Least squares; one eigenvector; a trained encoder, refined."),
    ] = "direct",
    model: Annotated[
        Path | None, typer.Option(help="Folder of mra train, for --method encoder.")
    ] = None,
    noise_std: Annotated[
        float | None,
        typer.Option(min=0, help="Of the white noise; default from the smallest eigenvalues."),
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="At most, of method encoder.")] = 3000,
    learning_rate: Annotated[float, typer.Option(help="Of method encoder.")] = 1e-4,
    starts: Annotated[int, typer.Option(min=0, help="Random starts of method direct.")] = 4,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Signal and density of shifts from a file of observations, up to one common shift.

    The file is read once, block by block. Estimates stop where the moments are explained to within
    their noise.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.engines.mra_encoding import RefineConfig
    from cryorecon.engines.mra_solvers import DirectConfig
    from cryorecon.run.mra import solve_file

    if (method == "encoder") != (model is not None):
        raise CryoreconError(
            "Method encoder and --model go together",
            "Give --method encoder --model DIR, or neither",
        )
    if learning_rate <= 0:
        raise CryoreconError(f"--learning-rate {learning_rate} is not positive", "Try 1e-4")
    prepare_folder(output, overwrite)
    with count_progress(f"Reading {observations.name}", "observations") as bar:
        solved = solve_file(
            observations, output, method, noise_std, model, DirectConfig(starts=starts),
            RefineConfig(iterations, learning_rate), seed, bar,
        )  # fmt: skip
    told = solved.figures
    console.print(
        f"noise         {told['noise_std']:.4g} ({told['noise_std_source']})\n"
        f"moment errors {told['moment_1_relative_error']:.4f} and "
        f"{told['moment_2_relative_error']:.4f}; expected of noise "
        f"{told['moment_1_relative_noise']:.4f} and {told['moment_2_relative_noise']:.4f}",
        markup=False,
    )
    if told["misfit"] > 1.5:
        console.print(
            f"The moments are not explained to within their noise (misfit {told['misfit']:.3g}, "
            "1 expected): the estimate may be far off."
        )
    console.print(
        f"{output / 'signal.npy'}  {output / 'density.npy'}  {output / 'solution.png'}",
        markup=False,
    )


@mra_app.command("train")
def train_command(
    output: Output,
    gaussians: Annotated[int, typer.Option(min=1, max=10, help="In a mixture.")] = 2,
    points: Annotated[int, typer.Option(min=8, max=256, help="Of a signal.")] = 32,
    pairs: Annotated[int, typer.Option(min=1, help="Signals and densities an epoch.")] = 50_000,
    epochs: Annotated[int, typer.Option(min=1)] = 24,
    batch: Annotated[int, typer.Option(min=1)] = 256,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of Adam; default 6e-3, of the paper's recipe 1e-4.")
    ] = None,
    recipe: Recipe = "ours",
    seed: Seed = 0,
    continued: Annotated[
        bool, typer.Option("--continue", help="Go on from the folder's checkpoint.")
    ] = False,
    settings: Settings = None,
    overwrite: Overwrite = False,
) -> None:
    """Teach encoders to read signal and density off exact moments of random mixtures.

    Writes encoder.safetensors for `mra solve --method encoder --model DIR`, a checkpoint after
    every epoch, and the errors on pairs not seen in training.
    """
    from cryorecon.run.mra import train_encoders
    from cryorecon.run.settings import with_settings

    config = _training(recipe, gaussians, points, pairs, epochs, seed)
    chosen = [f"batch={batch}"]
    if learning_rate is not None:
        chosen.append(f"learning_rate={learning_rate}")
    try:
        config = with_settings(config, None, chosen + (settings or []))
    except ValueError as error:
        raise CryoreconError(str(error), "Change the settings") from error
    if not continued:
        prepare_folder(output, overwrite)
    with count_progress("Training", "batches") as bar:
        told = train_encoders(config, output, continued, 10_000, bar)
    console.print(
        f"error on {told['test_pairs']:,} unseen pairs: signal {told['signal_error_mean']:.4f}, "
        f"density {told['density_error_mean']:.4f}\n{output / 'encoder.safetensors'}",
        markup=False,
    )


@mra_app.command("reproduce")
def reproduce_command(
    output: Output,
    full: Annotated[
        bool, typer.Option("--full", help="The paper's sizes and recipe: days on a CPU.")
    ] = False,
    recipe: Annotated[
        Literal["ours", "paper"] | None, typer.Option(help="Default ours; paper with --full.")
    ] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="An epoch; default 50,000.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default 24.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Default 1,000; 3,000.")] = None,
    instances: Annotated[int, typer.Option(min=1, help="Problems that are averaged.")] = 20,
    observations: Annotated[int, typer.Option(min=10, help="Of each problem.")] = 1_000_000,
    seed: Seed = 0,
) -> None:
    """Table 1 and figure 4 of Khoo, Paul and Sharon (2024), and rivals on the same moments.

    Finished trainings in the folder are kept, interrupted ones go on.
    """
    from cryorecon.run.mra_reproduce import ReproduceConfig, figure_4, rivals, table_1

    recipe = recipe or ("paper" if full else "ours")
    pairs, epochs = pairs or (1_750_000 if full else 50_000), epochs or (30_000 if full else 24)
    make_folder(output)
    trainings = {g: _training(recipe, g, 32, pairs, epochs, seed) for g in (1, 2, 3)}
    config = ReproduceConfig(
        test_pairs=250_000 if full else 10_000,
        instances=instances,
        observations=observations,
        iterations=iterations or (3000 if full else 1000),
        seed=seed,
    )
    with count_progress("Table 1", "batches") as bar:
        table_1(trainings, output, config, bar, console.print)
    rivals(trainings, output, config, console.print)
    with count_progress("Figure 4", "iterations") as bar:
        figure_4(trainings[2], output, config, bar, console.print)
    console.print(f"{output / 'table1.csv'}  {output / 'rivals.csv'}  {output / 'figure4.png'}")


def _training(
    recipe: str, gaussians: int, points: int, pairs: int, epochs: int, seed: int
) -> TrainingConfig:
    from cryorecon.engines.mra_training import TrainingConfig, paper_training
    from cryorecon.networks.moment_encoders import MomentEncoderConfig
    from cryorecon.physics.mixtures import MixtureConfig

    if recipe == "paper":
        return paper_training(gaussians, points, pairs, epochs, seed)
    return TrainingConfig(
        MixtureConfig(gaussians), MomentEncoderConfig(points), pairs, epochs, seed=seed
    )
