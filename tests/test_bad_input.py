"""Damaged particle tables and stacks: commands do their work or say what to mend, soon and small."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bad_inputs import BOX, COUNT, cases, damaged, particle_table, project, run
from hypothesis import given
from hypothesis import strategies as st

from cryorecon.io.mrc import read_map
from cryorecon.io.star import write_star

# What commands make of particles; {} is the table.
COMMANDS = [
    ("reconstruct", "{}", "-o", "out/m.mrc", "--half-maps"),
    ("export", "{}", "-o", "out/x.star", "--to", "relion"),
    ("export", "{}", "-o", "out/x.star", "--to", "relion", "--relion30", "--flip"),
    ("export", "{}", "-o", "out/x.cs", "--to", "cryosparc"),
    ("export", "{}", "-o", "out/drgn", "--to", "cryodrgn"),
    ("compare-poses", "{}", "good.star", "--json", "out/x.json"),
    ("moments", "estimate", "{}", "-o", "out/x.h5", "--max-radius", "3", "--overwrite"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "work"))
    return tmp_path / "work"


def process(folder: Path, number: int, table: str = "p.star") -> None:
    """One of the commands; a map that it writes is a map."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    arguments = [a.format(table) for a in COMMANDS[number % len(COMMANDS)]]
    result = run(folder, *arguments)
    if arguments[0] == "reconstruct" and result.exit_code == 0:
        assert np.isfinite(read_map("out/m.mrc").data).all()


@cases(150)
@given(st.data())
def test_damaged_bytes_of_a_table(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["good.star", "old.star"]))
    (folder / "p.star").write_bytes(damaged(data, (folder / name).read_bytes()))
    process(folder, data.draw(st.integers(0, len(COMMANDS) - 1)))


WORDS = [
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1e308",
    "1e300",
    "0",
    "-1",
    "3",
    "1.5",
    "99999999999999999999",
    "x",
    '"two words"',
    "''",
    "#",
    "000000@s.mrcs",
    "7@s.mrcs",
    "99999999999@s.mrcs",
    "1@gone.mrcs",
    "1@../../../etc/passwd",
    "1@/etc/passwd",
    "1@/dev/zero",
    "1@.",
    "@",
    "1@",
    "s.mrcs",
    "-1@s.mrcs",
    "1@good.star",
    "1@" + "d/" * 3000 + "s.mrcs",
    "1@a\\b",
    "1@s.mrcs@s.mrcs",
    "data_",
    "loop_",
    "_rlnX",
    "é",
    "\u2028",
    "0x10",
    "1_000",
    "True",
]


@cases(200)
@given(st.data())
def test_wrong_values_and_columns(folder: Path, data: st.DataObject) -> None:
    tables = particle_table()
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(["optics", "particles"]))
        table = tables[name].astype(object)
        if not len(table.columns):
            continue
        column = data.draw(st.sampled_from(list(table.columns)))
        other = data.draw(st.sampled_from(list(table.columns)))
        kind = data.draw(
            st.sampled_from(["value", "column", "drop", "rename", "twice", "swap", "rows", "block"])
        )
        word = data.draw(st.sampled_from(WORDS))
        if kind == "value" and len(table):
            table.loc[data.draw(st.integers(0, len(table) - 1)), column] = word
        elif kind == "column":
            table[column] = word
        elif kind == "drop":
            table = table.drop(columns=[column])
        elif kind == "rename":
            table = table.rename(columns={column: "rlnNoSuchColumn"})
        elif kind == "twice":
            table = pd.concat([table, table[[column]]], axis=1)
        elif kind == "swap":
            table[[column, other]] = table[[other, column]].to_numpy()
        elif kind == "rows":
            table = table.iloc[: data.draw(st.integers(0, 1))]
        tables[name] = table
        if kind == "block":
            tables = {data.draw(st.sampled_from(["", "images", "x", "optics"])): table}
            break
        if kind == "twice":
            break
    text = ""
    for name, table in tables.items():
        text += f"\ndata_{name}\n\nloop_\n" + "".join(
            f"_{c} #{k + 1}\n" for k, c in enumerate(table.columns)
        )
        text += "".join(" ".join(map(str, row)) + "\n" for row in table.itertuples(index=False))
    (folder / "p.star").write_text(text, "utf-8")
    process(folder, data.draw(st.integers(0, len(COMMANDS) - 1)))


@cases(120)
@given(st.data())
def test_a_damaged_stack(folder: Path, data: st.DataObject) -> None:
    raw = bytearray((folder / "good.mrc").parent.joinpath("s.mrcs").read_bytes())
    whole = bytes(raw)
    kind = data.draw(st.sampled_from(["bytes", "word", "pixel"]))
    if kind == "bytes":
        raw = bytearray(damaged(data, whole[:1100]) + whole[1100:])
    elif kind == "word":
        at = 4 * data.draw(st.integers(0, 56))
        value = data.draw(
            st.sampled_from([0, 1, -1, 2, 4, 6, 12, 16, 101, 1000, 2**16, 2**31 - 1, -(2**31)])
        )
        order = data.draw(st.sampled_from(["little", "big"]))
        raw[at : at + 4] = value.to_bytes(4, order, signed=True)
    else:
        pixels = np.frombuffer(raw, "<f4", offset=1024)
        value = data.draw(st.sampled_from([np.nan, np.inf, 3e38, -3e38, 1e30, 0.0]))
        if data.draw(st.booleans()):
            pixels[:] = value
        else:
            pixels[data.draw(st.integers(0, len(pixels) - 1))] = value
    (folder / "s.mrcs").write_bytes(raw)
    try:
        process(folder, data.draw(st.integers(0, len(COMMANDS) - 1)), "good.star")
    finally:
        (folder / "s.mrcs").write_bytes(whole)
