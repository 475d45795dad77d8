"""`cryorecon moments` through the command line, with real files."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODEL, cryorecon
from typer.testing import CliRunner

from cryorecon.cli.main import app, main
from cryorecon.errors import CryoreconError
from cryorecon.io.moments_file import MomentsData, read_moments_data, write_moments
from cryorecon.io.mrc import stack_writer
from cryorecon.io.particles import read_particles
from cryorecon.io.star import read_star, write_star
from cryorecon.run.moments.estimate import (
    MomentsOptions,
    estimate_moments,
    resolve_geometry,
    state_path,
)
from cryorecon.run.moments.reader import centred_images
from cryorecon.run.moments.store import merge_moments, read_moments
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig
from cryorecon.run.stopping import StoppedError


def run(*arguments):
    """Run in this process; errors that a user can mend are raised."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(result.exception, CryoreconError):
        raise result.exception
    return result


def _star(folder: Path, stack: Path, name: str, rows: slice, groups: int = 2) -> Path:
    """Part of a stack, its images in alternate optics groups of unlike microscopes."""
    tables = read_star(stack / "particles.star")
    particles = tables["particles"].iloc[rows].reset_index(drop=True)
    particles["rlnImageName"] = [
        f"{i.split('@')[0]}@{stack / 'particles.mrcs'}" for i in particles["rlnImageName"]
    ]
    particles["rlnOpticsGroup"] = 1 + np.arange(len(particles)) % groups
    optics = pd.concat([tables["optics"]] * groups, ignore_index=True)
    optics["rlnOpticsGroup"] = np.arange(groups) + 1
    optics["rlnVoltage"] = [300, 200][:groups]
    write_star(folder / name, {"optics": optics, "particles": particles})
    return folder / name


@pytest.mark.parametrize("form", ["steerable", "full"])
def test_halves_merge_to_the_whole(tmp_path, stack_32, form):
    whole = _star(tmp_path, stack_32, "whole.star", slice(0, 600))
    first = _star(tmp_path, stack_32, "first.star", slice(0, 256))
    second = _star(tmp_path, stack_32, "second.star", slice(256, 600))
    small = ["--form", form, "--max-radius", 6, "--diameter", 56]
    for star in (whole, first, second):
        done = run("moments", "estimate", star, "-o", star.with_suffix(".h5"), *small)
        assert done.exit_code == 0, done.output
        assert "of its norm" in done.output
    assert not list(tmp_path.glob("*.partial.h5"))
    a, b, c, w = (tmp_path / f"{n}.h5" for n in ("first", "second", "merged", "whole"))
    done = run("moments", "merge", a, b, "-o", c)
    assert done.exit_code == 0, done.output
    merged, expected = read_moments(c), read_moments(w)
    assert merged.n_images == 600
    for name in ("first", "second", "second_error", "noise", "conditioning"):
        one, other = getattr(merged, name), getattr(expected, name)
        assert (one - other).norm() < 1e-6 * other.norm(), name
    with pytest.raises(CryoreconError, match="exists"):
        run("moments", "merge", a, b, "-o", c)
    with pytest.raises(CryoreconError, match="same STAR file"):
        run("moments", "merge", c, a, "-o", tmp_path / "d.h5")


def test_files_of_other_geometry_are_not_merged(tmp_path, stack_32):
    files = []
    for number, options in enumerate((MomentsOptions(max_radius=5), MomentsOptions(max_radius=4))):
        rows = slice(100 * number, 100 * number + 60)
        star = _star(tmp_path, stack_32, f"{number}.star", rows, 1)
        files.append(tmp_path / f"{number}.h5")
        estimate_moments(star, files[-1], options)
    with pytest.raises(CryoreconError, match="max_radius is 5 in one and 4 in the other"):
        merge_moments(*files, tmp_path / "m.h5")
    assert not (tmp_path / "m.h5").exists()


def test_an_interrupted_run_goes_on_to_the_same_sums(tmp_path, stack_32, monkeypatch, capsys):
    star = _star(tmp_path, stack_32, "p.star", slice(0, 500))
    options = MomentsOptions(max_radius=6, checkpoint_images=128)
    whole = estimate_moments(star, tmp_path / "whole.h5", options)

    def stop(done, total):
        if done == 256:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(StoppedError, match="256 of 500 images"):
        estimate_moments(star, tmp_path / "m.h5", options, progress=stop)
    state = state_path(tmp_path / "m.h5")
    assert state.exists()
    with pytest.raises(CryoreconError, match="is not finished"):
        read_moments(state)
    with pytest.raises(CryoreconError, match="begun with max_radius = 6, now it is 5"):
        estimate_moments(star, tmp_path / "m.h5", MomentsOptions(max_radius=5), resume=True)
    other = _star(tmp_path, stack_32, "q.star", slice(0, 400))
    with pytest.raises(CryoreconError, match="another STAR file"):
        estimate_moments(other, tmp_path / "m.h5", options, resume=True)
    again = estimate_moments(star, tmp_path / "m.h5", options, resume=True)
    assert torch.equal(again.second, whole.second)
    assert torch.equal(again.first_error, whole.first_error)
    assert not state.exists()
    # What is finished is told again, and not of others.
    told = estimate_moments(star, tmp_path / "m.h5", options, resume=True)
    assert torch.equal(told.second, whole.second)
    command = "moments", "estimate", star, "-o", tmp_path / "m.h5", "--continue"
    assert "500 images" in cryorecon(*command, "--max-radius", 6).stdout
    assert "m.h5 exists" in cryorecon(*command[:-1], "--max-radius", 6).stderr
    for path, given in [(other, options), (star, MomentsOptions(max_radius=5))]:
        with pytest.raises(CryoreconError, match="to continue from"):
            estimate_moments(path, tmp_path / "m.h5", given, resume=True)

    # The same through the command: exit status 3 and the command to go on with.
    def stop_at_once(*_):
        raise StoppedError(f"1 of 2 images are in {state}")

    monkeypatch.setattr("cryorecon.run.moments.estimate.estimate_moments", stop_at_once)
    monkeypatch.setattr(sys, "argv", ["cryorecon", "moments", "estimate", "p.star", "-o", "x.h5"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 3
    assert "cryorecon moments estimate p.star -o x.h5 --continue" in capsys.readouterr().err


def test_a_crash_leaves_the_last_state(tmp_path, stack_32):
    star = _star(tmp_path, stack_32, "p.star", slice(0, 500))
    options = MomentsOptions(max_radius=4, checkpoint_images=128)

    def crash(done, total):
        if done == 384:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        estimate_moments(star, tmp_path / "m.h5", options, progress=crash)
    assert not (tmp_path / "m.h5").exists()
    again = estimate_moments(star, tmp_path / "m.h5", options, resume=True)
    whole = estimate_moments(star, tmp_path / "w.h5", options)
    assert torch.equal(again.second, whole.second)


def test_the_file_describes_itself_and_comes_back(tmp_path, stack_32):
    star = _star(tmp_path, stack_32, "p.star", slice(0, 80))
    found = estimate_moments(star, tmp_path / "m.h5", MomentsOptions(max_radius=4))
    back = read_moments(tmp_path / "m.h5")
    assert back.geometry == found.geometry
    assert torch.equal(back.second, found.second)
    with h5py.File(tmp_path / "m.h5") as file:
        assert file.attrs["format"] == b"cryorecon-moments"
        assert file.attrs["pixel_size_angst"] == pytest.approx(2.4)
        for name in ("first", "second", "second_error", "radii_per_angst"):
            assert len(file[f"moments/{name}"].attrs["about"]) > 10
        side = file.attrs["side_angst"]
        assert file["moments/radii_per_angst"][()] == pytest.approx(np.arange(1, 5) / side)


def test_damaged_and_foreign_files_are_refused(tmp_path, stack_32):
    star = _star(tmp_path, stack_32, "p.star", slice(0, 60))
    good = tmp_path / "m.h5"
    estimate_moments(star, good, MomentsOptions(max_radius=4))
    raw = good.read_bytes()
    cut, text, foreign, newer = (tmp_path / f"{n}.h5" for n in ("cut", "text", "foreign", "newer"))
    cut.write_bytes(raw[: len(raw) // 2])
    text.write_text("not HDF5")
    with h5py.File(foreign, "w") as file:
        file["data"] = np.zeros(3)
    newer.write_bytes(raw)
    with h5py.File(newer, "r+") as file:
        file.attrs["version"] = 2
    for path, words in (
        (cut, "cannot be read as a moments file"),
        (text, "cannot be read as a moments file"),
        (foreign, "holds no moments"),
        (newer, "version 2"),
        (tmp_path / "none.h5", "does not exist"),
        (tmp_path, "is a directory"),
    ):
        with pytest.raises(CryoreconError, match=words):
            run("moments", "merge", path, good, "-o", tmp_path / "x.h5")
    data = read_moments_data(good)
    arrays = {k: v for k, v in data.arrays.items() if k != "sums/second"}
    write_moments(cut, MomentsData(data.attributes, arrays))
    with pytest.raises(CryoreconError, match="lacks sums/second"):
        run("moments", "merge", cut, good, "-o", tmp_path / "x.h5")
    attributes = {k: v for k, v in data.attributes.items() if k != "side_angst"}
    write_moments(cut, MomentsData(attributes, data.arrays))
    with pytest.raises(CryoreconError, match="side_angst"):
        run("moments", "merge", cut, good, "-o", tmp_path / "x.h5")
    assert not (tmp_path / "x.h5").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "x.txt"], "HDF5"),
        (["-o", "no/x.h5"], "does not exist"),
        (["-o", "x.h5", "--diameter", 500], "does not fit"),
        (["-o", "x.h5", "--max-radius", 16], "1 to 15"),
        (["-o", "x.h5", "--resolution", 4.0], "1 to 15"),
        (["-o", "x.h5", "--device", "abacus"], "--device abacus"),
        (["-o", "x.h5", "--continue"], "no x.partial.h5 to continue"),
        (["-o", "x.h5", "--noise-std", 1000], "--noise-std 1000 is more than all"),
    ],
)
def test_bad_options_are_told(tmp_path, stack_32, arguments, words, monkeypatch):
    star = _star(tmp_path, stack_32, "p.star", slice(0, 20))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CryoreconError, match=words):
        run("moments", "estimate", star, *arguments)
    assert not (tmp_path / "x.h5").exists()


def test_usage_errors_exit_with_2():
    assert run("moments", "estimate").exit_code == 2
    words = "moments", "estimate", "p.star", "-o", "x.h5"
    assert run(*words, "--form", "round").exit_code == 2
    nowhere = run(*words, "--project", "no/such/folder")
    assert nowhere.exit_code == 2
    assert "no/such/folder" in nowhere.output


def test_a_missing_ctf_needs_no_ctf(tmp_path, stack_32):
    star = _star(tmp_path, stack_32, "p.star", slice(0, 40))
    tables = read_star(star)
    tables["particles"] = tables["particles"].drop(columns=["rlnDefocusU"])
    write_star(star, tables)
    with pytest.raises(CryoreconError, match="rlnDefocusU"):
        run("moments", "estimate", star, "-o", tmp_path / "x.h5")
    done = run("moments", "estimate", star, "-o", tmp_path / "x.h5", "--no-ctf")
    assert done.exit_code == 0, done.output


def test_a_blank_image_is_named(tmp_path, generator):
    images = torch.randn(5, 16, 16, generator=generator).numpy()
    images[3] = 1.0
    with stack_writer(tmp_path / "s.mrcs", 16, 4.0) as stack:
        stack.append(images)
    optics = pd.DataFrame([{"rlnOpticsGroup": 1, "rlnImagePixelSize": 4.0, "rlnImageSize": 16}])
    names = [f"{i + 1}@{tmp_path / 's.mrcs'}" for i in range(5)]
    particles = pd.DataFrame({"rlnImageName": names, "rlnOpticsGroup": 1})
    write_star(tmp_path / "p.star", {"optics": optics, "particles": particles})
    with pytest.raises(CryoreconError, match="row 4: the image is blank"):
        run("moments", "estimate", tmp_path / "p.star", "-o", tmp_path / "x.h5", "--no-ctf")
    assert not list(tmp_path.glob("*.h5"))


def test_origins_are_undone_up_to_part_pixels(generator):
    image = torch.randn(1, 9, 9, generator=generator)
    # The particle lies at minus the origin.
    moved = image.roll((-2, 3), (1, 2))
    back, rest = centred_images(moved, torch.tensor([[-3.25, 2.25]]))
    assert torch.equal(back, image)
    assert torch.allclose(rest, torch.tensor([[-0.25, 0.25]]))
    assert centred_images(image, torch.zeros(1, 2))[1] is None


def test_particles_off_centre_have_the_moments_of_centred_ones(tmp_path):
    """What lies outside a particle is told once it is in the middle, not its signal for noise."""
    shape = {"n_particles": 300, "box": 32, "pixel_size_angst": 4.0, "snr": 1.0, "seed": 3}
    simulate(MODEL, tmp_path / "s", SimulateConfig(**shape, shift_angst=40.0))
    star = tmp_path / "s" / "particles.star"
    tables = read_star(star)
    particles = read_particles(star)
    whole = np.rint(particles.origins_angst() / 4.0).astype(int)
    images = particles.images(np.arange(300))
    with stack_writer(tmp_path / "rolled.mrcs", 32, 4.0) as stack:
        for image, (x, y) in zip(images, whole, strict=True):
            stack.append(np.roll(image, (y, x), (0, 1))[None])
    left = particles.origins_angst() - 4.0 * whole
    names = [f"{k + 1}@{tmp_path / 'rolled.mrcs'}" for k in range(300)]
    tables["particles"] = tables["particles"].assign(
        rlnImageName=names, rlnOriginXAngst=left[:, 0], rlnOriginYAngst=left[:, 1]
    )
    write_star(tmp_path / "rolled.star", tables)
    options = MomentsOptions(max_radius=5, diameter_angst=70.0)
    found = estimate_moments(star, tmp_path / "a.h5", options)
    expected = estimate_moments(tmp_path / "rolled.star", tmp_path / "b.h5", options)
    torch.testing.assert_close(found.second, expected.second, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.first, expected.first, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["steerable", "full"])
def test_a_level_changes_nothing_where_the_noise_is_given(tmp_path, stack_32, form):
    star = _star(tmp_path, stack_32, "p.star", slice(0, 300), 1)
    particles = read_particles(star)
    images = particles.images(np.arange(300)) + 25.0
    with stack_writer(tmp_path / "raised.mrcs", particles.box, particles.pixel_size_angst) as stack:
        stack.append(images)
    tables = read_star(star)
    names = [f"{k + 1}@{tmp_path / 'raised.mrcs'}" for k in range(300)]
    tables["particles"] = tables["particles"].assign(rlnImageName=names)
    write_star(tmp_path / "raised.star", tables)
    options = MomentsOptions(form=form, max_radius=4, noise_std=0.5)
    found = estimate_moments(tmp_path / "raised.star", tmp_path / "a.h5", options)
    expected = estimate_moments(star, tmp_path / "b.h5", options)
    near = {"rtol": 1e-3, "atol": 1e-3 * float(expected.second.abs().max())}
    torch.testing.assert_close(found.second, expected.second, **near)


def test_black_particles_are_told_from_white_ones(tmp_path, stack_32):
    star = _star(tmp_path, stack_32, "p.star", slice(0, 600), 1)
    white = estimate_moments(star, tmp_path / "w.h5", MomentsOptions(max_radius=5))
    forced = MomentsOptions(max_radius=5, contrast="black")
    black = estimate_moments(star, tmp_path / "b.h5", forced)
    assert white.first[0] > 0
    assert torch.equal(black.first, -white.first)
    assert torch.equal(black.second, white.second)


def test_the_geometry_follows_the_options():
    plain = resolve_geometry(MomentsOptions(), 64, 1.2)
    assert plain.side_angst == pytest.approx(76.8)
    assert (plain.max_radius, plain.max_order) == (16, 42)
    padded = resolve_geometry(MomentsOptions(diameter_angst=40.0, resolution_angst=10.0), 64, 1.2)
    assert padded.side_angst == pytest.approx(50.0)
    assert padded.max_radius == 5
    assert float(padded.image_grid().radii[-1]) == pytest.approx(5 / 50 * 76.8)
    full = resolve_geometry(MomentsOptions(form="full", resolution_angst=10.0), 64, 1.2)
    assert (full.max_radius, full.max_order, full.side_angst) == (7, 0, pytest.approx(76.8))
