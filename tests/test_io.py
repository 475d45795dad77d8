"""MRC files, STAR files and particles: round trips and every kind of bad input."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import yaml
from conftest import GOLDEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryorecon.errors import CryoreconError
from cryorecon.io import mrc
from cryorecon.io.particles import read_particles
from cryorecon.io.star import read_star, star_blocks, write_star
from cryorecon.io.text_table import PIECE_ROWS, TextTable
from cryorecon.run.table_doubts import table_doubts

N = 8


def write_stack(path: Path, images: np.ndarray, pixel: float = 2.0) -> None:
    with mrc.stack_writer(path, images.shape[-1], pixel) as stack:
        for image in images:
            stack.append(image[None])


def optics(**columns: object) -> pd.DataFrame:
    base = {
        "rlnOpticsGroup": 1,
        "rlnVoltage": 300.0,
        "rlnSphericalAberration": 2.7,
        "rlnAmplitudeContrast": 0.1,
        "rlnImagePixelSize": 2.0,
        "rlnImageSize": N,
    }
    return pd.DataFrame([{**base, **columns}])


def rows(n: int = 3, stack: str = "s.mrcs") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@{stack}" for i in range(n)],
            "rlnOpticsGroup": 1,
            "rlnDefocusU": 10000.0,
            "rlnDefocusV": 9900.0,
            "rlnDefocusAngle": 12.0,
            "myLabel": [f"00{i}" for i in range(n)],
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = np.random.default_rng(0).standard_normal((3, N, N)).astype(np.float32)
    write_stack(tmp_path / "s.mrcs", images)
    return tmp_path


def star(folder: Path, table: pd.DataFrame | None = None, group: pd.DataFrame | None = None):
    path = folder / "p.star"
    write_star(
        path,
        {
            "optics": optics() if group is None else group,
            "particles": rows() if table is None else table,
        },
    )
    return path


@pytest.mark.parametrize(
    ("mode", "dtype"), [(0, "i1"), (1, "i2"), (2, "f4"), (6, "u2"), (12, "f2")]
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_mode_and_byte_order_is_read(tmp_path, mode, dtype, order):
    images = np.arange(2 * N * N).reshape(2, N, N) % 100 - (0 if dtype == "u2" else 50)
    with mrcfile.new(tmp_path / "a.mrcs") as file:
        file.set_data(images.astype(dtype))
        assert int(file.header.mode) == mode
    raw = (tmp_path / "a.mrcs").read_bytes()
    if order == ">":
        words = np.frombuffer(raw[:1024], "<i4").copy()
        head = bytearray(words.astype(">i4").tobytes())
        head[208:212], head[212:216] = b"MAP ", bytes([0x11, 0x11, 0, 0])
        body = np.frombuffer(raw[1024:], f"<{dtype}").astype(f">{dtype}").tobytes()
        (tmp_path / "a.mrcs").write_bytes(bytes(head) + body)
    assert np.array_equal(np.asarray(mrc.open_stack(tmp_path / "a.mrcs"), int), images)


def test_a_streamed_stack_reads_back_and_others_read_it(folder):
    data = mrc.open_stack(folder / "s.mrcs")
    with mrcfile.open(folder / "s.mrcs") as file:
        assert np.array_equal(file.data, data)
        assert file.is_image_stack()
        assert float(file.header.cella.x) == pytest.approx(2.0 * N)
        assert float(file.header.dmax) == pytest.approx(data.max())
    assert mrcfile.validate(folder / "s.mrcs")


def test_a_headers_voxel_size_has_no_more_digits_than_it_holds(tmp_path):
    """2.4 A came back as 2.4000000953674316, in JSON beside a STAR file's 2.4."""
    for box, pixel in ((32, 2.4), (33, 1.061), (256, 0.885123), (1000, 13.33333)):
        mrc.write_map(tmp_path / "m.mrc", np.zeros((2, box, box), np.float32), pixel)
        assert mrc.read_header(tmp_path / "m.mrc").pixel_size_angst == pixel


def test_an_extended_header_is_skipped(tmp_path):
    volume = np.random.default_rng(1).random((4, 4, 4)).astype(np.float32)
    with mrcfile.new(tmp_path / "m.mrc") as file:
        file.set_data(volume)
        file.voxel_size = 1.5
        file.set_extended_header(np.zeros(80, "V1"))
    found = mrc.read_map(tmp_path / "m.mrc")
    assert np.array_equal(found.data, volume)
    assert found.pixel_size_angst == pytest.approx(1.5)


def test_a_failed_stack_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), mrc.stack_writer(tmp_path / "x.mrcs", N, 1.0) as stack:
        stack.append(np.zeros((1, N, N)))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_rows_and_columns_survive_a_round_trip(folder):
    particles = read_particles(star(folder))
    particles.write(folder / "out.star", euler_deg=np.ones((3, 3)), origins_angst=np.ones((3, 2)))
    before, after = read_star(folder / "p.star"), read_star(folder / "out.star")
    assert list(after) == list(before)
    for column in before["particles"]:
        assert list(after["particles"][column]) == list(before["particles"][column])
    assert list(after["particles"]["myLabel"]) == ["000", "001", "002"]
    again = read_particles(folder / "out.star")
    assert np.allclose(again.euler_deg(), 1)
    assert np.allclose(again.origins_angst(), 1)


def test_what_was_said_of_poses_goes_with_them(folder):
    """Columns of another program must not be read as what a job says of its own poses."""
    said = ("rlnMaxValueProbDistribution", "rlnLogLikeliContribution")
    first = read_particles(star(folder))
    told = np.array([0.25, 0.5, 1.0])
    first.write(folder / "said.star", pose_share=told, log_likelihood=7 * told)
    particles = read_particles(folder / "said.star")
    particles.write(folder / "moved.star", origins_angst=np.ones((3, 2)))
    particles.write(folder / "new.star", euler_deg=np.ones((3, 3)))
    particles.write(folder / "own.star", euler_deg=np.ones((3, 3)), log_likelihood=told)
    moved, new, own = (
        read_star(folder / f"{name}.star")["particles"] for name in ("moved", "new", "own")
    )
    assert set(said) <= set(moved)
    assert not set(said) & set(new)
    assert "rlnMaxValueProbDistribution" not in own
    assert np.allclose(own["rlnLogLikeliContribution"].astype(float), told)


def test_priors_and_origins_in_another_unit_go_with_the_poses_they_were_of(folder):
    """A 3.1 file may hold origins in pixels; both readers and RELION would prefer one of two."""
    tables = read_star(star(folder))
    given = {"rlnOriginX": "7", "rlnOriginY": "7", "rlnAngleTiltPrior": "3", "rlnOriginXPrior": "1"}
    tables["particles"] = tables["particles"].assign(**given)
    tables["particles"] = tables["particles"].drop(
        columns=["rlnOriginXAngst", "rlnOriginYAngst"], errors="ignore"
    )
    write_star(folder / "both.star", tables)
    particles = read_particles(folder / "both.star")
    assert np.allclose(particles.origins_angst(), 7 * particles.stored_pixel_size_angst)
    particles.write(
        folder / "new.star", euler_deg=np.ones((3, 3)), origins_angst=np.full((3, 2), 2.0)
    )
    assert not set(given) & set(read_star(folder / "new.star")["particles"])
    assert np.allclose(read_particles(folder / "new.star").origins_angst(), 2.0)
    particles.write(folder / "turned.star", euler_deg=np.ones((3, 3)))
    assert {"rlnOriginX", "rlnOriginXPrior"} <= set(read_star(folder / "turned.star")["particles"])


@pytest.mark.parametrize("dialect", ["relion30", "relion31"])
def test_the_dialect_is_kept(tmp_path, dialect):
    particles = read_particles(GOLDEN / f"{dialect}_32.star")
    origins = particles.origins_angst() + 1.0
    particles.write(tmp_path / "out.star", origins_angst=origins)
    shutil.copy(GOLDEN / f"{dialect}_32.mrcs", tmp_path)
    again = read_particles(tmp_path / "out.star")
    assert again.has_optics_table == (dialect == "relion31")
    assert np.allclose(again.origins_angst(), origins, atol=1e-5)


@pytest.mark.skipif(shutil.which("relion_star_handler") is None, reason="RELION not installed")
def test_relion_reads_what_we_write(folder):
    particles = read_particles(star(folder))
    particles.write(folder / "out.star", euler_deg=np.ones((3, 3)))
    command = ["relion_star_handler", "--i", "out.star", "--o", "r.star", "--select", "rlnAngleRot"]
    subprocess.run(
        [*command, "--minval", "0", "--maxval", "2"], cwd=folder, check=True, capture_output=True
    )
    assert len(read_star(folder / "r.star")["particles"]) == 3


def test_images_come_in_the_order_asked(folder):
    data = np.array(mrc.open_stack(folder / "s.mrcs"))
    other = np.random.default_rng(5).standard_normal((2, N, N)).astype(np.float32)
    write_stack(folder / "t.mrcs", other)
    names = ["3@s.mrcs", "1@t.mrcs", "1@s.mrcs", "2@t.mrcs"]
    table = pd.concat([rows(2), rows(2)], ignore_index=True).assign(rlnImageName=names)
    particles = read_particles(star(folder, table))
    expected = np.stack([data[2], other[0], data[0], other[1]])
    assert np.array_equal(particles.images([0, 1, 2, 3]), expected)
    assert np.array_equal(particles.images([3, 0]), expected[[3, 0]])
    assert list(particles.file_order()) == [2, 0, 1, 3]
    assert np.array_equal(particles.subset([1, 3]).images([1]), expected[[3]])


def test_paths_from_an_ancestor_and_from_the_project(folder, tmp_path_factory, monkeypatch):
    job = folder / "Extract" / "job007"
    job.mkdir(parents=True)
    shutil.move(folder / "s.mrcs", job / "s.mrcs")
    table = rows(stack="Extract/job007/s.mrcs")
    path = star(job, table)
    assert len(read_particles(path)) == 3
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move(path, elsewhere / "p.star")
    with pytest.raises(CryoreconError, match=r"names 1 of 1 stacks.*--project"):
        read_particles(elsewhere / "p.star")
    assert len(read_particles(elsewhere / "p.star", project=folder)) == 3
    monkeypatch.chdir(folder)
    assert len(read_particles(elsewhere / "p.star")) == 3


@pytest.fixture
def other_stack(folder: Path) -> np.ndarray:
    """Another extraction, of the same name, in the folder ``sub`` of the first."""
    images = np.random.default_rng(2).standard_normal((3, N, N)).astype(np.float32)
    (folder / "sub").mkdir()
    write_stack(folder / "sub" / "s.mrcs", images)
    return images


@pytest.mark.parametrize(
    ("job", "name"), [("sub", "s.mrcs"), ("sub", "./s.mrcs"), ("sub/job", "../s.mrcs")]
)
def test_a_stack_beside_its_table_comes_before_those_above(folder, other_stack, job, name):
    (folder / job).mkdir(exist_ok=True)
    path = star(folder / job, rows(stack=name))
    assert np.array_equal(read_particles(path).images([0, 1, 2]), other_stack)


def test_a_name_with_folders_is_the_project_s_before_the_job_s(folder, other_stack):
    (folder / "sub" / "sub").mkdir()
    shutil.copy(folder / "s.mrcs", folder / "sub" / "sub" / "s.mrcs")
    path = star(folder / "sub", rows(stack="sub/s.mrcs"))
    assert np.array_equal(read_particles(path).images([0, 1, 2]), other_stack)
    (folder / "sub" / "s.mrcs").unlink()
    assert len(read_particles(path)) == 3


def test_the_current_directory_and_the_project_come_first(folder, other_stack, monkeypatch):
    first, path = np.array(mrc.open_stack(folder / "s.mrcs")), star(folder / "sub")
    assert np.array_equal(read_particles(path, project=folder).images([0, 1, 2]), first)
    monkeypatch.chdir(folder)
    assert np.array_equal(read_particles(path).images([0, 1, 2]), first)


@pytest.mark.parametrize("name", ["s.mrcs", "raw/s.mrcs"])
def test_a_job_s_table_leads_to_the_particles_that_the_job_was_given(folder, tmp_path, name):
    """Where they are named from their own table's folder; and from a job on that job's table."""
    data, job, later = (folder / part for part in ("data", "job001", "job002"))
    for made in (data, job, later):
        made.mkdir()
    (data / name).parent.mkdir(exist_ok=True)
    images = np.random.default_rng(2).standard_normal((3, N, N)).astype(np.float32)
    write_stack(data / name, images)
    path = star(data, rows(stack=name))
    if name == "raw/s.mrcs":
        (folder / "s.mrcs").unlink()
    given = os.path.relpath(path, folder)
    for made, source in ((job, given), (later, "job001/run_data.star")):
        shutil.copy(path, made / "run_data.star")
        record = {"directory": str(folder), "input": source}
        (made / "job.yaml").write_text(yaml.safe_dump(record))
        assert np.array_equal(read_particles(made / "run_data.star").images([0, 1, 2]), images)
    if name == "s.mrcs":
        # What lies beside a table is its own all the same.
        shutil.copy(folder / "s.mrcs", job / "s.mrcs")
        first = np.array(mrc.open_stack(folder / "s.mrcs"))
        assert np.array_equal(read_particles(job / "run_data.star").images([0, 1, 2]), first)
    for broken in ("[1", "- 3", "input: 4", "directory: x"):
        (later / "job.yaml").write_text(broken)
        if name == "raw/s.mrcs":
            with pytest.raises(CryoreconError, match="that do not exist"):
                read_particles(later / "run_data.star")


@pytest.mark.parametrize("name", ["s.mrcs", "mics/s.mrcs"])
def test_stacks_beside_a_link_to_the_table_are_found(folder, other_stack, name):
    """Also where one of the same name lies above what the link points to."""
    (folder / "store").mkdir()
    table = star(folder / "store", rows(stack=name))
    link = folder / "sub" / "p.star"
    link.symlink_to(table)
    (folder / "sub" / "mics").mkdir()
    shutil.copy(folder / "sub" / "s.mrcs", folder / "sub" / "mics" / "s.mrcs")
    assert np.array_equal(read_particles(link).images([0, 1, 2]), other_stack)
    (folder / "store" / "mics").mkdir()
    shutil.copy(folder / "s.mrcs", folder / "store" / name)
    first = np.array(mrc.open_stack(folder / "s.mrcs"))
    assert np.array_equal(read_particles(link).images([0, 1, 2]), first)


@pytest.mark.parametrize("column", ["rlnImagePixelSize", "rlnImageSize"])
@pytest.mark.parametrize("value", [12, "none"])
def test_groups_without_particles_do_not_count(folder, column, value):
    groups = pd.concat([optics(rlnOpticsGroup=7, **{column: value}), optics()])
    particles = read_particles(star(folder, group=groups))
    assert particles.pixel_size_angst == 2.0
    particles.write(folder / "out.star", euler_deg=np.ones((3, 3)))
    assert len(read_star(folder / "out.star")["optics"]) == 2
    table = rows().assign(rlnOpticsGroup=[1, 7, 1])
    with pytest.raises(CryoreconError, match=r"none|12"):
        read_particles(star(folder, table, groups))


def test_the_row_of_a_group_is_that_of_the_optics_table(folder):
    groups = pd.concat([optics(rlnOpticsGroup=2), optics(rlnImagePixelSize="x")])
    with pytest.raises(CryoreconError, match="row 2, column rlnImagePixelSize: 'x'"):
        read_particles(star(folder, group=groups))


def nan_stack(folder):
    images = np.zeros((3, N, N), np.float32)
    images[1, 2, 2] = np.nan
    write_stack(folder / "s.mrcs", images)


def truncate(folder):
    raw = (folder / "s.mrcs").read_bytes()
    (folder / "s.mrcs").write_bytes(raw[:-100])


def larger(folder):
    write_stack(folder / "t.mrcs", np.zeros((1, N + 2, N + 2), np.float32))


def text_stack(folder):
    (folder / "s.mrcs").write_text("not an image\n" * 200)


def directory_stack(folder):
    (folder / "s.mrcs").unlink()
    (folder / "s.mrcs").mkdir()


MIXED = rows().assign(rlnImageName=["1@s.mrcs", "1@t.mrcs", "2@s.mrcs"])
TWO_GROUPS = pd.concat([optics(), optics(rlnOpticsGroup=2, rlnImagePixelSize=2.5)])

BAD = {
    "truncated": (truncate, None, None, r"s.mrcs is truncated.*1792 bytes.*1692 bytes"),
    "beyond": (None, rows(5), None, r"row 4: asks for image 4 of .*s.mrcs, which holds 3"),
    "zero": (None, rows().assign(rlnImageName="0@s.mrcs"), None, "row 1: image number 0"),
    "no ctf": (
        None,
        rows().drop(columns=["rlnDefocusV"]),
        None,
        "lacks the CTF column rlnDefocusV",
    ),
    "boxes": (larger, MIXED, None, r"mixes box sizes.*8 x 8.*10 x 10"),
    "nan": (nan_stack, None, None, r"row 2: image 2 of .*s.mrcs holds NaN"),
    "text value": (None, rows().assign(rlnDefocusU=["1", "x", "3"]), None, "row 2, .*rlnDefocusU"),
    "empty": (None, rows(0), None, "holds no particles"),
    "group": (None, rows().assign(rlnOpticsGroup=[1, 2, 1]), None, "row 2: optics group 2"),
    "size": (None, None, optics(rlnImageSize=12), "says 12 px boxes"),
    "pixels": (
        None,
        rows().assign(rlnOpticsGroup=[1, 2, 1]),
        TWO_GROUPS,
        r"mixes pixel sizes \(2, 2.5 A\)",
    ),
    "text stack": (text_stack, None, None, "not an MRC file"),
    "directory stack": (directory_stack, None, None, "s.mrcs is a directory"),
    "missing stack": (None, rows(stack="gone.mrcs"), None, "1 of 1 stacks that do not exist: gone"),
    "subset": (None, rows().assign(rlnRandomSubset=[1, 3, 2]), None, "row 2: rlnRandomSubset is 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_particles_are_named(folder, name):
    damage, table, group, message = BAD[name]
    if damage:
        damage(folder)
    with pytest.raises(CryoreconError, match=message) as caught:
        particles = read_particles(star(folder, table, group))
        particles.ctf_parameters()
        particles.random_subsets()
        particles.images(range(len(particles)))
    assert "p.star" in str(caught.value) or "s.mrcs" in str(caught.value)
    assert caught.value.remedy


def test_bad_maps_are_named(tmp_path):
    with mrcfile.new(tmp_path / "flat.mrc") as file:
        file.set_data(np.zeros((4, 8, 8), np.float32))
        file.voxel_size = 1
    with pytest.raises(CryoreconError, match=r"not a cubic map: it has 8 x 8 x 4"):
        mrc.read_map(tmp_path / "flat.mrc")
    mrc.write_map(tmp_path / "nan.mrc", np.full((4, 4, 4), np.nan), 1.0)
    with pytest.raises(CryoreconError, match="64 voxels that are NaN"):
        mrc.read_map(tmp_path / "nan.mrc")
    with mrcfile.new(tmp_path / "unitless.mrc") as file:
        file.set_data(np.zeros((4, 4, 4), np.float32))
        file.header.cella = (0, 0, 0)
    with pytest.raises(CryoreconError, match="voxel size"):
        mrc.read_map(tmp_path / "unitless.mrc")
    (tmp_path / "z.mrc").write_bytes(gzip.compress((tmp_path / "nan.mrc").read_bytes()))
    for path, words in ((tmp_path / "z.mrc", "not an MRC"), (tmp_path, "is a directory")):
        with pytest.raises(CryoreconError, match=words):
            mrc.read_map(path)


def test_bad_star_files_are_named(tmp_path):
    path = tmp_path / "a.star"
    for content, words in (
        (b"\x00\xff\xfe\x80binary", "not a text file"),
        (b"hello\n", "no data_ block"),
        (b"data_particles\n\nloop_\n_rlnA #1\n_rlnB #2\n1 2\n3\n", "row 2: fewer values"),
        (b"data_job\n\n_rlnJobType 3\n", "no table with a column rlnImageName"),
    ):
        path.write_bytes(content)
        with pytest.raises(CryoreconError, match=words) as caught:
            read_particles(path)
        assert "a.star" in str(caught.value)
    with pytest.raises(CryoreconError, match="does not exist"):
        read_particles(tmp_path / "none.star")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_line_that_is_not_utf8_is_named(tmp_path, end):
    names = "".join(f"{n}@s.mrcs\n" for n in range(3000)) + "1@M\xfcller.mrcs\n"
    text = f"\ufeffdata_particles\n\nloop_\n_rlnImageName #1\n1@\xe9.mrcs\n{names}"
    raw = b"".join(
        line.encode("latin-1" if "M" in line else "utf-8") + end for line in text.splitlines()
    )
    (tmp_path / "a.star").write_bytes(raw)
    with pytest.raises(CryoreconError, match=r"a\.star, line 3006: byte 0xfc .*UTF-8") as caught:
        read_star(tmp_path / "a.star")
    assert "UTF-8" in caught.value.remedy


def test_a_map_is_no_star_file(folder):
    mrc.write_map(folder / "map.star", np.full((4, 4, 4), -1.0), 1.0)
    with pytest.raises(CryoreconError, match="not a text file"):
        read_star(folder / "map.star")


SLOW_OK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


AWKWARD = st.text(st.sampled_from("ab_1.#'\" \t\xa0\u2028é@"), max_size=8)
WORDS = AWKWARD | st.builds(str.__add__, st.sampled_from(["data_", "loop_", "_", "#"]), AWKWARD)


@SLOW_OK
@given(st.lists(st.tuples(WORDS, WORDS, st.floats(-9, 9)), min_size=1, max_size=4))
def test_any_text_that_can_be_quoted_is_read_again(tmp_path, table):
    table = pd.DataFrame(table, columns=["rlnA", "rlnB", "rlnC"])
    unquotable = [
        value
        for value in (*table["rlnA"], *table["rlnB"])
        if re.search(r"'\s", value) and re.search(r'"\s', value)
    ]
    tables = {"first": table[["rlnA"]], "optics": table}
    if unquotable:
        with pytest.raises(CryoreconError, match="cannot stand in a STAR file"):
            write_star(tmp_path / "a.star", tables)
        return
    write_star(tmp_path / "a.star", tables)
    found = read_star(tmp_path / "a.star")
    texts = [found["first"]["rlnA"], found["optics"]["rlnA"], found["optics"]["rlnB"]]
    for given_, read in zip((table["rlnA"], table["rlnA"], table["rlnB"]), texts, strict=True):
        assert list(read) == list(given_)
    np.testing.assert_allclose(found["optics"]["rlnC"].astype(float), table["rlnC"], atol=1e-6)


@SLOW_OK
@given(st.lists(st.tuples(*2 * [WORDS.filter(lambda v: not set(v) & set("'\""))]), min_size=1))
def test_starfile_reads_any_text_without_quotes(tmp_path, table):
    table = pd.DataFrame(table, columns=["rlnA", "rlnB"])
    write_star(tmp_path / "a.star", {"particles": table})
    found = starfile.read(tmp_path / "a.star", parse_as_string=["rlnA", "rlnB"])
    assert found.to_numpy().tolist() == table.to_numpy().tolist()


def test_a_text_that_no_star_file_can_hold_is_refused(tmp_path):
    (tmp_path / "a.star").write_text("kept")
    for value in ("two\nlines", "a' b\" c"):
        with pytest.raises(CryoreconError, match=r"a\.star, column rlnB: .* cannot stand in"):
            write_star(tmp_path / "a.star", {"": pd.DataFrame({"rlnA": ["1"], "rlnB": [value]})})
    assert (tmp_path / "a.star").read_text() == "kept"


@SLOW_OK
@given(st.integers(0, 1023), st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused(folder, position, value):
    raw = bytearray((folder / "s.mrcs").read_bytes())
    raw[position] = value
    (folder / "damaged.mrcs").write_bytes(bytes(raw))
    try:
        data = mrc.open_stack(folder / "damaged.mrcs")
    except CryoreconError:
        return
    assert data.ndim == 3
    assert data.nbytes <= len(raw)


@SLOW_OK
@given(st.integers(0, 900), st.text(alphabet="ab1 _#\n\t'\"@data_loop", max_size=12))
def test_a_damaged_star_file_is_read_or_refused(folder, position, insert):
    text = star(folder).read_text()
    damaged = folder / "damaged.star"
    damaged.write_text(text[:position] + insert + text[position:])
    try:
        particles = read_particles(damaged)
        particles.ctf_parameters()
    except CryoreconError:
        return
    assert 0 < len(particles) <= 4


def long_table(rows_: int) -> pd.DataFrame:
    random = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "rlnImageName": [f"{i % 50 + 1:06d}@mic{i // 50}.mrcs" for i in range(rows_)],
            "rlnMicrographName": [f"mic{i // 50}.mrc" for i in range(rows_)],
            "rlnDefocusU": [f"{v:.2f}" for v in random.uniform(5000, 25000, rows_)],
            "rlnDefocusV": [f"{v:.2f}" for v in random.uniform(5000, 25000, rows_)],
            "rlnNote": [f"nan{i % 7}" if i % 3 else "nan" for i in range(rows_)],
        }
    )


def test_a_long_table_is_read_and_written_in_pieces(tmp_path):
    table = long_table(2 * PIECE_ROWS + 17)
    write_star(tmp_path / "p.star", {"optics": optics(), "particles": table})
    peer = starfile.read(tmp_path / "p.star", parse_as_string=list(table))["particles"]
    assert (peer.fillna("nan").to_numpy() == table.to_numpy()).all()
    found = read_star(tmp_path / "p.star")["particles"]
    pd.testing.assert_frame_equal(found, table.astype(object))
    sizes = {
        name: [len(piece) for piece in pieces] for name, pieces in star_blocks(tmp_path / "p.star")
    }
    assert sizes == {"optics": [1], "particles": [PIECE_ROWS, PIECE_ROWS, 17]}
    packed = TextTable.gather([table[:PIECE_ROWS], table[PIECE_ROWS:]])
    write_star(tmp_path / "q.star", {"optics": optics(), "particles": packed.frames()})
    without_date = [(tmp_path / f).read_text().split("\n", 1)[1] for f in ("p.star", "q.star")]
    assert without_date[0] == without_date[1]


@pytest.mark.parametrize("order", ["sorted", "shuffled", "repeated"])
def test_rows_of_a_packed_table_come_in_the_order_asked(order):
    table = long_table(PIECE_ROWS + 100)
    packed = TextTable.gather([table[:PIECE_ROWS], table[PIECE_ROWS:]])
    random = np.random.default_rng(1)
    wanted = random.choice(len(table), 500, replace=order == "repeated")
    wanted = np.sort(wanted) if order == "sorted" else wanted
    some = packed.subset(wanted)
    assert list(some["rlnImageName"]) == list(table["rlnImageName"].iloc[wanted])
    assert list(some.numbers("rlnDefocusU")) == list(
        table["rlnDefocusU"].astype(float).iloc[wanted]
    )
    again = some.subset(np.array([3, 1]))
    assert list(again["rlnDefocusV"]) == list(table["rlnDefocusV"].iloc[wanted[[3, 1]]])
    assert np.isnan(packed.numbers("rlnNote")).all()


def test_a_packed_table_is_small():
    """A million rows are to take megabytes: at most 25 bytes a row here, as text 61."""
    table = long_table(PIECE_ROWS)
    packed = TextTable.gather([table])
    assert sum(len(v) for v in packed._pieces[0].values()) < 25 * PIECE_ROWS


def test_damage_far_down_a_table_is_named(tmp_path):
    table = long_table(PIECE_ROWS + 40)
    write_star(tmp_path / "p.star", {"particles": table})
    lines = (tmp_path / "p.star").read_text().split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("000001@mic0.")) + PIECE_ROWS + 4
    lines[at] = "\t".join(lines[at].split("\t")[:3])
    (tmp_path / "p.star").write_text("\n".join(lines))
    with pytest.raises(CryoreconError, match=f"row {PIECE_ROWS + 5}: fewer values"):
        read_star(tmp_path / "p.star")


AWKWARD = ["O'Neil/mic.mrc", "it's/st#ck.mrcs", 'a"b', "data_2/m.mrc", "#5", "two words", "", "_x"]


def test_values_come_back_as_they_are(tmp_path):
    """Quotes, hashes and keywords within values, in every column."""
    plain = [v for v in AWKWARD if v not in ("#5",)]
    table = pd.DataFrame({"rlnA": plain, "rlnB": plain[::-1], "rlnC": "1.0"}, dtype=object)
    lines = ["data_particles", "", "loop_", "_rlnA #1", "_rlnB #2", "_rlnC #3"]
    quoted = table.map(lambda v: f'"{v}"' if " " in v or not v else v)
    lines += [" ".join(row) for row in quoted.itertuples(index=False)]
    (tmp_path / "a.star").write_text("\n".join([*lines, "x y z # a remark", ""]))
    found = read_star(tmp_path / "a.star")["particles"]
    assert found[:-1].to_numpy().tolist() == table.to_numpy().tolist()
    assert found.iloc[-1].tolist() == ["x", "y", "z"]
    write_star(tmp_path / "b.star", {"particles": found})
    again = read_star(tmp_path / "b.star")["particles"]
    pd.testing.assert_frame_equal(again, found)


def test_rows_without_labels_are_no_table(tmp_path):
    (tmp_path / "a.star").write_text("data_x\n\nloop_\n_rlnA #1\n1\ndata_y\n1 2 3\n")
    with pytest.raises(CryoreconError, match="data_y"):
        read_star(tmp_path / "a.star")


def test_the_row_of_the_file_is_named_in_a_subset(folder):
    table = rows()
    table["rlnDefocusU"] = ["10000.0", "bad", "10000.0"]
    write_star(folder / "bad.star", {"optics": optics(), "particles": table})
    some = read_particles(folder / "bad.star").subset(np.array([2, 1]))
    with pytest.raises(CryoreconError, match="row 2, column rlnDefocusU"):
        some.ctf_parameters()


@pytest.mark.parametrize("other", ["./s.mrcs", "linked.mrcs", "sub/../s.mrcs"])
def test_a_stack_of_two_names_is_one_stack(folder, other):
    """Else one image would be in both half sets, which would agree by its noise."""
    (folder / "sub").mkdir()
    (folder / "linked.mrcs").symlink_to("s.mrcs")
    both = pd.concat([rows(), rows(stack=other).iloc[::-1]], ignore_index=True)
    particles = read_particles(star(folder, both))
    assert len(particles.stacks) == 1
    assert particles.first_with_image().tolist() == [0, 1, 2, 2, 1, 0]
    images = particles.images(range(6))
    assert np.array_equal(images[:3], images[:2:-1])
    write_stack(folder / "t.mrcs", images[:3] + 1)
    mixed = pd.concat([rows(), rows(stack="t.mrcs"), rows(stack=other)], ignore_index=True)
    particles = read_particles(star(folder, mixed))
    assert len(particles.stacks) == 2
    assert particles.first_with_image().tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert np.allclose(particles.images([3, 8]), images[[0, 2]] + [[[1]], [[0]]])


def test_subtomograms_are_no_images(folder):
    path = star(folder, group=optics(rlnImageDimensionality=3))
    with pytest.raises(CryoreconError, match="names volumes, not images"):
        read_particles(path)
    assert len(read_particles(star(folder, group=optics(rlnImageDimensionality=2)))) == 3


@pytest.mark.parametrize("sections", [1, 3])
def test_names_without_a_number_are_of_one_image(folder, sections):
    """A volume or a tilt series of each particle has several sections."""
    for name in "ab":
        write_stack(folder / f"{name}.mrc", np.random.default_rng(1).normal(size=(sections, N, N)))
    table = rows(2).assign(rlnImageName=["a.mrc", "b.mrc"])
    if sections == 1:
        assert read_particles(star(folder, table)).images([0, 1]).shape == (2, N, N)
        return
    with pytest.raises(
        CryoreconError, match=r"a\.mrc without the number of an image, and it holds"
    ):
        read_particles(star(folder, table))


@pytest.mark.parametrize("suffix", [":mrcs", ":mrc"])
def test_relion_s_suffix_behind_a_stack_is_no_part_of_its_name(folder, suffix):
    (folder / "s.mrcs").rename(folder / "s.mrc")
    found = read_particles(star(folder, rows(stack=f"s.mrc{suffix}")))
    assert found.images([2]).shape == (1, N, N)
    assert found.table["rlnImageName"].iloc[0] == f"000001@s.mrc{suffix}"


def test_tables_of_one_name_are_refused(folder):
    """Selections joined end to end: the last alone would be read."""
    path = star(folder)
    path.write_text(path.read_text() + path.read_text())
    with pytest.raises(CryoreconError, match=r"p\.star has two tables named data_optics"):
        read_particles(path)


def test_a_list_of_names_that_begin_like_blocks_is_one_table(tmp_path):
    path = tmp_path / "list.star"
    names = ["data_001.mrc", "data_002.mrc", "data_003.mrc"]
    text = "data_list\n\nloop_\n_rlnMicrographName #1\n" + "\n".join(names)
    path.write_text(text + "\n\n# more\ndata_more\n\nloop_\n_rlnMicrographName\ndata_004.mrc\n")
    tables = read_star(path)
    assert [list(table["rlnMicrographName"]) for table in tables.values()] == [
        names,
        ["data_004.mrc"],
    ]
    assert list(tables) == ["list", "more"]


def test_images_of_the_project_that_is_named_come_first(tmp_path, monkeypatch):
    """Job folders have the same names in all projects."""
    for number, project in enumerate(("A", "B")):
        (tmp_path / project / "Extract").mkdir(parents=True)
        write_stack(
            tmp_path / project / "Extract" / "s.mrcs", np.full((3, N, N), number) + noise(3)
        )
        star(tmp_path / project, rows(stack="Extract/s.mrcs"))
    monkeypatch.chdir(tmp_path / "B")
    found = read_particles("../A/p.star", project="../A")
    assert found.images([0, 1, 2]).mean() == pytest.approx(0, abs=0.3)
    assert read_particles("../A/p.star").images([0]).mean() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(("other", "taken"), [(2.0001, 2.0), (2.015, 2.015), (2.025, None)])
def test_pixel_sizes_that_hardly_differ_are_that_of_most(folder, other, taken):
    group = pd.concat([optics(), optics(rlnOpticsGroup=2, rlnImagePixelSize=other)])
    path = star(folder, rows().assign(rlnOpticsGroup=[1, 2, 2]), group)
    if taken is None:
        with pytest.raises(CryoreconError, match=r"mixes pixel sizes \(2, 2\.025 A\)"):
            read_particles(path)
        return
    found = read_particles(path)
    assert found.pixel_size_angst == taken
    told = [line for line in table_doubts(found) if "pixel sizes are" in line]
    assert told == (
        []
        if taken == 2.0
        else [
            "pixel sizes are 2 to 2.015 A: 1 of 3 images are taken as if theirs were 2.015 A, too"
        ]
    )


def noise(n):
    return 0.5 * np.random.default_rng(2).normal(size=(n, N, N))


def test_groups_without_particles_may_hold_anything(folder):
    spare = optics(rlnOpticsGroup=2, rlnVoltage="None", rlnImageSize=9, rlnImageDimensionality=3)
    group = pd.concat([spare, optics()], ignore_index=True)
    found = read_particles(star(folder, group=group)).ctf_parameters()
    assert found.voltage_kv.tolist() == [300.0] * 3
    group.loc[1, "rlnVoltage"] = "None"
    with pytest.raises(CryoreconError, match="row 2, column rlnVoltage: 'None' is not a finite"):
        read_particles(star(folder, group=group)).ctf_parameters()
