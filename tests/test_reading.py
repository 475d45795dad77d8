"""Reading images: whatever the order, the numbers are those of the file; blocks are read once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import simulated

from cryorecon.engines import stream
from cryorecon.engines.observations import ImageSet
from cryorecon.errors import CryoreconError
from cryorecon.io import mrc, text_table
from cryorecon.io.mrc import StackReader
from cryorecon.io.particles import read_particles
from cryorecon.io.read_ahead import ReadAhead
from cryorecon.io.text_table import TextTable
from cryorecon.physics import fourier
from cryorecon.run import load

N = 8


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<i2", "<f2"])
@pytest.mark.parametrize("gap", [0, 1 << 16])
def test_sections_come_in_runs_with_gaps_and_repeats(tmp_path, dtype, gap, monkeypatch):
    monkeypatch.setattr(mrc, "_GAP_BYTES", gap)
    path = tmp_path / "s.mrcs"
    with mrc.stack_writer(path, N, 2.0) as writer:
        writer.append(np.random.default_rng(0).integers(-99, 99, (30, N, N)).astype(np.float32))
    data = np.array(mrc.open_stack(path))
    stored = data.astype(dtype)
    path.write_bytes(path.read_bytes()[:1024] + stored.tobytes())
    header = mrc.Header(data.shape, stored.dtype, 1024, 2.0)
    monkeypatch.setattr(mrc, "_PIECE_BYTES", 100)
    reader = StackReader()
    for sections in ([0, 1, 2, 29], [3, 3, 5], [7], [0, 2, 4, 5, 6, 6, 20], list(range(30))):
        found = np.empty((len(sections), N, N), np.float32)
        reader.read(path, header, np.array(sections), found)
        assert np.array_equal(found, data[sections])


def test_a_reader_goes_from_stack_to_stack(tmp_path):
    paths, headers, held = [tmp_path / "a.mrcs", tmp_path / "b.mrcs"], [], []
    for value, path in enumerate(paths):
        with mrc.stack_writer(path, N, 2.0) as writer:
            writer.append(np.full((3, N, N), value, np.float32))
        headers.append(mrc.read_header(path))
    reader, found = StackReader(), np.empty((1, N, N), np.float32)
    for number in (0, 0, 1, 0, 1, 1):
        reader.read(paths[number], headers[number], np.array([1]), found)
        assert (found == number).all()
        held.append(reader._file)
    assert held[0] is held[1]
    assert held[4] is held[5]
    assert [file.closed for file in held] == [True] * 4 + [False] * 2
    reader.close()
    assert held[-1].closed


def test_a_stack_that_has_become_shorter_is_told(tmp_path):
    path = tmp_path / "s.mrcs"
    with mrc.stack_writer(path, N, 2.0) as writer:
        writer.append(np.ones((3, N, N), np.float32))
    header = mrc.read_header(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CryoreconError, match="no longer be read"):
        StackReader().read(path, header, np.arange(3), np.empty((3, N, N), np.float32))
    path.unlink()  # From a reader that does not hold it.
    with pytest.raises(CryoreconError, match="no longer be read"):
        StackReader().read(path, header, np.arange(3), np.empty((3, N, N), np.float32))


def test_a_long_table_on_disk_is_the_same(monkeypatch):
    frames = [
        pd.DataFrame({"a": [f"{i}.5" for i in range(k, k + 40)], "b": ["x y"] * 40})
        for k in (0, 40, 80)
    ]
    held = TextTable.gather(frames)
    monkeypatch.setattr(text_table, "_IN_MEMORY", 200)
    spilled = TextTable.gather(frames)
    assert spilled._store._file.__class__ is not held._store._file.__class__
    assert np.array_equal(spilled.numbers("a"), np.arange(120) + 0.5)
    few = spilled.subset(np.array([100, 3, 50]))
    assert list(few["a"]) == ["100.5", "3.5", "50.5"]
    for one, other in zip(held.frames(), spilled.frames(), strict=True):
        pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize("box", [8, 9])
def test_coefficients_are_those_of_the_centred_transform(box, generator):
    images = torch.randn(3, box, box, generator=generator, dtype=torch.float64)
    plane = fourier.half_plane(box)
    whole = fourier.fft_centred(images, 2)
    kx, ky = plane.frequencies.unbind(-1)
    expected = whole[:, ky + box // 2, kx + box // 2]
    assert torch.allclose(fourier.to_coefficients(images, plane), expected, atol=1e-12)


def test_normalised_images_whatever_their_level(generator, monkeypatch):
    monkeypatch.setattr(load, "_PIXELS_AT_ONCE", 3 * 16 * 16)
    images = torch.randn(7, 16, 16, generator=generator) * 0.5 + 1e4
    outside = torch.rand(16, 16, generator=generator)
    found = load.normalised(images, outside).double()
    weight = outside.double() / outside.double().sum()
    assert (found * weight).sum((-2, -1)).abs().max() < 1e-5
    assert ((found**2 * weight).sum((-2, -1)) - 1).abs().max() < 1e-5


def image_set(n, asked, place=None):
    """Images whose first coefficient is their number; each block that is read is noted."""
    plane = fourier.half_plane(8, 2)

    def source(rows, count):
        asked.append(rows)
        values = rows[:, None] + torch.zeros(len(rows), count)
        return values + 0j, values + 1

    ones = torch.ones(n)
    return ImageSet(
        plane,
        source,
        torch.ones(1, 3),
        torch.zeros(n, dtype=torch.int32),
        ones,
        torch.arange(n, dtype=torch.int32),
        place=place,
    )


def blocks_of_16(monkeypatch):
    """Four of them are shuffled together, eight are kept."""
    monkeypatch.setattr(stream, "_TOGETHER", 64)
    monkeypatch.setattr(stream, "_SMALLEST_BLOCK", 16)
    monkeypatch.setattr(stream, "_BLOCK_BYTES", 0)
    assert stream.block_size(8**2) == 16


def test_training_reads_each_block_once_a_pass_in_file_order(generator, monkeypatch):
    blocks_of_16(monkeypatch)
    n, asked = 1000, []
    place = torch.randperm(n, generator=generator).int()
    images = image_set(n, asked, place)
    ahead, seen = stream.read_ahead(images), []
    order = torch.argsort(place)
    rows_of = stream.Stream(n, 20, 8**2, generator)
    for _ in range(n // 20):
        rows = next(rows_of)
        batch = ahead.select(rows)
        ahead.expect(rows_of.upcoming)
        assert torch.equal(batch.coefficients[:, 0].real.long(), order[rows])
        assert torch.equal(batch.ctf[:, -1].long(), order[rows] + 1)
        seen.append(rows)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(n))
    assert torch.equal(torch.cat(asked).sort().values, torch.arange(n))
    for rows in asked:
        assert torch.equal(place[rows].diff(), torch.ones(len(rows) - 1, dtype=torch.int32))


@pytest.mark.parametrize("part", [16, 5])
def test_blocks_of_a_training_are_told_before_they_are_read(generator, monkeypatch, part):
    """Also the parts of blocks that are too large to be read at once."""
    blocks_of_16(monkeypatch)
    monkeypatch.setattr(stream, "_PIXELS_AT_ONCE", part * 8 * 8)
    n, asked, told = 640, [], []
    images = image_set(n, asked)
    images.source.expect = told.append
    ahead, rows_of = stream.read_ahead(images), stream.Stream(n, 20, 8**2, generator)
    for _ in range(2 * n // 20):
        rows = next(rows_of)
        assert torch.equal(ahead.select(rows).coefficients[:, 0].real.long(), rows)
        ahead.expect(rows_of.upcoming)
    wanted = {tuple(rows.tolist()) for rows in told}
    untold = [rows for rows in asked if tuple(rows.tolist()) not in wanted]
    # The first of each pass: whatever its blocks, nobody could know of them.
    assert len(untold) <= 2 * 4
    assert len(told) >= len(asked) - 2 * 4
    assert max(map(len, asked)) == part


@pytest.mark.parametrize("batch", [20, 90, 200, 640])
@pytest.mark.parametrize("part", [16, 5])
@pytest.mark.parametrize("n", [640, 641, 200, 30])
def test_batches_may_lie_in_more_blocks_than_are_kept(generator, monkeypatch, n, batch, part):
    """A large batch; the rest of a group, a short last one, and the first of the next pass."""
    blocks_of_16(monkeypatch)
    monkeypatch.setattr(stream, "_PIXELS_AT_ONCE", part * 8 * 8)
    ahead = stream.read_ahead(image_set(n, []))
    rows_of = stream.Stream(n, batch, 8**2, generator)
    for _ in range(3 * n // min(n, batch)):
        rows = next(rows_of)
        assert torch.equal(ahead.select(rows).coefficients[:, 0].real.long(), rows)
        ahead.expect(rows_of.upcoming)


def test_groups_of_blocks_are_read_while_the_one_before_is_used(generator, monkeypatch):
    """What a thread has begun to read is not forgotten until it is asked for."""
    blocks_of_16(monkeypatch)
    asked, told = [], []
    images = image_set(640, asked)
    images.source.expect = lambda rows: told.append((len(asked), rows))
    ahead, rows_of = stream.read_ahead(images), stream.Stream(640, 20, 8**2, generator)
    for _ in range(640 // 20):
        ahead.select(next(rows_of))
        ahead.expect(rows_of.upcoming)
    # Within the next two reads: the part in work, then the one that was told.
    for before, rows in told:
        assert any(torch.equal(rows, other) for other in asked[before : before + 2])


def test_a_training_does_not_wait_for_what_is_not_read_yet(generator, monkeypatch):
    blocks_of_16(monkeypatch)
    asked, there = [], []
    images = image_set(640, asked)
    images.source.expect = lambda rows: None
    images.source.ready = lambda rows: bool(there)
    ahead, rows_of = stream.read_ahead(images), stream.Stream(640, 4, 8**2, generator)

    def steps(count):
        for _ in range(count):
            ahead.select(next(rows_of))
            ahead.expect(rows_of.upcoming)
        return len(asked)

    assert steps(8) == steps(4) == 4  # The first group, one block after the other.
    there.append(True)
    assert steps(3) == 4 + 3


def test_images_that_are_expected_are_those_of_the_file(tmp_path):
    particles = read_particles(simulated(tmp_path / "stack", 20, 16, 1.0) / "particles.star")
    ahead, rows = ReadAhead(particles), np.arange(20)
    for _ in range(2):
        for now, later in pairwise([rows[:7], rows[5:9], rows[:0], rows[::-1]]):
            ahead.expect(later)
            assert np.array_equal(ahead.images(now), particles.images(now))
    stack = tmp_path / "stack" / "particles.mrcs"
    stack.write_bytes(stack.read_bytes()[:-10])
    ahead.expect(rows[15:])
    assert np.array_equal(ahead.images(rows[:5]), particles.images(rows[:5]))
    with pytest.raises(CryoreconError, match="no longer be read"):
        ahead.images(rows[15:])


@pytest.mark.parametrize(("box", "images"), [(32, 8192), (64, 8192), (128, 2048), (256, 512)])
def test_blocks_of_a_training_take_128_megabytes(box, images):
    assert stream.block_size(box**2) == images


def test_a_training_goes_on_with_other_blocks(generator):
    """A state of a program whose blocks were smaller: the pass begins anew, no row is unknown."""
    n = 10_000
    rows_of = stream.Stream(n, 64, 64**2, generator)
    state = rows_of.state() | {"blocks": torch.arange(20), "block": 512}
    rows_of.load(state)
    seen = torch.cat([next(rows_of) for _ in range(-(-n // 64))])
    assert torch.equal(seen[:n].sort().values, torch.arange(n))


def test_rows_in_file_order(generator):
    place = torch.randperm(50, generator=generator).int()
    images = image_set(50, [], place)
    rows = torch.arange(0, 50, 3)
    found = images.in_file_order(rows)
    assert torch.equal(found.sort().values, rows)
    assert (place[found].diff() > 0).all()
    some = images.apart(found)
    assert torch.equal(some.in_file_order(torch.arange(len(rows))), torch.arange(len(rows)))


def test_noise_is_measured_on_as_many_images_whatever_groups_the_table_keeps():
    """An optics table may list groups that no particle is of."""
    some = load._spread(torch.full((50_000,), 999))
    assert 15_000 < int(some.sum()) <= 20_000
    two = load._spread(torch.tensor([3, 400]).repeat(50_000))
    assert 15_000 < int(two.sum()) <= 20_000
