"""How wide particles are, as their images tell."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from conftest import cryorecon as run
from conftest import simulated

from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import open_stack, stack_writer
from cryorecon.io.particles import read_particles
from cryorecon.io.star import read_star, write_star
from cryorecon.physics.fourier import half_plane, radius_grid
from cryorecon.run import abinitio_input
from cryorecon.run.abinitio_input import AbinitioOptions, prepared
from cryorecon.run.extent import extent_of, particle_extent
from cryorecon.run.sample import sample_of
from cryorecon.run.width import diameter_share

N, BOX = 400, 48


def discs(width, noise, generator, box=BOX):
    """Images of discs of rough texture, and noise over all of the box."""
    inside = radius_grid(box, 2).float() <= width * box / 2
    rough = torch.randn(N, box, box, generator=generator)
    rough = torch.nn.functional.avg_pool2d(rough, 3, 1, 1) * inside
    return rough + noise * torch.randn(N, box, box, generator=generator)


@pytest.mark.parametrize("box", [47, 48])
@pytest.mark.parametrize("width", [0.35, 0.5, 0.7])
@pytest.mark.parametrize("noise", [0.1, 0.6])
def test_the_width_of_what_varies_is_told(width, noise, box, generator):
    """But for the blur of what is looked at; an image's scale, level and sign say nothing."""
    images = discs(width, noise, generator, box)
    gain = torch.ones(N, len(half_plane(box)))
    found = extent_of(images, gain)
    assert width - 2.1 / box < found < width + 6.1 / box
    scale = 10 * torch.randn(N, 1, 1, generator=generator)
    assert extent_of(scale * images + 7, gain) == pytest.approx(found, abs=1e-6)


def test_noise_has_no_width(generator):
    gain = torch.ones(N, len(half_plane(BOX)))
    for seed in range(5):
        generator.manual_seed(seed)
        assert extent_of(torch.randn(N, BOX, BOX, generator=generator), gain) is None
    assert extent_of(discs(1.4, 0.1, generator), gain) is None


def test_one_bright_spot_has_no_width(generator):
    """Its ring is the strongest, and as unsure as it is strong."""
    images = torch.randn(1000, 64, 64, generator=generator)
    images[7, 31:34, 31:34] += 400
    assert extent_of(images, torch.ones(1000, len(half_plane(64)))) is None


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """4AKE, some 70 A wide, in a box of 140 A."""
    folder = simulated(tmp_path_factory.mktemp("wide"), 500, 32, 1.0)
    images = torch.from_numpy(open_stack(folder / "particles.mrcs").copy())
    border = images.std() * torch.randn(500, 58, 58, generator=torch.Generator().manual_seed(0))
    border[:, 13:45, 13:45] = images
    with stack_writer(folder / "wide.mrcs", 58, 2.4) as stack:
        stack.append(border.numpy())
    tables = read_star(folder / "particles.star")
    tables["optics"]["rlnImageSize"] = "58"
    tables["particles"]["rlnImageName"] = [f"{i + 1}@wide.mrcs" for i in range(500)]
    write_star(folder / "wide.star", tables)
    return folder / "wide.star"


def test_a_job_takes_the_diameter_that_images_tell(wide, tmp_path, monkeypatch):
    monkeypatch.chdir(wide.parent)
    ready = prepared(wide, AbinitioOptions())
    side = ready.particles.box * ready.particles.pixel_size_angst
    assert side == pytest.approx(58 * 2.4)
    assert 65 < ready.extent * side < 80
    assert ready.config.diameter == pytest.approx(1.05 * ready.extent)
    assert "as the images tell" in ready.width_text
    assert not ready.doubts
    given = prepared(wide, AbinitioOptions(diameter_angst=100.0))
    assert given.config.diameter * side == pytest.approx(100.0)
    assert given.width_text == "particle diameter 100 A"
    assert not given.doubts
    told = run("abinitio", wide, "-o", tmp_path / "no", "--dry-run", "--diameter", 40)
    assert "as if particles were" in told.stdout
    assert "a smaller --diameter cuts them" in told.stdout


@pytest.mark.parametrize(
    ("factor", "doubted"),
    [
        (1.0, ()),
        (1e-4, ("if it is in micrometres",)),
        (-1e-4, ("if it is in micrometres", "check its sign")),
        (0.1, ("if it is in nanometres",)),
        (10.0, ("so far from focus",)),
        (-1.0, ("underfocus is positive",)),
    ],
)
def test_a_defocus_of_another_unit_or_sign_is_doubted(wide, monkeypatch, factor, doubted):
    monkeypatch.chdir(wide.parent)
    tables = read_star(wide)
    for axis in "UV":
        defocus = tables["particles"][f"rlnDefocus{axis}"].astype(float)
        tables["particles"][f"rlnDefocus{axis}"] = factor * defocus
    write_star(wide.parent / "scaled.star", tables)
    told = run("abinitio", "scaled.star", "-o", "no", "--dry-run", "--diameter", 75)
    assert told.returncode == 0, told.stderr
    assert ("the median defocus is" in told.stdout) == bool(doubted)
    for words in doubted:
        assert words in " ".join(told.stdout.split())


def test_images_that_tell_nothing_leave_the_default(wide, monkeypatch):
    monkeypatch.chdir(wide.parent)
    monkeypatch.setattr(abinitio_input, "particle_extent", lambda _: None)
    ready = prepared(wide, AbinitioOptions())
    assert ready.config.diameter == 0.8
    assert ready.extent is None
    assert ready.width_text == "particle diameter 111 A, assumed: 0.8 of the box"
    assert ready.doubts == [
        "the images do not tell the particle's diameter: 0.8 of the box, 111 A, is assumed; "
        "give --diameter, or extract wider where particles fill the box"
    ]


@pytest.mark.parametrize(("side", "seen"), [(96.6, 0.93), (96.6, 0.6), (139.2, 0.6134)])
def test_the_diameter_that_is_printed_can_be_given_back(wide, monkeypatch, side, seen):
    monkeypatch.chdir(wide.parent)
    particles = replace(read_particles(wide), stored_pixel_size_angst=side / 58)
    monkeypatch.setattr(abinitio_input, "read_particles", lambda *_: particles)
    monkeypatch.setattr(abinitio_input, "particle_extent", lambda _: seen)
    told = prepared(wide, AbinitioOptions())
    printed = float(told.width_text.split()[2])
    given = prepared(wide, AbinitioOptions(diameter_angst=printed))
    assert 0 <= told.config.diameter - given.config.diameter < 1 / side


@pytest.mark.parametrize(("box", "pixel"), [(88, 1.1), (128, 1.061), (69, 1.4), (64, 1.5)])
def test_the_limits_that_an_error_states_can_be_given(wide, monkeypatch, box, pixel):
    monkeypatch.chdir(wide.parent)
    particles = replace(read_particles(wide), stored_box=box, stored_pixel_size_angst=pixel)
    with pytest.raises(CryoreconError) as caught:
        diameter_share(0.97 * box * pixel, particles)
    found = re.search(r"from (\S+) \(4 pixels\) to (\S+) \(0.95 of the box\)", caught.value.remedy)
    least, most = map(float, found.groups())
    assert 0 <= least - 4 * pixel < 0.11
    assert 0 <= 0.95 * box * pixel + 1e-6 - most < 0.11
    for angst in (least, most):
        assert diameter_share(angst, particles) == pytest.approx(angst / (box * pixel))


def test_a_stack_of_larger_images_tells_the_same(wide, monkeypatch):
    """They are looked at in a smaller box."""
    monkeypatch.chdir(wide.parent)
    particles = read_particles(wide)
    whole = particle_extent(sample_of(particles))
    monkeypatch.setattr("cryorecon.run.sample._BOX", 40)
    assert particle_extent(sample_of(particles)) == pytest.approx(whole, abs=0.07)


@pytest.mark.parametrize("engine", ["rmfn", "amortized"])
def test_a_diameter_in_the_settings_is_kept_even_if_it_is_the_default(
    wide, tmp_path, engine, monkeypatch
):
    monkeypatch.chdir(wide.parent)
    (tmp_path / "settings.yaml").write_text("diameter: 0.8\n")
    for given in (("--set", "diameter=0.8"), ("--config", tmp_path / "settings.yaml")):
        words = ("--method", engine, "--dry-run", *given)
        told = run("abinitio", wide, "-o", tmp_path / "no", *words).stdout
        assert "particle diameter 111 A" in told
        assert "as the images tell" not in told


def test_columns_that_nobody_listens_to_are_named(wide, monkeypatch):
    """In either table, unless they change nothing."""
    monkeypatch.chdir(wide.parent)
    tables = read_star(wide)
    tables["optics"] = tables["optics"].assign(rlnMagMat00="1.0", rlnMagMat01="0.012")
    tables["particles"] = tables["particles"].assign(rlnCtfScalefactor="1.000000")
    write_star(wide.parent / "stretched.star", tables)
    told = run("abinitio", "stretched.star", "-o", "no", "--dry-run", "--diameter", 75)
    assert told.returncode == 0, told.stderr
    assert "rlnMagMat01 of stretched.star are not modelled" in " ".join(told.stdout.split())
    flat, bent = "[0,0.0]", "[0,-1.5e-2]"
    tables["optics"] = tables["optics"].assign(
        rlnMagMat01="0", rlnOddZernike=flat, rlnEvenZernike=bent
    )
    write_star(wide.parent / "bent.star", tables)
    told = run("abinitio", "bent.star", "-o", "no", "--dry-run", "--diameter", 75)
    assert " rlnEvenZernike of bent.star are not modelled" in " ".join(told.stdout.split())
    assert (
        "not modelled"
        not in run("abinitio", wide, "-o", "no", "--dry-run", "--diameter", 75).stdout
    )
