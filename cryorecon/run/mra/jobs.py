"""Multireference alignment jobs: solving a file of observations, training encoders."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from cryorecon import __version__
from cryorecon.engines.mra.encoding import RefineConfig, solve_encoder
from cryorecon.engines.mra.problem import (
    ShiftMoments,
    ShiftMomentSums,
    estimate_noise_std,
    moment_errors,
)
from cryorecon.engines.mra.solvers import (
    DirectConfig,
    Solution,
    raised,
    solve_direct,
    solve_spectral,
)
from cryorecon.engines.mra.training import (
    EncoderPair,
    Training,
    TrainingConfig,
    config_from,
    errors_of_the_mean,
    held_out_errors,
)
from cryorecon.errors import CryoreconError, require_file
from cryorecon.io.files import make_folder, replacing
from cryorecon.io.signals import ObservationFile, write_array, write_columns
from cryorecon.run.plots import save_figure

Method = Literal["spectral", "direct", "encoder"]
Progress = Callable[[int, int], None]
_MODEL, _CHECKPOINT, _FIGURES = "encoder.safetensors", "checkpoint.pt", "training.json"
_LOG = "training.csv"
_SOLUTION = tuple(f"{name}.npy" for name in ("signal", "density"))
_SOLUTION = (*_SOLUTION, *(f"solution.{kind}" for kind in ("csv", "png", "json")))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write figures; NaN and infinity become null, as JSON knows neither."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(values), indent=2) + "\n", "utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Solved:
    """What `solve_file` found.

    Attributes
    ----------
    solution : Solution
        Of one problem.
    figures : dict
        What ``solution.json`` holds.
    """

    solution: Solution
    figures: dict[str, Any]


def read_sums(
    path: Path, noise_std: float | None, progress: Progress, *, centred: bool
) -> tuple[ShiftMomentSums, dict[str, Any]]:
    """Sums over a file of observations, and what was found on the way.

    Parameters
    ----------
    centred : bool
        Less a constant, near the mean of all values: a problem as good as the given one, whose
        moments do not drown in what noise makes of a baseline.

    Raises
    ------
    CryoreconError
        If the file does not fit, or the noise cannot be told and is not given.
    """
    file = ObservationFile(path)
    sums = ShiftMomentSums(file.points)
    for block in file.blocks():
        values = torch.from_numpy(block)
        if centred and sums.count == 0:
            sums.baseline = float(values.double().mean())
        sums.add(values)
        progress(sums.count, file.count)
    found: dict[str, Any] = {"observations": file.count, "points": file.points}
    source = "given"
    if noise_std is None:
        noise_std, dimensions = estimate_noise_std(sums.raw_second(), sums.count)
        if not dimensions:
            few = file.count < 4 * file.points
            why = (
                f"{file.count} observations are few for {file.points} points"
                if few
                else f"it fills all {file.points} dimensions or comes without noise"
            )
            raise CryoreconError(
                f"{path}: the noise cannot be told from the signal: {why}",
                "Give its standard deviation with --noise-std",
            )
        source = f"mean of the {dimensions} smallest eigenvalues of the second moment"
    found |= {"noise_std": noise_std, "noise_std_source": source}
    return sums, found


def solve_file(
    path: Path,
    folder: Path,
    method: Method,
    noise_std: float | None,
    model: Path | None,
    direct: DirectConfig,
    refine: RefineConfig,
    seed: int,
    progress: Progress,
) -> Solved:
    """Signal and density of shifts of the observations in a file; results into a folder.

    Parameters
    ----------
    model : Path, optional
        Folder of ``mra train``, for method "encoder".
    progress : callable
        Told of observations read and their number.

    Raises
    ------
    CryoreconError
        See `read_sums` and `load_encoders`; also if the encoder is for another length or the
        moments hold no signal.
    """
    pair = load_encoders(model) if method == "encoder" and model is not None else None
    # Encoders have learned from signals as they are.
    sums, found = read_sums(path, noise_std, progress, centred=pair is None)
    target = sums.moments(found["noise_std"])
    if pair is not None and pair.config.encoder.n != found["points"]:
        raise CryoreconError(
            f"{model} reads {pair.config.encoder.n} points, {path} has {found['points']}",
            "Train an encoder for this length or choose another method",
        )
    # Not before: a file that cannot be read takes nothing away.
    _remove(folder, *_SOLUTION)
    _require_signal(target, path)
    if method == "spectral":
        solution = raised(solve_spectral, target)
    elif method == "direct":
        solution = solve_direct(target, torch.Generator().manual_seed(seed), direct)
    elif pair is not None:
        solution = solve_encoder(pair, target, refine)
    else:
        raise CryoreconError("Method encoder needs a trained model", "Give --model DIR")
    if not bool(solution.signal.any()):
        raise _no_signal(path, "the signal that fits the moments best is 0 everywhere")
    solution = dataclasses.replace(solution, signal=solution.signal + sums.baseline)
    target = target.plus(sums.baseline)
    errors = moment_errors(solution.signal, solution.density, target)
    figures = {
        "program": f"cryorecon {__version__}",
        "input": str(path),
        "method": method,
        "seed": seed,
        **found,
        "moment_1_relative_error": float(errors[0]),
        "moment_2_relative_error": float(errors[1]),
        "moment_1_relative_noise": float(target.first_noise / target.first.norm()),
        "moment_2_relative_noise": float(target.second_noise / target.second.norm()),
        "misfit": float(solution.misfit),
    }
    write_solution(folder, solution, figures)
    return Solved(solution, figures)


def _remove(folder: Path, *names: str) -> None:
    """What is left of an earlier call, which the one that begins may not replace."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _require_signal(target: ShiftMoments, path: Path) -> None:
    if not math.isfinite(float(target.second_noise)):
        raise CryoreconError(
            f"{path} holds values so large that their fourth powers overflow",
            "Divide all observations by one large number",
        )
    energy = float(target.second[0].diagonal().sum())
    if energy <= 0 or float(target.second_noise) > float(target.second.norm()):
        raise _no_signal(path, "the second moment is no larger than its statistical error")


def _no_signal(path: Path, why: str) -> CryoreconError:
    return CryoreconError(
        f"{path}: no signal found: {why}", "Check --noise-std, or add observations"
    )


def write_solution(folder: Path, solution: Solution, figures: dict[str, Any]) -> None:
    """``signal``, ``density`` (.npy), ``solution.csv``, ``.png`` and ``.json``."""
    make_folder(folder)
    signal, density = solution.signal[0].numpy(), solution.density[0].numpy()
    write_array(folder / "signal.npy", signal)
    write_array(folder / "density.npy", density)
    write_columns(folder / "solution.csv", {"signal": signal, "density": density})
    save_figure(_picture(solution.signal[0], solution.density[0]), folder / "solution.png")
    write_json(folder / "solution.json", figures)


def _picture(signal: Tensor, density: Tensor) -> Figure:
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, values, name in zip(
        figure.subplots(1, 2), (signal, density), ("signal", "probability of shift"), strict=True
    ):
        axes.plot(values.numpy(), color="#0b6fa4", linewidth=1.8)
        axes.set_xlabel("sample")
        axes.set_ylabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def train_encoders(
    config: TrainingConfig,
    folder: Path,
    resume: bool,
    test_pairs: int,
    progress: Progress,
    checkpoint_every: int = 1,
) -> dict[str, Any]:
    """Train, with a checkpoint after epochs; returns and writes test errors (equation 21).

    Parameters
    ----------
    resume : bool
        Go on from the folder's checkpoint, with the same result as if never interrupted.
    checkpoint_every : int
        Epochs between checkpoints.

    Raises
    ------
    CryoreconError
        If there is no checkpoint to go on from, or one of another training, or the training
        diverges; the folder then has the last good checkpoint, but no encoder.
    """
    training = _resumed(folder, config) if resume else Training(config)
    make_folder(folder)
    if not resume:
        _remove(folder, _MODEL, _FIGURES, _LOG, _CHECKPOINT)
    total = config.epochs * config.steps_per_epoch
    running = torch.zeros(2, dtype=torch.float64)
    while training.step < total:
        losses = training.advance()
        if not all(map(math.isfinite, losses)):
            raise CryoreconError(
                f"The training diverged at batch {training.step}: losses {losses[0]:.3g} of the "
                f"signal and {losses[1]:.3g} of the density; no encoder is written",
                f"Lower --learning-rate, which is {config.learning_rate:g}",
            )
        running += torch.tensor(losses, dtype=torch.float64)
        progress(training.step, total)
        if training.step % config.steps_per_epoch == 0:
            means = (running / config.steps_per_epoch).tolist()
            running.zero_()
            # Before the checkpoint: a continued training repeats an epoch, and replaces its line.
            _log(folder, training.epoch, means)
            if training.epoch % checkpoint_every == 0 or training.step == total:
                _keep(training, folder)
    save_encoders(training.pair, folder)
    signal, density = held_out_errors(training.pair, test_pairs, config.seed + 1)
    blind = errors_of_the_mean(config, test_pairs, config.seed + 2)
    figures = {
        "program": f"cryorecon {__version__}",
        "pairs_seen": config.pairs * config.epochs,
        "test_pairs": test_pairs,
        "signal_error_mean": float(signal.mean()),
        "signal_error_median": float(signal.median()),
        "density_error_mean": float(density.mean()),
        "density_error_median": float(density.median()),
        "signal_error_of_the_mean": blind[0],
        "density_error_of_the_mean": blind[1],
    }
    write_json(folder / _FIGURES, figures)
    return figures


def _keep(training: Training, folder: Path) -> None:
    # In memory first: a full disk is then an error of the disk, not of the format.
    state = io.BytesIO()
    torch.save(training.state(), state)
    with replacing(folder / _CHECKPOINT) as temporary:
        temporary.write_bytes(state.getvalue())


def _log(folder: Path, epoch: int, losses: list[float]) -> None:
    """A line an epoch; lines of epochs that a continued training repeats are replaced."""
    path, lines = folder / _LOG, ["epoch,signal_loss,density_loss"]
    if path.is_file():
        found = path.read_text("utf-8").splitlines()[1:]
        lines += [line for line in found if int(line.split(",")[0]) < epoch]
    with replacing(path) as temporary:
        temporary.write_text(
            "\n".join([*lines, f"{epoch},{losses[0]:.6g},{losses[1]:.6g}"]) + "\n", "utf-8"
        )


def _resumed(folder: Path, config: TrainingConfig) -> Training:
    path = require_file(folder / _CHECKPOINT, "checkpoint")
    try:
        training = Training.from_state(torch.load(path, weights_only=True))
    except Exception as error:
        raise CryoreconError(
            f"{path} is no checkpoint of this version", "Begin anew in another folder"
        ) from error
    if training.config != config:
        raise CryoreconError(
            f"{path} is of a training with other settings",
            "Repeat the options of the first call, or begin anew in another folder",
        )
    return training


def save_encoders(pair: EncoderPair, folder: Path) -> None:
    """Both networks and their config as one safetensors file."""
    config = json.dumps(asdict(pair.config))
    with replacing(folder / _MODEL) as temporary:
        temporary.write_bytes(save(pair.state_dict(), {"config": config}))


def load_encoders(folder: Path) -> EncoderPair:
    """Networks that `save_encoders` wrote.

    Raises
    ------
    CryoreconError
        If the file is missing or damaged.
    """
    path = folder / _MODEL if folder.is_dir() else folder
    require_file(path, "trained encoder (encoder.safetensors of mra train)")
    try:
        with safe_open(path, "pt") as file:
            config = config_from(json.loads((file.metadata() or {})["config"]))
            # Two networks of float32; a config must not ask for more than the file holds.
            if 8 * config.encoder.weight_count() > path.stat().st_size:
                raise ValueError("the file is smaller than its networks")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        pair = EncoderPair(config)
        pair.load_state_dict(weights)
    except Exception as error:
        # Damage shows as exceptions of many kinds.
        raise CryoreconError(
            f"{path} is no trained encoder of this version", "Train it again with mra train"
        ) from error
    return pair
