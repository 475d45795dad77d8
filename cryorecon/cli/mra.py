"""``cryorecon mra``: multireference alignment in one dimension, by the method of moments."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cryorecon.cli.command import COMPUTE, EXPERT, INPUT, Command, Group, examples
from cryorecon.cli.console import (
    count_progress,
    error_console,
    messages,
    prepare_folder,
    print_json,
    use_threads,
)
from cryorecon.cli.options import (
    LEARNING_RATE_HELP,
    Config,
    Folder,
    Json,
    NoiseStd,
    Overwrite,
    Seed,
    Settings,
    Threads,
    argument,
    option,
)
from cryorecon.errors import CryoreconError
from cryorecon.io.files import make_folder

if TYPE_CHECKING:
    from rich.console import Console

    from cryorecon.engines.mra.training import TrainingConfig
    from cryorecon.run.mra.jobs import Solved

mra_app = typer.Typer(
    cls=Group,
    help="A signal from noisy, circularly shifted copies of it: multireference alignment in 1-D.",
    short_help="The method of moments in one dimension",
    no_args_is_help=True,
    rich_markup_mode=None,
)

RECIPE_HELP = "paper: moments over frequencies, fixed pairs, squared error, rates 1e-4, 1e-5, 1e-6."
ITERATIONS_HELP = "Iterations of a trained encoder's refinement."

SOLVE_EXAMPLES = examples(
    ("by least squares", "cryorecon mra solve observations.npy -o solved"),
    (
        "by a trained encoder",
        "cryorecon mra solve observations.npy -o solved --method encoder --model trained",
    ),
    (
        "the misfit alone, for a script",
        "cryorecon mra solve observations.npy -o solved --json | jq .misfit",
    ),
)


def solve_command(
    observations: Annotated[
        Path,
        argument("NumPy file (.npy), shape (observations, points).", "OBSERVATIONS"),
    ],
    output: Folder,
    method: Annotated[
        Literal["direct", "spectral", "encoder"],
        option(COMPUTE, "Least squares; one eigenvector; a trained encoder, refined."),
    ] = "direct",
    model: Annotated[
        Path | None,
        option(INPUT, "Folder of mra train, for --method encoder.", metavar="DIR"),
    ] = None,
    noise_std: NoiseStd = None,
    iterations: Annotated[
        int | None,
        option(COMPUTE, ITERATIONS_HELP, metavar="N", min=1, default="3000"),
    ] = None,
    learning_rate: Annotated[
        float | None, option(EXPERT, LEARNING_RATE_HELP, metavar="X", default="1e-4")
    ] = None,
    starts: Annotated[
        int | None,
        option(
            COMPUTE,
            "Random starts besides the spectral solution, of method direct.",
            metavar="N",
            min=0,
            default="4",
        ),
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Signal and density of shifts from a file of observations, up to one common shift.

    The file is read once, block by block. Estimates stop where the moments are explained to within
    their noise.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.engines.mra.encoding import RefineConfig
    from cryorecon.engines.mra.solvers import DirectConfig
    from cryorecon.run.mra.jobs import solve_file

    use_threads(threads)
    if (method == "encoder") != (model is not None):
        raise CryoreconError(
            "Method encoder and --model go together",
            "Give --method encoder --model DIR, or neither",
        )
    _refuse(method, "direct", **{"--starts": starts})
    _refuse(method, "encoder", **{"--iterations": iterations, "--learning-rate": learning_rate})
    refine, direct = RefineConfig(iterations or 3000, learning_rate or 1e-4), DirectConfig()
    if starts is not None:
        direct = DirectConfig(starts=starts)
    if learning_rate is not None and not learning_rate > 0:
        raise CryoreconError(f"--learning-rate {learning_rate} is not positive", "Try 1e-4")
    prepare_folder(output, overwrite)
    with count_progress(f"Reading {observations.name}", "observations") as bar:
        solved = solve_file(
            observations, output, method, noise_std, model, direct, refine, seed, bar
        )  # fmt: skip
    _tell(solved, output, messages(json))
    if json:
        print_json(solved.figures | {"folder": output})


def _refuse(method: str, its_method: str, **options: float | None) -> None:
    """Options that another method has, and this one would not listen to."""
    for name, value in options.items():
        if value is not None and method != its_method:
            raise typer.BadParameter(f"{name} belongs to --method {its_method}")


def _tell(solved: Solved, output: Path, out: Console) -> None:
    told = solved.figures
    out.print(
        f"noise         {told['noise_std']:.4g} ({told['noise_std_source']})\n"
        f"moment errors {told['moment_1_relative_error']:.4f} and "
        f"{told['moment_2_relative_error']:.4f}; expected of noise "
        f"{told['moment_1_relative_noise']:.4f} and {told['moment_2_relative_noise']:.4f}",
        markup=False,
    )
    if told["misfit"] > 1.5:
        out.print(
            f"The moments are not explained to within their noise (misfit {told['misfit']:.3g}, "
            "1 expected): the estimate may be far off."
        )
    out.print(
        f"{output / 'signal.npy'}  {output / 'density.npy'}  {output / 'solution.png'}",
        markup=False,
    )


TRAIN_EXAMPLES = examples(
    ("encoders of signals of 32 points: an hour", "cryorecon mra train -o trained"),
    ("a short try", "cryorecon mra train -o short --pairs 2000 --epochs 2"),
    ("go on after an interruption", "cryorecon mra train -o trained --continue"),
)


def train_command(
    output: Folder,
    gaussians: Annotated[
        int, option(INPUT, "Gaussians in a mixture.", metavar="N", min=1, max=10)
    ] = 2,
    points: Annotated[int, option(INPUT, "Points of a signal.", metavar="N", min=8, max=256)] = 32,
    pairs: Annotated[
        int, option(COMPUTE, "Signals and densities an epoch.", metavar="N", min=1)
    ] = 50_000,
    epochs: Annotated[int, option(COMPUTE, "Epochs.", metavar="N", min=1)] = 24,
    batch: Annotated[int, option(COMPUTE, "Pairs in a batch.", metavar="N", min=1)] = 256,
    learning_rate: Annotated[
        float | None,
        option(EXPERT, LEARNING_RATE_HELP, metavar="X", default="6e-3, of the paper's recipe 1e-4"),
    ] = None,
    recipe: Annotated[Literal["ours", "paper"], option(COMPUTE, RECIPE_HELP)] = "ours",
    seed: Seed = 0,
    threads: Threads = None,
    continued: Annotated[bool, option(INPUT, "Go on after an interruption.", "--continue")] = False,
    settings: Settings = None,
    config: Config = None,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Teach encoders to read signal and density off exact moments of random mixtures.

    Writes encoder.safetensors for `mra solve --method encoder --model DIR`, a checkpoint after
    every epoch, and the errors on pairs not seen in training.
    """
    from cryorecon.run.mra.jobs import train_encoders
    from cryorecon.run.settings import with_settings

    use_threads(threads)
    training = _training(recipe, gaussians, points, pairs, epochs, seed)
    chosen = [f"batch={batch}"]
    if learning_rate is not None:
        chosen.append(f"learning_rate={learning_rate}")
    try:
        training = with_settings(training, config, chosen + (settings or []))
    except ValueError as error:
        raise CryoreconError(str(error), "Change the settings") from error
    if not continued:
        prepare_folder(output, overwrite)
    try:
        with count_progress("Training", "batches") as bar:
            told = train_encoders(training, output, continued, 10_000, bar)
    except KeyboardInterrupt:
        if (output / "checkpoint.pt").is_file():
            again = shlex.join(["cryorecon", *(a for a in sys.argv[1:] if a != "--continue")])
            error_console.print(f"Go on with:\n{again} --continue", markup=False)
        raise
    useless = [
        f"{what} {told[f'{what}_error_mean']:.4f} against {told[f'{what}_error_of_the_mean']:.4f}"
        for what in ("signal", "density")
        if not told[f"{what}_error_mean"] < told[f"{what}_error_of_the_mean"]
    ]
    if useless:
        messages(json).print(
            f"WARNING: the training taught nothing: one mean guess for all has smaller errors "
            f"({', '.join(useless)}). Lower --learning-rate, or give more pairs or epochs.",
            markup=False,
        )
    if json:
        print_json(told | {"encoder": output / "encoder.safetensors"})
        return
    messages(json).print(
        f"error on {told['test_pairs']:,} unseen pairs: signal {told['signal_error_mean']:.4f}, "
        f"density {told['density_error_mean']:.4f}\n{output / 'encoder.safetensors'}",
        markup=False,
    )


REPRODUCE_EXAMPLES = examples(
    ("at sizes for a CPU: hours", "cryorecon mra reproduce -o mra"),
    ("a short try", "cryorecon mra reproduce -o short --pairs 2000 --epochs 2 --instances 2"),
    ("the paper's sizes: days", "cryorecon mra reproduce -o mra_full --full"),
)


def reproduce_command(
    output: Folder,
    full: Annotated[
        bool, option(COMPUTE, "The paper's sizes and recipe: days on a CPU.", "--full")
    ] = False,
    recipe: Annotated[
        Literal["ours", "paper"] | None,
        option(COMPUTE, RECIPE_HELP, default="ours, with --full paper"),
    ] = None,
    pairs: Annotated[
        int | None,
        option(COMPUTE, "Signals and densities an epoch.", metavar="N", min=1, default="50000"),
    ] = None,
    epochs: Annotated[
        int | None, option(COMPUTE, "Epochs.", metavar="N", min=1, default="24")
    ] = None,
    iterations: Annotated[
        int | None,
        option(COMPUTE, ITERATIONS_HELP, metavar="N", min=1, default="1000, with --full 3000"),
    ] = None,
    instances: Annotated[
        int, option(INPUT, "Problems that are averaged.", metavar="N", min=1)
    ] = 20,
    observations: Annotated[
        int, option(INPUT, "Observations of each problem.", metavar="N", min=10)
    ] = 1_000_000,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Table 1 and figure 4 of Khoo, Paul and Sharon (2024), and rivals on the same moments.

    Finished trainings in the folder are kept, interrupted ones go on.
    """
    from cryorecon.run.mra.reproduce import ReproduceConfig, figure_4, rivals, table_1

    use_threads(threads)
    out = messages(json)
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
        table = table_1(trainings, output, config, bar, out.print)
    others = rivals(trainings, output, config, out.print)
    with count_progress("Figure 4", "iterations") as bar:
        curves = figure_4(trainings[2], output, config, bar, out.print)
    out.print(f"{output / 'table1.csv'}  {output / 'rivals.csv'}  {output / 'figure4.png'}")
    if json:
        print_json({"table_1": table, "rivals": others, "figure_4": curves})


mra_app.command(
    "solve", cls=Command, epilog=SOLVE_EXAMPLES, short_help="Signal and shifts of observations"
)(solve_command)
mra_app.command("train", cls=Command, epilog=TRAIN_EXAMPLES, short_help="Encoders for mra solve")(
    train_command
)
mra_app.command(
    "reproduce",
    cls=Command,
    epilog=REPRODUCE_EXAMPLES,
    short_help="Table 1 and figure 4 of Khoo, Paul and Sharon (2024)",
)(reproduce_command)


def _training(
    recipe: str, gaussians: int, points: int, pairs: int, epochs: int, seed: int
) -> TrainingConfig:
    from cryorecon.engines.mra.training import TrainingConfig, paper_training
    from cryorecon.networks.moment_encoders import MomentEncoderConfig
    from cryorecon.physics.mixtures import MixtureConfig

    if recipe == "paper":
        return paper_training(gaussians, points, pairs, epochs, seed)
    return TrainingConfig(
        MixtureConfig(gaussians), MomentEncoderConfig(points), pairs, epochs, seed=seed
    )
