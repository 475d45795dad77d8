"""Sums over likely poses alone are those over all poses."""

from __future__ import annotations

import pytest
import torch

from cryorecon.engines import search
from cryorecon.physics import compiled, likely

P, R, K = 40, 700, 9


@pytest.fixture
def peaked(generator):
    """Log-likelihoods of which some in a hundred count, and the rows that they weigh."""
    score = 60 * torch.randn(P, R, generator=generator)
    rows = torch.randn(P, K, generator=generator)
    return score, score.amax(-1), rows


def test_few_likely_poses_are_told(peaked):
    score, peak, _ = peaked
    assert likely.are_few(score, peak)
    assert not likely.are_few(score / 60, peak / 60)
    assert not likely.are_few(score.to("meta"), peak.to("meta"))


def test_sums_are_those_over_all(peaked, threads):
    score, peak, rows = peaked
    weights = (score - peak[:, None]).double().exp()
    of_pair, squares = likely.likely_sums(score, peak)
    assert torch.allclose(of_pair.double(), weights.sum(-1), rtol=1e-6)
    assert torch.allclose(squares.double(), weights.square().sum(-1), rtol=1e-6)
    sums = torch.ones(R, K)
    likely.add_likely(score, peak, rows, sums)
    assert torch.allclose(sums.double(), 1 + weights.T @ rows.double(), rtol=1e-5, atol=1e-6)


def test_threads_change_no_digit(peaked, monkeypatch):
    score, peak, rows = peaked
    monkeypatch.setattr(compiled, "_POINTS_A_THREAD", 1)
    found, before = [], torch.get_num_threads()
    for count in (1, 4):
        torch.set_num_threads(count)
        sums = torch.zeros(R, K)
        likely.add_likely(score, peak, rows, sums)
        found.append((sums, *likely.likely_sums(score, peak)))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_number_that_is_none_is_not_lost():
    score = torch.full((P, R), -100.0)
    score[:, 0], score[3, 5] = 0.0, torch.nan
    of_pair, _ = likely.likely_sums(score, score.amax(-1))
    log_evidence = score.amax(-1) + of_pair.log()
    assert log_evidence.isnan().nonzero().flatten().tolist() == [3]


def test_posteriors_agree_with_those_by_products_of_matrices(stack_32, monkeypatch):
    from conftest import at_true_poses

    from cryorecon.engines.rmfn import RmfnConfig
    from cryorecon.io.mrc import read_map
    from cryorecon.physics.projection import extract_slices, padded_transform
    from cryorecon.physics.rotations import so3_grid

    images, _ = at_true_poses(stack_32, RmfnConfig())
    batch = images.select(torch.arange(30), 8)
    truth = torch.from_numpy(read_map(stack_32 / "map.mrc").data)
    templates = extract_slices(
        padded_transform(truth * 3, band=8.0), so3_grid(3, torch.float32)[0], batch.plane
    )
    offsets = search.offset_grid(3.0, 1.0)
    asked = []

    def watched(*given):
        asked.append(likely.are_few(*given))
        return asked[-1]

    found = []
    for few in (watched, lambda *_: False):
        monkeypatch.setattr(search, "are_few", few)
        found.append(search.grid_expectation(batch, templates, offsets))
    assert asked
    assert all(asked)
    (one, *sums), (two, *expected) = found
    assert torch.allclose(one.log_evidence, two.log_evidence, atol=1e-4)
    assert torch.allclose(one.effective_poses, two.effective_poses, rtol=1e-4)
    assert torch.allclose(one.offset_shares, two.offset_shares, atol=1e-5)
    for mine, other in zip(sums, expected, strict=True):
        assert (mine - other).abs().max() < 1e-4 * other.abs().max()
