"""Export to other programs and cryoSPARC input: formats, signs by re-projection, round trips."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor
from typer.testing import CliRunner

from cryorecon.cli.compare_poses import compare_poses
from cryorecon.cli.export import export_command
from cryorecon.cli.reconstruct import reconstruct_command
from cryorecon.conventions import euler_to_matrix, matrix_to_euler
from cryorecon.errors import CryoreconError
from cryorecon.io.cryosparc import is_cryosparc_file, read_cryosparc
from cryorecon.io.mrc import read_map, stack_writer, write_map
from cryorecon.io.particles import Particles, read_particles
from cryorecon.io.star import read_star, write_star
from cryorecon.maps.align import mirror_map
from cryorecon.maps.contour import contour_level
from cryorecon.physics.ctf import ctf
from cryorecon.physics.fourier import half_plane, lowpass, radius_grid
from cryorecon.physics.imaging import render
from cryorecon.physics.resampling import resample_volume, sample_volume
from cryorecon.physics.rotations import random_rotations

N, COUNT, PIXEL = 24, 12, 2.5
ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
ORIGINS = ["rlnOriginXAngst", "rlnOriginYAngst"]
runner = CliRunner()


def run(command: object, *arguments: object) -> Result:
    app = typer.Typer()
    app.command()(command)  # type: ignore[type-var]
    return runner.invoke(app, [str(a) for a in arguments], terminal_width=120)


def export(*arguments: object) -> Result:
    result = run(export_command, *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def error_of(result: Result) -> CryoreconError:
    assert isinstance(result.exception, CryoreconError), result.output
    return result.exception


def gain(particles: Particles) -> Tensor:
    return ctf(half_plane(N).frequencies, particles.ctf_parameters(), N, PIXEL)


def agreement(volume: Tensor, particles: Particles, rotations: Tensor, px: Tensor) -> float:
    """Correlation of the particles' images with projections of a map."""
    images = particles.images(range(len(particles)))
    mine = render(volume.double(), rotations.double(), px.double(), gain(particles))
    return float(np.corrcoef(images.ravel(), mine.numpy().ravel())[0, 1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with a job: noise-free images with shifts and astigmatism, two stacks."""
    folder = tmp_path_factory.mktemp("project")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(N, N, N, generator=generator, dtype=torch.float64)
    volume = lowpass(noise * (radius_grid(N, 3) < 0.3 * N), 7, 3)
    random = np.random.default_rng(1)
    order = random.permutation(COUNT)
    table = pd.DataFrame(
        {
            "rlnImageName": [f"{k // 2 + 1:06d}@stacks/{'ab'[k % 2]}.mrcs" for k in order],
            "rlnOpticsGroup": [f"{k % 2 + 1}" for k in order],
            "rlnDefocusU": [f"{v:.3f}" for v in random.uniform(9e3, 2e4, COUNT)],
            "rlnDefocusV": [f"{v:.3f}" for v in random.uniform(8e3, 1.8e4, COUNT)],
            "rlnDefocusAngle": [f"{v:.4f}" for v in random.uniform(-90, 90, COUNT)],
            "rlnPhaseShift": [f"{v:.3f}" for v in random.uniform(0, 60, COUNT)],
            "rlnRandomSubset": [f"{k % 2 + 1}" for k in range(COUNT)],
            "myLabel": [f"00{k}" for k in range(COUNT)],
        }
    )
    angles = matrix_to_euler(random_rotations(COUNT, generator))
    for name, values in zip(ANGLES, angles.T, strict=True):
        table[name] = [f"{value:.6f}" for value in values.tolist()]
    for name in ORIGINS:
        table[name] = [f"{value:.6f}" for value in random.uniform(-5, 5, COUNT)]
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": ["1", "2"],
            "rlnOpticsGroupName": ["one", "two"],
            "rlnVoltage": ["300.0", "200.0"],
            "rlnSphericalAberration": ["2.7", "2.0"],
            "rlnAmplitudeContrast": ["0.1", "0.07"],
            "rlnBeamTiltX": ["0.25", "-0.5"],
            "rlnImagePixelSize": [f"{PIXEL}"] * 2,
            "rlnImageSize": [f"{N}"] * 2,
            "rlnImageDimensionality": ["2", "2"],
        }
    )
    job = folder / "job"
    job.mkdir()
    (folder / "stacks").mkdir()
    images = np.zeros((COUNT, N, N), np.float32)
    for again in range(2):  # First to read the table back, then with its own CTFs and poses.
        for number, name in enumerate("ab"):
            with stack_writer(folder / f"stacks/{name}.mrcs", N, PIXEL) as stack:
                stack.append(images[np.argsort(order)][number::2])
        if not again:
            write_star(job / "run_data.star", {"optics": optics, "particles": table})
            particles = read_particles(job / "run_data.star")
            rotations, px = poses(particles)
            images = render(volume, rotations, px, gain(particles)).numpy()
    halves = [f"run_half{k}_class001_unfil.mrc" for k in (1, 2)]
    for k, name in enumerate(["initial_model.mrc", *halves]):
        write_map(job / name, (volume * (1 + k)).numpy(), PIXEL)
    return folder


def poses(particles: Particles) -> tuple[Tensor, Tensor]:
    """A and the origin in pixels, float64."""
    rotations = euler_to_matrix(torch.from_numpy(particles.euler_deg()))
    return rotations, torch.from_numpy(particles.origins_angst() / PIXEL)


@pytest.fixture
def job(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(made, tmp_path / "project")
    return tmp_path / "project" / "job"


def same_particles(first: Particles, second: Particles) -> None:
    """Row for row: images, poses to 1e-3 degrees, shifts to 1e-3 A, CTF to float32."""
    assert list(first.table["rlnImageName"]) == list(second.table["rlnImageName"])
    rows = range(len(first))
    np.testing.assert_array_equal(first.images(rows), second.images(rows))
    turn = Rotation.from_matrix(poses(first)[0] @ poses(second)[0].mT)
    assert np.rad2deg(turn.magnitude()).max() < 1e-3
    np.testing.assert_allclose(first.origins_angst(), second.origins_angst(), atol=1e-3)
    one, two = first.ctf_parameters(), second.ctf_parameters()
    for name in vars(one):
        # cryoSPARC's radians are float32: angles agree to a unit in its last place.
        rtol = 2e-7 if name in ("defocus_angle_deg", "phase_shift_deg") else 0.0
        a, b = (getattr(optics, name).float() for optics in (one, two))
        torch.testing.assert_close(a, b, rtol=rtol, atol=0.0, msg=name)


def test_the_fixture_is_described_by_its_table(made: Path) -> None:
    particles = read_particles(made / "job/run_data.star")
    volume = torch.from_numpy(read_map(made / "job/initial_model.mrc").data)
    rotations, px = poses(particles)
    assert agreement(volume, particles, rotations, px) > 0.9999
    assert agreement(volume, particles, rotations, -px) < 0.9
    assert agreement(volume, particles, rotations.mT, px) < 0.9


def test_relion_31_goes_out_as_it_came(job: Path) -> None:
    export(job, "-o", job / "out.star", "--to", "relion")
    before, after = read_star(job / "run_data.star"), read_star(job / "out.star")
    assert list(before) == list(after)
    for name in before:
        pd.testing.assert_frame_equal(before[name], after[name])


def test_relion_30_and_back_keeps_every_row(job: Path) -> None:
    first = read_particles(job / "run_data.star")
    export(job, "-o", job / "old.star", "--to", "relion", "--relion30")
    blocks = read_star(job / "old.star")
    assert list(blocks) == [""]
    table = blocks[""]
    scale = (
        table["rlnDetectorPixelSize"].astype(float) * 1e4 / table["rlnMagnification"].astype(float)
    )
    np.testing.assert_allclose(scale, PIXEL)
    px = table[["rlnOriginX", "rlnOriginY"]].to_numpy(float)
    np.testing.assert_allclose(px, first.origins_angst() / PIXEL, atol=1e-6)
    assert not set(ORIGINS) & set(table)
    assert list(table["myLabel"]) == [f"00{k}" for k in range(COUNT)]
    assert list(table["rlnVoltage"].astype(float)) == [
        {"1": 300, "2": 200}[g] for g in first.table["rlnOpticsGroup"]
    ]
    assert set(table["rlnBeamTiltX"]) == {"0.25", "-0.5"}
    old = read_particles(job / "old.star")
    assert not old.has_optics_table
    same_particles(first, old)
    export(job / "old.star", "-o", job / "new.star", "--to", "relion")
    new = read_particles(job / "new.star")
    same_particles(first, new)
    assert len(new.blocks["optics"]) == 2
    assert not {"rlnVoltage", "rlnOriginX", "rlnMagnification"} & set(new.table)
    assert set(new.blocks["optics"]["rlnBeamTiltX"]) == {"0.25", "-0.5"}


def test_of_origins_in_both_units_those_in_angstrom_go_out(job: Path) -> None:
    export(job, "-o", job / "old.star", "--to", "relion", "--relion30")
    table = read_star(job / "old.star")[""].assign(rlnOriginXAngst="9.0", rlnOriginYAngst="9.0")
    write_star(job / "both.star", {"": table})
    export(job / "both.star", "-o", job / "new.star", "--to", "relion")
    for name in ("both", "new"):
        np.testing.assert_allclose(read_particles(job / f"{name}.star").origins_angst(), 9.0)


def test_cryosparc_fields_reproject_to_the_images(job: Path) -> None:
    export(job, "-o", job / "p.cs", "--to", "cryosparc")
    table = np.load(job / "p.cs", allow_pickle=False)
    particles = read_particles(job / "run_data.star")
    names = [f"{row['blob/idx'] + 1:06d}@{row['blob/path'].decode()}" for row in table]
    assert names == list(particles.table["rlnImageName"])
    assert len(set(table["uid"].tolist())) == COUNT
    assert table["blob/shape"].tolist() == [[N, N]] * COUNT
    assert table["alignments3D/split"].tolist() == [k % 2 for k in range(COUNT)]
    # cryoSPARC's rotation vector turns image axes into the map's: it is that of A.T.
    turned = Rotation.from_rotvec(table["alignments3D/pose"]).as_matrix()
    volume = torch.from_numpy(read_map(job / "initial_model.mrc").data)
    px = torch.from_numpy(table["alignments3D/shift"].copy())
    assert agreement(volume, particles, torch.from_numpy(turned).mT, px) > 0.9999
    expected = particles.ctf_parameters()
    np.testing.assert_array_equal(table["ctf/df2_A"], expected.defocus_v_angst.float())
    angle = np.deg2rad(expected.defocus_angle_deg.numpy())
    np.testing.assert_allclose(table["ctf/df_angle_rad"], angle, rtol=1e-6)
    phase = np.deg2rad(expected.phase_shift_deg.numpy())
    np.testing.assert_allclose(table["ctf/phase_shift_rad"], phase, rtol=1e-6)
    assert table["ctf/accel_kv"].tolist() == expected.voltage_kv.tolist()


def test_cryosparc_and_back_keeps_particles_row_for_row(job: Path) -> None:
    export(job, "-o", job / "p.cs", "--to", "cryosparc")
    first, read = read_particles(job / "run_data.star"), read_particles(job / "p.cs")
    same_particles(first, read)
    assert read.random_subsets().tolist() == first.random_subsets().tolist()
    read.write(job / "again.star", euler_deg=read.euler_deg(), origins_angst=read.origins_angst())
    same_particles(first, read_particles(job / "again.star"))
    export(job / "p.cs", "-o", job / "relion.star", "--to", "relion")
    same_particles(first, read_particles(job / "relion.star"))
    # And to cryoSPARC again: the same particles by uid, CTFs to the bit.
    export(job / "relion.star", "-o", job / "q.cs", "--to", "cryosparc")
    one, two = np.load(job / "p.cs"), np.load(job / "q.cs")
    for name in one.dtype.names:
        if name.startswith("alignments3D"):
            np.testing.assert_allclose(one[name], two[name], atol=2e-6)
        else:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_names_with_spaces_go_to_cryosparc_and_back(job: Path) -> None:
    tables = read_star(job / "run_data.star")
    names = tables["particles"]["rlnImageName"].str.replace("stacks/a", "my stacks/a  1")
    tables["particles"]["rlnImageName"] = names
    (job.parent / "my stacks").mkdir()
    shutil.copy(job.parent / "stacks/a.mrcs", job.parent / "my stacks/a  1.mrcs")
    write_star(job / "my table.star", tables)
    export(job / "my table.star", "-o", job / "p.cs", "--to", "cryosparc")
    first, read = read_particles(job / "my table.star"), read_particles(job / "p.cs")
    same_particles(first, read)
    export(job / "p.cs", "-o", job / "relion.star", "--to", "relion")
    same_particles(first, read_particles(job / "relion.star"))
    assert set(read.table["rlnImageName"]) == set(names)


def test_cryodrgn_arrays_reproject_to_the_images(job: Path) -> None:
    export(job, "-o", job / "drgn", "--to", "cryodrgn")
    with (job / "drgn/poses.pkl").open("rb") as file:
        rot, trans = pickle.load(file)
    with (job / "drgn/ctf.pkl").open("rb") as file:
        values = pickle.load(file)
    assert (rot.shape, rot.dtype, trans.shape) == ((COUNT, 3, 3), np.float64, (COUNT, 2))
    assert (values.shape, values.dtype) == ((COUNT, 9), np.float32)
    particles = read_particles(job / "run_data.star")
    rotations, px = poses(particles)
    np.testing.assert_allclose(rot, rotations, atol=1e-12)
    np.testing.assert_allclose(trans * N, px, atol=1e-9)
    # cryoDRGN's CTF formula, its sign opposite to ours: with images inverted as it reads them,
    # its prediction is our image.
    box, pixel, u, v, angle, kv, cs, w, phase = values.astype(np.float64).T[..., None]
    assert set(box.ravel()) == {N}
    s = half_plane(N).frequencies.numpy() / (box * pixel)[..., None]
    s2, azimuth = (s**2).sum(-1), np.arctan2(s[..., 1], s[..., 0])
    volts = kv * 1e3
    wavelength = 12.2639 / np.sqrt(volts + 0.97845e-6 * volts**2)
    defocus = (u + v + (u - v) * np.cos(2 * (azimuth - np.deg2rad(angle)))) / 2
    gamma = 2 * np.pi * (-0.5 * defocus * wavelength * s2 + 0.25 * cs * 1e7 * wavelength**3 * s2**2)
    gamma -= np.deg2rad(phase)
    theirs = np.sqrt(1 - w**2) * np.sin(gamma) - w * np.cos(gamma)
    ours = gain(particles).numpy()
    assert np.corrcoef(-theirs.ravel(), ours.ravel())[0, 1] > 0.9999


def test_without_poses_cryodrgn_gets_the_ctf_alone(job: Path) -> None:
    blocks = read_star(job / "run_data.star")
    blocks["particles"] = blocks["particles"].drop(columns=ANGLES)
    write_star(job / "bare.star", blocks)
    export(job / "bare.star", "-o", job / "drgn", "--to", "cryodrgn")
    assert [path.name for path in (job / "drgn").iterdir()] == ["ctf.pkl"]
    export(job / "bare.star", "-o", job / "p.cs", "--to", "cryosparc")
    assert not [n for n in np.load(job / "p.cs").dtype.names if n.startswith("alignments")]
    result = run(
        export_command, job / "bare.star", "-o", job / "x.cs", "--to", "cryosparc", "--flip"
    )
    assert "no column rlnAngleRot" in error_of(result).problem


def test_a_shift_beyond_the_box_is_not_for_cryodrgn(job: Path) -> None:
    blocks = read_star(job / "run_data.star")
    blocks["particles"].loc[4, "rlnOriginYAngst"] = f"{-1.1 * N * PIXEL}"
    write_star(job / "far.star", blocks)
    result = run(export_command, job / "far.star", "-o", job / "drgn", "--to", "cryodrgn")
    assert "row 5: the origin is farther than the box" in error_of(result).problem


@pytest.mark.parametrize(
    ("words", "there"),
    [
        (["-o", "t.star", "--to", "relion"], "t.star"),
        (["-o", "t.cs", "--to", "cryosparc"], "t.cs"),
        (["-o", "t.cxc", "--to", "chimerax"], "t.cxc"),
        (["-o", "drgn", "--to", "cryodrgn"], "drgn/poses.pkl"),
        (["-o", "m.mrc", "--to", "mrc"], "m_half2_unfil.mrc"),
        (["-o", "m.mrc", "--to", "mrc", "--flip"], "m.star"),
    ],
)
def test_what_is_there_is_replaced_only_when_asked_for(job: Path, monkeypatch, words, there):
    monkeypatch.chdir(job)
    Path("drgn").mkdir()
    Path(there).write_text("a thesis")
    before = sorted(job.rglob("*"))
    result = run(export_command, job, *words)
    assert f"{there} exists" in error_of(result).problem
    assert Path(there).read_text() == "a thesis"
    assert sorted(job.rglob("*")) == before
    export(job, *words, "--overwrite")
    assert Path(there).read_bytes() != b"a thesis"


@pytest.mark.parametrize("target", ["cryodrgn", "cryosparc"])
def test_phase_flipped_images_are_not_for_programs_that_cannot_know(job: Path, target) -> None:
    blocks = read_star(job / "run_data.star")
    blocks["optics"]["rlnCtfDataArePhaseFlipped"] = "1"
    write_star(job / "flipped.star", blocks)
    result = run(export_command, job / "flipped.star", "-o", job / "out.cs", "--to", target)
    assert "images are phase flipped" in error_of(result).problem
    assert not (job / "out.cs").exists()
    export(job / "flipped.star", "-o", job / "relion.star", "--to", "relion")
    assert read_star(job / "relion.star")["optics"]["rlnCtfDataArePhaseFlipped"].iloc[0] == "1"


def test_flipped_map_and_poses_reproject_to_the_same_images(job: Path) -> None:
    export(job, "-o", job / "other.mrc", "--to", "mrc", "--flip")
    original = torch.from_numpy(read_map(job / "initial_model.mrc").data)
    volume = torch.from_numpy(read_map(job / "other.mrc").data)
    torch.testing.assert_close(volume, mirror_map(original))
    halves = [read_map(job / f"other_half{k}_unfil.mrc").data for k in (1, 2)]
    np.testing.assert_allclose(halves[1], 1.5 * halves[0], rtol=1e-5)
    flipped = read_particles(job / "other.star")
    assert agreement(volume, flipped, *poses(flipped)) > 0.99
    assert agreement(original, flipped, *poses(flipped)) < 0.9
    unflipped = read_particles(job / "run_data.star")
    assert agreement(volume, unflipped, *poses(unflipped)) < 0.9
    # The other formats turn poses over alike.
    export(job, "-o", job / "f.cs", "--to", "cryosparc", "--flip")
    export(job, "-o", job / "f.star", "--to", "relion", "--relion30", "--flip")
    for name in ("f.cs", "f.star"):
        same_particles(flipped, read_particles(job / name))


@pytest.mark.parametrize("dialect", [(), ("--relion30",)])
@pytest.mark.parametrize("source", ["run_data.star", "old.star"])
def test_the_other_hand_has_no_priors_of_this_one(job: Path, source: str, dialect: tuple) -> None:
    export(job, "-o", job / "old.star", "--to", "relion", "--relion30")
    tables = read_star(job / source)
    name = next(name for name, table in tables.items() if "rlnImageName" in table)
    unit, other = ("", "Angst") if source == "old.star" else ("Angst", "")
    told = {"rlnMaxValueProbDistribution": "0.5", f"rlnOriginXPrior{unit}": "1.5"}
    priors = {f"rlnAngle{axis}Prior": "30" for axis in ("Rot", "Tilt", "Psi")}
    tables[name] = tables[name].assign(**told, **priors)
    write_star(job / "helix.star", tables)
    # Lengths come in the unit of the dialect.
    written = "rlnOriginXPrior" if dialect else "rlnOriginXPriorAngst"
    told = {"rlnMaxValueProbDistribution", written}
    names = {*told, *priors, f"rlnOriginXPrior{unit}", f"rlnOriginXPrior{other}"}
    for words, kept in (((), {*told, *priors}), (("--flip",), told)):
        target = job / f"helix{len(words)}.star"
        export(job / "helix.star", "-o", target, "--to", "relion", *dialect, *words)
        found = next(table for table in read_star(target).values() if "rlnImageName" in table)
        assert names & set(found) == kept
        factor = (PIXEL if written != f"rlnOriginXPrior{unit}" and dialect == () else 1) / (
            PIXEL if written != f"rlnOriginXPrior{unit}" and dialect else 1
        )
        np.testing.assert_allclose(found[written].astype(float), 1.5 * factor, rtol=1e-5)


def test_the_mask_of_a_job_goes_along_with_its_map(job: Path) -> None:
    export(job, "-o", job / "alone.mrc", "--to", "mrc")
    assert not (job / "alone_mask.mrc").exists()
    original = read_map(job / "initial_model.mrc").data
    mask = (original > 0.1 * original.max()).astype(np.float32)
    write_map(job / "initial_model_mask.mrc", mask, PIXEL)
    words = ["--flip", "--invert", "--lowpass", 12, "--json"]
    told = export(job, "-o", job / "other.mrc", "--to", "mrc", *words)
    assert "other_mask.mrc" in told.stdout
    # Sign and edge stay; the hand does not.
    found = read_map(job / "other_mask.mrc")
    np.testing.assert_array_equal(found.data, mirror_map(torch.from_numpy(mask)))
    assert found.pixel_size_angst == pytest.approx(PIXEL, rel=1e-6)
    # With other voxels too it lies where the map lies, and does not ring beyond 0 and 1.
    edits = ["--resample", 1.7, "--crop", 30]
    export(job, "-o", job / "fine.mrc", "--to", "mrc", *edits)
    export(job / "initial_model_mask.mrc", "-o", job / "raw.mrc", "--to", "mrc", *edits)
    raw = read_map(job / "raw.mrc").data
    assert raw.min() < -0.01
    np.testing.assert_array_equal(read_map(job / "fine_mask.mrc").data, raw.clip(0, 1))


@pytest.mark.parametrize("box", [24, 25])
def test_resampling_to_any_voxel_size(box: int, generator: torch.Generator) -> None:
    noise = torch.randn(box, box, box, generator=generator, dtype=torch.float64)
    volume = lowpass(noise, 6, 3)
    finer = sample_volume(volume, 2 * box, 0.5)
    torch.testing.assert_close(finer, resample_volume(volume, 2 * box))
    # A plane wave, whose values are known everywhere.
    z, y, x = torch.meshgrid(*[torch.arange(box).double() - box // 2] * 3, indexing="ij")
    step = 1.37
    new = int(box / step)
    points = [(torch.arange(new).double() - new // 2) * step] * 3
    fz, fy, fx = torch.meshgrid(*points, indexing="ij")

    def wave(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.cos(2 * torch.pi * (3 * x - 2 * y + z) / box + 0.4)

    torch.testing.assert_close(sample_volume(wave(x, y, z), new, step), wave(fx, fy, fz))
    high = torch.cos(2 * torch.pi * 11 * x / box)
    assert float(sample_volume(high, new, step).abs().max()) < 1e-10


def test_map_edits_are_applied_and_recorded_in_the_header(job: Path) -> None:
    export(
        job / "initial_model.mrc", "-o", job / "small.mrc", "--to", "mrc",
        "--resample", 3.1, "--crop", 16, "--lowpass", 12, "--invert",
    )  # fmt: skip
    found, original = read_map(job / "small.mrc"), read_map(job / "initial_model.mrc")
    assert found.data.shape == (16, 16, 16)
    assert found.pixel_size_angst == pytest.approx(3.1, rel=1e-6)
    filtered = lowpass(torch.from_numpy(original.data).double(), N * PIXEL / 12, 3)
    expected = -sample_volume(filtered, 18, 3.1 / PIXEL)[1:17, 1:17, 1:17]
    np.testing.assert_allclose(found.data, expected, atol=1e-5 * float(filtered.abs().max()))
    # A file has no half maps and no poses to go with it.
    assert not list(job.glob("small*half*"))
    result = run(export_command, job, "-o", job / "x.mrc", "--to", "mrc", "--lowpass", 4)
    assert "finer than voxels of 2.5 A" in error_of(result).problem
    result = run(export_command, job, "-o", job / "x.mrc", "--to", "mrc", "--resample", 40)
    assert "too large" in error_of(result).problem


def test_chimerax_script_opens_what_is_there(job: Path) -> None:
    folder = job.parent / "figures"
    folder.mkdir()
    result = export(job, "-o", folder / "view.cxc", "--to", "chimerax")
    lines = (folder / "view.cxc").read_text().splitlines()
    opened = [line.split('"')[1] for line in lines if line.startswith("open ")]
    assert len(opened) == 3
    assert opened[0] == "../job/initial_model.mrc"
    assert all((folder / name).is_file() for name in opened)
    assert [line for line in lines if line.startswith("hide")] == [
        "hide #2 models",
        "hide #3 models",
    ]
    volume = torch.from_numpy(read_map(job / "initial_model.mrc").data)
    level = contour_level(volume)
    shown = float(lines[lines.index(f'open "{opened[0]}"') + 1].split("level ")[1])
    assert shown == pytest.approx(level, rel=1e-4)
    assert f"{level:.4g}" in result.output
    inside = volume > level
    assert float(volume[inside].mean() + volume[~inside].mean()) / 2 == pytest.approx(
        level, rel=1e-3
    )
    assert 0.005 < float(inside.float().mean()) < 0.3


def test_contour_separates_a_ball_from_noise(generator: torch.Generator) -> None:
    ball = (radius_grid(32, 3) < 8).double()
    noisy = 5 * ball + 0.7 * torch.randn(ball.shape, generator=generator, dtype=torch.float64) + 1
    level = contour_level(noisy)
    assert level == pytest.approx(3.5, abs=0.1)
    assert contour_level(-2 * torch.ones(4, 4, 4)) == -2


def fields(folder: Path, **changes: object) -> np.ndarray:
    """cryoSPARC fields of the project's first three images, changed or left out (None)."""
    base: dict[str, object] = {
        "uid": np.array([7, 2**63 + 5, 9], "u8"),
        "blob/path": np.array([b">stacks/a.mrcs"] * 3),
        "blob/idx": np.array([2, 0, 1], "u4"),
        "blob/shape": np.full((3, 2), N, "u4"),
        "blob/psize_A": np.full(3, PIXEL, "f4"),
        "ctf/accel_kv": np.full(3, 300, "f4"),
        "ctf/cs_mm": np.full(3, 2.7, "f4"),
        "ctf/amp_contrast": np.full(3, 0.1, "f4"),
        "ctf/df1_A": np.array([10000.1, 11000.2, 12000.3], "f4"),
        "ctf/df2_A": np.array([9000.1, 9100.2, 9200.3], "f4"),
        "ctf/df_angle_rad": np.array([0.1, 4.2, -1.0], "f4"),
    }
    merged = {k: np.asarray(v) for k, v in {**base, **changes}.items() if v is not None}
    kinds = [(name, v.dtype, v.shape[1:]) for name, v in merged.items()]
    table = np.zeros(3, kinds)
    for name, values in merged.items():
        table[name] = values
    return table


def save(path: Path, table: np.ndarray) -> Path:
    with path.open("wb") as file:
        np.save(file, table)
    return path


POSES = {f"alignments_class_{k}/pose": np.full((3, 3), 0.1 * (k + 1), "f4") for k in (0, 1)}
SHIFTS = {f"alignments_class_{k}/shift": np.full((3, 2), k - 1.5, "f4") for k in (0, 1)}


def test_ab_initio_classes_and_coarser_alignments_are_read(job: Path) -> None:
    table = fields(
        job, **POSES, **SHIFTS,
        **{"alignments_class_0/psize_A": np.full(3, 5.0, "f4")},
        **{"alignments_class_0/class_posterior": np.array([0.9, 0.2, 0.5], "f4")},
        **{"alignments_class_1/class_posterior": np.array([0.1, 0.8, 0.5], "f4")},
    )  # fmt: skip
    particles = read_particles(save(job / "p.cs", table))
    assert list(particles.table["rlnClassNumber"]) == ["1", "2", "1"]
    # Class 1's shifts are in pixels of 5 A, class 2's in those of the images.
    np.testing.assert_allclose(particles.origins_angst()[:, 0], [-7.5, -1.25, -7.5])
    turn = Rotation.from_matrix(poses(particles)[0].mT).as_rotvec()
    np.testing.assert_allclose(turn, np.array([[0.1] * 3, [0.2] * 3, [0.1] * 3]), atol=1e-6)
    assert list(particles.table["cryosparcUid"]) == ["7", str(2**63 + 5), "9"]
    stack = read_particles(job / "run_data.star")
    third = list(stack.table["rlnImageName"]).index("000003@stacks/a.mrcs")
    np.testing.assert_array_equal(particles.images([0])[0], stack.images([third])[0])


def test_a_pixel_size_of_zero_of_an_alignment_is_the_images(job: Path) -> None:
    poses_of = {
        "alignments3D/pose": np.full((3, 3), 0.1, "f4"),
        "alignments3D/shift": np.full((3, 2), 2.0, "f4"),
        "alignments3D/psize_A": np.array([0.0, 5.0, 0.0], "f4"),
    }
    particles = read_particles(save(job / "p.cs", fields(job, **poses_of)))
    np.testing.assert_allclose(
        particles.origins_angst()[:, 0], [2 * PIXEL, 10.0, 2 * PIXEL], rtol=1e-5
    )


def test_experiment_groups_become_optics_groups(job: Path) -> None:
    table = fields(
        job,
        **{
            "ctf/exp_group_id": np.array([4, 9, 4], "u4"),
            "ctf/accel_kv": np.array([300, 200, 300], "f4"),
        },
    )
    particles = read_particles(save(job / "p.cs", table))
    assert particles.optics_index().tolist() == [0, 1, 0]
    assert particles.ctf_parameters().voltage_kv.tolist() == [300, 200, 300]
    assert list(particles.blocks["optics"]["rlnOpticsGroupName"]) == ["expGroup4", "expGroup9"]


def test_fields_come_from_the_passthrough_file_by_uid(job: Path) -> None:
    whole = fields(job)
    names = list(whole.dtype.names)
    save(job / "main.cs", whole[["uid", *[n for n in names if n.startswith("blob")]]].copy())
    rest = whole[["uid", *[n for n in names if n.startswith("ctf")]]][[2, 0, 1]].copy()
    save(job / "rest.cs", rest)
    command = ("-o", job / "p.star", "--to", "relion")
    problem = error_of(run(export_command, job / "main.cs", *command))
    assert "main.cs has no usable field ctf/df1_A" in problem.problem
    assert "--passthrough" in problem.remedy
    export(job / "main.cs", *command, "--passthrough", job / "rest.cs")
    defocus = read_star(job / "p.star")["particles"]["rlnDefocusU"].astype(float)
    np.testing.assert_array_equal(defocus.to_numpy(np.float32), whole["ctf/df1_A"])
    save(job / "rest.cs", rest[:2])
    result = run(export_command, job / "main.cs", *command, "--passthrough", job / "rest.cs")
    assert "lacks 1 of the 3 particles" in error_of(result).problem


BAD = {
    "no path": ({"blob/path": None}, "no usable field blob/path"),
    "no defocus": ({"ctf/df2_A": None}, "no usable field ctf/df2_A"),
    "nan": ({"ctf/df1_A": np.array([1, np.nan, 3], "f4")}, "row 2, field ctf/df1_A"),
    # Of a damaged file: one that processors tell of when it is computed with.
    "signalling nan": (
        {"ctf/df1_A": np.array([0, 0x7F800001, 0], "u4").view("f4")}, "row 2, field ctf/df1_A"
    ),
    "text": ({"blob/idx": np.array([b"a", b"b", b"c"])}, "field blob/idx: |S1"),
    "numbers as paths": ({"blob/path": np.arange(3)}, "field blob/path: int64"),
    "width": ({"alignments3D/pose": np.ones((3, 2), "f4")}, "field alignments3D/pose: float32"),
    "no shift": ({"alignments3D/pose": np.ones((3, 3), "f4")}, "usable field alignments3D/shift"),
    "quote": ({"blob/path": np.array([b"a", b"a", b"b\"c.mrcs"])}, "row 3, field blob/path"),
    "tab": ({"blob/path": np.array([b"a", b"b\tc.mrcs", b"a"])}, "row 2, field blob/path"),
    "not text": ({"blob/path": np.array([b"\xff", b"a", b"a"])}, "row 1, field blob/path"),
    "missing stack": ({"blob/path": np.array([b"gone.mrcs"] * 3)}, "do not exist: gone.mrcs"),
    "long name": ({"blob/path": np.array([b"x" * 300] * 3)}, "do not exist: xxx"),
    "beyond": ({"blob/idx": np.array([0, 1, 99], "u4")}, "row 3: asks for image 100"),
    "box": ({"blob/shape": np.full((3, 2), 9, "u4")}, "says 9 px boxes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_cryosparc_files_are_named(job: Path, name: str) -> None:
    changes, words = BAD[name]
    path = save(job / "p.cs", fields(job, **changes))
    with pytest.raises(CryoreconError) as caught:
        read_particles(path)
    assert words in caught.value.problem
    assert "p.cs" in caught.value.problem


def test_files_that_are_no_particle_tables_are_refused(job: Path) -> None:
    path = job / "p.cs"
    objects = np.array([("a",)], dtype=[("blob/path", object)])
    np.save(path.with_suffix(".npy"), objects)
    path.with_suffix(".npy").rename(path)
    for content, words in (
        (None, "object"),
        (np.zeros((3, 4)), "no table"),
        (fields(job)[:0], "p.cs"),
        (b"\x95CSDAT6\x08" + bytes(50), "streamed format"),
        (b"nothing of the kind", "cannot be read"),
        (b"", "cannot be read"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            save(path, content)
        assert is_cryosparc_file(path)
        with pytest.raises(CryoreconError, match=words):
            read_particles(path)
    with pytest.raises(CryoreconError, match="does not exist"):
        read_particles(job / "none.cs")


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_cryosparc_file_is_read_or_refused(job: Path, data: st.DataObject) -> None:
    extra = {
        "alignments3D/pose": np.ones((3, 3), "f4"),
        "alignments3D/shift": np.ones((3, 2), "f4"),
    }
    raw = bytearray(save(job / "whole.cs", fields(job, **extra)).read_bytes())
    # The header is text of which every byte counts; the rest are the numbers.
    position = data.draw(st.integers(0, len(raw) - 1) | st.integers(0, 700))
    piece = data.draw(st.binary(min_size=1, max_size=6))
    cut = data.draw(st.sampled_from([0, len(piece)]))
    raw[position : position + cut] = piece
    path = job / "damaged.cs"
    path.write_bytes(bytes(raw[: data.draw(st.sampled_from([len(raw), position + 1]))]))
    try:
        particles = read_particles(path)
        particles.ctf_parameters()
        particles.euler_deg()
        particles.write(job / "out.star")
    except CryoreconError:
        return
    assert len(particles) <= 3


def test_commands_take_cryosparc_files(job: Path) -> None:
    export(job, "-o", job / "p.cs", "--to", "cryosparc")
    for source, name in ((job / "run_data.star", "a.mrc"), (job / "p.cs", "b.mrc")):
        result = run(reconstruct_command, source, "-o", job / name)
        assert result.exit_code == 0, result.output
    one, two = read_map(job / "a.mrc"), read_map(job / "b.mrc")
    assert two.pixel_size_angst == pytest.approx(PIXEL)
    np.testing.assert_allclose(one.data, two.data, atol=1e-4 * np.abs(one.data).max())
    result = run(compare_poses, job / "p.cs", job / "run_data.star")
    assert result.exit_code == 0, result.output


def test_one_number_an_image_and_no_number_twice(job: Path) -> None:
    blocks = read_star(job / "run_data.star")
    blocks["particles"] = pd.concat([blocks["particles"], blocks["particles"][:2]])
    write_star(job / "twice.star", blocks)
    for name, source in (("p.cs", job), ("q.cs", job / "twice.star")):
        export(source, "-o", job / name, "--to", "cryosparc")
    one, two = (np.load(job / name)["uid"].tolist() for name in ("p.cs", "q.cs"))
    assert two[:COUNT] == one
    assert len(set(two)) == COUNT + 2
    for bad in ("seven", "-7", str(2**64)):
        blocks["particles"]["cryosparcUid"] = bad
        write_star(job / "bad.star", blocks)
        result = run(export_command, job / "bad.star", "-o", job / "x.cs", "--to", "cryosparc")
        assert "column cryosparcUid" in error_of(result).problem


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "mrc", "--relion30"), "--relion30 goes with"),
        (("--to", "relion", "--crop", "16"), "--to mrc"),
        (("--to", "cryodrgn", "--invert"), "--to mrc"),
        (("--to", "chimerax", "--flip"), "--to chimerax"),
        (("--to", "mrc", "--passthrough", "x.cs"), "particle formats"),
        (("--to", "emdb"), "emdb"),
        (("--to", "mrc"), "writes .mrc or .map files"),
    ],
)
def test_options_that_do_not_go_together(job: Path, arguments: tuple[str, ...], words: str) -> None:
    result = run(export_command, job, "-o", job / "x", *arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert not (job / "x").exists()


def test_what_is_not_there_is_named(job: Path) -> None:
    (job / "empty").mkdir()
    for source, name, words in (
        (job / "empty", "x.star", "holds neither run_data.star nor initial_model.mrc"),
        (job / "gone", "x.mrc", "does not exist"),
        (job / "initial_model.mrc", "x.cs", "has no particle table"),
        (job / "run_data.star", "x.cxc", "has no map"),
    ):
        formats = {".star": "relion", ".mrc": "mrc", ".cs": "cryosparc", ".cxc": "chimerax"}
        result = run(export_command, source, "-o", job / name, "--to", formats[Path(name).suffix])
        assert words in error_of(result).problem
        assert not (job / name).exists()


def test_the_table_and_its_optics_are_text(job: Path) -> None:
    optics, table = read_cryosparc(save(job / "p.cs", fields(job)))
    assert list(optics["rlnSphericalAberration"]) == ["2.7"]
    assert list(table["rlnDefocusU"]) == ["10000.1", "11000.2", "12000.3"]
