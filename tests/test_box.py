"""Images larger than a first map needs: Fourier cropped as they are read, maps in their own box."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import cryorecon as run
from conftest import simulated

from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import open_stack, read_map, stack_writer, write_map
from cryorecon.io.particles import read_particles
from cryorecon.io.read_ahead import ReadAhead
from cryorecon.io.relion_dialects import relion30
from cryorecon.io.star import read_star, write_star
from cryorecon.maps.agreement import map_agreement
from cryorecon.physics.fourier import crop_or_pad_centred, fft_centred, radius_grid
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.resampling import downsample_images, resample_volume
from cryorecon.run import abinitio_input as job
from cryorecon.run.consensus.inputs import read_candidates
from cryorecon.run.consensus.pairs import pair_of
from cryorecon.run.load import load_observations
from cryorecon.run.report.inputs import read_job

pytestmark = pytest.mark.usefixtures("no_pictures")

BOX, SMALL, PIXEL = 24, 16, 3.2
QUICK = [
    f"--set={word}"
    for word in (
        "search_nside=2", "temperatures=[5.0, 1.0]", "width=16", "half_rounds=2",
        "joint_rounds=1", "final_steps=1", "fine_epochs=1",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def cropped_before(few, tmp_path_factory):
    """The same particles, cropped by whoever extracted them."""
    folder = tmp_path_factory.mktemp("small")
    images = torch.from_numpy(np.array(open_stack(few.parent / "particles.mrcs")))
    with stack_writer(folder / "particles.mrcs", SMALL, PIXEL * BOX / SMALL) as stack:
        stack.append(downsample_images(images, SMALL).numpy())
    tables = read_star(few)
    tables["optics"]["rlnImagePixelSize"] = str(PIXEL * BOX / SMALL)
    tables["optics"]["rlnImageSize"] = str(SMALL)
    names = [f"{i + 1}@particles.mrcs" for i in range(len(images))]
    tables["particles"]["rlnImageName"] = names
    write_star(folder / "particles.star", tables)
    return folder / "particles.star"


@pytest.mark.parametrize(("size", "box"), [(24, 16), (25, 16), (24, 15), (25, 15), (16, 16)])
def test_a_smaller_box_holds_the_same_coefficients(size, box, generator):
    images = torch.randn(3, size, size, generator=generator, dtype=torch.float64) + 5
    found = fft_centred(downsample_images(images, box), 2) * (size / box) ** 2
    wanted = crop_or_pad_centred(fft_centred(images, 2), box, 2)
    below = slice(1 if box % 2 == 0 and box < size else 0, None)
    torch.testing.assert_close(found[:, below, below], wanted[:, below, below])
    single = downsample_images(images.float(), box)
    torch.testing.assert_close(single.double(), downsample_images(images, box), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "box"), [(48, 32), (49, 32), (48, 31)])
def test_a_gaussian_stays_in_its_place_and_keeps_its_height(size, box):
    def gaussian(n):
        axis = (torch.arange(n, dtype=torch.float64) - n // 2) / n - 0.07
        line = torch.exp(-(axis**2) / (2 * 0.05**2))
        return 3.0 + 2 * line[:, None] * line

    found = downsample_images(gaussian(size)[None], box)[0]
    torch.testing.assert_close(found, gaussian(box), atol=1e-5, rtol=0)


def test_an_image_of_one_value_stays_one():
    images = torch.full((2, 36, 36), 1234.567)
    assert torch.equal(downsample_images(images, 25), images[:, :25, :25])


def test_particles_know_both_boxes(few, tmp_path):
    """Origins in pixels are of the images on disk; angles and names do not change."""
    particles = read_particles(few)
    small = particles.cropped(SMALL)
    assert (small.box, small.stored_box) == (SMALL, BOX)
    assert small.pixel_size_angst * SMALL == pytest.approx(PIXEL * BOX)
    assert small.as_stored() == particles.cropped(BOX) == particles.cropped(400)
    rows = np.array([5, 2, 70])
    images = torch.from_numpy(particles.images(rows))
    assert np.array_equal(small.images(rows), downsample_images(images, SMALL).numpy())
    assert np.array_equal(ReadAhead(small).images(rows), images.numpy())
    origins = np.random.default_rng(0).normal(size=(len(particles), 2))
    particles.write(tmp_path / "new.star", origins_angst=origins)
    write_star(
        tmp_path / "old.star", relion30(read_particles(tmp_path / "new.star", few.parent), {})
    )
    old = read_particles(tmp_path / "old.star", few.parent).cropped(SMALL)
    np.testing.assert_allclose(old.origins_angst(), origins, atol=1e-5)
    old.write(tmp_path / "again.star", origins_angst=origins)
    written = read_star(tmp_path / "again.star")[""]["rlnOriginX"].astype(float)
    np.testing.assert_allclose(written, origins[:, 0] / PIXEL, atol=1e-5)


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_engines_see_the_images_of_a_stack_that_was_cropped_before(few, cropped_before, keep):
    here = load_observations(read_particles(few).cropped(SMALL), 0.8, keep=keep)
    there = load_observations(read_particles(cropped_before), 0.8, keep=keep)
    # Blocks of mini-batches, and with them random numbers, are the same wherever images are.
    assert here.pixels == BOX**2
    assert here.pixels_read == (BOX**2 if keep == "disk" else SMALL**2)
    assert torch.equal(here.noise_power, there.noise_power)
    ours, theirs = here.whole(), there.whole()
    torch.testing.assert_close(ours.coefficients, theirs.coefficients)
    torch.testing.assert_close(ours.ctf, theirs.ctf, atol=1e-5, rtol=0)


def test_a_job_finds_what_it_finds_in_a_stack_that_was_cropped_before(
    few, cropped_before, tmp_path, with_report
):
    """Its maps come in the box and pixel size of the particles; the FSC ends with the images."""
    words = ["--diameter", 60, "--threads", 1, *QUICK]
    for star, name, box in ((few, "here", SMALL), (cropped_before, "there", BOX)):
        done = run("abinitio", star, "-o", tmp_path / name, *words, "--box", box, "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["box"] == (BOX if name == "here" else SMALL)
        assert len(told["fsc"]["values"]) == SMALL // 2 + 1
        assert (tmp_path / name / "report.html").exists()
    log = (tmp_path / "here" / "run.log").read_text()
    assert "24 px at 3.2 A, Fourier cropped to 16 px at 4.8 A (see --box)" in log
    assert "as far as images of 16 px go" in log
    assert "as far as images" not in (tmp_path / "there" / "run.log").read_text()
    ours = read_particles(tmp_path / "here" / "run_data.star", few.parent)
    theirs = read_particles(tmp_path / "there" / "run_data.star", cropped_before.parent)
    assert np.abs(ours.origins_angst()).max() > 1
    turned = np.abs((ours.euler_deg() - theirs.euler_deg() + 180) % 360 - 180).max(1)
    moved = np.abs(ours.origins_angst() - theirs.origins_angst()).max(1)
    # Where an image's two likeliest poses are next to each other, rounding chooses.
    assert ((turned < 0.1) & (moved < 0.05)).mean() > 0.95
    assert turned.max() < 5
    mask = read_map(tmp_path / "here" / "initial_model_mask.mrc").data
    assert mask.shape == (BOX,) * 3
    assert 0 == mask.min() < mask.max() <= 1
    for name in ("here", "there"):
        assert read_job(tmp_path / name).worked_pixel_angst == pytest.approx(PIXEL * BOX / SMALL)
    for name in ("initial_model", "run_half1_class001_unfil", "run_half2_class001_unfil", "scale1"):
        found, wanted = (read_map(tmp_path / n / f"{name}.mrc") for n in ("here", "there"))
        assert found.data.shape == (BOX,) * 3
        assert found.pixel_size_angst == pytest.approx(PIXEL)
        # A line of sight has more voxels in a finer grid.
        values = resample_volume(torch.from_numpy(found.data), SMALL) * (BOX / SMALL)
        high = float(np.abs(wanted.data).max())
        torch.testing.assert_close(values, torch.from_numpy(wanted.data), atol=0.03 * high, rtol=0)


@pytest.mark.parametrize(("box", "unit"), [(BOX, 37.0), (SMALL, 1.0)])
def test_maps_are_on_the_scale_of_the_images_on_disk(few, tmp_path, box, unit):
    """Whatever they were normalised by, and whatever box they were worked on in."""
    images = unit * np.array(open_stack(few.parent / "particles.mrcs"))
    with stack_writer(tmp_path / "particles.mrcs", BOX, PIXEL) as stack:
        stack.append(images)
    tables = read_star(few)
    numbers = tables["particles"]["rlnImageName"].str.partition("@")[0]
    tables["particles"]["rlnImageName"] = numbers + f"@{tmp_path}/particles.mrcs"
    write_star(tmp_path / "particles.star", tables)
    words = ["-o", tmp_path / "job", "--box", box, "--diameter", 60, "--threads", 1, *QUICK]
    done = run("abinitio", tmp_path / "particles.star", *words)
    assert done.returncode == 0, done.stderr
    found = read_map(tmp_path / "job" / "initial_model.mrc").data
    truth = read_map(few.parent / "map.mrc").data * unit
    # Power does not depend on the orientation.
    shells = radius_grid(BOX, 3) + 0.5
    coarse = (shells >= 1) & (shells < 4)
    power = [
        fft_centred(torch.from_numpy(v), 3)[coarse].abs().square().sum() for v in (found, truth)
    ]
    assert float((power[0] / power[1]).sqrt()) == pytest.approx(1, abs=0.25)


def test_maps_that_are_given_have_the_box_of_the_particles(few, tmp_path):
    ones = np.ones((BOX,) * 3, np.float32)
    write_map(tmp_path / "right.mrc", ones, PIXEL)
    write_map(tmp_path / "wrong.mrc", ones[:SMALL, :SMALL, :SMALL], PIXEL * BOX / SMALL)
    options = job.AbinitioOptions(box=SMALL, mask=tmp_path / "right.mrc")
    assert job.prepared(few, options).particles.box == SMALL
    for name in ("mask", "init_map"):
        wrong = job.AbinitioOptions(box=SMALL, **{name: tmp_path / "wrong.mrc"})
        with pytest.raises(CryoreconError, match=r"has 16 px at 4\.8 A, the particles 24 px"):
            job.prepared(few, wrong)


def test_jobs_of_cropped_images_agree_no_further_than_they_go(few, tmp_path):
    """A mask, and turning a map, put what they hold into shells that hold nothing."""
    for seed in (0, 1):
        words = ["--seed", seed, "--box", SMALL, "--diameter", 60, "--threads", 1, *QUICK]
        assert run("abinitio", few, "-o", tmp_path / f"{seed}", *words).returncode == 0
    found, _ = read_candidates([tmp_path / "0", tmp_path / "1"])
    one, two = found
    assert one.last_shell == two.last_shell == SMALL // 2
    ball = soft_ball(BOX, 0.35 * BOX, 2, 3)
    same = one.volumes, one.volumes, ball, PIXEL, torch.zeros(BOX // 2 + 1)
    whole = map_agreement(*same, crossed=False)
    assert float(whole.curve[SMALL // 2 + 1 :].max()) > 0.5
    ended = map_agreement(*same, crossed=False, last_shell=SMALL // 2)
    assert torch.equal(ended.curve[: SMALL // 2 + 1], whole.curve[: SMALL // 2 + 1])
    assert not ended.curve[SMALL // 2 + 1 :].any()
    pair = pair_of(found, 0, 1, ball, torch.zeros(BOX // 2 + 1), torch.eye(3)[None])
    assert not pair.curve.values[SMALL // 2 + 1 :].any()


def test_boxes_of_up_to_128_px_are_worked_on_as_they_are(few, tmp_path, monkeypatch):
    assert job.prepared(few, job.AbinitioOptions()).particles.box == BOX
    assert job.prepared(few, job.AbinitioOptions(box=SMALL)).particles.box == SMALL
    large = simulated(tmp_path / "large", 20, 140, 1.0) / "particles.star"
    assert job.prepared(large, job.AbinitioOptions()).particles.box == 128
    assert job.prepared(large, job.AbinitioOptions(box=140)).particles.box == 140
    told = run("abinitio", large, "-o", tmp_path / "no", "--dry-run")
    assert "140 px at 0.55 A, Fourier cropped to 128 px" in told.stdout
