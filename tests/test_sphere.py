"""Quadrature rules on the sphere are exact, and frames look where they should."""

from __future__ import annotations

import pytest
import torch

from cryorecon.physics.sphere import (
    frames,
    lebedev,
    real_harmonics,
    spherical_design,
)


@pytest.mark.parametrize(
    "rule",
    [lebedev(5), lebedev(13), lebedev(29), spherical_design(7)],
    ids=lambda r: f"{len(r)}-{r.degree}",
)
def test_rules_sum_harmonics_up_to_their_degree_and_no_further(rule):
    def mean(degree):
        return rule.weights @ real_harmonics(degree, rule.directions)

    assert abs(float(rule.weights.sum()) - 1) < 1e-12
    assert (rule.weights > 0).all()
    assert mean(rule.degree)[1:].abs().max() < 1e-12
    # A symmetric rule sums all odd degrees; the next even one is beyond it.
    assert mean(rule.degree + 2 - rule.degree % 2 + 2)[1:].abs().max() > 1e-3
    half = rule.hemisphere()
    even = real_harmonics(2, half.directions)
    assert 2 * len(half) == len(rule)
    assert (half.weights @ even[:, 4:]).abs().max() < 1e-12


def test_the_paper_s_design_has_at_most_its_hundred_points():
    rule = spherical_design(13)
    assert len(rule) == 94
    assert (rule.weights == rule.weights[0]).all()
    assert real_harmonics(13, rule.directions).mean(0)[1:].abs().max() < 1e-12


def test_harmonics_are_orthonormal():
    rule = lebedev(13)
    values = real_harmonics(6, rule.directions)
    gram = (values * rule.weights[:, None]).T @ values
    assert torch.allclose(gram, torch.eye(49, dtype=torch.float64), atol=1e-12)


def test_frames_are_rotations_towards_their_directions(generator):
    directions = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    poles = torch.tensor([[0.0, 0, 1], [0, 0, -1]], dtype=torch.float64)
    directions = torch.cat([directions, poles])
    rotations = frames(directions)
    assert torch.allclose(rotations[:, 2], directions, atol=1e-12)
    identity = torch.eye(3, dtype=torch.float64).expand(22, 3, 3)
    assert torch.allclose(rotations @ rotations.mT, identity, atol=1e-12)
    assert torch.allclose(torch.linalg.det(rotations), torch.ones(22).double())


def test_what_no_rule_can_do_is_said():
    with pytest.raises(ValueError, match="131"):
        lebedev(132)
    rule = lebedev(5)
    lopsided = type(rule)(rule.directions[:-1], rule.weights[:-1], 0)
    with pytest.raises(ValueError, match="not symmetric"):
        lopsided.hemisphere()
