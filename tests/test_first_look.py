"""What images show at once: white and black particles, and things that outshine them."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODEL, cryorecon, simulated
from rich.console import Console

from cryorecon.engines import contrast
from cryorecon.engines.contrast import FirstLook
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.engines.stream import read_ahead
from cryorecon.io.mrc import open_stack, stack_writer
from cryorecon.io.particles import read_particles
from cryorecon.io.read_ahead import ReadAhead
from cryorecon.io.star import read_star, write_star
from cryorecon.run.abinitio import abinitio
from cryorecon.run.abinitio_input import AbinitioOptions
from cryorecon.run.contrast import first_look
from cryorecon.run.load import load_observations
from cryorecon.run.moments.estimate import MomentsOptions, estimate_moments
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig

N, BOX, PIXEL_ANGST = 300, 24, 3.2
ICE = slice(0, N, 12)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("stack"), N, BOX, 0.3)


@pytest.fixture
def changed(stack, tmp_path):
    """The particles with other pixels, and optics groups if told."""

    def change(images, group=None):
        with stack_writer(tmp_path / "changed.mrcs", BOX, PIXEL_ANGST) as written:
            written.append(images)
        tables = read_star(stack / "particles.star")
        names = [f"{i + 1}@{tmp_path}/changed.mrcs" for i in range(N)]
        tables["particles"]["rlnImageName"] = names
        if group is not None:
            two = tables["optics"].loc[[0, 0]].reset_index(drop=True)
            two["rlnOpticsGroup"], two["rlnOpticsGroupName"] = ["1", "2"], ["a", "b"]
            tables["optics"], tables["particles"]["rlnOpticsGroup"] = two, group.astype(str)
        write_star(tmp_path / "changed.star", tables)
        return tmp_path / "changed.star"

    return change


def images_of(stack):
    return np.array(open_stack(stack / "particles.mrcs"))


def with_ice(stack):
    """One image in twelve has a blob ten times as bright as the noise."""
    images, axis = images_of(stack), np.arange(BOX) - BOX / 2
    blob = np.exp(-((axis[:, None] - 3) ** 2 + (axis + 2) ** 2) / 8)
    images[ICE] += 10 * images.std() * blob
    return images


def looked(star, contrast="auto"):
    said = []
    images = load_observations(read_particles(star), 0.8)
    return first_look(SimpleNamespace(say=said.append), images, 0.8, contrast), said


def test_bright_images_are_dimmed_to_what_is_usual_and_told(stack, changed):
    images, said = looked(changed(with_ice(stack)))
    bright = np.zeros(N, bool)
    bright[ICE] = True
    assert ((images.dimming < 1).numpy() == bright).all()
    assert said[0].startswith(f"WARNING: {bright.sum()} of {N} images are much brighter")
    assert "white on black" in said[1]
    look = FirstLook.at(images, 0.8)
    usual = look.power[~bright]
    assert look.power[bright].max() < 1.5 * usual.max()
    assert (look.dimming() == 1).all()


def test_particles_alone_are_left_as_they_are(stack):
    images, said = looked(stack / "particles.star")
    assert images.dimming is None
    assert not any("WARNING" in line for line in said)


def test_particles_far_from_focus_are_no_ice(tmp_path):
    """One image in ten shows ten times the coarse power of the others, by its CTF."""
    parts, tables = [], []
    for number, (n, near, far) in enumerate(((270, 1000.0, 2500.0), (30, 35000.0, 40000.0))):
        config = SimulateConfig(
            n_particles=n, box=BOX, pixel_size_angst=PIXEL_ANGST, snr=float("inf"),
            defocus_min_angst=near, defocus_max_angst=far,
        )  # fmt: skip
        simulate(MODEL, tmp_path / str(number), config)
        parts.append(np.array(open_stack(tmp_path / str(number) / "particles.mrcs")))
        tables.append(read_star(tmp_path / str(number) / "particles.star"))
    images = np.concatenate(parts)
    noise = np.random.default_rng(0).standard_normal(images.shape)
    with stack_writer(tmp_path / "both.mrcs", BOX, PIXEL_ANGST) as written:
        written.append(images + 1.5 * parts[0].std() * noise)
    rows = pd.concat([table["particles"] for table in tables], ignore_index=True)
    rows["rlnImageName"] = [f"{i + 1}@{tmp_path}/both.mrcs" for i in range(len(rows))]
    write_star(tmp_path / "both.star", {**tables[0], "particles": rows})
    look = FirstLook.at(load_observations(read_particles(tmp_path / "both.star"), 0.8), 0.8)
    middle = look.power.median()
    spread = 1.4826 * (look.power - middle).abs().median()
    assert (look.power.max() - middle) / spread > 15
    assert (look.dimming() == 1).all()


def test_images_that_hardly_differ_do_not_outshine_each_other():
    """Where most rows show one image, nothing is spread about the median."""
    power = torch.full((40,), 5.0, dtype=torch.float64)
    power[30:], shares = 7.0, torch.ones(40, dtype=torch.float64)
    assert (FirstLook(power, power, shares).dimming() == 1).all()
    power[39] = 50.0
    assert (FirstLook(power, power, shares).dimming() < 1).nonzero().tolist() == [[39]]


def test_dimming_follows_images_into_parts_and_mini_batches(stack, changed):
    images, _ = looked(changed(with_ice(stack)))
    rows = torch.tensor([0, 7, 24, 25])
    part = images.apart(rows)
    torch.testing.assert_close(part.whole().coefficients, images.select(rows).coefficients)
    plain = replace(images, dimming=None).select(rows).coefficients
    factor = images.dimming[rows, None]
    torch.testing.assert_close(images.select(rows).coefficients, plain * factor)
    assert factor.unique().numel() > 2
    ahead = read_ahead(replace(images, held=False))
    mean = ahead.select(torch.arange(N)).coefficients.abs().square().mean()
    torch.testing.assert_close(mean, images.whole().coefficients.abs().square().mean())


@pytest.mark.parametrize("black", [2, 1])
def test_each_optics_group_has_the_contrast_that_it_shows(stack, changed, black):
    """Joined data of two microscopes: the mean of all tells nothing."""
    group = 1 + np.arange(N) % 2
    images = images_of(stack)
    images[group == black] *= -1
    found, said = looked(changed(images, group))
    assert (
        f"white on black in optics group {3 - black} and BLACK ON WHITE in optics group {black}"
        in said[0]
    )
    assert ((found.gain < 0).numpy() == (group == black)).all()
    assert FirstLook.at(found, 0.8).score() > 20
    given, said = looked(changed(images, group), "white")
    assert (given.gain > 0).all()
    told = cryorecon("abinitio", changed(images, group), "-o", "no", "--dry-run", "--json")
    assert json.loads(told.stdout)["contrast"] == "differs"
    assert "each will be taken as it looks" in told.stderr


def test_the_dimmed_are_marked_in_the_table_of_poses(stack, changed, tmp_path, monkeypatch):
    monkeypatch.setattr("cryorecon.run.abinitio.report_at_end", lambda *_: None)
    engine = RmfnConfig(
        n_starts=1, temperatures=(2.0, 1.0), search_nside=2, fine_epochs=1, hard_epochs=0,
        half_rounds=1, joint_rounds=1, volume="grid", final_steps=1,
    )  # fmt: skip
    quiet = Console(quiet=True)
    abinitio(changed(with_ice(stack)), tmp_path / "ice", AbinitioOptions(engine=engine), quiet)
    table = read_star(tmp_path / "ice" / "run_data.star")["particles"]
    merit = table["rlnParticleFigureOfMerit"].astype(float).to_numpy()
    assert (merit[ICE] < 0.9).all()
    assert (np.delete(merit, np.arange(N)[ICE]) == 1).all()


@pytest.mark.parametrize("form", ["steerable", "full"])
def test_moments_leave_bright_images_out(stack, changed, tmp_path, form):
    """Exactly as if the STAR file had not named them."""
    star, said = changed(with_ice(stack)), []
    tables = read_star(star)
    dark = np.ones(N, bool)
    dark[ICE] = False
    rows = tables["particles"][dark].reset_index(drop=True)
    write_star(tmp_path / "dark.star", {**tables, "particles": rows})
    options = MomentsOptions(form=form, max_radius=8)
    found = estimate_moments(star, tmp_path / "all.h5", options, say=said.append)
    wanted = estimate_moments(tmp_path / "dark.star", tmp_path / "dark.h5", options)
    assert found.n_images == wanted.n_images == dark.sum()
    assert said == [
        f"WARNING: {N - dark.sum()} of {N} images are much brighter than the others, as ice, "
        "carbon and aggregates are; they are left out"
    ]
    error = (found.second - wanted.second).abs().max()
    assert error < 1e-5 * wanted.second.abs().max()


def test_moments_of_particles_alone_are_those_of_all(stack, tmp_path):
    said = []
    found = estimate_moments(
        stack / "particles.star", tmp_path / "all.h5", MomentsOptions(), say=said.append
    )
    assert found.n_images == N
    assert not said


def test_images_are_read_while_others_are_looked_at(stack, monkeypatch):
    images = load_observations(read_particles(stack / "particles.star"), 0.8, keep="disk")
    here, told = FirstLook.at(images, 0.8), []
    expect = ReadAhead.expect
    monkeypatch.setattr(contrast, "_AT_ONCE", 100)
    monkeypatch.setattr(ReadAhead, "expect", lambda self, r: (told.append(len(r)), expect(self, r)))
    there = FirstLook.at(images, 0.8)
    assert told == [100, 100, 0]
    assert torch.allclose(there.scores, here.scores)
