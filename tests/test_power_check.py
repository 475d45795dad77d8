"""A CTF that is not the images' is told before there is a map."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import cryorecon as run
from conftest import simulated

from cryorecon.io.mrc import stack_writer
from cryorecon.io.particles import read_particles
from cryorecon.io.star import read_star, write_star
from cryorecon.physics.ctf import ctf
from cryorecon.physics.fourier import half_plane, to_coefficients, to_images
from cryorecon.run.power_check import power_doubts
from cryorecon.run.sample import Sample, sample_of

N, DIAMETER = 400, 0.8


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("stack"), N, 32, 0.3)


@pytest.fixture
def doubts_of(stack):
    """What is said of the stack with columns of its particles, or of their optics, changed."""

    def said(particles=None, **optics):
        tables = read_star(stack / "particles.star")
        tables["optics"] = tables["optics"].assign(**optics)
        if particles is not None:
            tables["particles"] = particles(tables["particles"])
        write_star(stack / "changed.star", tables)
        return power_doubts(sample_of(read_particles(stack / "changed.star")), DIAMETER)

    return said


def with_defocus(change):
    """A change of all particles' defocus, array to array."""

    def changed(table):
        columns = ["rlnDefocusU", "rlnDefocusV"]
        values = change(table[columns].to_numpy(float))
        return table.assign(rlnDefocusU=values[:, 0], rlnDefocusV=values[:, 1])

    return changed


def test_nothing_is_said_of_the_right_ctf(doubts_of):
    assert doubts_of() == []


def test_many_small_groups_are_one(stack):
    tables = read_star(stack / "particles.star")
    groups = [tables["optics"].assign(rlnOpticsGroup=k, rlnVoltage=200.0) for k in range(1, 41)]
    tables["optics"] = pd.concat(groups, ignore_index=True)
    tables["particles"] = tables["particles"].assign(rlnOpticsGroup=np.arange(N) % 40 + 1)
    write_star(stack / "small.star", tables)
    (said,) = power_doubts(sample_of(read_particles(stack / "small.star")), DIAMETER)
    assert said.startswith("the images look recorded 0.")


@pytest.mark.parametrize(
    ("snr", "box", "seed"), [(0.02, 32, 5), (0.1, 48, 6), (3.0, 33, 7), (1000.0, 32, 8)]
)
def test_nothing_is_said_of_other_good_stacks(tmp_path, snr, box, seed):
    folder = simulated(tmp_path, 300, box, snr, seed=seed)
    assert power_doubts(sample_of(read_particles(folder / "particles.star")), DIAMETER) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rlnAmplitudeContrast": 0.07}, None),
        ({"rlnSphericalAberration": 0.0}, None),
        ({"rlnImagePixelSize": 2.4 * 1.02}, None),
        ({"rlnImagePixelSize": 2.4 * 1.05}, 2.4),
        ({"rlnImagePixelSize": 2.4 / 1.05}, 2.4),
        ({"rlnImagePixelSize": 4.8}, 2.4),
    ],
)
def test_the_pixel_size_that_fits_is_told(doubts_of, change, told):
    said = doubts_of(**change)
    assert len(said) == (told is not None)
    if said:
        pixel = float(re.search(r"as if pixels were (\S+) A", said[0])[1].rstrip(","))
        assert pixel == pytest.approx(told, rel=0.025)


def test_another_voltage_is_told(doubts_of):
    (said,) = doubts_of(rlnVoltage=200.0)
    assert "or the voltage 300 kV" in said


def test_a_defocus_too_large_is_told(doubts_of):
    (said,) = doubts_of(with_defocus(lambda defocus: defocus + 4000))
    assert "times as far from focus" in said
    assert doubts_of(with_defocus(lambda defocus: defocus + 200)) == []


def test_the_ctf_of_other_images_is_told(doubts_of):
    (said,) = doubts_of(with_defocus(lambda defocus: defocus[::-1]))
    assert "does not follow the CTF" in said
    # One defocus for all tells nothing either way.
    assert doubts_of(with_defocus(lambda defocus: np.full_like(defocus, 15000.0))) == []


def test_a_group_of_another_voltage_is_named(stack, doubts_of):
    tables = read_star(stack / "particles.star")
    optics = tables["optics"]
    other = optics.assign(rlnOpticsGroup=2, rlnVoltage=200.0)
    tables["optics"] = pd.concat([optics, other], ignore_index=True)
    groups = np.where(np.arange(N) < 150, 2, 1)
    tables["particles"] = tables["particles"].assign(rlnOpticsGroup=groups)
    write_star(stack / "joined.star", tables)
    (said,) = power_doubts(sample_of(read_particles(stack / "joined.star")), DIAMETER)
    assert "the images of optics group 2 look" in said


def test_noise_says_nothing(stack, generator):
    sample = sample_of(read_particles(stack / "particles.star"))
    noise = torch.randn(N, 32, 32, generator=generator)
    assert power_doubts(replace(sample, images=noise), DIAMETER) == []
    few = Sample(sample.particles.subset(np.arange(50)), sample.images[:50])
    assert power_doubts(few, DIAMETER) == []


def test_images_that_outshine_the_others_change_nothing(stack):
    sample = sample_of(read_particles(stack / "particles.star"))
    images = sample.images.clone()
    images[::10, 8:12, 20:25] += 20
    assert power_doubts(replace(sample, images=images), DIAMETER) == []


def test_images_multiplied_by_their_ctf_are_told(stack):
    sample = sample_of(read_particles(stack / "particles.star"))
    plane = half_plane(32)
    gain = ctf(plane.frequencies, sample.particles.ctf_parameters(), 32, 2.4).float()
    for change, told in ((gain, 1), (gain.sign(), 0)):
        changed = to_images(to_coefficients(sample.images, plane) * change, plane)
        said = power_doubts(replace(sample, images=changed), DIAMETER)
        assert len(said) == told
        assert all("they look multiplied by it" in line for line in said)


def test_images_with_empty_shells_say_nothing_new(tmp_path):
    """Low-passed ones."""
    folder = simulated(tmp_path, 300, 32, 0.3)
    particles = read_particles(folder / "particles.star")
    k = np.fft.fftfreq(32, 1 / 32)
    passed = np.hypot(k[:, None], k) < 9
    images = np.fft.ifft2(np.fft.fft2(particles.images(np.arange(300))) * passed).real
    with stack_writer(folder / "particles.mrcs", 32, 2.4) as written:
        written.append(images)
    assert power_doubts(sample_of(read_particles(folder / "particles.star")), DIAMETER) == []


def test_dry_runs_tell_of_it(stack, tmp_path):
    tables = read_star(stack / "particles.star")
    tables["optics"] = tables["optics"].assign(rlnVoltage=200.0)
    write_star(stack / "wrong.star", tables)
    told = run("abinitio", stack / "wrong.star", "-o", tmp_path / "job", "--dry-run")
    assert "WARNING: the images look recorded 0." in told.stdout
