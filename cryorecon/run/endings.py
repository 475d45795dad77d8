"""How jobs end: markers that RELION looks for, also where several processes end one by one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryorecon.errors import CryoreconError, LostRankError
from cryorecon.io.files import JOB_LOCK
from cryorecon.ranks import ALONE, Ranks
from cryorecon.run.job_files import MARKERS
from cryorecon.run.stopping import StoppedError

# How long another process waits for what the first one has to say of the same end.
_AFTER_THE_FIRST_S = 1.0


@contextmanager
def marked(folder: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """Leave the marker of how a job has ended, for RELION and for `finished`.

    Of several processes that fail or are stopped, whichever is first: it may be the only one that
    knows why.
    """
    outcome = "failure"
    try:
        yield
        outcome = "success"
    except KeyboardInterrupt:
        outcome = "aborted"
        raise
    except LostRankError:
        raise
    except CryoreconError as error:
        _note(folder, ranks, error)
        raise
    finally:
        # On a full disk there is no room even for a marker; the error itself must be seen.
        with contextlib.suppress(OSError):
            if ranks.first if outcome == "success" else ended(folder) is None:
                (folder / MARKERS[outcome]).touch()


def ended(folder: Path) -> str | None:
    """How a process of this job says that it has ended; None if none has."""
    return next((how for how, name in MARKERS.items() if (folder / name).exists()), None)


def finished(folder: Path) -> bool:
    """Whether a job's directory bears the marker of success."""
    return (folder / MARKERS["success"]).exists()


def told_by_the_first(folder: Path, ranks: Ranks) -> bool:
    """Whether the first process has met the same end, and tells of it."""
    until = time.monotonic() + _AFTER_THE_FIRST_S
    while not ranks.first and ended(folder) is None and time.monotonic() < until:
        time.sleep(0.05)
    return not ranks.first and ended(folder) is not None


def reason_of(folder: Path, met: BaseException, ranks: Ranks) -> BaseException:
    """What ends this process, as the marker of another one has it.

    When one process fails, ``torchrun`` stops the others by the signal that a user's request
    comes as; and when one stops on request, others lose it.
    """
    how = ended(folder) if ranks.count > 1 else None
    if isinstance(met, KeyboardInterrupt) and how == "failure":
        return LostRankError(
            "Another process of this job has failed", f"Its message is in {folder / JOB_LOCK}"
        )
    if isinstance(met, LostRankError) and how == "aborted":
        return StoppedError("stopped, as another process of this job was")
    return met


def _note(folder: Path, ranks: Ranks, error: CryoreconError) -> None:
    """Put another process's error into the log, which the first one cannot know."""
    with contextlib.suppress(OSError):
        if not ranks.first and not told_by_the_first(folder, ranks):
            with (folder / JOB_LOCK).open("a", encoding="utf-8") as log:
                log.write(f"process {ranks.index}: {error}\n")
