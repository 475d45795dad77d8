"""The search's end at a higher band, from a map between the two hands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import simulated
from rich.console import Console

from cryorecon.engines import search as search_module
from cryorecon.engines.fine_search import FineSearch
from cryorecon.engines.rmfn import RmfnConfig, scaled_to_images
from cryorecon.engines.search import Evidence, evidence
from cryorecon.io.mrc import read_map
from cryorecon.io.particles import read_particles
from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.fourier import lowpass
from cryorecon.run.checkpoint import frozen
from cryorecon.run.climbing import Climb
from cryorecon.run.job import Task, open_job
from cryorecon.run.load import load_observations
from cryorecon.run.rmfn_stages import RmfnStages

BOX, COUNT, HELD_OUT = 24, 480, 80
CONFIG = RmfnConfig(diameter=0.8, search_nside=3, search_batch=40)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = simulated(tmp_path_factory.mktemp("fine") / "stack", COUNT, BOX, 0.3)
    images = load_observations(read_particles(folder / "particles.star"), CONFIG.diameter)
    found = read_map(folder / "map.mrc")
    return images, torch.from_numpy(found.data), found.pixel_size_angst


def begun(stack, start, config=CONFIG):
    images = stack[0]
    rows = torch.arange(COUNT).split(COUNT - HELD_OUT)
    seen, held = (images.select(some, config.fine_band(BOX)) for some in rows)
    shells = torch.ones(config.search_band(BOX) + 1)
    generator = torch.Generator().manual_seed(0)
    known = {"held_out": held, "start": start, "unexplained": 2 * shells}
    return FineSearch(config, seen, generator, **known)


def epoch(search):
    for rows in search.batches():
        search.step(rows, 1.0)
    search.end_epoch()


def agreement(stack, volume):
    """FSC with the truth of either hand, by shell."""
    truth, pixel = stack[1:]
    moved = apply_alignment(volume, align_maps(volume, truth, pixel))
    return fsc_curve(moved, truth)


def test_a_map_between_the_hands_falls_to_one_side(stack):
    images, truth, pixel = stack
    band = CONFIG.search_band(BOX)
    other = truth.flip(0)
    other = apply_alignment(other, align_maps(other, truth, pixel, both_hands=False))
    between = scaled_to_images(lowpass((truth + other) / 2, float(band), 2), images, CONFIG)
    search = begun(stack, between)
    assert not search.settled
    for _ in range(8):
        epoch(search)
    before, after = agreement(stack, between), agreement(stack, search.network.volume(0, BOX))
    last = CONFIG.fine_band(BOX)
    assert last > band
    assert (after[band:last] > before[band:last] + 0.1).all()


def course_of(search, values):
    """After which of some epochs it has settled."""
    told = []
    for value in values:
        search.course.append(value)
        told.append(search.settled)
    return told


def test_a_search_has_settled_when_two_epochs_bring_no_evidence(stack):
    search = begun(stack, scaled_to_images(stack[1], stack[0], CONFIG))
    search.poses = 24
    told = course_of(search, (10.0, 10.4, 10.3, 10.42, 10.35, 10.42, 10.425, 10.3))
    # The fourth exceeds the best of the first two by 0.02, of which 0.01 is enough.
    assert told == [False] * 5 + [True] * 3


def test_while_poses_are_not_told_apart_it_has_patience(stack):
    search = begun(stack, scaled_to_images(stack[1], stack[0], CONFIG))
    search.poses = 25
    told = course_of(search, (10.0, *[9.99] * 6, 10.004, 10.003, 10.006, *[10.004] * 5))
    # 0.0025 within four epochs is enough: the eighth brings 0.004, the tenth 0.002.
    assert told == [False] * 11 + [True] * 4


def test_its_course_is_the_evidence_of_images_that_it_does_not_see(stack):
    images, truth, _ = stack
    search = begun(stack, scaled_to_images(truth, images, CONFIG))
    for _ in range(2):
        epoch(search)
    volume = search.network.volume(0)
    assert len(search.course) == 2
    whole = evidence(search.held_out, volume, search.grid, search.offsets)
    assert search.course[-1] == pytest.approx(whole.mean, abs=0.01)


def test_a_search_among_likely_offsets_finds_what_one_among_all_finds(stack, monkeypatch):
    """Where particles may lie far off centre most offsets are soon unlikely."""
    config = replace(CONFIG, offset_range=0.25)
    start = scaled_to_images(stack[1], stack[0], config)
    runs = []
    for least in (search_module._UNLIKELY, -1.0):
        monkeypatch.setattr(search_module, "_UNLIKELY", least)
        runs.append(begun(stack, start, config))
        for _ in range(3):
            epoch(runs[-1])
    few, all_offsets = runs
    assert few.likely.sum() < 0.6 * all_offsets.likely.sum()
    assert all_offsets.likely.all()
    assert few.likely.any(-1).all()
    assert few.course == pytest.approx(all_offsets.course, abs=0.02)
    assert float(fsc_curve(few.network.volume(0), all_offsets.network.volume(0))[1:6].min()) > 0.999


def test_it_keeps_the_map_of_its_best_epoch(stack):
    images, truth, _ = stack
    search = begun(stack, scaled_to_images(truth, images, CONFIG))
    maps = []
    # The third is worse, the fourth so little better than the second that rounding might decide.
    for told, best in ((10.0, 0), (11.0, 1), (10.5, 1), (11.001, 1), (11.1, 4)):
        search._evidence_held_out = lambda found=told: Evidence(found, 0.1, 5.0)
        epoch(search)
        maps.append(search.network.volume(0))
        assert torch.equal(search.best, maps[best])


def job_for(folder, config):
    star = folder / "particles.star"
    star.touch()
    return open_job(folder / "job", Console(quiet=True), Task("test", star, COUNT, config, None, 0))


def searched(images, config, folder):
    """Map and band of a whole search, and what it says."""
    with job_for(folder, config) as job:
        stages = RmfnStages(job, config, torch.Generator().manual_seed(0), 3.0)
        volume, band = stages.first_map(images)
    return volume, band, (folder / "job" / "run.log").read_text()


@pytest.mark.parametrize(("likely", "bands"), [(0, 2), (10**9, 1)])
def test_only_a_hard_set_is_searched_on_twice(stack, tmp_path, likely, bands):
    config = replace(
        CONFIG, n_starts=1, temperatures=(1.0,), fine_epochs=1, hard_epochs=1, width=16
    )
    config = replace(config, hard_poses=likely, hard_images=210)
    volume, band, log = searched(stack[0], config, tmp_path)
    assert band == (CONFIG.fine_band(BOX), CONFIG.hard_band(BOX))[bands - 1]
    assert log.count("searching on") == bands
    assert ("with 210 images" in log) == (bands == 2)
    inside = fsc_curve(volume, lowpass(volume, band, 3))
    assert inside[:band].min() > 0.99


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("poses", [0, 10**9])
def test_of_two_beginnings_the_likelier_is_gone_on_with(stack, tmp_path, right, poses):
    """The second one only of a hard set, whatever it is."""
    images, truth, _ = stack
    start = scaled_to_images(truth, images, CONFIG)
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    noise = lowpass(noise * start.std(), CONFIG.search_band(BOX), 3)
    maps = [noise, start] if right else [start, noise]
    unexplained = torch.ones(CONFIG.search_band(BOX) + 1)
    config = replace(CONFIG, hard_poses=poses, fine_epochs=2, hard_epochs=1)
    climb = Climb(order=torch.arange(COUNT))
    kept = []

    def keep():
        kept.append((climb.rung, climb.begun))

    with job_for(tmp_path, config) as job:
        stages = RmfnStages(job, config, torch.Generator().manual_seed(0), 3.0)
        beginnings = [lambda: (maps[0], unexplained), lambda: (maps[1], unexplained)]
        found, band = stages.finer(climb, beginnings, images, keep)
    told = (tmp_path / "job" / "run.log").read_text()
    hard = poses == 0
    assert told.count("searching on") == (3 if hard else 1)
    assert band == (CONFIG.hard_band(BOX) if hard else CONFIG.fine_band(BOX))
    assert kept[-1] == (2, 2 if hard else 1)
    assert climb.likeliest is None
    if hard:
        assert fsc_curve(found, truth)[2:6].min() > 0.9


def test_of_small_bands_none_is_searched_twice(stack, tmp_path):
    config = replace(CONFIG, n_starts=1, temperatures=(1.0,), width=16)
    config = replace(config, fine_cycles=1.0, hard_cycles=1.0)
    _, band, log = searched(stack[0], config, tmp_path)
    assert band == CONFIG.search_band(BOX)
    assert "searching on" not in log


def test_each_shell_is_held_back_by_its_signal(stack, tmp_path):
    """Noise over signal: ten times the noise, ten times the prior; twice the images, half of it."""
    images, truth, _ = stack
    start = scaled_to_images(truth, images, CONFIG)
    folder = simulated(tmp_path / "noisy", COUNT, BOX, 0.03)
    noisy = load_observations(read_particles(folder / "particles.star"), CONFIG.diameter)
    few, many = (begun(stack, start, replace(CONFIG, fine_memory=n)) for n in (100, 200))
    other = begun((noisy, truth, stack[2]), start, replace(CONFIG, fine_memory=100))
    torch.testing.assert_close(few._prior, 2 * many._prior)
    # Of shells with more signal than counts as none; the noise's own power is measured too.
    told = other._prior < 0.3 * other._prior.max()
    told[0] = False
    assert told.sum() >= 3
    more = other._prior[told] / few._prior[told]
    assert ((more > 6) & (more < 12)).all()
    # More than the lowest, which stand out; none is taken to be empty.
    assert (few._prior[4:] > 5 * few._prior[1]).all()
    assert other._prior.isfinite().all()


def test_images_held_out_are_seen_by_no_search(stack, tmp_path):
    """As many are drawn as the larger search sees; those held out are the same for both."""
    images = stack[0]
    config = replace(
        CONFIG, search_images=100, fine_images=150, temperatures=(1.0,), fine_epochs=1, width=16
    )
    asked = []

    def source(rows, count):
        asked.append(set(rows.tolist()))
        return images.source(rows, count)

    searched(replace(images, source=source), config, tmp_path)
    *starts, seen, held = asked
    first, second = starts[:2], starts[2:]
    assert first == second
    assert [len(rows) for rows in (*first, seen, held)] == [100, 96, 150, 96]
    assert first[0] < seen
    assert held == first[1]
    assert seen.isdisjoint(held)


def test_it_goes_on_from_its_state(stack):
    images, truth, _ = stack
    start = scaled_to_images(truth, images, CONFIG)
    search = begun(stack, start)
    epoch(search)
    state, drawn = frozen(search.state()), search.generator.get_state()
    epoch(search)
    again = begun(stack, torch.zeros_like(start))
    again.load(state)
    again.generator.set_state(drawn)
    epoch(again)
    assert torch.equal(again.network.volume(0), search.network.volume(0))
    assert torch.equal(again.best, search.best)
    assert again.course == search.course


def test_the_first_epoch_only_gathers(stack):
    images, truth, _ = stack
    start = scaled_to_images(truth, images, CONFIG)
    search = begun(stack, start)
    before = search.network.volume(0)
    torch.testing.assert_close(
        search.excess[: CONFIG.search_band(BOX) + 1].unique(), torch.tensor([2.0])
    )
    batches = search.batches()
    for rows in batches:
        search.step(rows, 1.0)
    assert torch.equal(search.network.volume(0), before)
    whole = search.sums.weight.sum()
    search.end_epoch()
    assert not torch.equal(search.network.volume(0), before)
    # Of 400 images in batches of 40 the sums remember all, unless they are to remember fewer.
    assert len(batches) == 10
    torch.testing.assert_close(search.sums.weight.sum(), whole)
    search.step(batches[0], 1.0)
    torch.testing.assert_close(search.sums.weight.sum(), whole, rtol=0.05, atol=0)


@pytest.mark.parametrize("memory", [0, 100, 200, 10_000])
def test_sums_remember_so_many_images(stack, memory):
    start = scaled_to_images(stack[1], stack[0], CONFIG)
    search = begun(stack, start, replace(CONFIG, fine_memory=memory))
    everyone = begun(stack, start, replace(CONFIG, fine_memory=COUNT - HELD_OUT))
    for each in (search, everyone):
        epoch(each)
    remembered = max(40, min(memory, COUNT - HELD_OUT))
    assert search._kept() == pytest.approx(1 - 40 / remembered)
    share = remembered / (COUNT - HELD_OUT)
    torch.testing.assert_close(search.sums.weight.sum(), share * everyone.sums.weight.sum())
