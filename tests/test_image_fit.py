from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from conftest import cryorecon
from PIL import Image

from cryorecon.engines.image_fit import (
    METHODS,
    ImageFitConfig,
    fit_image,
    pixel_centres,
    psnr_db,
    spectrum_change,
)
from cryorecon.errors import CryoreconError
from cryorecon.networks.mfn import MfnConfig, ResidualMfn
from cryorecon.networks.sape import Sape
from cryorecon.run import fit_image as run_fit
from cryorecon.run.fit_image import read_image, summarise

TINY = ImageFitConfig(iterations=(40, 40, 60, 160), width=48, learning_rate=1e-2)


def scene(size):
    """A smooth picture with detail at several scales; shape (size, size, 3)."""
    x, y = pixel_centres(size).unbind(-1)
    waves = [torch.sin(2 * torch.pi * (k * x + (5 - k) * y) * f) for k, f in ((1, 1), (3, 2))]
    fine = 0.3 * torch.sin(2 * torch.pi * 9 * (x + y))
    blob = torch.exp(-((x - 0.1) ** 2 + y**2) / 0.02)
    colours = torch.stack([waves[0] + blob, waves[1] - blob, fine + blob], -1)
    return (0.5 + 0.2 * colours).reshape(size, size, 3)


@pytest.fixture(scope="module")
def fits():
    train, image = scene(64), scene(128)
    return {
        method: fit_image(train, image, method, TINY, torch.Generator().manual_seed(1))
        for method in METHODS
    }


def test_every_method_fits_and_generalises(fits):
    flat = psnr_db(scene(128).mean((0, 1)).expand(128, 128, 3), scene(128))
    for method, fit in fits.items():
        assert fit.full.shape == (128, 128, 3)
        assert fit.psnr_db == pytest.approx(psnr_db(fit.full, scene(128)))
        assert fit.psnr_db > flat + 4, method


def test_the_proposed_scheme_disturbs_the_scales_less(fits):
    """The order of the paper's table 1, as far as a short run on a small picture shows it."""
    ours = fits["residual"].spectrum_change
    assert ours[1] < 0.5 * fits["bacon-unfair"].spectrum_change[1]
    assert ours[2] < fits["bacon-fair"].spectrum_change[2]
    assert ours[2] < 0.5 * fits["bacon-unfair"].spectrum_change[2]


def test_the_last_scale_does_not_change_after_its_own_stage(fits):
    for method in ("residual", "residual-bacon", "bacon-fair", "bacon-unfair"):
        assert len(fits[method].spectrum_change) == 4
        assert fits[method].spectrum_change[-1] == 0
    assert fits["sape"].at_end == []


def test_spectrum_change_is_the_mean_modulus_of_an_unnormalised_transform():
    before = torch.zeros(8, 8, 3)
    after = before.clone()
    after[0, 0] = 2.0  # a delta of height 2 has |F| = 2 everywhere
    assert spectrum_change(before, after) == pytest.approx(2.0)


def test_psnr_is_not_clipped():
    image = torch.ones(4, 4, 3)
    assert psnr_db(image + 1, image) == pytest.approx(0.0, abs=1e-5)


def test_a_fair_step_moves_hidden_layers_through_one_scale_only(generator):
    config = MfnConfig((2, 4, 8), 8, ndim=2, residual=False, initialisation="bacon", bias=True)
    network = ResidualMfn(config, generator)
    outputs = network(pixel_centres(8), trained=0)
    outputs[2].sum().backward()
    assert network.hidden.grad is None or not network.hidden.grad.any()
    assert network.readout.grad[2].any()
    network.zero_grad()
    network(pixel_centres(8), trained=2)[2].sum().backward()
    assert network.hidden.grad.any()


@pytest.mark.parametrize("initialisation", ["proposed", "bacon"])
def test_both_initialisations_have_the_same_bands(initialisation, generator):
    config = MfnConfig((2, 5, 11), 64, ndim=2, initialisation=initialisation)
    reach = ResidualMfn(config, generator).frequencies.abs().amax((1, 2)).cumsum(0)
    assert torch.equal(reach, torch.tensor([2, 5, 11]))


def test_sape_lets_features_in_from_coarse_to_fine(generator):
    network = Sape(8, 16, 16, 2, 2, 3, generator)
    norms = network.frequencies.norm(dim=-1)
    assert torch.equal(norms, norms.sort().values)
    points = pixel_centres(6)
    closed = network(points, torch.zeros(36))
    assert not torch.allclose(closed, network(points, torch.ones(36)))


def test_pictures_are_cut_square_and_halved(tmp_path):
    pixels = np.zeros((21, 31, 3), np.uint8)
    pixels[:, :, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    train, full = read_image(tmp_path / "a.png", None)
    assert full.shape == (20, 20, 3)
    assert train.shape == (10, 10, 3)
    assert torch.allclose(train[..., 0], torch.ones(10, 10))
    assert read_image(tmp_path / "a.png", 16)[1].shape == (16, 16, 3)


def test_pictures_of_more_bits_are_read_to_scale(tmp_path):
    """Pillow cuts them off at 255."""
    grey = np.linspace(0, 1, 400).reshape(20, 20)
    for name, values in (
        ("a.png", (grey * 65535).astype(np.uint16)),
        ("b.tif", (grey * 65535).astype(np.uint16)),
        ("c.tif", grey.astype(np.float32)),
        ("d.png", (grey * 255).round().astype(np.uint8)),
    ):
        Image.fromarray(values).save(tmp_path / name)
        full = read_image(tmp_path / name, None)[1]
        assert np.abs(full[..., 1].numpy() - grey).max() < 0.004
    Image.fromarray(np.full((20, 20), 300, np.float32)).save(tmp_path / "e.tif")
    with pytest.raises(CryoreconError, match="values from 300 to 300"):
        read_image(tmp_path / "e.tif", None)


def test_means_and_deviations_are_over_images():
    rows = [{"image": n, "method": "sape", "psnr_db": v} for n, v in (("a", 20.0), ("b", 22.0))]
    (line,) = summarise(rows)
    assert line["psnr_db"] == 21
    assert line["psnr_db_std"] == pytest.approx(2**0.5)


def test_the_command_writes_pictures_and_tables(tmp_path):
    picture = (scene(32).clamp(0, 1) * 255).byte().numpy()
    Image.fromarray(picture).save(tmp_path / "p.png")
    done = cryorecon(
        "fit-image", "p.png", "-o", "out", "--width", 8, "--iterations", "3,3,4",
        "--method", "residual", "--method", "sape", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["residual", "sape"]
    assert float(rows[0]["spectrum_change_2"]) > 0
    folder = tmp_path / "out" / "p" / "residual"
    for name, side in (("full_size.png", 32), ("scale2_stage_end_spectrum.png", 16)):
        with Image.open(folder / name) as picture:
            assert picture.size == (side, side)
    for arguments, words in (
        (("none.png",), "does not exist"),
        (("p.png", "--method", "siren"), "Unknown method siren"),
        (("p.png", "--size", "31"), "odd"),
        (("p.png", "--learning-rate", "nan"), "not positive"),
        (("p.png", "sub/p.png"), "would be written to one folder"),
        (("p.png", "--iterations", "3,x"), "not a list"),
        (("p.png", "--iterations", "3,3,3,3"), "too few frequencies for 4 scales"),
    ):
        done = cryorecon("fit-image", *arguments, "-o", "no", cwd=tmp_path)
        assert done.returncode == 1
        assert words in done.stderr
    assert not (tmp_path / "no" / "fits.csv").exists()


def test_what_is_done_stays_when_a_later_method_is_interrupted(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    fit = run_fit.fit_image

    def until_sape(train, full, method, *rest):
        if method == "sape":
            raise KeyboardInterrupt
        return fit(train, full, method, *rest)

    monkeypatch.setattr(run_fit, "fit_image", until_sape)
    done = cryorecon("fit-image", "p.png", "-o", "out", "--width", 8, "--iterations", "2,2,2",
                     "--method", "residual", "--method", "sape", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 3
    with open(tmp_path / "out" / "fits.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["residual"]
