"""Fits of moments from several random starts, one after the other or shared by processes."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import torch

from cryorecon.engines.moments.fit import Fitter, MomentFit
from cryorecon.errors import CryoreconError
from cryorecon.ranks import ALONE
from cryorecon.run.checkpoint import Entry, on_cpu
from cryorecon.run.job import Job
from cryorecon.run.progress import Update

Fits = list[tuple[int, MomentFit]]
Keep = Callable[[Callable[[], Entry]], None]


def all_starts(fitter: Fitter, starts: int, seed: int, job: Job) -> Fits:
    """Number of the start and its fit, the best first; starts that diverge are told and left.

    Each start has random numbers of its own, so that it does not matter which process runs it.

    Raises
    ------
    CryoreconError
        If all of them diverge.
    """
    saved = job.checkpoint.get("starts") or {"tried": 0, "fits": [], "going": None}
    fits = [(entry["number"], fitter.restored(entry)) for entry in saved["fits"]]
    if saved["tried"] or saved["going"]:
        job.say(f"{saved['tried']} starts taken from the checkpoint")
    begun = [str(n + 1) for n in range(starts) if job.checkpoint.get(_part(n))]
    if begun:
        job.say(f"begun before, going on where they were left: start {', '.join(begun)}")
    several = job.ranks.count
    with job.bar("Fitting", starts * fitter.steps, unit="steps") as bar:
        for start in range(saved["tried"], starts, several):
            if several > 1:
                fits += _at_once(fitter, range(start, min(start + several, starts)), seed, job, bar)
            else:
                going = saved["going"] if start == saved["tried"] else None
                going = going or job.checkpoint.get(_part(start))
                fits += _alone(fitter, start, seed, job, bar, fits, going)
            tried = min(start + several, starts)
            job.checkpoint.drop(*map(_part, range(start, tried)))
            pack = partial(_packed, fits, tried, None)
            job.checkpoint.put("starts", pack, force=several > 1 or tried == starts)
    if not fits:
        raise CryoreconError("All starts diverged", "Lower --set rate")
    return sorted(fits, key=lambda pair: pair[1].misfit)


def _alone(
    fitter: Fitter, start: int, seed: int, job: Job, bar: Update, fits: Fits, going: Entry | None
) -> Fits:
    """One start, or what is left of it; its state is kept on the way."""

    def keep(state: Callable[[], Entry]) -> None:
        job.checkpoint.put("starts", lambda: _packed(fits, start, state()))

    return _told(_one(fitter, start, seed, bar, keep, going), job)


def _at_once(fitter: Fitter, starts: range, seed: int, job: Job, bar: Update) -> Fits:
    """As many starts as there are processes, or fewer, one each; all learn what each found."""
    ranks, mine = job.ranks, b""
    if ranks.index < len(starts):
        start = starts[ranks.index]
        # A file for each: they come to points worth keeping at different times.
        own = job.checkpoint.for_team(ranks.index + 1, ALONE)
        keep = partial(own.put, _part(start))
        number, fit = _one(fitter, start, seed, bar, keep, job.checkpoint.get(_part(start)))
        file = io.BytesIO()
        found = {"diverged": fit} if isinstance(fit, str) else fit.state()
        torch.save(on_cpu({"number": number, **found}), file)
        mine = file.getvalue()
    fits: Fits = []
    for source in range(len(starts)):
        told = ranks.bytes_from(source, mine)
        entry = torch.load(io.BytesIO(told), map_location="cpu", weights_only=True)
        diverged = entry.get("diverged")
        fit = fitter.restored(entry) if diverged is None else diverged
        fits += _told((entry["number"], fit), job)
    return fits


def _part(start: int) -> str:
    """Of the checkpoint: a start that is going on beside others."""
    return f"start {start + 1}"


def _one(
    fitter: Fitter,
    start: int,
    seed: int,
    bar: Update,
    keep: Keep | None = None,
    going: Entry | None = None,
) -> tuple[int, MomentFit | str]:
    """A start's number, from 1, and its fit, or why it diverged."""
    done = start * fitter.steps

    def progress(steps: int) -> None:
        nonlocal done
        done += steps
        bar(done, f"start {1 + done // fitter.steps}")

    generator = torch.Generator().manual_seed(seed * 1000 + start)
    try:
        return start + 1, fitter.fit(generator, progress, going, keep)
    except FloatingPointError as error:
        return start + 1, str(error)


def _told(found: tuple[int, MomentFit | str], job: Job) -> Fits:
    number, fit = found
    if isinstance(fit, str):
        job.say(f"start {number} diverged: {fit}")
        return []
    one, two = fit.frobenius
    job.say(
        f"start {number}: misfit {fit.misfit:.3g}, errors of the moments {one:.4f} and {two:.4f}"
    )
    return [(number, fit)]


def _packed(fits: Fits, tried: int, going: Entry | None) -> Entry:
    done = [{"number": number, **fit.state()} for number, fit in fits]
    return {"tried": tried, "fits": done, "going": going}
