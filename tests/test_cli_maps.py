"""The commands fsc and compare-poses on real files, and the pictures they draw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from click.testing import Result
from matplotlib.figure import Figure
from torch import Tensor
from typer.testing import CliRunner

from cryorecon.cli.command import Command
from cryorecon.cli.compare_poses import compare_poses
from cryorecon.cli.fsc import fsc
from cryorecon.conventions import matrix_to_euler
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map, write_map
from cryorecon.io.star import read_star, write_star
from cryorecon.maps.align import mirror_map, rotate_map
from cryorecon.maps.fsc import fsc_curve, resolution_at
from cryorecon.maps.poses import mirror_poses, rotate_poses, shift_origins
from cryorecon.physics.fourier import lowpass, radius_grid
from cryorecon.physics.rotations import exp_map, random_rotations
from cryorecon.run.compare_poses import compare_pose_files, read_pose_table
from cryorecon.run.plots import map_figure, save_figure, viewing_direction_figure

PIXEL_SIZE = 1.7
runner = CliRunner()


def run(command: object, *arguments: object) -> Result:
    app = typer.Typer()
    app.command(cls=Command)(command)  # type: ignore[type-var]
    return runner.invoke(app, [str(a) for a in arguments], terminal_width=120)


def error_of(result: Result) -> CryoreconError:
    assert isinstance(result.exception, CryoreconError), result.output
    return result.exception


def random_map(box: int, seed: int) -> Tensor:
    """Filtered noise inside a ball: detail everywhere, empty corners."""
    noise = torch.randn(
        box, box, box, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return lowpass(noise * (radius_grid(box, 3) < 0.32 * box), box / 4, 3)


@pytest.fixture
def maps(tmp_path: Path) -> tuple[Path, Path, Tensor, Tensor]:
    first = random_map(24, 0)
    second = first + 0.5 * first.std() * random_map(24, 1) / random_map(24, 1).std()
    paths = tmp_path / "a.mrc", tmp_path / "b.mrc"
    for path, volume in zip(paths, (first, second), strict=True):
        write_map(path, volume.numpy(), PIXEL_SIZE)
    return *paths, first, second


def test_fsc_prints_and_writes_the_curve(
    tmp_path: Path, maps: tuple[Path, Path, Tensor, Tensor]
) -> None:
    a, b, first, second = maps
    out = {name: tmp_path / f"out.{name}" for name in ("star", "xml", "json")}
    plot = tmp_path / "plot.png"
    options = [part for name, path in out.items() for part in (f"--{name}", path)]
    result = run(fsc, a, b, *options, "--plot", plot)
    assert result.exit_code == 0, result.output
    curve = fsc_curve(first.float(), second.float())
    expected = resolution_at(curve, 0.5, 24, PIXEL_SIZE)
    assert f"FSC = 0.5 at {expected:.2f} A (no mask, maps not aligned)" in result.output
    assert f"{float(curve[5]):.4f}" in result.output
    data = json.loads(out["json"].read_text())
    np.testing.assert_allclose([row["fsc"] for row in data["shells"]], curve, atol=1e-6)
    assert data["resolution_angst"]["0.5"] == pytest.approx(expected, rel=1e-6)
    assert (data["mask"], data["aligned"], data["alignment"]) == (None, False, None)
    column = read_star(out["star"])["fsc"]["rlnFourierShellCorrelationUnmaskedMaps"]
    np.testing.assert_allclose(column.astype(float), curve, atol=1e-5)
    assert out["xml"].read_text().startswith("<fsc title=")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_fsc_names_its_mask(tmp_path: Path, maps: tuple[Path, Path, Tensor, Tensor]) -> None:
    a, b, first, second = maps
    mask = (radius_grid(24, 3) < 6).float()
    write_map(tmp_path / "ball.mrc", mask.numpy(), PIXEL_SIZE)
    result = run(fsc, a, b, "--mask", tmp_path / "ball.mrc", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "mask ball.mrc (its effect taken out), maps not aligned" in result.output
    data = json.loads((tmp_path / "out.json").read_text())
    expected = fsc_curve(first.float(), second.float(), mask)
    np.testing.assert_allclose([row["masked"] for row in data["shells"]], expected, atol=1e-6)
    assert all(row["fsc"] <= row["masked"] for row in data["shells"])


def test_fsc_aligns_the_first_map_to_the_second(tmp_path: Path) -> None:
    volume = random_map(32, 3)
    turn = random_rotations(1, torch.Generator().manual_seed(4))[0]
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    write_map(tmp_path / "a.mrc", volume.numpy(), PIXEL_SIZE)
    write_map(tmp_path / "b.mrc", rotate_map(mirror_map(volume), turn, shift).numpy(), PIXEL_SIZE)
    plain = run(fsc, tmp_path / "a.mrc", tmp_path / "b.mrc", "--json", tmp_path / "plain.json")
    assert plain.exit_code == 0, plain.output
    before = json.loads((tmp_path / "plain.json").read_text())
    assert before["shells"][5]["fsc"] < 0.5

    result = run(
        fsc, tmp_path / "a.mrc", tmp_path / "b.mrc",
        "--aligned-map", tmp_path / "moved.mrc", "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "maps aligned first" in result.output
    assert "first map mirrored" in result.output
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["alignment"]["mirrored"] is True
    np.testing.assert_allclose(data["alignment"]["rotation"], turn, atol=0.01)
    np.testing.assert_allclose(data["alignment"]["shift_px"], shift, atol=0.1)
    assert min(row["fsc"] for row in data["shells"][:8]) > 0.98
    moved = read_map(tmp_path / "moved.mrc")
    assert moved.pixel_size_angst == pytest.approx(PIXEL_SIZE)
    target = read_map(tmp_path / "b.mrc").data
    assert np.corrcoef(moved.data.ravel(), target.ravel())[0, 1] > 0.98


def test_fsc_refuses_differing_grids_telling_both(
    tmp_path: Path, maps: tuple[Path, Path, Tensor, Tensor]
) -> None:
    a, _, first, _ = maps
    write_map(tmp_path / "big.mrc", random_map(26, 0).numpy(), PIXEL_SIZE)
    problem = error_of(run(fsc, a, tmp_path / "big.mrc")).problem
    assert "24 px" in problem
    assert "26 px" in problem
    write_map(tmp_path / "coarse.mrc", first.numpy(), 2.5)
    problem = error_of(run(fsc, a, tmp_path / "coarse.mrc")).problem
    assert "1.7 A" in problem
    assert "2.5 A" in problem
    assert not list(tmp_path.glob("*.json"))


def test_fsc_accepts_header_rounding(
    tmp_path: Path, maps: tuple[Path, Path, Tensor, Tensor]
) -> None:
    a, _, first, _ = maps
    write_map(tmp_path / "c.mrc", first.numpy(), PIXEL_SIZE * 1.0002)
    assert run(fsc, a, tmp_path / "c.mrc").exit_code == 0


def test_fsc_refuses_empty_maps_and_what_is_no_mask(
    tmp_path: Path, maps: tuple[Path, Path, Tensor, Tensor]
) -> None:
    a, b, first, _ = maps
    write_map(tmp_path / "zero.mrc", np.zeros((24, 24, 24), np.float32), PIXEL_SIZE)
    assert "empty: all its voxels are 0" in error_of(run(fsc, a, tmp_path / "zero.mrc")).problem
    found = error_of(run(fsc, a, b, "--mask", tmp_path / "zero.mrc"))
    assert "empty mask" in found.problem
    write_map(tmp_path / "density.mrc", 10 * first.numpy(), PIXEL_SIZE)
    found = error_of(run(fsc, a, b, "--mask", tmp_path / "density.mrc"))
    assert "no mask" in found.problem
    assert "does not exist" in error_of(run(fsc, a, tmp_path / "none.mrc")).problem


def particle_table(rotations: Tensor, origins_angst: Tensor | None) -> pd.DataFrame:
    names = [f"{i + 1:06d}@stack.mrcs" for i in range(len(rotations))]
    table = pd.DataFrame({"rlnImageName": names})
    table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]] = matrix_to_euler(rotations).numpy()
    if origins_angst is not None:
        table[["rlnOriginXAngst", "rlnOriginYAngst"]] = origins_angst.numpy()
    return table


@pytest.fixture
def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Second set of the other hand, turned, shifted, 2 degrees a component off."""
    generator = torch.Generator().manual_seed(0)
    a = random_rotations(200, generator)
    turn = random_rotations(1, generator)[0]
    vectors = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    b = exp_map(vectors * np.deg2rad(2.0)) @ rotate_poses(mirror_poses(a), turn)
    shift = torch.tensor([4.0, 8.0, -3.0], dtype=torch.float64)
    return particle_table(a, torch.zeros(200, 2)), particle_table(
        b, shift_origins(torch.zeros(200, 2, dtype=torch.float64), b, shift)
    )


def test_compare_poses_prints_and_writes_the_errors(
    tmp_path: Path, tables: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    a, b = tmp_path / "a.star", tmp_path / "b.star"
    write_star(a, {"particles": tables[0]})
    # Another order and names without leading zeros: matched by image, not by row.
    shuffled = tables[1].sample(frac=1, random_state=1)
    shuffled["rlnImageName"] = shuffled["rlnImageName"].str.lstrip("0")
    write_star(b, {"optics": pd.DataFrame({"rlnOpticsGroup": [1]}), "particles": shuffled})
    result = run(compare_poses, a, b, "--json", tmp_path / "o.json", "--plot", tmp_path / "o.svg")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "o.json").read_text())
    assert data["images"] == 200
    assert data["mirrored"] is True
    # Median length of a Gaussian vector of 2 degrees a component: 1.538 * 2.
    assert data["median_deg"] == pytest.approx(3.08, abs=0.4)
    assert data["fraction_within_deg"]["10"] == 1
    assert data["fraction_within_deg"]["1"] < 0.2
    assert np.linalg.norm(data["map_shift_angst"]) == pytest.approx(9.43, abs=0.1)
    assert data["offset_error_angst"]["median"] < 0.5
    assert f"{data['median_deg']:.3f}" in result.output
    assert "mirrored" in result.output
    assert "<svg" in (tmp_path / "o.svg").read_text()


def test_compare_poses_reads_relion_30_pixels(
    tmp_path: Path, tables: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    old = tables[0].drop(columns=["rlnOriginXAngst", "rlnOriginYAngst"])
    old["rlnOriginX"], old["rlnOriginY"] = 2.0, -1.0
    write_star(tmp_path / "b.star", {"particles": tables[0]})
    write_star(tmp_path / "px.star", {"": old})
    assert "does not state the pixel size" in error_of(
        run(compare_poses, tmp_path / "px.star", tmp_path / "b.star")
    ).problem  # fmt: skip
    old["rlnDetectorPixelSize"], old["rlnMagnification"] = 15.0, 100000.0
    write_star(tmp_path / "a.star", {"": old})
    result = run(
        compare_poses, tmp_path / "a.star", tmp_path / "b.star", "--json", tmp_path / "o.json"
    )
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "o.json").read_text())
    assert data["mirrored"] is False
    assert data["median_deg"] < 0.01
    # The same origin everywhere is no shift of a map seen from all sides: (3, -1.5) A is left.
    assert data["offset_error_angst"]["median"] == pytest.approx(3.35, abs=0.3)


@pytest.mark.parametrize(
    ("columns", "optics"),
    [
        ({"rlnPixelSize": 1.5}, {}),
        ({"rlnImagePixelSize": 1.5}, {}),
        ({}, {"rlnOpticsGroup": [1], "rlnImagePixelSize": [1.5]}),
        ({"rlnOpticsGroup": 2}, {"rlnOpticsGroup": [1, 2], "rlnImagePixelSize": [9.0, 1.5]}),
        ({"rlnPixelSize": 1.5}, {"rlnOpticsGroup": [1]}),
    ],
)
def test_poses_are_read_wherever_the_pixel_size_stands(
    tmp_path: Path, tables: tuple[pd.DataFrame, pd.DataFrame], columns: dict, optics: dict
) -> None:
    table = tables[0].drop(columns=["rlnOriginXAngst", "rlnOriginYAngst"])
    table = table.assign(rlnOriginX=2.0, rlnOriginY=-1.0, **columns)
    first = {"optics": pd.DataFrame(optics)} if optics else {}
    write_star(tmp_path / "a.star", {**first, "particles": table})
    found = read_pose_table(tmp_path / "a.star").origins_angst
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([[3.0, -1.5]]).double().expand(200, 2))


def test_a_group_that_is_not_there_is_told(
    tmp_path: Path, tables: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    table = tables[0].drop(columns=["rlnOriginXAngst", "rlnOriginYAngst"])
    table = table.assign(rlnOriginX=2.0, rlnOriginY=-1.0, rlnOpticsGroup=3)
    optics = pd.DataFrame({"rlnOpticsGroup": [1, 2], "rlnImagePixelSize": 1.5})
    write_star(tmp_path / "a.star", {"optics": optics, "particles": table})
    with pytest.raises(CryoreconError, match=r"a\.star, row 1: optics group 3 is not in"):
        read_pose_table(tmp_path / "a.star")


def test_images_listed_twice_are_matched_in_order(
    tmp_path: Path, tables: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    a, b, once = (tmp_path / f"{name}.star" for name in ("a", "b", "once"))
    one, other = (pd.concat([table, table.iloc[[3, 9, 3]]]) for table in tables)
    # Another pose each time that an image is named: its rows are matched in their order.
    for table in (one, other):
        table["rlnAnglePsi"] += 40.0 * table.groupby("rlnImageName").cumcount()
    write_star(a, {"particles": one})
    write_star(b, {"particles": other.sort_values("rlnImageName", kind="stable")})
    write_star(once, {"particles": tables[1]})
    found = compare_pose_files(a, b).angles_deg
    assert len(found) == 203
    assert found.max() < 15
    with pytest.raises(CryoreconError, match="3 of 203 images"):
        compare_pose_files(a, once)
    assert len(compare_pose_files(a, once, common_only=True).angles_deg) == 200


def test_compare_poses_tells_how_many_images_are_missing(
    tmp_path: Path, tables: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    a, b = tmp_path / "a.star", tmp_path / "b.star"
    write_star(a, {"particles": tables[0].iloc[:150]})
    write_star(b, {"particles": tables[1].iloc[20:]})
    error = error_of(run(compare_poses, a, b))
    assert "20 of 150 images" in error.problem
    assert "50 of 180" in error.problem
    assert "--common" in error.remedy
    result = run(compare_poses, a, b, "--common", "--json", tmp_path / "o.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "o.json").read_text())["images"] == 130


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.drop(columns="rlnAngleTilt"), "no column rlnAngleTilt"),
        (lambda t: t.drop(columns="rlnImageName"), "no table with a column rlnImageName"),
        (lambda t: t.assign(rlnAnglePsi=["x", *["1.0"] * 199]), "row 1, column rlnAnglePsi: 'x'"),
        (lambda t: t.assign(rlnImageName=t["rlnImageName"] + "x"), "no image in common"),
    ],
)
def test_compare_poses_says_what_is_wrong(
    tmp_path: Path, tables: tuple[pd.DataFrame, pd.DataFrame], change: object, words: str
) -> None:
    a, b = tmp_path / "a.star", tmp_path / "b.star"
    write_star(a, {"particles": tables[0]})
    write_star(b, {"particles": change(tables[1])})  # type: ignore[operator]
    assert words in error_of(run(compare_poses, a, b, "--json", tmp_path / "o.json")).problem
    assert not (tmp_path / "o.json").exists()


def test_poses_without_origins_are_compared_by_angle(
    tmp_path: Path, tables: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    write_star(tmp_path / "a.star", {"particles": tables[0].iloc[:, :4]})
    write_star(tmp_path / "b.star", {"particles": tables[1]})
    result = run(
        compare_poses, tmp_path / "a.star", tmp_path / "b.star", "--json", tmp_path / "o.json"
    )
    assert result.exit_code == 0, result.output
    assert "not in both files" in result.output
    assert json.loads((tmp_path / "o.json").read_text())["offset_error_angst"] is None


@pytest.mark.parametrize("name", ["f.xyz", "f.pgf", "f.PNGG"])
def test_a_picture_of_no_known_kind_is_refused_before_the_work(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*_: object, **__: object) -> None:
        pytest.fail("begun")

    monkeypatch.setattr("cryorecon.run.compare_maps.compare_maps", begun)
    monkeypatch.setattr("cryorecon.run.compare_poses.compare_pose_files", begun)
    plot = tmp_path / name
    for command in (fsc, compare_poses):
        error = error_of(run(command, "a", "b", "--plot", plot))
        assert name in error.problem
        assert ".png, .svg or .pdf" in error.remedy
    with pytest.raises(CryoreconError, match=name):
        save_figure(Figure(), plot)


@pytest.mark.parametrize("name", ["f", "f.png", "f.SVG", "f.pdf", "f.jpg", "f.tif", "f.eps"])
def test_pictures_of_many_kinds_are_drawn(tmp_path: Path, name: str) -> None:
    save_figure(Figure(figsize=(1, 1)), tmp_path / name)
    assert (tmp_path / name).stat().st_size


def test_map_and_view_pictures_are_drawn(tmp_path: Path) -> None:
    volume = random_map(24, 0).numpy()
    figure = map_figure(volume, PIXEL_SIZE, "a map")
    panels = [axes.images[0].get_array() for axes in figure.axes]
    assert len(panels) == 6
    np.testing.assert_allclose(panels[0], volume[12])
    np.testing.assert_allclose(panels[5], volume.sum(2))
    save_figure(figure, tmp_path / "map.png")
    views = viewing_direction_figure(random_rotations(4000, torch.Generator().manual_seed(0)))
    save_figure(views, tmp_path / "views.pdf")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "views.pdf").read_bytes().startswith(b"%PDF")
    density = views.axes[0].collections[0].get_array()
    assert density is not None
    assert float(np.mean(density)) == pytest.approx(1, abs=0.1)
    assert float(np.max(density)) < 3
