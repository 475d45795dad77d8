"""Stopping on request: Ctrl-C, SIGTERM, and the file by which RELION asks a job to end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

ABORT_FILE = "RELION_JOB_ABORT_NOW"
# How long a job that was asked to stop may go on to a point worth keeping.
GRACE_S = 5.0
# Looking for the file more often would cost time on network disks.
_POLL_S = 1.0


class StoppedError(KeyboardInterrupt):
    """The user asked to stop; what was done until then is on disk."""


class TooLateError(StoppedError):
    """The job was asked to stop and came to no point worth keeping in time."""


class Stop:
    """Whether somebody has asked the job to stop.

    Parameters
    ----------
    folder : Path, optional
        Where RELION leaves its file; without it only signals count.
    grace_s : float, optional
        How long the job may then go on; without it, to the next good point.
    patient : bool
        Take a second request for the first one: ``torchrun`` passes on what a terminal sends to
        all processes by itself.
    """

    def __init__(
        self,
        folder: Path | None = None,
        grace_s: float | None = GRACE_S,
        *,
        patient: bool = False,
    ) -> None:
        self._grace_s, self._patient = grace_s, patient
        self._file = None if folder is None else folder / ABORT_FILE
        self._polled = -_POLL_S
        self.asked = False

    def ask(self) -> None:
        """Stop at the next good point, or after a few seconds wherever the job then is.

        Raises
        ------
        StoppedError
            If asked for the second time, or where no alarm can be set.
        """
        if self.asked and self._patient:
            return
        if self.asked or threading.current_thread() is not threading.main_thread():
            raise StoppedError("stopped at once")
        self.asked = True
        if self._grace_s is not None:
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)

    def in_time(self) -> None:
        """A point worth keeping was reached: take as long as writing it needs."""
        if self.asked and threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)

    def poll(self) -> None:
        """Look for RELION's file, at most once a second."""
        if self._file is None or self.asked or time.monotonic() - self._polled < _POLL_S:
            return
        self._polled = time.monotonic()
        if self._file.exists():
            self.ask()


@contextmanager
def listening(
    folder: Path | None = None, grace_s: float | None = GRACE_S, *, patient: bool = False
) -> Iterator[Stop]:
    """Note SIGINT and SIGTERM instead of stopping anywhere; a second signal stops at once."""
    stop = Stop(folder, grace_s, patient=patient)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.ask()

    def too_late(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise TooLateError("stopped between two points worth keeping")

    handlers = {signal.SIGINT: note, signal.SIGTERM: note, signal.SIGALRM: too_late}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
