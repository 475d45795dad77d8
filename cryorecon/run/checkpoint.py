"""What a job needs to go on after it was killed: one file, replaced as a whole.

A run has *parts* (one, or each half set and then both), and each part one entry: the latest state
that it can go on from. Entries are nested dicts and lists of tensors, numbers and words.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cryorecon import __version__
from cryorecon.errors import CryoreconError
from cryorecon.io.files import remove_unfinished, replacing
from cryorecon.ranks import ALONE, Ranks
from cryorecon.run.stopping import Stop, StoppedError

NAME = "checkpoint.pt"
_FORMAT = 6
# Work between two checkpoints within a stage, and its least multiple of the time one takes.
_EVERY_S = 20.0
_TIMES_ITS_COST = 60.0

Entry = dict[str, Any]


def frozen(value: Any) -> Any:
    """A copy that later work in place does not change; strides stay, on which sums depend."""
    if isinstance(value, Tensor):
        plain = value.detach()
        if 0 in plain.stride():
            return plain.contiguous()
        return torch.empty_strided(
            plain.size(), plain.stride(), dtype=plain.dtype, device=plain.device
        ).copy_(plain)
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(frozen(item) for item in value)
    return value


def on_cpu(value: Any) -> Any:
    """The same with all tensors on the CPU, where a file can be read on any machine."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(item) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class Checkpoint:
    """The file, and what of it later parts still need.

    Parameters
    ----------
    path : Path
    stop : Stop
        Whoever asks to stop is heard whenever a state could be kept.
    resume : bool
        Begin with what the file holds, if there is one; else remove it.
    ranks : Ranks
        Processes that share the job; the first one writes.

    Attributes
    ----------
    spent_s : float
        Time that writing has taken.
    before : (Path, str), optional
        Where what comes before the first state is kept, and what that is.
    """

    def __init__(
        self, path: Path, stop: Stop, *, resume: bool = False, ranks: Ranks = ALONE
    ) -> None:
        self.path, self.stop, self.ranks = path, stop, ranks
        self.spent_s = 0.0
        self.before: tuple[Path, str] | None = None
        self._due = time.monotonic() + _EVERY_S
        self._is_team = False
        self._entries: dict[str, Entry] = {}
        # How often each part was kept: of two files that hold it, the later one counts.
        self._counts: dict[str, int] = {}
        for file in self._files() if resume else ():
            self._take_later(*_read(file))
        if ranks.first:
            remove_unfinished(path.parent, f"{path.stem}*{path.suffix}")
        if ranks.first and not resume:
            self.remove()
        ranks.wait()

    def _take_later(self, entries: dict[str, Entry], counts: dict[str, int]) -> None:
        for part, entry in entries.items():
            if part not in self._entries or counts.get(part, 0) > self._counts.get(part, 0):
                self._entries[part], self._counts[part] = entry, counts.get(part, 0)

    def get(self, part: str) -> Entry | None:
        """Where a part stands; None if it has not begun."""
        return self._entries.get(part)

    def drop(self, *parts: str) -> None:
        """Forget parts whose outcome has gone into a later one."""
        for part in parts:
            self._entries.pop(part, None)

    def put(
        self, part: str, pack: Callable[[], Entry], *, force: bool = False, hold: bool = False
    ) -> None:
        """Keep the state of a part, if the last one is old enough, or if told to.

        Parameters
        ----------
        pack : callable
            Gives the state; only called when it is written.
        force : bool
            At the end of a stage: write now.
        hold : bool
            At the end of a part: keep a copy for as long as other parts go on.

        Raises
        ------
        CryoreconError
            If the state holds numbers that are not finite, or the disk is full: the last good
            checkpoint stays.
        StoppedError
            If somebody has asked to stop, with this state on disk.
        """
        self.stop.poll()
        self.stop.asked = self.ranks.any(self.stop.asked)
        late = self.ranks.first and time.monotonic() >= self._due
        if not (force or self.stop.asked or late):
            return
        self.stop.in_time()
        if self.ranks.first:
            self._put(part, on_cpu(pack()), hold=hold)
        else:
            # What it went on from is of no more use.
            self._entries.pop(part, None)
        if self.stop.asked:
            self.ranks.wait()
            raise StoppedError("the state at this point is on disk")

    def for_team(self, number: int, ranks: Ranks) -> Checkpoint:
        """Of one of several teams that work at the same time, beginning with what there is.

        The first team's is this file, the second's and so on are beside it.
        """
        team = copy.copy(self)
        team.path, team.ranks, team._is_team = self._of_team(number), ranks, True
        team._entries, team._counts = dict(self._entries), dict(self._counts)
        return team

    def _of_team(self, number: int) -> Path:
        return self.path.with_stem(f"{self.path.stem}{number + 1}") if number else self.path

    def _files(self) -> list[Path]:
        """Of all teams, those that there are."""
        stem, suffix = self.path.stem, self.path.suffix
        others = self.path.parent.glob(f"{stem}[0-9]*{suffix}")
        return [file for file in (self.path, *sorted(others)) if file.exists()]

    def _put(self, part: str, entry: Entry, *, hold: bool) -> None:
        start = time.monotonic()
        _refuse_broken(part, entry)
        self._entries.pop(part, None)
        self._counts[part] = self._counts.get(part, 0) + 1
        self._write({**self._entries, part: entry})
        if hold:
            self._entries[part] = frozen(entry)
        if not self._is_team:
            # What other teams had left is in this file now.
            for file in self._files():
                if file != self.path:
                    file.unlink(missing_ok=True)
        cost_s = time.monotonic() - start
        self.spent_s += cost_s
        self._due = time.monotonic() + max(_EVERY_S, _TIMES_ITS_COST * cost_s)

    def describe(self) -> str:
        """How old the state on disk is, in words."""
        files = self._files()
        if not files and self.before is not None and self.before[0].exists():
            return "{} holds {}; go on with:".format(*self.before)
        if not files:
            return "Nothing was kept yet; what begins the job again:"
        latest = max(files, key=lambda file: file.stat().st_mtime)
        age = time.time() - latest.stat().st_mtime
        return f"{latest} holds the state of {max(0.0, age):.0f} s ago; go on with:"

    def remove(self) -> None:
        """Delete the file: the job is finished."""
        for file in self._files():
            file.unlink(missing_ok=True)

    def _write(self, entries: dict[str, Entry]) -> None:
        whole = {"format": _FORMAT, "program": f"cryorecon {__version__}"}
        whole |= {"parts": entries, "counts": self._counts}
        with replacing(self.path) as temporary:
            try:
                with temporary.open("wb") as file:
                    torch.save(whole, file)
            except RuntimeError as error:
                # On a full disk torch says only where in its code it stopped.
                raise _disk_error(error) from error


def _disk_error(error: RuntimeError) -> OSError:
    found = error.__context__
    return found if isinstance(found, OSError) else OSError(None, f"{error}".splitlines()[0])


def _read(path: Path) -> tuple[dict[str, Entry], dict[str, int]]:
    remedy = "Start anew with --overwrite"
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
        if whole["format"] != _FORMAT:
            raise CryoreconError(f"{path} is of another version, {whole['program']}", remedy)
        return whole["parts"], whole["counts"]
    except CryoreconError:
        raise
    except Exception as error:  # Whatever reading a damaged file leads to.
        raise CryoreconError(f"{path} cannot be read as a checkpoint", remedy) from error


def _refuse_broken(part: str, entry: Entry) -> None:
    for tensor in _tensors(entry):
        if not bool(torch.isfinite(tensor).all()):
            raise CryoreconError(
                f"The state of {part} holds numbers that are not finite",
                "Check the images; the last good checkpoint was kept",
            )


def broken(where: str, error: FloatingPointError) -> CryoreconError:
    """What a run that met numbers which are not finite tells."""
    return CryoreconError(
        f"{where} broke down: {error}",
        "Look for images of extreme values and CTF columns that are off; the state from before "
        "is kept",
    )
