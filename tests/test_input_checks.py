"""What is wrong with particles is told before an engine works with them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import MODEL, simulated
from rich.console import Console

from cryorecon.engines.amortized import AmortizedConfig
from cryorecon.engines.contrast import contrast_score
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import StackReader, open_stack, stack_writer
from cryorecon.io.particles import read_particles
from cryorecon.io.star import read_star, write_star
from cryorecon.physics.ctf import ctf
from cryorecon.ranks import Ranks
from cryorecon.run.abinitio import abinitio
from cryorecon.run.abinitio_input import AbinitioOptions
from cryorecon.run.extent import particle_extent
from cryorecon.run.half_sets import half_sets
from cryorecon.run.image_checks import FitImages, left_out_text
from cryorecon.run.load import load_observations
from cryorecon.run.moments.estimate import MomentsOptions, moments_of
from cryorecon.run.reconstruct import reconstruct
from cryorecon.run.repeats import repeats
from cryorecon.run.sample import sample_of
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig
from cryorecon.run.table_doubts import table_doubts

BOX, PIXEL_SIZE_ANGST, N = 32, 2.4, 60


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("stack"), N, BOX, 1.0)


@pytest.fixture
def changed(stack, tmp_path):
    """The stack's particles with other pixels, and columns or rows of the table changed."""

    def change(pixels=lambda images: images, table=lambda particles: particles, **optics):
        images = np.array(open_stack(stack / "particles.mrcs"), np.float32)
        with stack_writer(tmp_path / "changed.mrcs", BOX, PIXEL_SIZE_ANGST) as written:
            written.append(pixels(images))
        tables = read_star(stack / "particles.star")
        names = tables["particles"]["rlnImageName"].str.partition("@")[0] + "@changed.mrcs"
        tables["particles"] = table(tables["particles"].assign(rlnImageName=names))
        tables["optics"] = tables["optics"].assign(**optics)
        write_star(tmp_path / "changed.star", tables)
        return read_particles(tmp_path / "changed.star")

    return change


def disc(radius_px):
    steps = np.arange(BOX) - BOX // 2
    return np.hypot(*np.meshgrid(steps, steps)) < radius_px


@pytest.mark.parametrize(
    ("radius_px", "rows", "told"),
    [
        (16.0, slice(None), r"row 1 \(and 59 more of 60 images read\): the image is masked"),
        (12.0, slice(7, None, 2), r"row 8 \(and 26 more of 60 images read\): the image is masked"),
        (0.0, slice(9, 13), r"row 10 \(and 3 more of 60 images read\): the image is blank"),
    ],
)
def test_images_without_noise_around_the_particle_are_counted(changed, radius_px, rows, told):
    def masked(images):
        images[rows] *= disc(radius_px)
        return images

    with pytest.raises(CryoreconError, match=told):
        load_observations(changed(masked), 0.8)


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_a_slope_of_the_images_is_taken_out(stack, changed, keep):
    """Ice that is thicker on one side."""
    steps = np.arange(BOX) - 3.0
    tilts = np.random.default_rng(1).uniform(1, 2, size=(2, N, 1, 1))
    tilts[:, ::2] *= -1
    slope = tilts[0] * steps + tilts[1] * steps[:, None]
    found = load_observations(changed(lambda images: images + 0.2 * slope), 0.8, keep=keep)
    # Whatever the slope is.
    plain = load_observations(changed(lambda images: images + 0.3 * slope), 0.8, keep=keep)
    torch.testing.assert_close(found.noise_power, plain.noise_power, rtol=1e-3, atol=0)
    for mine, expected in zip(found.whole().matched(), plain.whole().matched(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_a_few_images_that_cannot_be_worked_with_are_left_out(stack, changed, keep):
    def spoilt(images):
        images[9] = 7.0
        images[40, 3, 3] = np.nan
        images[55] *= disc(12.0)
        return images

    particles = changed(spoilt)
    found = load_observations(particles, 0.8, keep=keep)
    rows = np.setdiff1d(np.arange(N), [9, 40, 55])
    assert found.rows.tolist() == rows.tolist()
    told = left_out_text(particles, found.rows)
    assert len(told) == 1
    assert "3 of 60 images" in told[0]
    assert told[0].endswith("rows 10, 41, 56)")
    # Their noise, too, and their neighbours are as without them.
    others = read_particles(stack / "particles.star").subset(rows)
    alone = load_observations(others, 0.8, keep=keep)
    torch.testing.assert_close(found.noise_power, alone.noise_power)
    assert found.spread == pytest.approx(alone.spread)
    for mine, expected in zip(found.whole().matched(), alone.whole().matched(), strict=True):
        torch.testing.assert_close(mine, expected)
    assert left_out_text(others, alone.rows) == []


@dataclass(frozen=True)
class Two(Ranks):
    """The first of two processes; the other found some rows that cannot be worked with."""

    others: tuple[int, ...] = ()

    def add_up(self, *tensors):
        for values in tensors:
            values[list(self.others)] += 1


def test_broken_images_of_all_processes_are_counted_together(changed):
    """Each by itself left out a twentieth of all."""

    def spoilt(images):
        images[[9, 20]] = 7.0
        return images

    particles = changed(spoilt)
    fit = FitImages(particles)
    rows = torch.arange(N // 2)
    fit.emptied(rows, torch.from_numpy(particles.read(rows.numpy(), StackReader())))
    assert len(fit.everywhere(Two(count=2, others=(31,)))) == N - 3
    with pytest.raises(CryoreconError, match=r"changed\.star, row 10 and 3 more of 60: the images"):
        fit.everywhere(Two(count=2, others=(31, 32)))


@pytest.mark.parametrize("form", ["steerable", "full"])
@pytest.mark.parametrize("noise_std", [None, 0.3])
def test_moments_leave_out_what_cannot_be_worked_with(
    changed, stack, tmp_path, monkeypatch, form, noise_std
):
    """Whole blocks of images, too."""
    for module in ("estimate", "reader"):
        monkeypatch.setattr(f"cryorecon.run.moments.{module}._BLOCK", 1)
    broken, said = [9, 40, 55], []

    def spoilt(images):
        images[9] = 7.0
        images[40, 3, 3] = np.nan
        images[55] *= disc(12.0)
        return images

    options = MomentsOptions(form=form, max_radius=8, noise_std=noise_std)
    particles = changed(spoilt)
    found = moments_of(particles, tmp_path / "all.h5", options, say=said.append)
    rows = np.setdiff1d(np.arange(N), broken)
    others = read_particles(stack / "particles.star").subset(rows)
    wanted = moments_of(others, tmp_path / "fit.h5", options)
    assert found.n_images == wanted.n_images == N - 3
    assert len(said) == 1
    assert said[0].startswith("WARNING: 3 of 60 images, blank, masked, or")
    assert said[0].endswith("left out (" + str(particles.path) + ", rows 10, 41, 56)")
    error = (found.second - wanted.second).abs().max()
    assert error < 1e-5 * wanted.second.abs().max()


def test_the_width_is_told_though_some_images_are_blank(changed, stack):
    particles = changed(lambda images: images * (np.arange(N) % 30 > 0)[:, None, None])
    assert len(sample_of(particles)) == N - 2
    assert particle_extent(sample_of(particles)) == pytest.approx(
        particle_extent(sample_of(read_particles(stack / "particles.star"))), abs=0.07
    )


TINY = RmfnConfig(
    n_starts=1, temperatures=(1.0,), search_nside=2, half_rounds=1, joint_rounds=1, width=32
)
SHORT = AmortizedConfig(images_seen=320, search_nside=2, half_rounds=1, joint_rounds=1)


@pytest.mark.parametrize(
    "options",
    [
        AbinitioOptions(engine=TINY, subset=50),
        AbinitioOptions(engine=TINY, keep="disk"),
        AbinitioOptions(engine=SHORT, keep="disk"),
    ],
)
def test_a_job_goes_on_without_blank_images(changed, tmp_path, options):
    spoilt = changed(lambda images: images * (np.arange(N) % 40 != 3)[:, None, None])
    abinitio(spoilt.path, tmp_path / "job", options, Console(quiet=True))
    names = read_star(tmp_path / "job" / "run_data.star")["particles"]["rlnImageName"]
    assert len(names) == N - 2
    assert not names.str.partition("@")[0].astype(int).isin([4, 44]).any()
    log = (tmp_path / "job" / "run.log").read_text()
    assert "WARNING: 2 of 60 images, blank, masked" in log
    assert "could not be written" not in log


@pytest.mark.parametrize("amplitude_contrast", [0.0, 0.02, 0.1])
def test_white_particles_are_white_with_any_amplitude_contrast(tmp_path, amplitude_contrast):
    """Without any, coarse shells hold little, and finer ones have either sign."""
    settings = SimulateConfig(
        n_particles=300,
        box=32,
        pixel_size_angst=3.2,
        snr=0.5,
        amplitude_contrast=amplitude_contrast,
    )
    simulate(MODEL, tmp_path / "stack", settings)
    images = load_observations(read_particles(tmp_path / "stack/particles.star"), 0.7)
    assert contrast_score(images, 0.7) > 20


@pytest.mark.parametrize(("least", "surely"), [(0.5, 20), (1.1, 20), (1.5, -1)])
def test_white_particles_are_not_black_where_the_first_shells_are_filtered_out(
    tmp_path, least, surely
):
    simulated(tmp_path, 300, BOX, 0.3)
    images = np.array(open_stack(tmp_path / "particles.mrcs"))
    k = np.fft.fftfreq(BOX, 1 / BOX)
    passed = np.hypot(k[:, None], k) > least
    with stack_writer(tmp_path / "particles.mrcs", BOX, PIXEL_SIZE_ANGST) as written:
        written.append(np.fft.ifft2(np.fft.fft2(images) * passed).real)
    images = load_observations(read_particles(tmp_path / "particles.star"), 0.9)
    assert contrast_score(images, 0.9) > surely


def test_images_multiplied_by_their_ctf_are_refused(changed):
    changed(rlnCtfDataAreCtfPremultiplied=0).ctf_parameters()
    with pytest.raises(CryoreconError, match="rlnCtfDataAreCtfPremultiplied"):
        changed(rlnCtfDataAreCtfPremultiplied=1).ctf_parameters()


def test_phase_flipped_images_give_the_map_of_recorded_ones(stack, changed):
    recorded = read_particles(stack / "particles.star")
    axis = np.fft.fftfreq(BOX) * BOX
    where = torch.from_numpy(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))
    transfer = ctf(where, recorded.ctf_parameters(), BOX, PIXEL_SIZE_ANGST)
    signs = transfer.sign().view(N, BOX, BOX).numpy()
    assert 0.2 < (signs < 0).mean() < 0.8

    def flip(images):
        return np.fft.ifft2(np.fft.fft2(images) * signs).real.astype(np.float32)

    flipped = changed(flip, rlnCtfDataArePhaseFlipped=1)
    plain = reconstruct(recorded).volume
    levels = {"atol": 2e-3 * float(plain.abs().max()), "rtol": 0}
    torch.testing.assert_close(reconstruct(flipped).volume, plain, **levels)
    not_told = reconstruct(changed(flip)).volume
    assert (not_told - plain).norm() > 0.3 * plain.norm()
    here, there = (load_observations(p, 0.8) for p in (recorded, flipped))
    scores = [contrast_score(images, 0.8) for images in (here, there)]
    assert scores[1] > max(5.0, 0.8 * scores[0])


@pytest.mark.parametrize("level", [10.0, 30000.0])
def test_a_reconstruction_does_not_depend_on_the_images_level(stack, changed, level):
    plain = reconstruct(read_particles(stack / "particles.star")).volume
    raised = reconstruct(changed(lambda images: 50 * images + level)).volume / 50
    torch.testing.assert_close(raised, plain, atol=2e-3 * float(plain.abs().max()), rtol=0)


def drawn(particles):
    said = []
    generator = torch.Generator().manual_seed(1)
    return half_sets(particles, generator, repeats(particles), said.append), said


def test_particles_with_one_image_share_a_half_set(stack, changed):
    half, said = drawn(read_particles(stack / "particles.star"))
    assert said == []
    assert half.sum() == N // 2
    twice = np.r_[np.arange(N), 5:15]
    half, said = drawn(changed(table=lambda rows: rows.iloc[twice]))
    assert torch.equal(half[N:], half[5:15])
    assert 0 < half[N:].sum() < 10
    assert said == ["WARNING: 10 of 70 particles show an image that another one shows"]


def test_given_half_sets_that_share_images_are_doubted(changed):
    twice = np.r_[np.arange(N), 5:15]
    sets = np.r_[np.arange(N) % 2 + 1, np.full(10, 1)]
    half, said = drawn(changed(table=lambda t: t.iloc[twice].assign(rlnRandomSubset=sets)))
    assert torch.equal(half, torch.from_numpy(sets - 1))
    assert "half sets share particles" in said[1]


def picked(**more):
    """A table whose last ten particles lie 5 A from the first ten, six a micrograph."""
    place = np.arange(N) % 50
    columns = {
        "rlnMicrographName": [f"mic{i // 6}.mrc" for i in place],
        # Pixels of 1.2 A: 240 A from one to the next.
        "rlnCoordinateX": 500.0 + 200 * (place % 6) + np.where(np.arange(N) < 50, 0, 3),
        "rlnCoordinateY": 500.0 + np.where(np.arange(N) < 50, 0, 3),
    }
    return lambda table: table.assign(**columns | more)


def test_particles_picked_twice_share_a_half_set(changed, cryorecon, tmp_path):
    half, said = drawn(changed(table=picked(), rlnMicrographOriginalPixelSize=1.2))
    assert torch.equal(half[50:], half[:10])
    assert 0 < half[50:].sum() < 10
    assert said == [
        "WARNING: 10 of 60 particles lie within 9 A of another one of their micrograph: picked "
        "twice, they count twice; remove duplicates"
    ]
    told = cryorecon("abinitio", tmp_path / "changed.star", "-o", tmp_path / "job", "--dry-run")[1]
    assert "WARNING: 10 of 60 particles lie within" in " ".join(told.split())
    sets = np.arange(N) % 2 + 1
    sets[50:] = 1
    found = changed(table=picked(rlnRandomSubset=sets), rlnMicrographOriginalPixelSize=1.2)
    assert "half sets share particles" in drawn(found)[1][1]


@pytest.mark.parametrize(
    "more",
    [
        {"rlnMicrographName": [f"mic{i}.mrc" for i in range(N)]},
        {"rlnCoordinateX": 200.0 * np.arange(N)},
        {"rlnCoordinateX": 0.0, "rlnCoordinateY": 0.0, "rlnMicrographName": "m.mrc"},
        {"rlnCoordinateX": "none"},
        {"rlnHelicalTubeID": 1},
    ],
)
def test_nothing_is_said_of_particles_apart_or_nowhere(changed, more):
    found = changed(table=picked(**more), rlnMicrographOriginalPixelSize=1.2)
    assert repeats(found).first is None


def test_a_particle_and_its_image_may_both_be_there_again(changed):
    twice = np.r_[np.arange(N), 5:15]

    def table(rows):
        return picked()(rows).iloc[twice]

    found = repeats(changed(table=table, rlnMicrographOriginalPixelSize=1.2))
    assert (found.n_images, found.n_places) == (10, 10)
    assert found.first[50:].tolist() == [*range(10), *range(5, 15)]


def test_half_sets_that_make_no_two_maps_are_told(changed):
    one, said = drawn(changed(table=lambda t: t.assign(rlnRandomSubset=2)))
    assert one.sum() == N // 2
    assert said == ["all particles are of half set 2: new half sets are drawn"]
    few = np.r_[np.full(N - 3, 1), np.full(3, 2)]
    half, said = drawn(changed(table=lambda t: t.assign(rlnRandomSubset=few)))
    assert half.sum() == 3
    assert said[0].startswith("WARNING: half set 2 has 3 of 60 images")


@pytest.mark.parametrize(
    "command", ["abinitio", "reconstruct", "abinitio --method moments", "moments estimate"]
)
def test_a_doubtful_table_is_told_before_anything_is_done(changed, cryorecon, tmp_path, command):
    changed(table=lambda particles: particles.assign(rlnDefocusU="1.7", rlnDefocusV="1.6"))
    name = "no.h5" if "estimate" in command else "no.mrc"
    words = (tmp_path / "changed.star", "-o", tmp_path / name, "--dry-run", "--json")
    code, told, said = cryorecon(*command.split(), *words)
    assert code == 0
    warnings = json.loads(told)["warnings"]
    assert [w.startswith("the median defocus is 1.7 A") for w in warnings].count(True) == 1
    assert " ".join(said.split()).count("WARNING: the median defocus is 1.7 A") == 1


def test_moments_of_a_doubtful_table_warn(changed, cryorecon, tmp_path):
    """They did in dry runs only."""
    changed(table=lambda particles: particles.assign(rlnDefocusU="1.7", rlnDefocusV="1.6"))
    words = (tmp_path / "changed.star", "-o", tmp_path / "m.h5", "--third", 0)
    code, _, said = cryorecon("moments", "estimate", *words)
    assert code == 0
    assert " ".join(said.split()).startswith("WARNING: the median defocus is 1.7 A")
    said = cryorecon("moments", "estimate", *words, "--overwrite", "--no-ctf")[2]
    assert "WARNING" not in said


def test_images_without_a_ctf_have_no_doubtful_defocus(changed):
    def flat(particles):
        return particles.assign(rlnDefocusU="0", rlnDefocusV="0")

    assert "the median defocus is 0 A" in table_doubts(changed(table=flat))[0]
    assert not table_doubts(changed(table=flat), ctf=False)
    assert not table_doubts(changed(table=flat, rlnAmplitudeContrast="1"))
    assert not table_doubts(changed(table=flat, rlnSphericalAberration="0"))


def test_a_defocus_that_was_not_estimated_is_doubted(changed):
    def table(defocus, n_micrographs):
        names = [f"mic{i % n_micrographs}.mrc" for i in range(N)]
        return lambda rows: rows.assign(
            rlnDefocusU=defocus, rlnDefocusV=defocus, rlnMicrographName=names
        )

    some = np.where(np.arange(N) < 4, [0.0, 120000.0] * (N // 2), 12000.0 + np.arange(N))
    told = table_doubts(changed(table=table(some, 20)))
    assert told == [
        "the defocus of 4 of 60 images is below 1,000 or above 80,000 A, as where its estimate "
        "failed: take them out"
    ]
    told = table_doubts(changed(table=table(15000.0, 20)))
    assert told == ["all images of 20 micrographs have one defocus, 15,000 A: was it estimated?"]
    assert not table_doubts(changed(table=table(15000.0, 2)))
    assert not table_doubts(changed(table=table(12000.0 + np.arange(N), 20)))


@pytest.mark.parametrize(
    ("stated", "header", "doubts"),
    [
        (2.4, 2.4, ()),
        (2.4, 2.46, ()),
        (2.4, 3.1, ("pixels are 2.4 A by", "3.1 A by the header of")),
        # What says nothing: none, 1, and what no microscope has.
        (2.4, 0.0, ()),
        (2.4, 1.0, ()),
        (2.4, 240.0, ()),
        (1.0, 2.4, ("pixels are 1 A by",)),
        (0.14, 0.14, ("is 0.14 A: if it is in nanometres, write it in angstrom",)),
        (24.0, 0.0, ("is 24 A: check that it is in angstrom",)),
    ],
)
def test_a_pixel_size_that_headers_contradict_is_doubted(changed, tmp_path, stated, header, doubts):
    changed(rlnImagePixelSize=str(stated))
    with (tmp_path / "changed.mrcs").open("r+b") as file:
        file.seek(40)
        file.write(np.full(2, header * BOX, "<f4").tobytes())
    particles = read_particles(tmp_path / "changed.star")
    # Images that are cropped as they are read are judged as they are on disk.
    for some in (particles, particles.cropped(16)):
        told = table_doubts(some)
        assert len(told) == bool(doubts)
        assert all(words in told[0] for words in doubts)


def test_stacks_whose_headers_contradict_the_table_are_counted(stack):
    one = read_particles(stack / "particles.star")
    wrong = replace(one.headers[0], pixel_size_angst=1.2)
    headers = (*one.headers, wrong, wrong)
    (told,) = table_doubts(replace(one, headers=headers, _stacks=one.stacks * 3))
    assert "1.2 A by the header" in told
    assert "as of 2 of 3 stacks" in told


@pytest.mark.parametrize(
    ("command", "left_out"),
    [
        ("abinitio", "left out, of run_data.star, too; 60 of 60 were looked at"),
        ("moments estimate", "left out of the sums; 60 of 60 were looked at"),
        # Which takes blank images as they are.
        ("reconstruct", ""),
    ],
)
def test_a_dry_run_lists_images_that_are_left_out(changed, cryorecon, tmp_path, command, left_out):
    changed(lambda images: images * (np.arange(N) != 9)[:, None, None])
    name = "no.h5" if "estimate" in command else "no"
    words = (tmp_path / "changed.star", "-o", tmp_path / name, "--dry-run", "--json")
    code, told, _ = cryorecon(*command.split(), *words)
    assert code == 0
    warnings = json.loads(told)["warnings"]
    found = [w for w in warnings if w.startswith("1 of 60 images, blank")]
    assert len(found) == bool(left_out)
    assert all(left_out in text for text in found)
