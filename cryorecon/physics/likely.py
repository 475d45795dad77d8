"""Posterior weights of which nearly all are nothing, compiled for the CPU.

Once a map is known, an image has some likely poses among a million. The products of matrices that
sum over all of them then multiply by nothing; these loops look for what is left.
"""

from __future__ import annotations

import math

from torch import Tensor

from cryorecon.physics.compiled import compiled, in_threads
from cryorecon.physics.points import as_array, on_cpu

# Log-likelihood behind the likeliest pose's at which a pose counts for nothing: a million of them
# change no digit in single precision.
_NOTHING = -30.0
# Every so many rows are looked at to tell whether there are few; of a product of matrices, that
# share of its numbers takes as long here.
_EVERY, _FEW = 16, 0.05


def are_few(score: Tensor, peak: Tensor) -> bool:
    """Whether so few poses are likely that looking for them is worth it; never off the CPU.

    Parameters
    ----------
    score : Tensor, shape (p, r), real
        Log-likelihoods.
    peak : Tensor, shape (p,)
        What each row is compared with.
    """
    if not on_cpu(score):
        return False
    some = score[::_EVERY] > (peak[::_EVERY, None] + _NOTHING)
    return int(some.sum()) < _FEW * some.numel()


def likely_sums(score: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's sum of ``exp(score - peak)``, and of its squares; shape (p,) each."""
    found = score.new_zeros(2, len(score))
    work = as_array(score), as_array(peak), found.numpy()
    in_threads(lambda first, end: _sum_rows(*work, first, end), len(score), score.numel())
    return found[0], found[1]


def add_likely(score: Tensor, peak: Tensor, rows: Tensor, sums: Tensor) -> None:
    """``sums += exp(score - peak).T @ rows``.

    Parameters
    ----------
    rows : Tensor, shape (p, k)
    sums : Tensor, shape (r, k), contiguous
        Changed in place.
    """
    work = as_array(score), as_array(peak), as_array(rows), sums.numpy()
    in_threads(lambda first, end: _add_columns(*work, first, end), len(sums), score.numel())


@compiled
def _sum_rows(score, peak, found, first, end):
    for i in range(first, end):
        least, total, squares = peak[i] + _NOTHING, 0.0, 0.0
        for j in range(score.shape[1]):
            if score[i, j] > least:
                weight = math.exp(score[i, j] - peak[i])
                total += weight
                squares += weight * weight
        found[0, i] = total
        found[1, i] = squares


@compiled
def _add_columns(score, peak, rows, sums, first, end):
    for i in range(score.shape[0]):
        least = peak[i] + _NOTHING
        for j in range(first, end):
            if score[i, j] > least:
                weight = sums.dtype.type(math.exp(score[i, j] - peak[i]))
                for k in range(rows.shape[1]):
                    sums[j, k] += weight * rows[i, k]
