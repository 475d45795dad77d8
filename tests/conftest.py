"""Shared fixtures: the built-in molecule, small stacks and generators."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from importlib.resources import files
from pathlib import Path
from unittest.mock import patch

import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

# As the command does: torch's threads must not spin while other programs wait for a core.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from cryorecon.cli.main import app, main
from cryorecon.conventions import euler_to_matrix
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import Reconstruction, RefineConfig
from cryorecon.errors import CryoreconError
from cryorecon.io.atoms import read_atoms
from cryorecon.io.mrc import write_map
from cryorecon.io.particles import read_particles
from cryorecon.maps import align
from cryorecon.physics import compiled
from cryorecon.physics.fourier import max_band
from cryorecon.physics.masks import Support
from cryorecon.physics.potential import potential_map
from cryorecon.physics.symmetry import symmetry_group
from cryorecon.run import abinitio
from cryorecon.run.load import load_observations
from cryorecon.run.moments import reconstruct as moment_reconstruct
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig

GOLDEN = Path(__file__).parent / "golden"
MODEL = Path(str(files("cryorecon") / "data" / "4ake_chain_a_heavy.pdb"))


def cryorecon(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The whole command in this process: a process of its own spends seconds to load torch."""
    words, out, err, code = ["cryorecon", *map(str, arguments)], io.StringIO(), io.StringIO(), 0
    streams = redirect_stdout(out), redirect_stderr(err)
    with chdir(cwd or Path()), patch.object(sys, "argv", words), streams[0], streams[1]:
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def at_true_poses(stack: Path, config: RefineConfig) -> tuple[ImageSet, Reconstruction]:
    """Images of a simulated stack, and a state that holds their poses and no maps yet."""
    particles = read_particles(stack / "particles.star")
    rotations = euler_to_matrix(torch.from_numpy(particles.euler_deg())).float()
    offsets = torch.from_numpy(particles.origins_angst() / particles.pixel_size_angst).float()
    blank, half = torch.zeros([particles.box] * 3), torch.arange(len(particles)) % 2
    band, support = float(max_band(particles.box)), Support(config.diameter / 2)
    state = Reconstruction(rotations, offsets, half, [blank, blank], band, support)
    return load_observations(particles, config.diameter), state


def trimer_stack(folder: Path) -> Path:
    """300 particles of a map with a threefold axis on z: 24 px at 3.2 A, SNR 1."""
    generator = torch.Generator().manual_seed(11)
    group, box = symmetry_group("C3"), 24
    places = torch.rand(7, 3, generator=generator).double() * 13 - 6.5
    places = (group[:, None] @ places[None, :, :, None]).reshape(-1, 3)
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    waves = [torch.exp(-((axis - places[:, i, None]) ** 2) / 2.5) for i in range(3)]
    volume = torch.einsum("px,py,pz->zyx", *waves)
    write_map(folder / "trimer.mrc", volume.float().numpy(), 3.2)
    return simulated(folder, 300, 24, 1.0, model=folder / "trimer.mrc", seed=6)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Picture files of one pixel: drawing costs a second a job. Other tests look at pictures."""
    draw = Figure.savefig

    def one_pixel(self: Figure, target: object, *args: object, **options: object) -> None:
        kind = options.get("format")
        if kind == "png" and isinstance(target, str | Path):
            Image.new("RGB", (1, 1)).save(target, "png")
        else:
            draw(self, target, *args, **options)

    monkeypatch.setattr(Figure, "savefig", one_pixel)


@pytest.fixture
def coarse_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps are aligned from 1,944 rotations in place of 9,000, in a third of the time."""
    monkeypatch.setattr(align, "_GRID_NSIDE", 3)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """One thread, and several that also share little work."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(compiled, "_POINTS_A_THREAD", 1)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="session")
def molecule_32() -> torch.Tensor:
    """4AKE, 32 px at 2.4 A; shape (32, 32, 32)."""
    return potential_map(read_atoms(MODEL, b_factor_angst2=20.0), 32, 2.4)


@pytest.fixture(scope="session")
def stack_32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a simulated stack: 600 particles, 32 px at 2.4 A, SNR 0.2, shifts, seed 3."""
    folder = tmp_path_factory.mktemp("stack")
    config = SimulateConfig(
        n_particles=600, box=32, pixel_size_angst=2.4, snr=0.2, shift_angst=4.0, seed=3
    )
    simulate(MODEL, folder, config)
    return folder


@pytest.fixture(autouse=True)
def no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs end without their report, which takes seconds, unless a test asks for it."""
    if "with_report" not in request.fixturenames:
        for module in (abinitio, moment_reconstruct):
            monkeypatch.setattr(module, "report_at_end", lambda *_: None)


@pytest.fixture
def with_report() -> None:
    """Jobs of this test write their report."""


@pytest.fixture(name="cryorecon")
def command_in_this_process(monkeypatch, capsys):
    """Runs a command in this process; returns its exit code and what it printed."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["cryorecon", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def invoke(*arguments):
    """A command in this process, its errors raised."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(result.exception, CryoreconError):
        raise result.exception
    return result


def simulated(folder, n_particles, box, snr, *, model=MODEL, seed=4):
    """The folder with a stack of a molecule in it; a box spans 76.8 A."""
    pixel_size_angst = round(76.8 / box, 2)
    simulate(
        model,
        folder,
        SimulateConfig(
            n_particles=n_particles, box=box, pixel_size_angst=pixel_size_angst, snr=snr, seed=seed
        ),
    )
    return folder


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """80 particles, 24 px at 3.2 A, SNR 2."""
    return simulated(tmp_path_factory.mktemp("few"), 80, 24, 2.0) / "particles.star"
