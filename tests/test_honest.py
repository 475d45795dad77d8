"""What a job says of itself is so: half sets stay apart, chance is taken out, doubts are told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import at_true_poses, simulated
from conftest import cryorecon as run

from cryorecon.engines.reconstruction import Reconstruction, RefineConfig
from cryorecon.engines.rivals import MOST_IN_DOUBT
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.engines.rounds import refine_round
from cryorecon.io.star import read_star
from cryorecon.maps import chance as by_chance
from cryorecon.maps.chance import beyond_chance, chance_fsc
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.masks import Support
from cryorecon.ranks import ALONE
from cryorecon.run import independent_halves
from cryorecon.run import stages as of_stages
from cryorecon.run.climbing import Climb, ClimbingStages
from cryorecon.run.report.doubts import unsure_poses
from cryorecon.run.results import scaled
from cryorecon.run.rmfn_stages import RmfnStages
from cryorecon.run.stages import Stages

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def at_truth(stack_32):
    """Images at their true poses, after a round against half maps; and the first noise spectrum."""
    config = RefineConfig(update_scale=True)
    images, state = at_true_poses(stack_32, config)
    measured = images.noise_power.clone()
    refine_round(state, images, config, fsc_curve, joint=False, n_steps=0)
    return config, images, state, measured


def test_rounds_against_the_joint_map_leave_half_maps_and_their_fsc_alone(at_truth):
    """Poses that follow the map of all images would make half maps agree by it."""
    config, images, state, _ = at_truth
    halves, curve = [half.clone() for half in state.halves], state.fsc.clone()
    refine_round(state, images, config, fsc_curve, joint=True, n_steps=1)
    assert torch.equal(state.maps[0], state.maps[1])
    assert all(torch.equal(a, b) for a, b in zip(state.halves, halves, strict=True))
    assert torch.equal(state.fsc, curve)


def test_half_maps_are_compared_inside_the_sphere(at_truth):
    _, _, state, _ = at_truth
    mask = state.support.on(32)
    torch.testing.assert_close(state.fsc, fsc_curve(*state.halves, mask))
    assert float((fsc_curve(*state.halves) - state.fsc).abs().max()) > 0.02


def test_a_round_measures_noise_and_scales_as_they_are(at_truth):
    config, images, state, measured = at_truth
    refine_round(state, images, config, fsc_curve, joint=True, n_steps=1)
    ratio = images.noise_power[0] / measured[0]
    assert float(ratio[4:15].min()) > 0.8
    assert float(ratio[4:15].max()) < 1.2
    assert float(images.gain.abs().mean()) == pytest.approx(1, abs=1e-5)
    assert float(images.gain.std()) < 0.1


def test_maps_on_another_scale_take_nothing_else_along(at_truth):
    *_, state, _ = at_truth
    state.rivals.share[:3, 0] = 0.5
    state.log_likelihood[:] = 7.0
    found = scaled(state, 3.0)
    torch.testing.assert_close(found.maps[1], 3 * state.maps[1])
    torch.testing.assert_close(found.halves[0], 3 * state.halves[0])
    assert found.rivals is state.rivals
    assert found.log_likelihood is state.log_likelihood
    assert found.rivals.in_doubt() == pytest.approx(3 / len(state.rotations))


CHANCE = torch.linspace(0.6, 0.0, 17, dtype=torch.float64)


def _blank(n=4, **given):
    maps = [torch.zeros(32, 32, 32)] * 2
    half = torch.arange(n) % 2
    poses = torch.eye(3).expand(n, 3, 3).clone(), torch.zeros(n, 2)
    state = Reconstruction(*poses, half, maps, 10.0, Support(0.4))
    state.halves, state.fsc = maps, torch.linspace(1, 0.2, 17, dtype=torch.float64)
    for name, value in given.items():
        setattr(state, name, value)
    return state


@pytest.fixture
def stages():
    """What of a run's stages these steps look at."""
    said = []
    job = SimpleNamespace(ranks=ALONE, say=said.append, path=None)
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        job=job, said=said, generator=generator, pixel_size_angst=2.4, config=RefineConfig()
    )


def test_what_aligned_noise_would_reach_is_taken_out(stages, monkeypatch):
    monkeypatch.setattr(independent_halves, "chance_fsc", lambda *_, **__: CHANCE.clone())
    state = _blank()
    before = state.fsc.clone()
    Stages._take_out_chance(stages, state, (state.maps[0], state.maps[1]))
    torch.testing.assert_close(state.fsc, beyond_chance(before, CHANCE))
    torch.testing.assert_close(state.chance, CHANCE)
    assert "FSC of up to 0.56" in stages.said[0]


def test_it_is_taken_out_again_where_a_symmetry_makes_half_maps_anew(stages, monkeypatch):
    def anew(state, *_, **__):
        state.fsc = torch.linspace(1, 0.4, 17, dtype=torch.float64)

    monkeypatch.setattr(of_stages, "refine_round", anew)
    images, stages._turn = SimpleNamespace(ranks=ALONE), lambda *_: None
    found = Stages._on_axes(stages, _blank(chance=CHANCE), images, "C2")
    wanted = beyond_chance(torch.linspace(1, 0.4, 17, dtype=torch.float64), CHANCE)
    torch.testing.assert_close(found.fsc, wanted)
    assert len(found.group) == 2


def test_chance_reaches_three_standard_deviations_above_the_mean(monkeypatch, generator):
    """Of Fisher's z; the largest at a shell or any finer one."""
    curves = [0.3 * torch.rand(17, generator=generator, dtype=torch.float64) for _ in range(4)]
    z = torch.stack(curves).atanh()
    wanted = (z.mean(0) + 3 * z.std(0)).tanh()
    wanted = wanted.flip(0).cummax(0).values.flip(0)
    given = iter([curve.clone() for curve in curves])
    monkeypatch.setattr(by_chance, "align_maps", lambda *_: SimpleNamespace(band=16.0))
    monkeypatch.setattr(by_chance, "apply_alignment", lambda volume, _: volume)
    monkeypatch.setattr(by_chance, "fsc_curve", lambda *_: next(given))
    volume = torch.randn(32, 32, 32, generator=generator)
    found = chance_fsc(volume, volume, torch.ones(32, 32, 32), 2.4, generator, n_trials=4)
    torch.testing.assert_close(found, wanted.clamp(0, 0.9))


def test_the_likeliest_start_goes_on_and_is_judged_by_unseen_images(stages):
    evidence = iter([3.0, 9.0, 5.0])

    def one_start(*_):
        value = next(evidence)
        state = {"log_evidence": value, "held_out_evidence": value, "held_out_error": 0.1}
        return SimpleNamespace(
            log_evidence=value, held_out_evidence=value, state=lambda: dict(state)
        )

    stages.config, stages.part = RmfnConfig(n_starts=3), "map"
    stages.counts, stages._angst = (lambda _: (200, 800)), (lambda *_: 20.0)
    stages.job.checkpoint = SimpleNamespace(get=lambda _: None)
    stages._one_start, stages._keep_search = one_start, lambda *_, **__: None
    images = SimpleNamespace(plane=SimpleNamespace(box=32))
    found = RmfnStages.search(stages, images)
    assert found.best["log_evidence"] == 9.0


@pytest.mark.parametrize(("n", "wanted"), [(1000, 800), (500, 500)])
def test_images_held_out_are_not_among_those_seen(generator, n, wanted):
    order = torch.randperm(1000, generator=generator)
    counted = SimpleNamespace(counts=lambda _: (200, 800))
    seen, held = ClimbingStages.seen_and_held(counted, Climb(order), n, None)
    assert len(seen) == wanted
    assert len(held) == 200
    assert not set(seen.tolist()) & set(held.tolist())


def test_poses_that_images_hardly_tell_are_warned_of():
    share = torch.ones(100)
    assert not unsure_poses(share).fires
    share[:56] = 0.7
    assert not unsure_poses(share).fires
    share[:62] = 0.7
    assert unsure_poses(share).fires
    assert unsure_poses(share).score == pytest.approx(0.62)
    assert unsure_poses(share).remedy.startswith("Check the CTF columns and the pixel size first")


def test_a_job_of_too_few_noisy_images_says_that_its_poses_are_unsure(tmp_path, with_report):
    """Its half maps follow each other's noise; what they agree to is no resolution."""
    stack = simulated(tmp_path, 40, 24, 0.05)
    settings = ("half_rounds=6", "width=16", "final_steps=1")
    words = ["--diameter", 62, "--threads", 1, "--starts", 1, *(f"--set={s}" for s in settings)]
    done = run("abinitio", stack / "particles.star", "-o", tmp_path / "job", *words)
    assert done.returncode == 0, done.stderr
    shares = read_star(tmp_path / "job" / "run_data.star")["particles"]
    shares = shares["rlnMaxValueProbDistribution"].astype(float)
    assert (shares < 0.9).mean() > MOST_IN_DOUBT
    log = (tmp_path / "job" / "run.log").read_text()
    assert "half maps split after a shared search, poses unsure" in log
    assert "check the CTF columns and the pixel size first" in log
    assert "Unsure poses" in log.rpartition("the report warns of")[2]
    assert "poses unsure" in (tmp_path / "job" / "fsc.star").read_text()[:200]
