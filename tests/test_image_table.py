"""Tables with a row for each image lie on disk where they are long, and nothing else changes."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from cryorecon import image_table as tables
from cryorecon.engines.reconstruction import PoseGrid, RefineConfig, assign
from cryorecon.engines.rounds import refine_round
from cryorecon.image_table import image_table, kept
from cryorecon.io.mrc import read_map
from cryorecon.io.particles import read_particles
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.masks import Support
from cryorecon.run.load import load_observations


def mapped(table) -> bool:
    """Whether memory is that of a file which has no name any more."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= table.data_ptr() < last:
            return line.endswith("(deleted)")
    return False


@pytest.mark.parametrize("shape", [(0, 3, 3), (7, 3, 3), (5, 2)])
def test_long_tables_are_mapped_and_short_ones_are_not(shape, monkeypatch):
    assert not mapped(image_table(*shape))
    monkeypatch.setattr(tables, "_IN_MEMORY", 0)
    table = image_table(*shape)
    assert table.shape == shape
    assert not table.any()
    assert mapped(table) == (len(table) > 0)


def test_a_copy_is_its_own(generator, monkeypatch):
    monkeypatch.setattr(tables, "_IN_MEMORY", 0)
    values = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    copy = kept(values)
    assert mapped(copy)
    assert torch.equal(copy, values.float())
    copy[torch.arange(0, 50, 2)] = 0
    assert values.all()


def test_a_full_disk_leaves_tables_in_memory(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tables, "_IN_MEMORY", 0)
    monkeypatch.setattr("os.posix_fallocate", full)
    table = image_table(9, 2)
    assert not mapped(table)
    assert not table.any()


def test_a_round_is_the_same_with_poses_on_disk(stack_32, generator, monkeypatch):
    particles, config = read_particles(stack_32 / "particles.star"), RefineConfig(search_nside=2)
    truth, seed = torch.from_numpy(read_map(stack_32 / "map.mrc").data), generator.get_state()
    grid = PoseGrid(config.assign_band(particles.box), config.search_nside + 1)
    poses = []
    for limit in (tables._IN_MEMORY, 0):
        monkeypatch.setattr(tables, "_IN_MEMORY", limit)
        images = load_observations(particles, config.diameter)
        half = torch.arange(len(images)) % 2
        support = Support(config.diameter / 2)
        state = assign(truth, support, images, half, config, grid, generator.set_state(seed))
        assert mapped(state.rotations) == (limit == 0)
        report = refine_round(state, images, config, fsc_curve, joint=False)
        poses.append((state.rotations, state.offsets_px, torch.tensor(report.pose_change_deg)))
    for one, other in zip(*poses, strict=True):
        assert torch.equal(one, other)
