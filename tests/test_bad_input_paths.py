"""What is no file of its kind at all: pipes, devices, folders, loops, claims; bugs once found."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import h5py
import mrcfile
import numpy as np
import pandas as pd
import pytest
import torch
from bad_inputs import BOX, COUNT, PIXEL, particle_table, run, whole_project
from click.testing import Result

from cryorecon.cli.main import main
from cryorecon.engines.mra.training import TrainingConfig
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map, write_map
from cryorecon.io.particles import read_particles
from cryorecon.io.star import write_star

# Each kind of input: the file's name, and a command that reads it.
READERS = {
    "table": ("x.star", ("reconstruct", "{}", "-o", "out/m.mrc")),
    "other table": ("x.star", ("compare-poses", "{}", "good.star")),
    "moments of a table": ("x.star", ("moments", "estimate", "{}", "-o", "out/x.h5")),
    "abinitio": ("x.star", ("abinitio", "{}", "-o", "out/job", "--diameter", "24")),
    "cryosparc": ("x.cs", ("export", "{}", "-o", "out/x.star", "--to", "relion")),
    "passthrough": (
        "x.cs",
        ("export", "good.cs", "--passthrough", "{}", "-o", "out/x.star", "--to", "relion"),
    ),
    "map": ("x.mrc", ("fsc", "{}", "good.mrc")),
    "mask": ("x.mrc", ("fsc", "good.mrc", "good.mrc", "--mask", "{}")),
    "first map": (
        "x.mrc",
        ("abinitio", "many.star", "-o", "out/job", "--diameter", "24", "--init-map", "{}"),
    ),
    "exported map": ("x.mrc", ("export", "{}", "-o", "out/y.mrc", "--to", "mrc")),
    "model": ("x.pdb", ("simulate", "{}", "-o", "out/s", "--n", "2", "--box", "16")),
    "mmcif": ("x.cif.gz", ("simulate", "{}", "-o", "out/s", "--n", "2", "--box", "16")),
    "moments": ("x.h5", ("moments", "merge", "{}", "good.h5", "-o", "out/y.h5")),
    "moments to a map": ("x.h5", ("moments", "reconstruct", "{}", "-o", "out/job")),
    "stack": ("x.mrcs", ("import", "{}", "--ctf-file", "ctf.pkl", "-o", "out/y.star")),
    "list": ("x.txt", ("import", "{}", "--ctf-file", "ctf.pkl", "-o", "out/y.star")),
    "ctf": ("x.pkl", ("import", "s.mrcs", "--ctf-file", "{}", "-o", "out/y.star")),
    "poses": ("x.pkl", ("import", "good.star", "--poses", "{}", "-o", "out/y.star")),
    "settings": ("x.yaml", ("abinitio", "good.star", "-o", "out/job", "--config", "{}")),
    "observations": ("x.npy", ("mra", "solve", "{}", "-o", "out/m")),
    "encoder": (
        "x.safetensors",
        ("mra", "solve", "o.npy", "-o", "out/m", "--method", "encoder", "--model", "{}"),
    ),
    "picture": ("x.png", ("fit-image", "{}", "-o", "out/i")),
}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.with_name("loop2"))
    path.with_name("loop2").symlink_to(path)


PLACES: dict[str, Callable[[Path], None]] = {
    "nothing": lambda path: None,
    "an empty file": lambda path: path.touch(),
    "a folder": lambda path: path.mkdir(),
    "a pipe": fifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a loop of links": loop,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "other text": lambda path: path.with_name(path.name).write_text("hello\nworld\n") and None,
    "zeros": lambda path: path.write_bytes(bytes(5000)) and None,
    "0xff": lambda path: path.write_bytes(b"\xff" * 5000) and None,
    "gzip": lambda path: path.write_bytes(gzip.compress(b"\x00" * 10**6)) and None,
    "bzip2": lambda path: path.write_bytes(bz2.compress(b"\x00" * 10**6)) and None,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = whole_project(tmp_path_factory.mktemp("bad"))
    tables = particle_table()
    tables["particles"] = pd.concat([tables["particles"]] * 4)
    write_star(folder / "many.star", tables)
    np.save(folder / "o.npy", np.random.default_rng(0).standard_normal((30, 8)).astype("f4"))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "lab"))
    return tmp_path / "lab"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_of_its_kind(folder: Path, reader: str, place: str) -> None:
    if (reader, place) == ("settings", "an empty file"):
        return  # It is none: nothing is set.
    name, arguments = READERS[reader]
    PLACES[place](folder / name)
    result = run(folder, *(a.format(name) for a in arguments))
    assert isinstance(result.exception, CryoreconError), result.output
    assert name in result.exception.problem


def refused(folder: Path, words: str, *arguments: object) -> Result:
    result = run(folder, *arguments)
    assert isinstance(result.exception, CryoreconError), result.output
    assert words in str(result.exception), result.exception
    return result


def reconstruct(folder: Path, words: str = "") -> None:
    """Refused with these words, or not at all."""
    arguments = ("reconstruct", "p.star", "-o", "out/m.mrc", "--half-maps", "--overwrite")
    if words:
        refused(folder, words, *arguments)
    else:
        result = run(folder, *arguments)
        assert result.exit_code == 0, result.exception


@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
def test_line_ends_of_other_systems(folder: Path, end: bytes) -> None:
    for name in ("good.star", "old.star"):
        raw = (folder / name).read_bytes()
        (folder / "p.star").write_bytes(raw.replace(b"\n", end))
        reconstruct(folder)
        ours, theirs = read_particles(folder / name), read_particles(folder / "p.star")
        assert np.array_equal(ours.euler_deg(), theirs.euler_deg())


def test_a_byte_order_mark_is_no_part_of_the_table(folder: Path) -> None:
    raw = (folder / "good.star").read_bytes()
    (folder / "p.star").write_bytes(b"\xef\xbb\xbf" + raw)
    reconstruct(folder)
    at = raw.index(b"data_optics")
    (folder / "p.star").write_bytes(b"\xef\xbb\xbf" + raw[at:])
    reconstruct(folder)
    assert read_particles(folder / "p.star").has_optics_table


def test_settings_with_a_byte_order_mark(folder: Path) -> None:
    (folder / "x.yaml").write_bytes(b"\xef\xbb\xbfno_such_setting: 3\n")
    refused(folder, "x.yaml: Unknown setting no_such_setting", "abinitio", "good.star", "-o",
            "out/j", "--config", "x.yaml")  # fmt: skip


def header(path: Path, **words: int) -> None:
    """Set fields of an MRC header."""
    at = {"nx": 0, "ny": 4, "nz": 8, "mode": 12, "nsymbt": 92}
    raw = bytearray(path.read_bytes())
    for name, value in words.items():
        struct.pack_into("<i", raw, at[name], value)
    path.write_bytes(raw)


CLAIMS = {
    "10^9 voxels": {"nx": 1000, "ny": 1000, "nz": 1000},
    "sections": {"nz": 2**31 - 1},
    "negative sections": {"nz": -COUNT},
    "negative box": {"nx": -BOX, "ny": -BOX},
    "no box": {"nx": 0, "ny": 0},
    "not square": {"nx": BOX // 2, "nz": 2 * COUNT},
    "complex": {"mode": 4},
    "16": {"mode": 16},
    "101": {"mode": 101},
    "extended": {"nsymbt": 2**30},
    "negatively extended": {"nsymbt": -4},
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_headers_that_claim_what_is_not_there(folder: Path, claim: str) -> None:
    header(folder / "s.mrcs", **CLAIMS[claim])
    refused(folder, "s.mrcs", "reconstruct", "good.star", "-o", "out/m.mrc")
    map_claim = {k: BOX // 2 if claim == "not square" else v for k, v in CLAIMS[claim].items()}
    header(folder / "good.mrc", **map_claim)
    if claim != "not square":
        refused(folder, "good.mrc", "export", "good.mrc", "-o", "out/x.mrc", "--to", "mrc")


@pytest.mark.parametrize("mode", [0, 1, 2, 6, 12])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("extended", [0, 80])
def test_good_stacks_of_any_kind_are_taken(
    folder: Path, mode: int, order: str, extended: int
) -> None:
    kind = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}[mode]
    images = np.random.default_rng(mode).integers(0, 100, (COUNT, BOX, BOX)).astype(f"<{kind}")
    with mrcfile.new(folder / "s.mrcs", overwrite=True) as file:
        file.set_data(images)
        file.set_extended_header(np.zeros(extended, "V1"))
    raw = (folder / "s.mrcs").read_bytes()
    if order == ">":
        head = bytearray(np.frombuffer(raw[:1024], "<i4").astype(">i4").tobytes())
        head[208:216] = b"MAP " + bytes([0x11, 0x11, 0, 0])
        raw = bytes(head) + raw[1024 : 1024 + extended] + images.astype(f">{kind}").tobytes()
    (folder / "s.mrcs").write_bytes(raw)
    run(folder, "reconstruct", "good.star", "-o", "out/m.mrc")
    found = read_particles("good.star").images(range(COUNT))
    assert np.array_equal(found, images)


def with_column(folder: Path, block: str, column: str, value: object) -> None:
    tables = particle_table()
    tables[block] = tables[block].astype(object)
    tables[block][column] = value
    write_star(folder / "p.star", tables)


def test_huge_pixels_are_refused_before_they_make_a_map_of_nan(folder: Path) -> None:
    raw = bytearray((folder / "s.mrcs").read_bytes())
    struct.pack_into("<f", raw, 1024 + 4 * (2 * BOX * BOX + 5), 3e38)
    (folder / "s.mrcs").write_bytes(raw)
    refused(folder, "row 3: image 3", "reconstruct", "good.star", "-o", "out/m.mrc")


def test_a_column_that_occurs_twice(folder: Path) -> None:
    text = (folder / "good.star").read_text().replace("_rlnDefocusV ", "_rlnDefocusU ")
    (folder / "p.star").write_text(text)
    reconstruct(folder, "data_particles: the column rlnDefocusU occurs twice")


@pytest.mark.parametrize(
    ("block", "value", "words"),
    [
        ("optics", ["1", "1"], "optics group 1 occurs twice"),
        ("optics", ["1", "-1e308"], "row 2, column rlnOpticsGroup: '-1e308' is no whole number"),
        ("particles", ["1", "2", "1.5", "1", "1", "1"], "row 3, column rlnOpticsGroup: '1.5' is"),
    ],
)
def test_optics_groups_that_are_no_numbers_of_groups(
    folder: Path, block: str, value: list[str], words: str
) -> None:
    with_column(folder, block, "rlnOpticsGroup", value)
    reconstruct(folder, words)


def test_a_wrong_value_of_any_length_is_told_briefly(folder: Path) -> None:
    with_column(folder, "particles", "rlnDefocusU", "x" * 10_000)
    refused(folder, "p.star, row 1", "reconstruct", "p.star", "-o", "out/m.mrc")
    with_column(folder, "particles", "rlnImageName", "1@" + "d/" * 5000 + "s.mrcs")
    refused(folder, "do not exist", "reconstruct", "p.star", "-o", "out/m.mrc")


@pytest.mark.parametrize("stack", [".", "/dev/zero", "..", "good.star", "out"])
def test_stacks_that_are_none_are_named_with_their_table(folder: Path, stack: str) -> None:
    with_column(folder, "particles", "rlnImageName", f"1@{stack}")
    reconstruct(folder, "p.star names a stack that cannot be read: ")


def test_a_row_without_an_image(folder: Path) -> None:
    text = (folder / "good.star").read_text().replace("000003@s.mrcs", "''")
    (folder / "p.star").write_text(text)
    reconstruct(folder, "row 3: it names no image")


def test_nothing_is_written_outside_the_output(folder: Path) -> None:
    """Names in tables are no places to write to."""
    tables = particle_table("../lab/s.mrcs")
    tables["particles"]["rlnMicrographName"] = "../../../canary.mrc"
    tables["optics"]["rlnOpticsGroupName"] = ["/tmp/canary", "../canary"]
    write_star(folder / "p.star", tables)
    around = sorted(folder.parent.iterdir())
    for kind, name in (("relion", "x.star"), ("cryosparc", "x.cs"), ("cryodrgn", "d")):
        result = run(folder, "export", "p.star", "-o", f"out/{name}", "--to", kind)
        assert result.exit_code == 0
    assert sorted(folder.parent.iterdir()) == around


def altered(folder: Path, change: Callable[[h5py.File], object]) -> None:
    shutil.copy(folder / "good.h5", folder / "x.h5")
    with h5py.File(folder / "x.h5", "r+") as file:
        change(file)


def dataset(name: str, **wanted: object) -> Callable[[h5py.File], object]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **wanted)

    return change


def attribute(name: str, value: object) -> Callable[[h5py.File], object]:
    return lambda file: file.attrs.__setitem__(name, value)


CLAIM = {"shape": (10**6, 10**6), "dtype": "f8", "chunks": (1000, 1000)}
ELSEWHERE = {"shape": (3,), "dtype": "f8", "external": [("s.mrcs", 0, 24)]}
HDF5 = {
    "8 TB": (dataset("sums/first", **CLAIM), "sums/first is no array of numbers within"),
    "8 TB, packed": (
        dataset("sums/first", **CLAIM, compression="gzip"),
        "sums/first is no array of numbers within",
    ),
    "of another file": (dataset("sums/first", **ELSEWHERE), "is no array of numbers within"),
    "text": (dataset("sums/first", data=[b"a", b"b", b"c"]), "is no array of numbers within"),
    "shape": (dataset("moments/second", data=np.zeros((3, 3))), "lacks moments/second, or it has"),
    "complex": (dataset("moments/first", data=np.zeros(3, "c16")), "holds complex128 values"),
    "nan": (dataset("moments/first", data=np.full(3, np.nan)), "3 values that are not finite"),
    "word": (attribute("side_angst", "x"), "attribute side_angst cannot be 'x'"),
    "box": (attribute("box", 10**9), "attribute box cannot be 1000000000"),
    "radius": (attribute("max_radius", 4000), "contradict each other"),
    "order": (attribute("max_order", 4000), "contradict each other"),
    "small side": (attribute("side_angst", 1e-9), "contradict each other"),
    "form": (attribute("form", "round"), "attribute form cannot be 'round'"),
    "flag": (attribute("ctf", 2.5), "attribute ctf cannot be 2.5"),
    "count": (attribute("n_images", "many"), "attribute n_images is no number of images"),
}


@pytest.mark.parametrize("name", HDF5)
def test_moments_files_that_are_not_what_they_say(folder: Path, name: str) -> None:
    change, words = HDF5[name]
    altered(folder, change)
    refused(folder, words, "moments", "reconstruct", "x.h5", "-o", "out/job")


def test_atoms_whose_names_are_no_text(folder: Path) -> None:
    raw = (folder / "m.pdb").read_bytes()
    (folder / "x.pdb").write_bytes(raw.replace(b" CA AALA", b" C\x99AALA"))
    refused(folder, "x.pdb is damaged", "simulate", "x.pdb", "-o", "out/s", "--n", "2")


@pytest.mark.parametrize("number", [b"  9e37", b" -1e30", b"   nan"])
def test_atoms_far_beyond_any_molecule(folder: Path, number: bytes) -> None:
    """One of them took the program for ever."""
    (folder / "x.pdb").write_bytes((folder / "m.pdb").read_bytes().replace(b"11.104", number))
    refused(folder, "x.pdb: atom N", "simulate", "x.pdb", "-o", "out/s", "--n", "2", "--box", "16")


def test_poses_in_a_30_table_with_origins_in_angstrom(folder: Path) -> None:
    """Its unit stays: origins in both units would contradict each other."""
    old = read_particles("old.star")
    old.write("old2.star", origins_angst=np.full((COUNT, 2), 3.0))
    again = read_particles("old2.star")
    assert np.allclose(again.origins_angst(), 3.0)
    assert "rlnOriginX" not in again.table


def test_a_model_that_unpacks_to_gigabytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cryorecon.io.atoms._LARGEST_BYTES", 10_000)
    (folder / "x.pdb.gz").write_bytes(gzip.compress(b"REMARK\n" * 10_000))
    refused(folder, "x.pdb.gz is more than", "simulate", "x.pdb.gz", "-o", "out/s", "--n", "2")


def test_lists_of_lists_without_end(folder: Path) -> None:
    """A text of 500 characters that would have 10^8 words."""
    for name in ("n_starts", "temperatures", "memory"):
        text = f"{name}: [&a0 [x, x, x, x, x, x, x, x]"
        for k in range(1, 9):
            text += f", &a{k} [{', '.join([f'*a{k - 1}'] * 8)}]"
        (folder / "x.yaml").write_text(text + "]\n")
        refused(folder, f"x.yaml: Setting {name} cannot be", "abinitio", "good.star", "-o",
                "out/j", "--config", "x.yaml")  # fmt: skip


@pytest.mark.parametrize(
    ("block", "column", "value"),
    [
        ("particles", "rlnDefocusU", "1e300"),
        ("optics", "rlnAmplitudeContrast", "1.5"),
        ("optics", "rlnVoltage", "0"),
        ("optics", "rlnSphericalAberration", "-1e9"),
        ("particles", "rlnOriginXAngst", "1e30"),
    ],
)
def test_values_that_overflow(folder: Path, block: str, column: str, value: str) -> None:
    with_column(folder, block, column, value)
    reconstruct(folder, f"p.star, row 1, column {column}: {float(value):g} is not between")


@pytest.mark.parametrize(
    ("column", "value", "words", "remedy"),
    [
        ("rlnVoltage", "300000", "300000 is not between 1 and 2000 kV (all 6 rows)",
         "write 300 for 300000 V"),
        ("rlnVoltage", "3000", "3000 is not between 1 and 2000 kV", "Correct the column."),
        ("rlnAmplitudeContrast", "10", "10 is not between -1 and 1", "write 0.1 for 10 percent."),
        ("rlnSphericalAberration", "2.7e6", "between -1000 and 1000 mm", "Correct the column."),
        ("rlnSphericalAberration", "x", "'x' is not a finite number", "Correct the column."),
    ],
)  # fmt: skip
def test_values_in_another_unit(
    folder: Path, column: str, value: str, words: str, remedy: str
) -> None:
    """They said neither the unit nor what to do, but to remove every row."""
    with_column(folder, "optics", column, value)
    reconstruct(folder, words)
    reconstruct(folder, remedy)


def test_rows_in_another_unit(folder: Path) -> None:
    with_column(folder, "particles", "rlnDefocusU", ["1e4", "1e8", *["1e4"] * 4])
    reconstruct(
        folder, "row 2, column rlnDefocusU: 1e+08 is not between -1e+07 and 1e+07 A (1 such"
    )
    reconstruct(folder, "row). Correct or remove these rows.")


def test_origins_that_overflow_are_not_compared(folder: Path) -> None:
    """They ended in an internal error of the linear algebra."""
    with_column(folder, "particles", "rlnOriginXAngst", "-1e308")
    refused(folder, "p.star, row 1, column rlnOriginXAngst", "compare-poses", "p.star", "good.star")


@pytest.mark.parametrize("value", ["0", "-2", "1e9", "1e-300"])
def test_impossible_pixel_sizes(folder: Path, value: str) -> None:
    with_column(folder, "optics", "rlnImagePixelSize", value)
    reconstruct(folder, f"p.star states a pixel size of {float(value):g} A")
    text = (folder / "old.star").read_text().replace("\t10000\n", "\t0\n")
    (folder / "p.star").write_text(text)
    reconstruct(folder, "p.star states a pixel size of inf A")


def test_an_encoder_that_claims_more_than_its_file_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before the networks are made."""
    from safetensors.torch import save

    config = asdict(TrainingConfig())
    config["encoder"]["hidden"] = [30_000, 30_000]
    text = json.dumps(config)
    (folder / "x.safetensors").write_bytes(save({"a": torch.zeros(3)}, {"config": text}))
    monkeypatch.setattr("cryorecon.run.mra.jobs.EncoderPair", lambda _: pytest.fail("it was made"))
    solve = ("mra", "solve", "o.npy", "-o", "out/m", "--method", "encoder")
    refused(folder, "is no trained encoder", *solve, "--model", "x.safetensors")


def test_a_picture_of_a_gigapixel(folder: Path) -> None:
    from PIL import Image

    Image.new("1", (8192, 8192)).save(folder / "x.png")
    refused(folder, "x.png has 8192 x 8192 pixels", "fit-image", "x.png", "-o", "out/i")


@pytest.mark.parametrize("cell", [1e-30, 1e-3, 1e5, 1e30, 3e4 * BOX])
def test_maps_of_impossible_voxels(folder: Path, cell: float) -> None:
    """Resampling one took all the memory there is."""
    raw = bytearray((folder / "good.mrc").read_bytes())
    struct.pack_into("<f", raw, 40, cell)
    (folder / "x.mrc").write_bytes(raw)
    words = f"x.mrc states voxels of {np.float32(cell) / BOX:g} A"
    resample = ("export", "x.mrc", "-o", "out/y.mrc", "--to", "mrc", "--resample", "3")
    refused(folder, words, *resample)
    refused(folder, words, "simulate", "x.mrc", "-o", "out/s", "--n", "2", "--pixel-size", "3")


def test_finer_voxels_than_memory_holds(folder: Path) -> None:
    resample = ("export", "good.mrc", "-o", "out/y.mrc", "--to", "mrc", "--resample", "0.001")
    refused(folder, "good.mrc: Voxels of 0.001 A divide 32 A into 32000 px", *resample)
    finer = ("simulate", "good.mrc", "-o", "out/s", "--n", "2", "--pixel-size", "0.001")
    refused(folder, "good.mrc is 32 A wide: more than 4096 px", *finer)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("you tried to allocate memory")])
def test_too_little_memory_is_told(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr("cryorecon.cli.main.app", fail)
    monkeypatch.setattr("sys.argv", ["cryorecon"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "not enough memory" in capsys.readouterr().err


def test_a_map_of_huge_values(folder: Path) -> None:
    write_map(folder / "x.mrc", np.full((BOX,) * 3, 1e14, "f4"), PIXEL)
    with pytest.raises(CryoreconError, match=r"x\.mrc"):
        read_map(folder / "x.mrc")
