"""What agreement by chance is worth: noise in place of maps, noise in place of particles."""

from __future__ import annotations

import pytest
import torch
from conftest import MODEL
from rich.console import Console

from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.io.mrc import stack_writer
from cryorecon.io.star import read_star, write_star
from cryorecon.maps import chance as by_chance
from cryorecon.maps.chance import beyond_chance, chance_fsc
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.fourier import fft_centred, lowpass, radius_grid, shell_sums
from cryorecon.physics.masks import soft_ball
from cryorecon.run import stages
from cryorecon.run.abinitio import abinitio
from cryorecon.run.abinitio_input import AbinitioOptions
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig

pytestmark = pytest.mark.usefixtures("no_pictures", "coarse_alignment")


def power_by_shell(volume):
    shells = (radius_grid(len(volume), 3) + 0.5).long().flatten()
    return shell_sums(
        fft_centred(volume, 3).abs().square().flatten(), shells, int(shells.max()) + 1
    )


def test_noise_has_the_power_of_the_map_and_nothing_else_of_it(molecule_32, generator):
    white = torch.randn(molecule_32.shape, generator=generator)
    noise = by_chance._coloured(white, molecule_32)
    assert torch.allclose(power_by_shell(noise), power_by_shell(molecule_32), rtol=1e-3)
    assert fsc_curve(noise, molecule_32)[4:16].abs().max() < 0.3


def test_alignment_makes_noise_agree_at_low_resolution_only(
    molecule_32, generator, coarse_alignment
):
    mask = soft_ball(32, 12.0, 2.0, 3)
    chance = chance_fsc(molecule_32, molecule_32, mask, 2.4, generator, n_trials=2)
    assert chance[1:4].min() > 0.2
    assert chance[12:].max() < 0.2
    assert (chance[1:] <= chance[:-1]).all()


def test_filtered_maps_agree_by_chance_in_the_shells_that_they_show(molecule_32, coarse_alignment):
    mask, noise = soft_ball(32, 12.0, 2.0, 3), molecule_32
    coarse = lowpass(molecule_32, 4.0, 3)
    found = [
        chance_fsc(noise, noise, mask, 2.4, torch.Generator().manual_seed(5), 3, aligned=aligned)
        for aligned in (None, (coarse, coarse))
    ]
    assert found[1][5:9].mean() < found[0][5:9].mean()
    assert found[1][3:5].mean() > found[0][3:5].mean()


def test_no_trials_take_nothing_out(molecule_32, generator):
    mask = torch.ones_like(molecule_32)
    assert not chance_fsc(molecule_32, molecule_32, mask, 2.4, generator, n_trials=0).any()


def test_what_is_beyond_chance():
    curve = torch.tensor([1.0, 1.0, 0.9, 0.5, 0.1, -0.5]).double()
    chance = torch.tensor([1.0, 0.6, 0.5, 0.5, 0.0, 0.8]).double()
    assert torch.allclose(
        beyond_chance(curve, chance), torch.tensor([1.0, 1.0, 0.8, 0.0, 0.1, -1.0]).double()
    )


@pytest.fixture
def pure_noise(tmp_path, generator):
    """400 particles that hold nothing, 24 px at 3.2 A."""
    config = SimulateConfig(n_particles=400, box=24, pixel_size_angst=3.2, seed=1)
    simulate(MODEL, tmp_path, config)
    with stack_writer(tmp_path / "noise.mrcs", 24, 3.2) as stack:
        stack.append(torch.randn(400, 24, 24, generator=generator).numpy())
    tables = read_star(tmp_path / "particles.star")
    tables["particles"]["rlnImageName"] = [f"{i + 1}@noise.mrcs" for i in range(400)]
    write_star(tmp_path / "noise.star", tables)
    return tmp_path / "noise.star"


@pytest.mark.slow
def test_independent_maps_of_noise_do_not_agree(pure_noise, tmp_path, monkeypatch):
    """Were the job not to stop at "No signal found": below 0.143 in all but the lowest shells.

    Shells 2 and 3 of this box hold so few coefficients that what is left there scatters by 0.3.
    """
    monkeypatch.setattr(stages, "_SURE", float("-inf"))
    engine = RmfnConfig(
        search_nside=3, temperatures=(5.0, 1.0), width=16, n_starts=1, half_rounds=3,
        joint_rounds=1, final_steps=1,
    )  # fmt: skip
    curves = []
    for seed in range(4):
        options = AbinitioOptions(halves="independent", engine=engine, seed=seed)
        abinitio(pure_noise, tmp_path / f"job{seed}", options, Console(quiet=True))
        table = read_star(tmp_path / f"job{seed}" / "fsc.star")["fsc"]
        column = table["rlnFourierShellCorrelationMaskedMaps"]
        curves.append(torch.tensor([float(value) for value in column]))
    found = torch.stack(curves)
    assert found[:, 4:].max() < 0.143
    assert found[:, 2:].max() < 0.5
    assert "noise aligned in place of half set 2" in (tmp_path / "job0" / "run.log").read_text()
