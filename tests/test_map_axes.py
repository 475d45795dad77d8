"""Maps stored in any order of axes come as [z, y, x], whichever option names them."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from conftest import GOLDEN

from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map, write_map
from cryorecon.io.particles import read_particles
from cryorecon.run.abinitio_input import given_map, given_mask, starting_map
from cryorecon.run.compare_maps import compare_maps
from cryorecon.run.simulate_config import SimulateConfig
from cryorecon.run.specimen import load_model


def store(
    path: Path,
    volume: np.ndarray,
    axes: tuple[int, int, int],
    voxel: float | tuple[float, float, float] = 1.5,
) -> Path:
    """Write a volume [z, y, x] with axes (columns, rows, sections), 1 being x."""
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(np.ascontiguousarray(volume.transpose([3 - axis for axis in axes[::-1]])))
        file.header.mapc, file.header.mapr, file.header.maps = axes
        # Samples of the cell are along x, y and z.
        file.header.mz, file.header.my, file.header.mx = volume.shape
        file.voxel_size = voxel
    return path


def relabelled(path: Path, axes: tuple[int, int, int]) -> Path:
    with mrcfile.open(path, "r+") as file:
        file.header.mapc, file.header.mapr, file.header.maps = axes
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).random(shape).astype(np.float32)


@pytest.mark.parametrize("axes", permutations((1, 2, 3)))
@pytest.mark.parametrize("box", [8, 9])
def test_axes_in_any_order(tmp_path, axes, box):
    volume = noise(box, box, box)
    path = store(tmp_path / "m.mrc", volume, axes)
    with mrcfile.open(path) as file:
        column = {1: (0, 0, 1), 2: (0, 1, 0), 3: (1, 0, 0)}[axes[0]]
        assert file.data[0, 0, 1] == volume[column]
    found = read_map(path)
    assert np.array_equal(found.data, volume)
    assert found.data.flags.c_contiguous
    assert found.data.flags.writeable
    assert found.pixel_size_angst == pytest.approx(1.5)


def test_a_header_without_axes_has_the_usual_ones(tmp_path):
    volume = noise(8, 8, 8)
    path = relabelled(store(tmp_path / "m.mrc", volume, (1, 2, 3)), (0, 0, 0))
    assert np.array_equal(read_map(path).data, volume)


@pytest.mark.parametrize("axes", [(1, 1, 3), (0, 2, 3), (1, 2, 4), (-1, 2, 3), (3, 0, 0)])
def test_axes_that_are_none_are_named(tmp_path, axes):
    path = relabelled(store(tmp_path / "m.mrc", noise(8, 8, 8), (1, 2, 3)), axes)
    words = ", ".join(map(str, axes))
    with pytest.raises(CryoreconError, match=rf"m\.mrc states axes {words}") as caught:
        read_map(path)
    assert "1, 2, 3" in caught.value.remedy


@pytest.mark.parametrize("axes", permutations((1, 2, 3)))
def test_maps_that_are_not_cubic_are_refused_in_any_order(tmp_path, axes):
    path = store(tmp_path / "m.mrc", noise(4, 6, 8), axes)
    with pytest.raises(CryoreconError, match=r"not a cubic map: it has 8 x 6 x 4 voxels \(x, y, z"):
        read_map(path)


@pytest.mark.parametrize("axes", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
@pytest.mark.parametrize("voxel", [(1.5, 1.5, 1.6), (1.5, 1.47, 1.5), (1.0, 1.0, 8.0)])
def test_voxels_that_are_not_cubic_are_refused(tmp_path, axes, voxel):
    path = store(tmp_path / "m.mrc", noise(8, 8, 8), axes, voxel)
    words = r"m\.mrc has voxels of {:g} x {:g} x {:g} A".format(*voxel)
    with pytest.raises(CryoreconError, match=words):
        read_map(path)


def test_voxels_equal_within_a_percent_are_those_of_x(tmp_path):
    path = store(tmp_path / "m.mrc", noise(8, 8, 8), (3, 1, 2), (1.5, 1.51, 1.49))
    assert read_map(path).pixel_size_angst == pytest.approx(1.5)


@pytest.mark.parametrize("field", ["my", "mz", "cella.y", "cella.z", "image stack"])
def test_voxel_sizes_that_are_not_stated_do_not_count(tmp_path, field):
    path = store(tmp_path / "m.mrc", noise(8, 8, 8), (1, 2, 3))
    with mrcfile.open(path, "r+") as file:
        if field == "image stack":  # Its cell keeps the depth of all sections.
            file.set_image_stack()
        elif field.startswith("cella"):
            file.header.cella[field[-1]] = 0
        else:
            file.header[field] = 0
    assert read_map(path).pixel_size_angst == pytest.approx(1.5)


def test_every_option_reads_maps_alike(tmp_path):
    """Start maps, masks, compared maps and maps to simulate from."""
    particles = read_particles(GOLDEN / "relion31_32.star")
    volume, pixel = noise(32, 32, 32), particles.pixel_size_angst
    plain = store(tmp_path / "plain.mrc", volume, (1, 2, 3), pixel)
    stored = store(tmp_path / "stored.mrc", volume, (3, 2, 1), pixel)
    assert torch.equal(given_map(stored, particles, "map"), given_map(plain, particles, "map"))
    mask = given_mask(stored, particles)
    assert mask is not None
    assert torch.allclose(mask, torch.from_numpy(volume), atol=1e-5)
    assert compare_maps(stored, plain, stored).curve.values.min() > 0.999
    found, _ = load_model(stored, SimulateConfig())
    assert torch.equal(found, torch.from_numpy(volume))


@pytest.mark.parametrize(("times", "plus"), [(1.0, 3.0), (1e-20, 0.0), (200.0, 30.0)])
def test_a_map_to_start_from_is_of_any_scale_and_level(few, tmp_path, times, plus):
    """Of eight bits, say, whose solvent is not 0."""
    particles = read_particles(few)
    volume = read_map(few.parent / "map.mrc").data
    write_map(tmp_path / "plain.mrc", volume, particles.pixel_size_angst)
    changed = (times * volume.astype(np.float64) + plus).astype(np.float32)
    write_map(tmp_path / "changed.mrc", changed, particles.pixel_size_angst)
    plain, other = (
        starting_map(tmp_path / f"{name}.mrc", particles, 0.8) for name in ("plain", "changed")
    )
    torch.testing.assert_close(other, plain, atol=1e-3, rtol=0)
    assert float(plain.std()) == pytest.approx(1, abs=1e-4)
    write_map(tmp_path / "flat.mrc", 0 * volume + 5, particles.pixel_size_angst)
    with pytest.raises(CryoreconError, match="has one value"):
        starting_map(tmp_path / "flat.mrc", particles, 0.8)
