"""Table 1 and figure 4 of Khoo, Paul and Sharon (2024), and rivals on the same noisy moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from cryorecon.engines.mra.encoding import RefineConfig, solve_encoder
from cryorecon.engines.mra.problem import (
    ShiftMoments,
    ShiftMomentSums,
    concatenated,
    exact_moments,
    moment_errors,
    observe,
    orbit_error,
)
from cryorecon.engines.mra.solvers import Solution, solve_direct, solve_spectral
from cryorecon.engines.mra.training import EncoderPair, TrainingConfig, draw_pairs, held_out_errors
from cryorecon.errors import CryoreconError
from cryorecon.run.fit_image import Row, write_table
from cryorecon.run.mra.jobs import load_encoders, train_encoders
from cryorecon.run.plots import save_figure

# Test errors of the paper's table 1: signal, density.
PAPER_TABLE_1 = {1: (0.052, 0.048), 2: (0.170, 0.141), 3: (0.206, 0.195)}
_BLOCK = 100_000
_RUNS = (("trained, rate 1e-4", 1e-4, True), ("untrained, rate 1e-4", 1e-4, False),
         ("trained, rate 1e-3", 1e-3, True), ("untrained, rate 1e-3", 1e-3, False))  # fmt: skip
_LEVELS = (0.2, 0.1, 0.05)

Say = Callable[[str], None]


@dataclass(frozen=True)
class ReproduceConfig:
    """Sizes of the experiments.

    Attributes
    ----------
    test_pairs : int
        Of table 1.
    instances : int
        Problems of figure 4 and of the rivals.
    observations : int
        Of each problem.
    noise_std : float
    iterations : int
        Of figure 4.
    every : int
        Iterations between two points of figure 4.
    seed : int
    """

    test_pairs: int = 10_000
    instances: int = 20
    observations: int = 1_000_000
    noise_std: float = 1.0
    iterations: int = 1000
    every: int = 5
    seed: int = 0


def table_1(
    trainings: dict[int, TrainingConfig],
    folder: Path,
    config: ReproduceConfig,
    progress: Callable[[int, int], None],
    say: Say,
) -> list[Row]:
    """Train for each number of Gaussians and tell test errors; finished trainings are kept."""
    rows: list[Row] = []
    for gaussians, training in trainings.items():
        place = _model_folder(folder, gaussians)
        if not (place / "encoder.safetensors").is_file():
            resume = (place / "checkpoint.pt").is_file()
            train_encoders(training, place, resume, 1, progress)
        pair = load_encoders(place)
        if pair.config != training:
            raise CryoreconError(
                f"{place} holds an encoder of a training with other settings",
                "Repeat the options of the first call, or choose another folder",
            )
        signal, density = held_out_errors(pair, config.test_pairs, config.seed + 1)
        row: Row = {"gaussians": gaussians, "pairs_seen": training.pairs * training.epochs}
        row |= {"signal": float(signal.mean()), "signal_median": float(signal.median())}
        row |= {"density": float(density.mean()), "density_median": float(density.median())}
        paper = PAPER_TABLE_1.get(gaussians, (float("nan"), float("nan")))
        rows.append(row | {"paper_signal": paper[0], "paper_density": paper[1]})
        say(
            f"{gaussians} Gaussians: signal {row['signal']:.4f} (paper {paper[0]}), "
            f"density {row['density']:.4f} (paper {paper[1]})"
        )
    write_table(folder / "table1.csv", rows)
    return rows


def _model_folder(folder: Path, gaussians: int) -> Path:
    return folder / f"encoder_{gaussians}_gaussians"


def noisy_problems(
    training: TrainingConfig, config: ReproduceConfig, observations: int
) -> tuple[Tensor, Tensor, ShiftMoments]:
    """Signals, densities (float64) and moments of noisy observations; 0 of them: exact moments."""
    generator = torch.Generator().manual_seed(7919 * (config.seed + 1))
    n = training.encoder.n
    signal, density = draw_pairs(training.mixture, config.instances, n, generator, torch.float64)
    if not observations:
        return signal, density, exact_moments(signal, density)
    parts = []
    for one, shifts in zip(signal.float(), density.float(), strict=True):
        sums = ShiftMomentSums(n)
        for begin in range(0, observations, _BLOCK):
            count = min(_BLOCK, observations - begin)
            sums.add(observe(one, shifts, count, config.noise_std, generator))
        parts.append(sums.moments(config.noise_std))
    return signal, density, concatenated(parts)


def rivals(
    trainings: dict[int, TrainingConfig], folder: Path, config: ReproduceConfig, say: Say
) -> list[Row]:
    """All ways to solve the same problems, with exact moments and with noisy ones."""
    rows: list[Row] = []
    for gaussians, training in trainings.items():
        pair = load_encoders(_model_folder(folder, gaussians))
        for observations in (0, config.observations // 10, config.observations):
            signal, density, target = noisy_problems(training, config, observations)
            for name, found in _solutions(pair, target, config, bool(observations)).items():
                error, shifts = orbit_error(found[0], signal), orbit_error(found[1], density)
                rows.append(
                    {
                        "gaussians": gaussians,
                        "observations": observations,
                        "method": name,
                        "signal": float(error.mean()),
                        "signal_median": float(error.median()),
                        "density": float(shifts.mean()),
                        "density_median": float(shifts.median()),
                    }
                )
                say(
                    f"{gaussians} Gaussians, {observations or 'infinitely many'} observations, "
                    f"{name}: signal {rows[-1]['signal']:.4f}, density {rows[-1]['density']:.4f}"
                )
    write_table(folder / "rivals.csv", rows)
    return rows


def _solutions(
    pair: EncoderPair, target: ShiftMoments, config: ReproduceConfig, noisy: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    def both(solution: Solution) -> tuple[Tensor, Tensor]:
        return solution.signal, solution.density

    generator = torch.Generator().manual_seed(config.seed)
    found = {
        "spectral": both(solve_spectral(target)),
        "direct": both(solve_direct(target, generator)),
        "encoder": pair.read(target),
    }
    if noisy:
        refine = RefineConfig(config.iterations)
        found["encoder, refined"] = both(solve_encoder(pair, target, refine))
    return found


def figure_4(
    training: TrainingConfig,
    folder: Path,
    config: ReproduceConfig,
    progress: Callable[[int, int], None],
    say: Say,
) -> list[Row]:
    """Refinement with and without supervised training, mean over problems of 2 Gaussians.

    Writes the curves (CSV, PNG) and how many iterations reach given signal errors.
    """
    signal, density, target = noisy_problems(training, config, config.observations)
    trained = load_encoders(_model_folder(folder, training.mixture.components))
    curves: dict[str, list[Row]] = {}
    for number, (name, rate, warm) in enumerate(_RUNS):
        pair = trained if warm else EncoderPair(replace(training, seed=training.seed + 1))
        points: list[Row] = []

        def told(done: int, v: Tensor, rho: Tensor, points: list[Row] = points,
                 number: int = number) -> None:  # fmt: skip
            if done % config.every == 0:
                points.append({"iteration": done, **_errors(v, rho, signal, density, target)})
            progress(number * config.iterations + done, len(_RUNS) * config.iterations)

        refine = RefineConfig(config.iterations, rate, stop_at_noise=False)
        solve_encoder(pair, target, refine, told)
        curves[name] = points
    write_table(folder / "figure4_curves.csv", [{"run": n, **p} for n in curves for p in curves[n]])
    save_figure(_figure(curves), folder / "figure4.png")
    rows = [_reached(name, points) for name, points in curves.items()]
    write_table(folder / "figure4.csv", rows)
    for row in rows:
        reached = ", ".join(f"{level:g} after {row[f'signal_{level:g}']}" for level in _LEVELS)
        say(f"{row['run']}: signal error {reached} iterations, {row['last_signal']} at the end")
    return rows


def _errors(
    v: Tensor, rho: Tensor, signal: Tensor, density: Tensor, target: ShiftMoments
) -> dict[str, Any]:
    v, rho = v.to(signal), rho.to(signal)
    first, second = moment_errors(v, rho, target)
    return {
        "moments": float((first + second).mean()),
        "signal": float(orbit_error(v, signal).mean()),
        "density": float(orbit_error(rho, density).mean()),
    }


def _reached(name: str, points: list[Row]) -> Row:
    """Iterations until the mean signal error is first below each level, and the errors at last."""
    row: Row = {"run": name}
    for level in _LEVELS:
        below = [p["iteration"] for p in points if float(p["signal"]) <= level]
        row[f"signal_{level:g}"] = below[0] if below else "-"
    best = min(points, key=lambda p: float(p["signal"]))
    row |= {"best_signal": round(float(best["signal"]), 4), "best_at": best["iteration"]}
    for key in ("moments", "signal", "density"):
        row[f"last_{key}"] = round(float(points[-1][key]), 4)
    return row


def _figure(curves: dict[str, list[Row]]) -> Figure:
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"moments": "sum of the moments' relative errors", "signal": "signal error"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, points in curves.items():
            x = [float(p["iteration"]) for p in points]
            axes.semilogy(x, [float(p[key]) for p in points], label=name)
        axes.set_xlabel("iteration")
        axes.set_ylabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure
