"""Damaged particle tables and stacks: commands do their work or say what to mend."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bad_inputs import cases, damaged, particle_table, project, run
from hypothesis import given
from hypothesis import strategies as st

from cryorecon.io.mrc import read_map

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
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "lab"))
    return tmp_path / "lab"


def process(folder: Path, number: int, table: str = "p.star") -> None:
    """One of the commands; a map that it writes is a map."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    arguments = [a.format(table) for a in COMMANDS[number % len(COMMANDS)]]
    result = run(folder, *arguments)
    if arguments[0] == "reconstruct" and result.exit_code == 0:
        assert np.isfinite(read_map("out/m.mrc").data).all()


@cases(110)
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


def altered(data: st.DataObject, table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """A table with a value, a column or a row changed, and what was done."""
    column, other = (data.draw(st.sampled_from(list(table.columns))) for _ in range(2))
    word, row = data.draw(st.sampled_from(WORDS)), data.draw(st.integers(0, max(len(table) - 1, 0)))
    exchanged = table.rename(columns={column: other, other: column})
    changed = {
        "value": table.mask((table.index == row)[:, None] & (table.columns == column)[None], word),
        "column": table.assign(**{column: word}),
        "drop": table.drop(columns=[column]),
        "rename": table.rename(columns={column: "rlnNoSuchColumn"}),
        "twice": pd.concat([table, table[[column]]], axis=1),
        "swap": exchanged,
        "rows": table.iloc[: row % 2],
        "block": table,
    }
    kind = data.draw(st.sampled_from(sorted(changed)))
    return changed[kind], kind


def as_star(tables: dict[str, pd.DataFrame]) -> str:
    """STAR text of tables as they are, without any care."""
    text = ""
    for name, table in tables.items():
        labels = "".join(f"_{column} #{k + 1}\n" for k, column in enumerate(table.columns))
        rows = "".join(" ".join(map(str, row)) + "\n" for row in table.to_numpy(object).tolist())
        text += f"\ndata_{name}\n\nloop_\n{labels}{rows}"
    return text


@cases(160)
@given(st.data())
def test_wrong_values_and_columns(folder: Path, data: st.DataObject) -> None:
    tables = particle_table()
    for name in data.draw(st.sampled_from([["optics"], ["particles"], ["optics", "particles"]])):
        tables[name], kind = altered(data, tables[name].astype(object))
        if kind == "block":
            tables = {data.draw(st.sampled_from(["", "images", "x", "optics"])): tables[name]}
            break
    (folder / "p.star").write_text(as_star(tables), "utf-8")
    process(folder, data.draw(st.integers(0, len(COMMANDS) - 1)))


@cases(90)
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
