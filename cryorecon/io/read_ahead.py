"""Images that are wanted next are read while others are worked on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cryorecon.io.mrc import StackReader
from cryorecon.io.particles import Particles

# Batches that are held, or being read: that in work, the next, and one that another loop waits for.
_HELD = 3
# Larger ones are read when they are asked for, bytes.
_LARGEST = 256e6


class ReadAhead:
    """Images of particles, which a thread of its own begins to read when they are expected.

    Parameters
    ----------
    particles : Particles
    """

    def __init__(self, particles: Particles) -> None:
        self.particles = particles
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._stacks = StackReader()
        self._expected: list[tuple[NDArray[np.int64], Future[NDArray[np.float32]]]] = []

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Begin to read rows that :meth:`images` will soon be asked for, just so.

        What is not asked for before several others are expected is forgotten.
        """
        large = 4.0 * len(rows) * self.particles.stored_box**2 > _LARGEST
        if (
            large
            or len(rows) == 0
            or any(np.array_equal(rows, known) for known, _ in self._expected)
        ):
            return
        mine = rows.copy()
        self._expected.append((mine, self._begin(mine)))
        for _, forgotten in self._expected[:-_HELD]:
            forgotten.cancel()
        del self._expected[:-_HELD]

    def ready(self, rows: NDArray[np.int64]) -> bool:
        """Whether :meth:`images` would not wait for rows that were expected."""
        return all(found.done() for known, found in self._expected if np.array_equal(rows, known))

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Images as they are on disk, whatever they hold; at once if they were expected."""
        return self._found(rows).result()

    def _found(self, rows: NDArray[np.int64]) -> Future[NDArray[np.float32]]:
        for place, (known, found) in enumerate(self._expected):
            if np.array_equal(rows, known):
                del self._expected[place]
                return found
        return self._begin(rows)

    def _begin(self, rows: NDArray[np.int64]) -> Future[NDArray[np.float32]]:
        return self._reader.submit(self.particles.read, rows, self._stacks)
