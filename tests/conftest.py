"""Shared fixtures: the built-in molecule, small stacks and generators."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import pytest

# As the command does: torch's threads must not spin while other programs wait for a core.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from cryorecon.io.atoms import read_atoms
from cryorecon.physics.potential import potential_map
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig

GOLDEN = Path(__file__).parent / "golden"
MODEL = Path(str(files("cryorecon") / "data" / "4ake_chain_a_heavy.pdb"))


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
