"""Faces of failure: measures by property, and the thresholds on good maps and made-up failures."""

from __future__ import annotations

import math

import pytest
import torch

from cryorecon.maps import contour
from cryorecon.maps.align import mirror_map
from cryorecon.maps.failures import (
    at_limit,
    hollowness,
    mass_at_rim,
    view_spread,
    whiteness,
)
from cryorecon.physics.fourier import crop_or_pad_centred, radius_grid
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.rotations import random_rotations
from cryorecon.run.report.doubts import (
    around_particle,
    collapsed_views,
    hollow_shell,
    mass_at_edge,
    mirror_plane,
    negative_blob,
    offsets_at_limit,
    poor_agreement,
    said_in_log,
)


@pytest.mark.parametrize("box", [32, 31])
def test_a_ball_is_solid_and_a_shell_is_not(box):
    radius = radius_grid(box, 3)
    ball, shell = (radius < 10).float(), ((radius > 8) & (radius < 12)).float()
    assert hollowness(ball) == pytest.approx(1, abs=0.1)
    assert abs(hollowness(shell)) < 0.1
    moved = torch.roll(shell, (3, -2, 1), (0, 1, 2))
    assert hollowness(7 * moved) == pytest.approx(hollowness(shell), abs=0.02)
    assert math.isinf(hollowness(torch.zeros(box, box, box)))


def test_whiteness_turns_with_the_sign_and_ignores_the_scale(molecule_32):
    score = whiteness(molecule_32)
    assert score > 2
    assert whiteness(-3 * molecule_32) == pytest.approx(-score, rel=1e-6)
    assert whiteness(molecule_32 + 5) == pytest.approx(score, rel=1e-3)
    assert whiteness(torch.ones(8, 8, 8)) == 0


def test_mass_at_the_rim_is_that_of_the_rim(molecule_32):
    radius = radius_grid(32, 3)
    rim = (radius < 12.8) & (radius > 0.9 * 12.8)
    assert mass_at_rim(rim.float(), 0.4) == pytest.approx(1)
    assert mass_at_rim((radius < 11).float(), 0.4) == 0
    shares = [mass_at_rim(molecule_32 * soft_ball(32, r * 32, 2.2, 3), r) for r in (0.4, 0.3, 0.2)]
    assert shares == sorted(shares)
    assert mass_at_rim(torch.zeros(8, 8, 8), 0.4) == 0


def test_view_spread_counts_directions_and_their_opposites(generator):
    views = random_rotations(2000, generator)[:, 2]
    assert view_spread(views) == pytest.approx(1, abs=0.1)
    one = torch.tensor([[0.0, 0.0, 1.0]]).expand(50, 3)
    both = torch.cat([one, -one])
    single = 1 - math.cos(math.radians(15))
    assert view_spread(both) == pytest.approx(single, rel=1e-3)
    three = torch.eye(3).repeat(200, 1)
    assert view_spread(three) == pytest.approx(3 * single, rel=0.02)
    # Weighted directions stand for repeated ones.
    assert view_spread(torch.eye(3), torch.ones(3)) == pytest.approx(3 * single, rel=1e-3)
    assert view_spread(torch.eye(3), torch.tensor([5.0, 0, 0])) == pytest.approx(single, rel=1e-3)
    few = view_spread(random_rotations(40, generator)[:, 2])
    assert 0.6 < few < 2.5


def test_share_at_the_limit():
    lengths = torch.tensor([0.0, 4.0, 4.6, 5.0])
    assert at_limit(lengths, 5.0, 1.0).double().mean() == 0.5
    # Nothing was searched: nothing lies at its limit.
    assert not at_limit(lengths, 0.4, 1.0).any()


def test_a_good_map_warns_of_nothing(molecule_32, generator):
    noisy = molecule_32 + 0.3 * molecule_32.std() * torch.randn(32, 32, 32, generator=generator)
    for volume in (molecule_32, noisy):
        found = [hollow_shell(volume), negative_blob(volume), mirror_plane(volume)]
        found.append(mass_at_edge(volume * soft_ball(32, 12.8, 2.2, 3), 0.4))
        assert [f.name for f in found if f.fires] == []
    assert not collapsed_views(random_rotations(300, generator)[:, 2]).fires


def test_made_up_failures_warn(molecule_32, generator):
    radius = radius_grid(32, 3)
    assert hollow_shell(((radius > 7) & (radius < 11)).float()).fires
    assert negative_blob(-molecule_32).fires
    assert negative_blob(torch.randn(32, 32, 32, generator=generator)).fires
    assert mirror_plane(molecule_32 + mirror_map(molecule_32)).fires
    assert mass_at_edge(molecule_32 * soft_ball(32, 9, 2.2, 3), 9 / 32).fires
    crowd = torch.nn.functional.normalize(
        torch.tensor([0.0, 0.6, 0.8]) + 0.15 * torch.randn(500, 3, generator=generator), dim=-1
    )
    assert collapsed_views(crowd).fires
    lengths = torch.linspace(0, 7, 100)
    assert offsets_at_limit(lengths, 7.0, 1.0, 50.0).fires
    assert not offsets_at_limit(lengths, 9.0, 1.0, 50.0).fires


def test_no_larger_range_is_advised_where_searches_went_as_far_as_they_go():
    lengths = torch.linspace(0, 7, 100)
    assert "larger --offset-range" in offsets_at_limit(lengths, 7.0, 1.0, 50.0).remedy
    # A quarter of the box, as rounds.star has it.
    remedy = offsets_at_limit(lengths, 6.999999, 1.0, 28.0).remedy
    assert "--offset-range" not in remedy
    assert "junk or neighbours" in remedy


def test_wide_boxes_make_no_false_alarm(molecule_32):
    """In cycles per box their particles show an outline only, which is nearly its mirror image."""
    wide = crop_or_pad_centred(molecule_32, 88, 3)
    near = around_particle(wide, 0.8 * 32 / 88)
    assert len(near) == 30
    assert mirror_plane(wide).fires
    for check in (hollow_shell, negative_blob, mirror_plane):
        assert not check(near).fires
        assert check(near).score == pytest.approx(check(molecule_32).score, abs=0.5)
    stuck = near + mirror_map(near)
    assert mirror_plane(stuck).fires
    assert around_particle(wide, 1.0) is wide
    assert around_particle(wide, 0.0) is wide


def test_poor_agreement_counts_cycles_per_diameter():
    curve = torch.tensor([1.0, 0.9, 0.5, 0.1, 0.0])
    poor = poor_agreement(curve, 0.5, 0.8)
    assert (poor.score, poor.fires) == (pytest.approx(1.6), True)
    assert not poor_agreement(torch.ones(9), 0.5, 0.8).fires


def test_warnings_of_the_run_are_found():
    log = ["    0.3 s  all is well", "   12.3 s  WARNING: many particles", "  1.0 s  AMBIGUOUS: no"]
    assert said_in_log(log) == ["WARNING: many particles", "AMBIGUOUS: no"]


def test_the_contour_of_a_large_map_is_half_way_between_both_means(generator, monkeypatch):
    """A part of the voxels leads to it; those near it settle it."""
    ball = soft_ball(48, 12.0, 6.0, 3)
    volume = ball * (1 + torch.rand(48, 48, 48, generator=generator))
    volume = volume + 0.2 * torch.randn(48, 48, 48, generator=generator)
    whole = contour.contour_level(volume)
    monkeypatch.setattr(contour, "_SAMPLED", 3000)
    for near in (0.01, 1e-7):
        monkeypatch.setattr(contour, "_NEAR", near)
        level = contour.contour_level(volume)
        # Several levels may be half way, next to each other.
        assert level == pytest.approx(whole, rel=1e-3)
    above = volume > level
    halfway = (volume[above].double().mean() + volume[~above].double().mean()) / 2
    assert level == pytest.approx(float(halfway), rel=1e-9)
