"""Fourier shell correlation: definition, shells, crossings, and the files that hold it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from cryorecon.io.mrc import write_map
from cryorecon.io.star import read_star
from cryorecon.maps.fsc import crossing_shell, fsc_curve, masked_fsc, resolution_at
from cryorecon.physics.fourier import fft_centred, ifft_centred, lowpass, radius_grid
from cryorecon.physics.masks import soft_ball
from cryorecon.run.curves import (
    FscCurve,
    fsc_as_dict,
    read_fsc_star,
    write_fsc_star,
    write_fsc_xml,
    write_json,
)


def noise(box: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(box, box, box, generator=generator, dtype=torch.float64)


def plane_wave(box: int, k: tuple[int, int, int]) -> torch.Tensor:
    axis = (torch.arange(box) - box // 2).double()
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return torch.cos(2 * torch.pi / box * (k[0] * x + k[1] * y + k[2] * z))


@pytest.mark.parametrize("box", [24, 25])
def test_identical_maps_correlate_fully_at_every_shell(box: int) -> None:
    curve = fsc_curve(noise(box, 0), noise(box, 0))
    assert curve.shape == (box // 2 + 1,)
    torch.testing.assert_close(curve, torch.ones_like(curve))


@pytest.mark.parametrize("box", [24, 25])
def test_scale_leaves_the_curve_and_sign_inverts_it(box: int) -> None:
    first, second = noise(box, 0), noise(box, 0) + noise(box, 1)
    curve = fsc_curve(first, second)
    torch.testing.assert_close(fsc_curve(1e4 * first, 1e-6 * second), curve)
    torch.testing.assert_close(fsc_curve(first, -second), -curve)


@pytest.mark.parametrize("box", [32, 33])
def test_independent_noise_stays_within_its_standard_error(box: int) -> None:
    shells = (radius_grid(box, 3) + 0.5).long().flatten()
    independent = torch.bincount(shells)[: box // 2 + 1] / 2
    inside = total = 0
    for seed in range(6):
        score = fsc_curve(noise(box, 2 * seed), noise(box, 2 * seed + 1)) * independent.sqrt()
        # Of a real correlation of n complex pairs the standard error is sqrt(1 / (2 n)).
        normal = score[3:] * math.sqrt(2)
        assert normal.abs().max() < 4.5
        inside += int((normal.abs() < 1).sum())
        total += len(normal)
    assert 0.55 < inside / total < 0.8


def test_noise_of_known_power_gives_the_textbook_correlation() -> None:
    signal, ratio = noise(40, 0), 2.0
    first, second = (signal + noise(40, seed) / math.sqrt(ratio) for seed in (1, 2))
    curve = fsc_curve(first, second)
    assert curve[4:].mean() == pytest.approx(ratio / (ratio + 1), abs=0.01)
    assert fsc_curve(first, signal)[4:].mean() == pytest.approx((2 / 3) ** 0.5, abs=0.01)


@pytest.mark.parametrize("box", [32, 33])
def test_truncated_band_is_one_inside_and_zero_outside(box: int) -> None:
    full = noise(box, 0)
    radius = radius_grid(box, 3)
    cut = ifft_centred(fft_centred(full, 3) * (radius < 9.5), 3).real
    curve = fsc_curve(full, cut)
    torch.testing.assert_close(curve[:10], torch.ones(10, dtype=torch.float64))
    assert torch.equal(curve[10:], torch.zeros_like(curve[10:]))
    # Linear between shell 9 (1) and shell 10 (0).
    assert crossing_shell(curve, 0.143) == pytest.approx(9 + 0.857)
    assert resolution_at(curve, 0.5, box, 2.0) == pytest.approx(2.0 * box / 9.5)


@pytest.mark.parametrize(
    ("k", "shell"),
    [((3, 4, 0), 5), ((1, 1, 0), 1), ((1, 1, 1), 2), ((-2, 3, 4), 5), ((0, 0, 7), 7)],
)
@pytest.mark.parametrize("box", [16, 17])
def test_shells_are_radii_rounded_to_the_nearest_integer(
    box: int, k: tuple[int, int, int], shell: int
) -> None:
    wave = plane_wave(box, k)
    expected = torch.zeros(box // 2 + 1, dtype=torch.float64)
    expected[shell] = 1
    torch.testing.assert_close(fsc_curve(wave, wave), expected)


def test_single_and_double_precision_agree() -> None:
    first, second = noise(24, 0), noise(24, 0) + noise(24, 1)
    single = fsc_curve(first.float(), second.float())
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, fsc_curve(first, second), atol=1e-6, rtol=0)


def test_mask_removes_what_differs_outside_it() -> None:
    box = 32
    inside = (radius_grid(box, 3) < 10).double()
    first = noise(box, 0)
    second = first * inside + noise(box, 1) * (1 - inside)
    assert fsc_curve(first, second)[5:].mean() < 0.5
    torch.testing.assert_close(
        fsc_curve(first, second, inside), torch.ones(box // 2 + 1, dtype=torch.float64)
    )


def test_an_empty_map_correlates_with_nothing() -> None:
    assert torch.equal(
        fsc_curve(noise(16, 0), torch.zeros(16, 16, 16)), torch.zeros(9, dtype=torch.float64)
    )


def test_differing_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        fsc_curve(noise(16, 0), noise(17, 0))


def test_crossing_is_the_first_and_interpolated() -> None:
    curve = torch.tensor([1.0, 1.0, 0.8, 0.3, 0.9, 0.1])
    assert crossing_shell(curve, 0.5) == pytest.approx(2.6)
    assert resolution_at(curve, 0.5, 10, 1.5) == pytest.approx(15 / 2.6)


def test_curves_that_never_cross_say_so() -> None:
    assert resolution_at(torch.full((6,), 0.9), 0.143, 10, 1.5) == pytest.approx(3.0)
    assert resolution_at(torch.tensor([1.0, 0.1, 0.9]), 0.143, 10, 1.5) == math.inf


def curve_of_noisy_maps(mask: str | None = None) -> FscCurve:
    values = fsc_curve(noise(32, 0), noise(32, 0) + noise(32, 1))
    return FscCurve(values, 32, 1.5, "a.mrc and b.mrc", mask)


def test_star_holds_the_curve_in_relions_columns(tmp_path: Path) -> None:
    curve = curve_of_noisy_maps()
    write_fsc_star(tmp_path / "fsc.star", curve, threshold=0.5)
    blocks = read_star(tmp_path / "fsc.star")
    table = blocks["fsc"].astype(float)
    assert list(table) == [
        "rlnSpectralIndex",
        "rlnResolution",
        "rlnAngstromResolution",
        "rlnFourierShellCorrelationUnmaskedMaps",
    ]
    np.testing.assert_allclose(table.iloc[:, 3], curve.values, atol=1e-6)
    np.testing.assert_allclose(table["rlnAngstromResolution"][1:], 48 / np.arange(1, 17), atol=1e-6)
    assert table["rlnAngstromResolution"][0] == 999
    final = float(blocks["general"]["rlnFinalResolution"].iloc[0])
    assert final == pytest.approx(curve.resolution_angst(0.5), abs=1e-5)
    head = (tmp_path / "fsc.star").read_text()[:200]
    assert "no mask, maps not aligned" in head
    assert "falls below 0.5" in head


def test_masked_curve_stands_under_the_masked_label(tmp_path: Path) -> None:
    write_fsc_star(tmp_path / "fsc.star", curve_of_noisy_maps("my mask.mrc"))
    blocks = read_star(tmp_path / "fsc.star")
    assert "rlnFourierShellCorrelationMaskedMaps" in blocks["fsc"]
    assert blocks["general"]["rlnMaskName"].iloc[0] == "my_mask.mrc"


def test_xml_is_what_the_emdb_takes(tmp_path: Path) -> None:
    curve = curve_of_noisy_maps("a<b>.mrc")
    write_fsc_xml(tmp_path / "fsc.xml", curve)
    root = ElementTree.parse(tmp_path / "fsc.xml").getroot()
    assert root.tag == "fsc"
    assert root.attrib["xaxis"] == "Resolution (A-1)"
    assert root.attrib["yaxis"] == "Correlation Coefficient"
    assert "mask a<b>.mrc, maps not aligned" in root.attrib["title"]
    points = [(float(c.findtext("x", "")), float(c.findtext("y", ""))) for c in root]
    np.testing.assert_allclose([x for x, _ in points], np.arange(17) / 48, atol=1e-6)
    np.testing.assert_allclose([y for _, y in points], curve.values, atol=1e-6)


def test_json_turns_infinity_into_null(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 0.3, 0.2])
    write_json(tmp_path / "a.json", fsc_as_dict(FscCurve(values, 4, 1.0, "a and b")))
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["resolution_angst"]["0.5"] is None
    assert data["resolution_angst"]["0.143"] == pytest.approx(2.0)
    assert data["shells"][0]["resolution_angst"] is None
    assert data["shells"][1] == pytest.approx({"shell": 1, "resolution_angst": 4.0, "fsc": 0.3})


@pytest.mark.skipif(shutil.which("relion_image_handler") is None, reason="RELION is not installed")
@pytest.mark.parametrize("box", [24, 32])
def test_relion_computes_the_same_curve(tmp_path: Path, box: int) -> None:
    first = noise(box, 0)
    second = first + noise(box, 1)
    for name, volume in (("a.mrc", first), ("b.mrc", second)):
        write_map(tmp_path / name, volume.numpy(), 1.5)
    answer = subprocess.run(
        ["relion_image_handler", "--i", "a.mrc", "--fsc", "b.mrc"],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    rows = [line.split() for line in answer.stdout.splitlines() if len(line.split()) == 4]
    theirs = np.array([[float(v) for v in row] for row in rows if row[0].isdigit()])
    assert len(theirs) == box // 2 + 1
    ours = fsc_curve(first.float(), second.float()).numpy()
    # RELION halves the transform along x and counts the plane kx = 0 twice: shells of few
    # coefficients differ a little.
    np.testing.assert_allclose(theirs[1:, 3], ours[1:], atol=0.04)
    np.testing.assert_allclose(theirs[5:, 3], ours[5:], atol=0.01)
    np.testing.assert_allclose(theirs[1:, 2], [1.5 * box / s for s in range(1, box // 2 + 1)], 1e-5)


@pytest.mark.skipif(shutil.which("relion_star_printtable") is None, reason="RELION not installed")
def test_relion_reads_our_star(tmp_path: Path) -> None:
    curve = curve_of_noisy_maps()
    write_fsc_star(tmp_path / "fsc.star", curve)
    column = "_rlnFourierShellCorrelationUnmaskedMaps"
    answer = subprocess.run(
        ["relion_star_printtable", "fsc.star", "data_fsc", column],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    values = [float(word) for word in answer.stdout.split()]
    np.testing.assert_allclose(values, curve.values, atol=1e-6)


@pytest.mark.parametrize("level", [0.3, 1.0])
def test_what_a_tight_mask_brings_is_taken_out(level: float) -> None:
    """Half maps share nothing beyond shell 8; the mask carries it on to Nyquist."""
    box, end = 48, 8
    signal = lowpass(noise(box, 5) * soft_ball(box, 12, 4, 3), end, 3)
    mask = (lowpass(signal.abs(), end, 3) > 0.3 * signal.abs().max()).float()
    spread = level * signal.std()
    first, second = (signal + spread * noise(box, seed) for seed in (6, 7))
    found = masked_fsc(first, second, mask, torch.Generator().manual_seed(0))
    beyond = slice(end + 4, None)
    assert float(found.masked[beyond].mean()) > 0.25
    assert abs(float(found.corrected[beyond].mean())) < 0.06
    assert float(found.corrected[1 : end - 1].min()) > 0.7
    torch.testing.assert_close(found.masked, fsc_curve(first, second, mask))
    torch.testing.assert_close(found.unmasked, fsc_curve(first, second))
    assert float((found.corrected - found.masked).max()) <= 0


def test_a_wide_mask_brings_nothing_and_like_maps_stay_alike() -> None:
    volume, ball = noise(32, 0), soft_ball(32, 12, 4, 3)
    generator = torch.Generator().manual_seed(0)
    same = masked_fsc(volume, volume, ball, generator)
    torch.testing.assert_close(same.corrected, torch.ones(17, dtype=torch.float64))
    other = masked_fsc(volume, volume + noise(32, 1), torch.ones(32, 32, 32), generator)
    assert float((other.corrected - other.masked).abs()[4:].max()) < 0.1


def test_masked_curve_is_written_with_its_parts_and_read_back(tmp_path: Path) -> None:
    maps = noise(32, 0), noise(32, 0) + noise(32, 1)
    parts = masked_fsc(*maps, soft_ball(32, 10, 3, 3), torch.Generator().manual_seed(0))
    curve = FscCurve(parts.corrected, 32, 1.5, "these", "ball.mrc", parts=parts)
    write_fsc_star(tmp_path / "fsc.star", curve)
    table = read_star(tmp_path / "fsc.star")["fsc"]
    assert list(table)[3:] == [
        "rlnFourierShellCorrelationCorrected",
        "rlnFourierShellCorrelationUnmaskedMaps",
        "rlnFourierShellCorrelationMaskedMaps",
        "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
    ]
    found = read_fsc_star(tmp_path / "fsc.star", 32, 1.5)
    assert (found.mask, found.conditions) == ("ball.mrc", curve.conditions)
    assert "its effect taken out" in found.conditions
    assert found.parts is not None
    for name, values in vars(parts).items():
        torch.testing.assert_close(getattr(found.parts, name), values, atol=1e-6, rtol=0)
    assert fsc_as_dict(curve)["shells"][12]["randomised"] == float(parts.randomised[12])


@pytest.mark.skipif(shutil.which("relion_postprocess") is None, reason="RELION not installed")
def test_relion_takes_out_as_much(tmp_path: Path) -> None:
    box, mask = 48, soft_ball(48, 14, 3, 3).float()
    signal = lowpass(noise(box, 5) * soft_ball(box, 10, 4, 3), 8, 3)
    halves = [signal + 0.5 * signal.std() * noise(box, seed) for seed in (6, 7)]
    names = [f"x_half{number}_class001_unfil.mrc" for number in (1, 2)]
    for name, volume in zip([*names, "mask.mrc"], [*halves, mask], strict=True):
        write_map(tmp_path / name, volume.float().numpy(), 1.5)
    words = ["relion_postprocess", "--i", names[0], "--mask", "mask.mrc", "--angpix", "1.5"]
    (tmp_path / "pp").mkdir()  # Else it cannot write its pictures.
    subprocess.run([*words, "--o", "pp"], cwd=tmp_path, check=True, capture_output=True)
    theirs = read_star(tmp_path / "pp.star")["fsc"]["rlnFourierShellCorrelationCorrected"]
    found = masked_fsc(*halves, mask, torch.Generator().manual_seed(0))
    # Random phases differ; shells of many coefficients hardly do.
    wanted = theirs.astype(float).to_numpy()[: box // 2 + 1]
    np.testing.assert_allclose(found.corrected[5:24], wanted[5:24], atol=0.12)
