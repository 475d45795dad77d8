"""Damaged maps, models, tables of other programs, settings: read or refused, soon and small."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from bad_inputs import ATOMS, cases, damaged, run, tell, whole_project
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_bad_input import process

from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.io.cryodrgn_input import read_ctf, read_poses
from cryorecon.io.mrc import read_map
from cryorecon.run.fit_image import read_image
from cryorecon.run.moments.store import read_moments
from cryorecon.run.settings import with_settings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_project(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "lab"))
    return tmp_path / "lab"


def altered_words(data: st.DataObject, raw: bytes) -> bytes:
    """Bytes with one of the first 57 words set: an MRC header that claims something else."""
    at = 4 * data.draw(st.integers(0, 56))
    value = data.draw(
        st.sampled_from(
            [0, 1, -1, 2, 4, 6, 12, 16, 101, 1000, 2**16, 2**31 - 1, -(2**31), 0x7FC00000]
        )
    )
    order = data.draw(st.sampled_from(["little", "big"]))
    return raw[:at] + value.to_bytes(4, order, signed=True) + raw[at + 4 :]


MAP_COMMANDS = [
    ("fsc", "bad.mrc", "good.mrc", "--star", "out/f.star"),
    ("fsc", "good.mrc", "good.mrc", "--mask", "bad.mrc"),
    ("export", "bad.mrc", "-o", "out/x.mrc", "--to", "mrc", "--lowpass", "2e3", "--crop", "24"),
    ("export", "bad.mrc", "-o", "out/x.cxc", "--to", "chimerax"),
    ("simulate", "bad.mrc", "-o", "out", "--n", "2", "--box", "16", "--overwrite"),
]


@cases(70)
@given(st.data())
def test_a_damaged_map(folder: Path, data: st.DataObject) -> None:
    raw = (folder / "good.mrc").read_bytes()
    kind = data.draw(st.sampled_from(["bytes", "words", "voxel"]))
    if kind == "bytes":
        raw = damaged(data, raw[:1100]) + raw[1100:]
    elif kind == "words":
        raw = altered_words(data, raw)
    else:
        voxels = np.frombuffer(raw, "<f4", offset=1024).copy()
        value = data.draw(st.sampled_from([np.nan, -np.inf, 3e38, 1e25, 0.0, -1e-40]))
        voxels[slice(None) if data.draw(st.booleans()) else 7] = value
        raw = raw[:1024] + voxels.tobytes()
    (folder / "bad.mrc").write_bytes(raw)
    arguments = data.draw(st.sampled_from(MAP_COMMANDS))
    result = run(folder, *arguments)
    if arguments[0] != "fsc" and result.exit_code == 0:
        for path in (folder / "out").glob("*.mrc"):
            assert np.isfinite(read_map(path).data).all()
    shutil.rmtree(folder / "out")


@cases(60)
@given(st.data())
def test_a_damaged_atomic_model(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["x.pdb", "x.cif"]))
    raw = ATOMS.encode()
    if name == "x.cif":
        import gemmi

        raw = gemmi.read_pdb_string(ATOMS).make_mmcif_document().as_string().encode()
    kind = data.draw(st.sampled_from(["bytes", "number", "element"]))
    if kind == "bytes":
        raw = damaged(data, raw)
    elif kind == "number":
        word = data.draw(
            st.sampled_from([b"11.104", b"-6.504", b" 20.00", b"  1.00", b"20.0", b"1.00"])
        )
        new = data.draw(
            st.sampled_from([b"   nan", b"   inf", b"******", b"1e9999", b"  9e37", b"-99999"])
        )
        raw = raw.replace(word, new[-len(word) :], data.draw(st.sampled_from([1, -1])))
    else:
        raw = raw.replace(b" C", data.draw(st.sampled_from([b" X", b"  ", b"Es", b" H"])))
    (folder / name).write_bytes(raw)
    run(folder, "simulate", name, "-o", "out", "--n", "1", "--box", "16", "--overwrite")
    shutil.rmtree(folder / "out", ignore_errors=True)


@cases(60)
@given(st.data())
def test_a_damaged_cryosparc_file(folder: Path, data: st.DataObject) -> None:
    table = np.load(folder / "good.cs")
    kind = data.draw(st.sampled_from(["bytes", "value", "type", "drop", "objects", "rows"]))
    names = list(table.dtype.names or ())
    name = data.draw(st.sampled_from(names))
    if kind == "bytes":
        raw = (folder / "good.cs").read_bytes()
        (folder / "p.cs").write_bytes(damaged(data, raw[:1500]) + raw[1500:])
    else:
        if kind == "value":
            value = data.draw(st.sampled_from([np.nan, np.inf, -1, 1e30, 0, 2**31, 1e-30]))
            with np.errstate(all="ignore"):
                table[name][0] = np.float64(value).astype(table.dtype[name].base, casting="unsafe")
        elif kind == "drop":
            table = table[[n for n in names if n != name]].copy()
        elif kind == "rows":
            table = table[: data.draw(st.integers(0, 1))]
        else:
            new = (
                "O"
                if kind == "objects"
                else data.draw(st.sampled_from(["S8", "c8", "?", "M8[s]", "V3", "i1"]))
            )
            kinds = [(n, new if n == name else table.dtype[n]) for n in names]
            other = np.zeros(len(table), kinds)
            for n in names:
                if n != name:
                    other[n] = table[n]
            if kind == "objects":
                other[name][:] = Canary()
            table = other
        with (folder / "p.cs").open("wb") as file:
            np.save(file, table, allow_pickle=True)
    process(folder, data.draw(st.integers(0, 6)), "p.cs")


class Canary:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, ("canary",)


def altered_hdf5(data: st.DataObject, path: Path) -> None:
    """One attribute or data set of another type or shape, gone, or elsewhere."""
    with h5py.File(path, "r+") as file:
        if data.draw(st.booleans()):
            attribute = data.draw(st.sampled_from(sorted(file.attrs)))
            values = [-1, 0, 10**9, np.nan, np.inf, "x", "", np.zeros(3), True, 2.5, 2**62, "full"]
            file.attrs[attribute] = data.draw(st.sampled_from(values))
            if data.draw(st.integers(0, 4)) == 0:
                del file.attrs[attribute]
            return
        sets: list[str] = []
        file.visititems(lambda n, item: sets.append(n) if isinstance(item, h5py.Dataset) else None)
        name = data.draw(st.sampled_from(sets))
        old = file[name][()]
        del file[name]
        not_finite = np.full_like(old, np.nan) if old.dtype.kind in "fc" else old[:0]
        target = data.draw(st.sampled_from(["/etc/passwd", "good.mrc", "good.h5", "gone.h5"]))
        claim = {"shape": (10**6, 10**6), "dtype": "f8", "chunks": (1000, 1000)}
        new = [
            {"data": not_finite},
            {"data": np.array([b"text"] * 3)},
            {"data": old.ravel()},
            {"data": np.zeros(3, [("a", "f4"), ("b", "i2")])},
            {"data": ["a"], "dtype": h5py.string_dtype()},
            {"data": h5py.Empty("f8")},
            {"data": old.astype("c16") if old.dtype.kind != "c" else old.real},
            claim,  # 8 TB that take no space.
            {**claim, "compression": "gzip"},
            {"shape": (40,), "dtype": "u1", "external": [(target, 0, 40)]},
        ]
        kind = data.draw(st.integers(0, len(new) + 1))
        if kind < len(new):
            file.create_dataset(name, **new[kind])
        elif kind == len(new):
            file[name] = h5py.ExternalLink(target, name)


@cases(90)
@given(st.data())
def test_a_damaged_moments_file(folder: Path, data: st.DataObject) -> None:
    raw = (folder / "good.h5").read_bytes()
    if data.draw(st.booleans()):
        (folder / "bad.h5").write_bytes(raw)
        altered_hdf5(data, folder / "bad.h5")
    else:
        (folder / "bad.h5").write_bytes(damaged(data, raw))
    if data.draw(st.booleans()):
        run(folder, "moments", "merge", "bad.h5", "good.h5", "-o", "out/x.h5", "--overwrite")
    else:
        tell(folder, read_moments, folder / "bad.h5")


@cases(90)
@given(st.data())
def test_damaged_pickles_of_cryodrgn(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["poses", "ctf"]))
    raw = (folder / f"{name}.pkl").read_bytes()
    kind = data.draw(st.sampled_from(["bytes", "bytes", "value", "shape", "object"]))
    if kind == "bytes":
        raw = damaged(data, raw)
    else:
        arrays = list(pickle.loads(raw)) if name == "poses" else [pickle.loads(raw)]
        at = data.draw(st.integers(0, len(arrays) - 1))
        array = arrays[at].copy()
        if kind == "value":
            value = data.draw(st.sampled_from([np.nan, np.inf, 1e30, -1, 0]))
            array.flat[data.draw(st.integers(0, array.size - 1))] = value
        elif kind == "shape":
            array = data.draw(
                st.sampled_from(
                    [
                        array[1:],
                        array.ravel(),
                        array[None],
                        array[:0],
                        array[..., 1:],
                        array.astype("i4"),
                        array.astype("c8"),
                        array.astype("S3"),
                        np.float64(2),
                    ]
                )
            )
        else:
            array = data.draw(
                st.sampled_from([Canary(), [Canary()], {"a": 1}, np.array([Canary()]), None, "x"])
            )
        arrays[at] = array
        found = tuple(arrays) if name == "poses" else arrays[0]
        raw = pickle.dumps(found, data.draw(st.integers(0, 5)))
    (folder / f"bad_{name}.pkl").write_bytes(raw)
    tell(folder, read_poses if name == "poses" else read_ctf, folder / f"bad_{name}.pkl")
    if data.draw(st.integers(0, 3)) == 0:
        given_ = {"poses": "poses.pkl", "ctf": "ctf.pkl", name: f"bad_{name}.pkl"}
        run(
            folder,
            "import",
            "s.mrcs",
            "--ctf-file",
            given_["ctf"],
            "--poses",
            given_["poses"],
            "-o",
            "out/x.star",
        )


@cases(60)
@given(st.data())
def test_a_damaged_settings_file(folder: Path, data: st.DataObject) -> None:
    good = b"first_layer: 4\nseed: 3\nfit: {n_steps: 3}\nlist: [1, 2]\nword: shared\n"
    raw = damaged(data, good)
    if data.draw(st.booleans()):
        raw = data.draw(
            st.sampled_from(
                [
                    b"!!python/object/apply:os.mkdir [canary]\n",
                    b"a: &a [*a]\n",
                    b"&a [*a, *a]",
                    b"\xff\xfe",
                    b"? {a: b}\n: c\n",
                    b"a: 2001-01-01\n",
                    b"[" * 3000,
                    b"1: 2\n",
                    b"null: 3\n",
                    b"a: !!binary x\n",
                    b"- a\n",
                    b"\x00",
                    b"a: " + b"9" * 5000,
                    b"? [1, 2]\n: 3\n",
                    b"<<: 3\n",
                    b"<<: {seed: 3}\n",
                    b"a: 1\n---\nb: 2\n",
                    b"x: &x {<<: *x}\n",
                    b"a: 99:99:99\n",
                    b"2020-99-99: 1\n",
                    b"a: 2020-99-99\n",
                ]
            )
        )
    (folder / "bad.yaml").write_bytes(raw)
    tell(folder, with_settings, RmfnConfig(), folder / "bad.yaml", [])


@cases(40)
@given(st.data())
def test_damaged_observations(folder: Path, data: st.DataObject) -> None:
    values = np.random.default_rng(0).standard_normal((40, 8)).astype("f4")
    kind = data.draw(st.sampled_from(["bytes", "value", "type", "objects"]))
    if kind == "value":
        values[3, 2] = data.draw(st.sampled_from([np.nan, np.inf, 3e38]))
    elif kind == "type":
        values = values.astype(data.draw(st.sampled_from(["S4", "c8", "?", "i1", "u8", "f2"])))
    path = folder / "bad.npy"
    with path.open("wb") as file:
        np.save(
            file, np.array([[Canary()]] * 4) if kind == "objects" else values, allow_pickle=True
        )
    if kind == "bytes":
        path.write_bytes(damaged(data, path.read_bytes()[:160]) + path.read_bytes()[160:])
    run(folder, "mra", "solve", "bad.npy", "-o", "out", "--overwrite", "--method", "spectral")
    shutil.rmtree(folder / "out", ignore_errors=True)


@cases(40)
@given(st.data())
def test_a_damaged_picture(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["bad.png", "bad.jpg", "bad.tif", "bad.gif"]))
    Image.fromarray(np.arange(32 * 32 * 3, dtype="u1").reshape(32, 32, 3)).save(folder / name)
    (folder / name).write_bytes(damaged(data, (folder / name).read_bytes()))
    tell(folder, read_image, folder / name, None)
