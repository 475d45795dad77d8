"""The report of a job: what the page and the PDF hold, from real files of every kind of job."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import torch
import typer
import yaml
from chromium import PATH, open_page
from rich.console import Console
from typer.testing import CliRunner

from cryorecon.cli.report import report_command
from cryorecon.conventions import matrix_to_euler
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map, write_map
from cryorecon.io.particles import read_particles
from cryorecon.io.star import read_star, write_star
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.fourier import radius_grid
from cryorecon.physics.rotations import random_rotations
from cryorecon.run.abinitio import abinitio
from cryorecon.run.abinitio_input import AbinitioOptions
from cryorecon.run.checkpoint import Checkpoint
from cryorecon.run.curves import FscCurve, read_fsc_star, write_fsc_star
from cryorecon.run.export import to_cryosparc
from cryorecon.run.job import Job, Task, add_output_node, open_job, write_output_nodes
from cryorecon.run.report import particles as report_particles
from cryorecon.run.report import written as report
from cryorecon.run.report.charts import likelihood_histogram
from cryorecon.run.report.contents import Report
from cryorecon.run.report.doubts import findings
from cryorecon.run.report.inputs import read_job, read_single_map
from cryorecon.run.report.particles import example_particles
from cryorecon.run.report.pictures import sphere_picture
from cryorecon.run.report.surface import shaded_views, surface_mesh
from cryorecon.run.stopping import Stop

QUIET = Console(quiet=True)
ROUND = {"cryoreconPoseChange": 3.0, "cryoreconOffsetChangeAngst": 0.5}
SECTIONS = ("warnings", "map", "slices", "fsc", "views", "rounds", "particles", "parameters")


@pytest.fixture(scope="module")
def job(stack_32, tmp_path_factory):
    """A finished job as it would be if it had found the truth."""
    folder = tmp_path_factory.mktemp("jobs") / "job001"
    particles = read_particles(stack_32 / "particles.star")
    volume = read_map(stack_32 / "map.mrc").data
    task = Task("abinitio", particles.path, 600, RmfnConfig(), {}, 3)
    with open_job(folder, QUIET, task) as opened:
        for number in (1, 2):
            opened.record_round("half-maps", number, ROUND)
        write_map(folder / "initial_model.mrc", volume, 2.4)
        noise = 1.5 * volume.std() * np.random.default_rng(1).standard_normal((2, 32, 32, 32))
        halves = volume + noise.astype(np.float32)
        for number in (1, 2):
            write_map(folder / f"run_half{number}_class001_unfil.mrc", halves[number - 1], 2.4)
        values = fsc_curve(*map(torch.from_numpy, halves))
        write_fsc_star(folder / "fsc.star", FscCurve(values, 32, 2.4, "half maps", "ball"))
        particles.write(folder / "run_data.star", random_subsets=np.arange(600) % 2 + 1)
        write_output_nodes(folder, {"initial_model.mrc": 6, "run_data.star": 3})
        opened.say("done")
    return folder


@pytest.fixture
def copy(job, tmp_path):
    return shutil.copytree(job, tmp_path / "copy")


def open_log(folder, log):
    """A job that writes its log elsewhere."""
    stop = Stop(folder)
    return Job(folder, QUIET, log, stop, Checkpoint(folder / "checkpoint.pt", stop, resume=False))


@pytest.fixture
def short(monkeypatch):
    """Pages without the five megabytes of plotly.js."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly.js */")


class Reader(HTMLParser):
    """Places, addresses and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.places, self.addresses, self.words, self.tag = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        for name, value in attrs:
            if name == "id":
                self.places.append(value)
            if name in ("src", "href", "data", "action", "srcset", "poster"):
                self.addresses.append(value)

    def handle_data(self, data):
        if self.tag not in ("script", "style"):
            self.words.append(data.strip())

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(folder):
    return (folder / "report.html").read_text("utf-8")


def test_the_page_is_whole_and_asks_for_nothing(copy):
    report.write_report(copy)
    page = page_of(copy)
    assert len(page) < 6e6
    read = Reader(page)
    assert set(SECTIONS) <= set(read.places)
    assert {a[:5] for a in read.addresses} <= {"data:", *(f"#{s}"[:5] for s in SECTIONS)}
    own = page[: page.index("plotly.js v")]
    assert "url(" not in own
    assert "@import" not in own
    assert "http" not in own
    assert "None. No known face of failure shows" in read.text
    assert "FSC = 0.5 at" in read.text
    assert "0.143 (between half maps)" in page
    assert "mask ball, maps not aligned" in read.text
    assert "half_rounds" in read.text
    assert read.text.count("image and prediction correlate") == 4
    pdf = (copy / "logfile.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page ") >= 6
    nodes = read_star(copy / "RELION_OUTPUT_NODES.star")["output_nodes"]
    assert list(nodes["rlnPipeLineNodeType"]) == ["6", "3", "13"]
    assert nodes["rlnPipeLineNodeName"].iloc[2].endswith("job001/logfile.pdf")


def test_warnings_say_what_to_do(short, copy):
    volume = read_map(copy / "initial_model.mrc").data
    write_map(copy / "initial_model.mrc", -volume, 2.4)
    particles = read_particles(copy / "run_data.star")
    angles = np.zeros((600, 3))
    particles.write(copy / "run_data.star", euler_deg=angles, origins_angst=np.full((600, 2), 7.6))
    with (copy / "run.log").open("a") as log:
        log.write("    1.0 s  WARNING: <b>something</b> else\n")
    rounds = read_star(copy / "rounds.star")["rounds"]
    rounds["cryoreconStage"] = "</script><script>alert(1)</script>"
    write_star(copy / "rounds.star", {"rounds": rounds})
    report.write_report(copy)
    # Names cannot break the page.
    assert "<script>alert(1)" not in page_of(copy)
    text = Reader(page_of(copy)).text
    for words in ("other --contrast", "crowd together", "larger --offset-range"):
        assert words in text
    assert "WARNING: <b>something</b> else" in text
    assert "No known face" not in text


def test_rounds_are_told_in_their_units(copy):
    rounds = read_star(copy / "rounds.star")["rounds"]
    names = ("ResolutionUsed", "LogLikelihood", "HalfMapResolution", "OffsetRangeAngst")
    rounds = rounds.assign(**{f"cryorecon{name}": "12.5" for name in names})
    write_star(copy / "rounds.star", {"rounds": rounds})
    report.write_report(copy)
    headings = re.findall(r"<th[^>]*>([^<]*)</th>", page_of(copy).split('id="rounds"')[1])
    for heading in (
        *("stage", "round", "resolution used (A)", "pose change (degrees)", "log likelihood"),
        *("offset change (A)", "half map resolution (A)", "offset range (A)"),
    ):
        assert heading in headings


def test_offsets_count_as_at_the_limit_where_the_last_search_ended(copy):
    assert read_job(copy).offset_limit_angst == pytest.approx(7.68)
    rounds = read_star(copy / "rounds.star")["rounds"]
    write_star(copy / "rounds.star", {"rounds": rounds.assign(cryoreconOffsetRangeAngst="12.5")})
    assert read_job(copy).offset_limit_angst == 12.5


def test_repeating_a_round_replaces_its_row(tmp_path):
    job = open_log(tmp_path, StringIO())
    for stage, number, value in (("a", 1, 5.0), ("a", 2, 4.0), ("b", 1, 3.0), ("a", 1, 2.0)):
        job.record_round(stage, number, {"cryoreconPoseChange": value})
    table = read_star(tmp_path / "rounds.star")["rounds"]
    assert [list(row) for row in table.itertuples(index=False)] == [
        ["a", "1", "2.000000"],
        ["a", "2", "4.000000"],
        ["b", "1", "3.000000"],
    ]


def test_an_output_node_is_added_once_under_the_folder_of_the_others(tmp_path):
    write_output_nodes(tmp_path, {"a.mrc": 6})
    text = (tmp_path / "RELION_OUTPUT_NODES.star").read_text().replace(str(tmp_path), "Ab/job7")
    (tmp_path / "RELION_OUTPUT_NODES.star").write_text(text)
    for _ in range(2):
        add_output_node(tmp_path, "logfile.pdf", 13)
    nodes = read_star(tmp_path / "RELION_OUTPUT_NODES.star")["output_nodes"]
    assert list(nodes["rlnPipeLineNodeName"]) == ["Ab/job7/a.mrc", "Ab/job7/logfile.pdf"]


@pytest.mark.parametrize(("mask", "aligned"), [(None, True), ("soft ball", False)])
def test_an_fsc_comes_back_with_its_conditions(mask, aligned, tmp_path):
    curve = FscCurve(torch.linspace(1, 0, 17), 32, 1.5, "these; and those", mask, aligned)
    write_fsc_star(tmp_path / "fsc.star", curve)
    found = read_fsc_star(tmp_path / "fsc.star", 32, 1.5)
    assert (found.maps, found.mask, found.aligned) == (curve.maps, mask, aligned)
    assert [round(float(v), 4) for v in found.values] == [  # noqa: PD011
        round(float(v), 4)
        for v in curve.values  # noqa: PD011
    ]


@pytest.mark.parametrize(("box", "most"), [(32, 10**6), (33, 10**6), (64, 3000)])
def test_the_mesh_is_the_surface(box, most):
    pixel = 100 / box
    radius = radius_grid(box, 3) * pixel
    mesh = surface_mesh((30 - radius).clamp(-3, 3).numpy(), pixel, most)
    distance = np.linalg.norm(mesh.vertices_angst, axis=1)
    assert abs(distance.mean() - 30) < 1.5
    assert distance.std() < 1.0
    assert len(mesh.faces) <= most
    a, b, c = (mesh.vertices_angst[mesh.faces[:, i]].astype(float) for i in range(3))
    enclosed = np.einsum("ij,ij->", a, np.cross(b, c)) / 6
    assert enclosed == pytest.approx(4 / 3 * np.pi * 30**3, rel=0.15)
    assert surface_mesh(np.zeros((8, 8, 8)), 1.0) is None


def test_shaded_views_face_the_eye():
    """What lies at large x, y and z is right and up in each view, and hides what is behind."""
    volume = np.zeros((32, 32, 32))
    volume[22:27, 22:27, 22:27] = 1
    for view in shaded_views(volume):
        rows, columns = np.nonzero(np.isfinite(view))
        assert rows.mean() > 150
        assert columns.mean() > 150
    volume[4:8, 22:27, 22:27] = 1
    along_z = shaded_views(volume)[0]
    assert np.nanmax(along_z) > 0.8


def test_the_sphere_has_the_equator_in_the_middle_and_the_first_pole_on_top():
    density = np.zeros(12 * 16)
    density[:4] = 5.0
    pixels, highest = sphere_picture(density, 200)
    assert highest == 5
    assert pixels[50, 3, 3] == 255
    assert pixels[2, 2, 3] == 0
    bright = (pixels[..., 0] > 200) & (pixels[..., 1] > 180) & (pixels[..., 3] > 0)
    assert np.nonzero(bright)[0].max() < 30


def test_examples_are_predicted_by_the_image_model(job, stack_32):
    found = example_particles(read_job(job), 6)
    assert len(found.names) == 6
    assert min(found.correlations) > 0.5
    assert torch.allclose(found.images - found.predictions, found.residuals, atol=1e-5)
    assert found.residuals.square().mean() < found.images.square().mean()
    assert found.scale == pytest.approx(1, abs=0.15)


def test_large_images_are_shown_in_fewer_pixels_on_the_same_scale(job, monkeypatch):
    whole = example_particles(read_job(job), 6)
    monkeypatch.setattr(report_particles, "_MOST_PIXELS", 24)
    found = example_particles(read_job(job), 6)
    assert found.images.shape[-1] == 24
    assert found.scale == pytest.approx(whole.scale, rel=0.02)
    assert float(found.images.std() / whole.images.std()) == pytest.approx(1, abs=0.05)
    assert float(found.predictions.std() / whole.predictions.std()) == pytest.approx(1, abs=0.05)


def test_an_image_in_two_rows_is_shown_in_its_own(copy, job):
    tables = read_star(copy / "run_data.star")
    table = tables["particles"]
    shown = list(table["rlnImageName"])[120]
    table.loc[0, ["rlnImageName", "rlnDefocusU", "rlnDefocusV"]] = [shown, "60000", "60000"]
    write_star(copy / "run_data.star", tables)
    found = example_particles(read_job(copy))
    assert found.names[0] == shown
    assert found.correlations == example_particles(read_job(job)).correlations
    tables["particles"] = table.iloc[::-1]
    write_star(copy / "reversed.star", tables)
    found = example_particles(read_job(copy, copy / "reversed.star"))
    assert min(found.correlations) > 0.5


def test_poses_that_name_no_images_are_told(copy, job):
    tables = read_star(copy / "run_data.star")
    del tables["particles"]["rlnImageName"]
    write_star(copy / "run_data.star", tables)
    told = Report(read_job(copy, job / "run_data.star")).no_examples
    assert "run_data.star names no images" in told


def test_images_are_found_by_name_where_they_moved(copy, stack_32, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(stack_32, moved)
    tables = read_star(copy / "run_data.star")
    tables["particles"]["rlnImageName"] = [f"{number + 1}@gone.mrcs" for number in range(600)]
    write_star(copy / "run_data.star", tables)
    settings = (copy / "job.yaml").read_text().replace("particles.star", "gone.star")
    (copy / "job.yaml").write_text(settings)
    lost = Report(read_job(copy))
    assert lost.examples is None
    assert "Give the file that leads to them with --particles" in lost.no_examples
    shutil.move(moved / "particles.mrcs", moved / "gone.mrcs")
    tables = read_star(moved / "particles.star")
    order = np.arange(600)[::-1]
    tables["particles"]["rlnImageName"] = [f"{n + 1}@gone.mrcs" for n in range(600)]
    tables["particles"] = tables["particles"].iloc[order]
    write_star(moved / "particles.star", tables)
    found = example_particles(read_job(copy, moved / "particles.star"))
    assert min(found.correlations) > 0.5


def test_files_of_different_jobs_are_refused(copy, job, tmp_path):
    cases = {
        "rows": (lambda f: _shorten(f / "run_data.star"), "has 569 particles, the job"),
        "half": (
            lambda f: write_map(f / "run_half2_class001_unfil.mrc", np.ones((8, 8, 8)), 2.4),
            "has 8 px",
        ),
        "fsc": (
            lambda f: write_fsc_star(f / "fsc.star", FscCurve(torch.ones(9), 16, 1.0, "x")),
            "has 9 shells",
        ),
        "map": (lambda f: (f / "initial_model.mrc").write_bytes(b"no"), "not an MRC file"),
        "yaml": (lambda f: (f / "job.yaml").write_text("a: [1"), "is not YAML"),
    }
    for name, (spoil, words) in cases.items():
        folder = shutil.copytree(job, tmp_path / name)
        spoil(folder)
        with pytest.raises(CryoreconError, match=words):
            read_job(folder)
    with pytest.raises(CryoreconError, match="is not a folder"):
        read_job(tmp_path / "none")
    (copy / "initial_model.mrc").unlink()
    (copy / "rounds.star").unlink()
    with pytest.raises(CryoreconError, match=r"no initial_model.mrc; its log ends with: .* done"):
        read_job(copy)


def _shorten(star):
    tables = read_star(star)
    tables["particles"] = tables["particles"].iloc[31:]
    write_star(star, tables)


def test_particles_in_doubt_are_counted_in_jobs_of_the_program_alone(short, copy, stack_32):
    table, doubt = copy / "run_data.star", "Another pose is likely"
    particles = read_particles(stack_32 / "particles.star")
    for share in (None, np.where(np.arange(600) % 4 == 0, 0.5, 1.0)):
        particles.write(table, pose_share=share)
        report.write_report(copy)
        assert (doubt in Reader(page_of(copy)).text) == (share is not None)
    assert "150 (25%)" in Reader(page_of(copy)).text
    report.write_map_report(copy / "initial_model.mrc", particles=table)
    page = (copy / "initial_model_report.html").read_text("utf-8")
    assert doubt not in Reader(page).text


def test_images_without_the_particle_are_warned_of(short, copy, stack_32):
    """In a job of the program, whose log-likelihoods are against an empty image."""
    table, said = copy / "run_data.star", "fit the map no better than an empty image"
    particles = read_particles(stack_32 / "particles.star")
    for empty in (0, 30):
        told = np.where(np.arange(600) < empty, -5.0, 20.0 + np.arange(600) % 7)
        particles.write(table, log_likelihood=told)
        report.write_report(copy)
        page = page_of(copy)
        assert (f"Some images {said}" in Reader(page).text) == (empty > 0)
        assert "likelihood-plot" in page
        counts, edges = likelihood_histogram(read_job(copy).log_likelihood)
        assert counts.sum() == 600
        assert counts[edges[1:] <= 0].sum() == empty
    (copy / "job.yaml").unlink()
    report.write_report(copy)
    assert said not in Reader(page_of(copy)).text
    assert "likelihood-plot" not in page_of(copy)


def test_a_map_and_a_table_alone_will_do(short, job, tmp_path):
    for name in ("initial_model.mrc", "run_data.star"):
        shutil.copy(job / name, tmp_path / name)
    report.write_report(tmp_path)
    text = Reader(page_of(tmp_path)).text
    assert "There is no job.yaml" in text
    assert "no half maps" in text
    assert "600 images" in text


def test_the_command_takes_a_map_of_any_program(short, job, tmp_path):
    shutil.copy(job / "initial_model.mrc", tmp_path / "theirs.mrc")
    app = typer.Typer()
    app.command()(report_command)
    arguments = [str(tmp_path / "theirs.mrc"), "--particles", str(job / "run_data.star")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    text = Reader((tmp_path / "theirs_report.html").read_text("utf-8")).text
    assert "theirs.mrc" in text
    assert "image and prediction correlate" in text
    assert (tmp_path / "theirs_report.pdf").exists()


def test_poses_of_a_map_may_come_from_cryosparc(job, tmp_path):
    particles = read_particles(job / "run_data.star")
    to_cryosparc(particles, tmp_path / "p.cs", flip=False, overwrite=False)
    found = read_single_map(job / "initial_model.mrc", tmp_path / "p.cs").poses
    expected = read_job(job).poses
    assert torch.allclose(found.rotations, expected.rotations, atol=1e-5)
    assert torch.allclose(found.origins_angst, expected.origins_angst, atol=1e-4)


def test_agreed_poses_may_be_of_another_job_than_the_first(short, copy):
    """A consensus that begins with a map, or with a job that is outvoted."""
    record = yaml.safe_load((copy / "job.yaml").read_text("utf-8"))
    (copy / "job.yaml").write_text(yaml.safe_dump({**record, "input_rows": 0}))
    with pytest.raises(CryoreconError, match="has 600 particles"):
        report.write_report(copy)
    agreed = {**record, "input_rows": 0, "kind": "consensus"}
    (copy / "job.yaml").write_text(yaml.safe_dump(agreed))
    report.write_report(copy)


def test_a_job_of_moments_shows_what_it_has(short, job, tmp_path):
    shutil.copy(job / "initial_model.mrc", tmp_path)
    config = {"moments": {"diameter_angst": None}, "fit": {"seed": 0}}
    (tmp_path / "job.yaml").write_text(json.dumps({"input_rows": 9, "config": config}))
    columns = ("cryoreconStart", "cryoreconMisfit", "cryoreconAgreementRadius")
    starts = pd.DataFrame([[2, 0.5, 7.0], [1, 0.6, 6.5]], columns=columns)
    write_star(tmp_path / "starts.star", {"starts": starts})
    radii = np.arange(1, 8)
    information = pd.DataFrame(
        {"rlnAngstromResolution": 77 / radii, "cryoreconExpectedFsc": 1 / radii}
    )
    write_star(tmp_path / "information.star", {"information": information})
    angles = matrix_to_euler(random_rotations(48, torch.Generator().manual_seed(0))).numpy()
    views = {"rlnAngleRot": angles[:, 0], "rlnAngleTilt": angles[:, 1]}
    views["cryoreconViewDensity"] = np.linspace(-0.1, 2, 48)
    write_star(tmp_path / "view_density.star", {"view_density": pd.DataFrame(views)})
    report.write_report(tmp_path)
    read = Reader(page_of(tmp_path))
    assert {"starts", "information", "information-plot"} <= set(read.places)
    assert "agreement radius" in read.text
    assert "As the moments tell" in read.text
    assert "no table of poses" in read.text
    (tmp_path / "initial_model.mrc").unlink()
    report.write_report(tmp_path)
    assert "This job has no map" in Reader(page_of(tmp_path)).text


def test_a_failing_report_does_not_fail_the_job(short, copy, monkeypatch):
    log = StringIO()
    monkeypatch.setattr(report, "write_pdf", lambda *_: 1 / 0)
    report.report_at_end(open_log(copy, log))
    assert "WARNING: the report could not be written: ZeroDivisionError" in log.getvalue()


def test_a_job_ends_with_its_report(short, with_report, stack_32, tmp_path):
    engine = RmfnConfig(
        n_starts=1,
        temperatures=(5.0,),
        half_rounds=1,
        joint_rounds=1,
        final_steps=1,
        search_nside=2,
    )
    options = AbinitioOptions(engine=engine, subset=60, assign="none")
    abinitio(stack_32 / "particles.star", tmp_path / "job", options, QUIET)
    read = Reader(page_of(tmp_path / "job"))
    assert "60 images" in read.text
    assert "Job done" in read.text
    assert read.text.count("image and prediction correlate") == 4
    rounds = read_star(tmp_path / "job" / "rounds.star")["rounds"]
    assert list(rounds["cryoreconStage"]) == ["half-maps", "joint-map"]
    assert list(rounds["cryoreconRound"]) == ["1", "2"]
    log = (tmp_path / "job" / "run.log").read_text()
    assert not any("report" in line for line in re.findall(r"WARNING.*", log))
    # Sixty images and one round are too few for a good map.
    fired = [found.name for found in findings(read_job(tmp_path / "job")) if found.fires]
    assert fired
    assert f"the report warns of {', '.join(fired)}\n" in log
    nodes = read_star(tmp_path / "job" / "RELION_OUTPUT_NODES.star")["output_nodes"]
    assert list(nodes["rlnPipeLineNodeType"]) == ["6", "6", "7", "3", "10", "13"]


@pytest.mark.slow
@pytest.mark.skipif(PATH is None, reason="no Chromium on PATH (Debian: apt-get install chromium)")
def test_a_browser_draws_the_page_without_a_complaint(copy, tmp_path):
    report.write_report(copy)
    with open_page(tmp_path / "profile") as page:
        for width, dark in ((1280, False), (400, True)):
            page.resize(width, 900, dark=dark)
            page.call("Page.navigate", url=(copy / "report.html").as_uri())
            page.wait_for("document.readyState === 'complete'")
            page.wait_for("document.getElementById('surface').dataset.drawn === 'yes'")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.evaluate("document.getElementById('surface').scrollIntoView()")
            page.screenshot(tmp_path / f"{width}.png", whole=False)
            assert page.evaluate(_COLOURS) > 20
            for plot in ("fsc-plot", "rounds-plot"):
                count = f"document.querySelectorAll('#{plot} path.js-line').length"
                assert page.evaluate(count) >= 1
        assert page.complaints() == []
        assert {address.split(":")[0] for address in page.requests()} <= {"file", "data", "blob"}


# Different colours that the surface is drawn with: an empty scene has one.
_COLOURS = """
Plotly.toImage(document.getElementById("surface"), { width: 200, height: 200 }).then(
  address => new Promise(done => {
    const image = new Image();
    image.onload = () => {
      const paper = document.createElement("canvas"); paper.width = paper.height = 200;
      const pen = paper.getContext("2d"); pen.drawImage(image, 0, 0);
      const data = new Uint32Array(pen.getImageData(0, 0, 200, 200).data.buffer);
      done(new Set(data).size);
    };
    image.src = address;
  }))
"""
