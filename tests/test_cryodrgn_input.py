"""cryoDRGN's pickles as input: nothing in them is run, and ours come back row by row."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_inputs import BOX, COUNT, PIXEL, project, run
from conftest import GOLDEN

from cryorecon.conventions import euler_to_matrix
from cryorecon.errors import CryoreconError
from cryorecon.io.cryodrgn import with_poses
from cryorecon.io.cryodrgn_input import read_ctf, read_poses
from cryorecon.io.mrc import read_map, stack_writer
from cryorecon.io.particles import read_particles
from cryorecon.io.pickled_arrays import read_pickled_arrays
from cryorecon.io.star import read_star, write_star

CTF = ["defocus_u_angst", "defocus_v_angst", "defocus_angle_deg", "voltage_kv"]
CTF += ["spherical_aberration_mm", "amplitude_contrast", "phase_shift_deg"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project(tmp_path))
    assert run(tmp_path, "export", "good.star", "-o", "out", "--to", "cryodrgn").exit_code == 0
    for name in ("poses.pkl", "ctf.pkl"):
        shutil.move(tmp_path / "out" / name, tmp_path / name)
    return tmp_path


def dump(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def refused(words: str, *arguments: object) -> None:
    result = run(Path.cwd(), *arguments)
    assert isinstance(result.exception, CryoreconError), result.output
    assert words in str(result.exception)


def test_poses_and_ctf_come_back_row_by_row(folder: Path) -> None:
    files = ("--ctf-file", "ctf.pkl", "--poses", "poses.pkl")
    assert run(folder, "import", "s.mrcs", *files, "-o", "out/p.star").exit_code == 0
    before, after = read_particles("good.star"), read_particles("out/p.star")
    both = [euler_to_matrix(torch.from_numpy(p.euler_deg())) for p in (before, after)]
    cosine = ((both[0] * both[1]).sum((1, 2)) - 1) / 2
    chord = (both[0] - both[1]).flatten(1).norm(dim=1)
    assert torch.rad2deg(chord).max() < 1e-4
    assert cosine.min() > 1 - 1e-9
    assert np.abs(before.origins_angst() - after.origins_angst()).max() / PIXEL < 1e-3
    for name in CTF:
        one, other = (getattr(p.ctf_parameters(), name).float() for p in (before, after))
        assert torch.equal(one, other), name
    assert np.array_equal(before.images(range(COUNT)), after.images(range(COUNT)))
    assert after.pixel_size_angst == PIXEL
    run(folder, "export", "out/p.star", "-o", "out/again", "--to", "cryodrgn")
    assert np.array_equal(read_ctf("out/again/ctf.pkl"), read_ctf("ctf.pkl"))
    assert np.allclose(read_poses("out/again/poses.pkl")[1], read_poses("poses.pkl")[1], atol=1e-6)


def test_ctf_values_of_any_float32_come_back_exactly(folder: Path) -> None:
    values = read_ctf("ctf.pkl")
    random = np.random.default_rng(4)
    values[:, 2:] *= random.uniform(0.5, 2, values[:, 2:].shape).astype("f4")
    values[:, 8] = random.uniform(0, 180, COUNT)
    values[:, 1] = 1.2345678
    dump(folder / "other.pkl", values)
    assert (
        run(folder, "import", "s.mrcs", "--ctf-file", "other.pkl", "-o", "out/p.star").exit_code
        == 0
    )
    assert run(folder, "export", "out/p.star", "-o", "out/b", "--to", "cryodrgn").exit_code == 0
    assert np.array_equal(read_ctf("out/b/ctf.pkl"), values)


def test_files_of_cryodrgn_itself(tmp_path: Path) -> None:
    """tests/golden/cryodrgn_*.pkl: parse_pose_star, parse_ctf_star of 4.3.1 on relion31_32.star."""
    truth = read_particles(GOLDEN / "relion31_32.star")
    found = read_particles(GOLDEN / "relion31_32.mrcs", ctf=GOLDEN / "cryodrgn_ctf.pkl")
    found = with_poses(found, GOLDEN / "cryodrgn_poses.pkl")
    assert np.allclose(found.euler_deg(), truth.euler_deg(), atol=2e-6)
    assert np.allclose(found.origins_angst(), truth.origins_angst(), atol=2e-6)
    assert np.array_equal(found.images([0, 7]), truth.images([0, 7]))
    for name in CTF:
        one, other = (getattr(p.ctf_parameters(), name).float() for p in (truth, found))
        assert torch.equal(one, other), name
    assert found.pixel_size_angst == pytest.approx(truth.pixel_size_angst)


def test_reconstruct_takes_a_stack_with_its_pickles(folder: Path) -> None:
    files = ("--ctf-file", "ctf.pkl", "--poses", "poses.pkl")
    dry = run(folder, "reconstruct", "s.mrcs", *files, "-o", "out/a.mrc", "--dry-run")
    assert dry.exit_code == 0
    assert not Path("out/a.mrc").exists()
    assert run(folder, "reconstruct", "s.mrcs", *files, "-o", "out/a.mrc").exit_code == 0
    assert run(folder, "reconstruct", "good.star", "-o", "out/b.mrc").exit_code == 0
    one, other = read_map("out/a.mrc").data, read_map("out/b.mrc").data
    assert np.abs(one - other).max() < 1e-4 * np.abs(other).max()


@pytest.mark.parametrize("table", ["good.star", "old.star"])
def test_poses_go_into_a_star_file(folder: Path, table: str) -> None:
    """Every other column stays; the dialect too."""
    rotations, shifts = read_poses("poses.pkl")
    turned = rotations[::-1].copy(), (-shifts).copy()
    dump(folder / "new.pkl", turned)
    assert run(folder, "import", table, "--poses", "new.pkl", "-o", "out/p.star").exit_code == 0
    before, after = read_star(table), read_star("out/p.star")
    said = {"rlnMaxValueProbDistribution": "0.9", "rlnAngleTiltPrior": "90"}
    tables = {**before, list(before)[-1]: before[list(before)[-1]].assign(**said)}
    write_star("said.star", tables)
    run(folder, "import", "said.star", "--poses", "new.pkl", "-o", "out/q.star")
    assert not set(said) & set(read_star("out/q.star")[list(before)[-1]])
    assert list(before) == list(after)
    kept = [c for c in before[list(before)[-1]] if "Angle" not in c and "Origin" not in c]
    assert len(kept) >= 4
    for name in kept:
        assert list(before[list(before)[-1]][name]) == list(after[list(after)[-1]][name])
    found = read_particles("out/p.star")
    matrices = euler_to_matrix(torch.from_numpy(found.euler_deg())).numpy()
    assert np.allclose(matrices, turned[0], atol=1e-6)
    assert np.allclose(found.origins_angst() / (BOX * PIXEL), turned[1], atol=1e-6)


def test_rotations_alone_mean_no_shifts(folder: Path) -> None:
    dump(folder / "pose.30.pkl", read_poses("poses.pkl")[0].astype("f4"))
    files = ("--poses", "pose.30.pkl", "-o", "out/p.star")
    assert run(folder, "import", "good.star", *files).exit_code == 0
    assert not read_particles("out/p.star").origins_angst().any()


def test_a_signalling_nan_among_poses_is_named(folder: Path) -> None:
    rotations = read_poses("poses.pkl")[0].astype("f4")
    rotations.view("u4")[1, 0, 0] = 0x7F800001
    dump(folder / "damaged.pkl", rotations)
    with pytest.raises(CryoreconError, match=r"damaged\.pkl, row 2: not a finite"):
        read_poses("damaged.pkl")


def test_a_list_of_stacks_is_read_from_its_folder(folder: Path) -> None:
    (folder / "my data").mkdir()
    images = np.random.default_rng(9).standard_normal((4, BOX, BOX))
    for name, part in (("a", images[:1]), ("b", images[1:])):
        with stack_writer(folder / f"my data/{name}.mrcs", BOX, 1.0) as stack:
            stack.append(part)
    (folder / "my data/all.txt").write_text("a.mrcs\nb.mrcs\n\n")
    dump(folder / "four.pkl", read_ctf("ctf.pkl")[:4])
    files = ("--ctf-file", "four.pkl", "-o", "out/p.star")
    assert run(folder, "import", "my data/all.txt", *files).exit_code == 0
    found = read_particles("out/p.star")
    assert np.array_equal(found.images(range(4)), images.astype("f4"))
    (folder / "my data/bad.txt").write_text("good.star\n")
    refused("no list of stacks", "import", "my data/bad.txt", *files)


def test_downsampled_stacks_have_larger_pixels(folder: Path) -> None:
    values = read_ctf("ctf.pkl")
    values[:, 0], values[:, 1] = 4 * BOX, PIXEL / 4
    dump(folder / "large.pkl", values)
    assert read_particles("s.mrcs", ctf="large.pkl").pixel_size_angst == PIXEL


def test_a_phase_shift_that_was_unknown_is_none(folder: Path) -> None:
    values = read_ctf("ctf.pkl")
    values[:, 8] = np.nan
    dump(folder / "nan.pkl", values)
    assert not read_ctf("nan.pkl")[:, 8].any()
    values[0, 8] = 90
    dump(folder / "nan.pkl", values)
    with pytest.raises(CryoreconError, match=r"nan.pkl, row 2: not a finite number \(5 such"):
        read_ctf("nan.pkl")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_every_protocol_order_and_numpy(tmp_path: Path, protocol: int, core: bytes) -> None:
    random = np.random.default_rng(0)
    values = random.random((5, 3, 3))
    pair = (values, random.random((5, 2)).astype("f4"))
    fortran, moved, big = np.asfortranarray(values), values.transpose(0, 2, 1), values.astype(">f8")
    for value in (pair, values, list(pair), fortran, moved, big, values[::2], values[:, :0]):
        raw = pickle.dumps(value, protocol)
        if protocol < 4:  # Later ones state lengths.
            raw = raw.replace(b"numpy._core", core).replace(b"numpy.core", core)
        (tmp_path / "x.pkl").write_bytes(raw)
        found = read_pickled_arrays(tmp_path / "x.pkl", "pickle")
        expected = value if isinstance(value, (tuple, list)) else (value,)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one, other)
            assert one.dtype == other.dtype.newbyteorder("=")


class Command:
    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.system, ("touch canary",)


CALL = f"c{os.name}\nsystem\n".encode()
EVIL = {
    "an object": (pickle.dumps(Command()), f"{os.name}.system"),
    "one in an array": (pickle.dumps(np.array([Command()])), f"{os.name}.system"),
    "beside arrays": (pickle.dumps((np.eye(3)[None], Command())), f"{os.name}.system"),
    "old style": (b"(S'touch canary'\ni" + CALL[1:] + b".", "instruction STRING"),
    "old style, no text": (b"(i" + CALL[1:] + b".", f"{os.name}.system"),
    "eval": (b"\x80\x02cbuiltins\neval\n.", "builtins.eval"),
    "a method of numpy": (b"\x80\x02cnumpy\nload\n.", "numpy.load"),
    "a dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0acore.load_\x93.", "numpy.core.load_"),
    "no text as a name": (b"\x80\x04K\x01K\x02\x93.", "1.2"),
    "a persistent name": (b"\x80\x02K\x01Q.", "instruction BINPERSID"),
    "an extension": (b"\x80\x02\x82\x01.", "instruction EXT1"),
    "a set": (pickle.dumps({1}), "EMPTY_SET"),
    "8 exabytes": (b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.", "no undamaged"),
    "memo at 4 billion": (b"\x80\x02K\x01r\xff\xff\xff\xff.", "something else"),
    "many parts": (b"\x80\x02" + b"K\x01" * 20_000 + b".", "too many parts"),
    "a tuple too long": (b"\x80\x02\x87.", "a tuple of nothing"),
    "no end": (b"\x80\x02K\x01", "no undamaged"),
    "nothing": (b"", "no undamaged"),
}


@pytest.mark.parametrize("name", EVIL)
def test_what_is_no_array_is_refused_by_name(folder: Path, name: str) -> None:
    raw, words = EVIL[name]
    (folder / "x.pkl").write_bytes(raw)
    refused(words, "import", "good.star", "--poses", "x.pkl", "-o", "out/p.star")


def test_an_array_larger_than_its_bytes_is_refused(folder: Path) -> None:
    for protocol in (2, 4, 5):
        raw = pickle.dumps(np.zeros((300, 3, 3)), protocol)
        huge = raw.replace(b"M\x2c\x01", b"M\xff\xff")
        assert huge != raw
        (folder / "x.pkl").write_bytes(huge)
        refused("another size", "import", "good.star", "--poses", "x.pkl", "-o", "out/p.star")


def test_text_made_into_bytes_again_and_again_stays_small(folder: Path) -> None:
    """A text of 1 MB asked for as bytes 2,000 times would be 2 GB."""
    text = b"X" + (2**20).to_bytes(4, "little") + b"a" * 2**20 + b"q\x00"
    once = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    (folder / "x.pkl").write_bytes(b"\x80\x02" + text + once * 1500 + b".")
    refused("more bytes", "import", "good.star", "--poses", "x.pkl", "-o", "out/p.star")


def test_what_does_not_belong_together_is_named(folder: Path) -> None:
    rotations, shifts = read_poses("poses.pkl")
    ctf = read_ctf("ctf.pkl")
    dump(folder / "few.pkl", (rotations[:4], shifts[:4]))
    dump(folder / "px.pkl", (rotations, shifts * 100))
    dump(folder / "scaled.pkl", (rotations * np.array([1, 1, 2, 1, 1, 1])[:, None, None], shifts))
    dump(folder / "mirrored.pkl", (-rotations, shifts))
    dump(folder / "fewctf.pkl", ctf[:4])
    mixed = ctf.copy()
    mixed[2, 1] = 3
    dump(folder / "mixed.pkl", mixed)
    out = ("-o", "out/p.star")
    refused("few.pkl has 4 rows, good.star 6", "import", "good.star", "--poses", "few.pkl", *out)
    refused("not pixels", "import", "good.star", "--poses", "px.pkl", *out)
    refused("row 3: the matrix", "import", "good.star", "--poses", "scaled.pkl", *out)
    refused("(6 such rows)", "import", "good.star", "--poses", "mirrored.pkl", *out)
    refused("holds no poses", "import", "good.star", "--poses", "ctf.pkl", *out)
    refused("fewctf.pkl has 4 rows", "import", "s.mrcs", "--ctf-file", "fewctf.pkl", *out)
    refused("mixes box or pixel", "import", "s.mrcs", "--ctf-file", "mixed.pkl", *out)
    refused("no CTF table", "import", "s.mrcs", "--ctf-file", "poses.pkl", *out)
    refused("no stack of images", "import", "good.star", "--ctf-file", "ctf.pkl", *out)
    refused("--ctf-file ctf.pkl", "import", "s.mrcs", "--poses", "poses.pkl", *out)
    refused("cryorecon import s.mrcs", "moments", "estimate", "s.mrcs", "-o", "out/x.h5")
    assert run(folder, "import", "good.star", *out).exit_code == 2
    assert run(folder, "import", "good.star", "--poses", "poses.pkl", "-o", "x").exit_code == 2
