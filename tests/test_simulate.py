from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN, MODEL

from cryorecon.conventions import euler_to_matrix
from cryorecon.errors import CryoreconError
from cryorecon.io.atoms import read_atoms
from cryorecon.io.mrc import open_stack, read_map
from cryorecon.io.particles import read_particles
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.ctf import ctf
from cryorecon.physics.fourier import fft_centred, half_plane, radius_grid
from cryorecon.physics.imaging import render
from cryorecon.physics.potential import Atoms, potential_map
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig
from cryorecon.run.specimen import load_model

PDB = """\
ATOM      1  CA AALA A   1      10.000   0.000   0.000  0.40 15.00           C
ATOM      2  CA BALA A   1      12.000   0.000   0.000  0.60 25.00           C
ATOM      3  H   ALA A   1      11.000   1.000   0.000  1.00 10.00           H
HETATM    4  O   HOH A   2       0.000   0.000   9.000  1.00 10.00           O
HETATM    6  N   DUM A   4       4.000   0.000  15.000  1.00 10.00           N
ATOM      7  OH2 TIP3A   5       4.000   0.000  25.000  1.00 10.00           O
ATOM      5  N   GLY A   3       8.000   0.000   0.000  0.50  0.00           N
END
"""


def atom(position=(0.0, 0.0, 0.0), element="C", b=30.0):
    return Atoms(np.array([position]), (element,), np.ones(1), np.array([b]))


def test_the_rules_for_atoms(tmp_path):
    path = tmp_path / "m.pdb"
    path.write_text(PDB)
    atoms = read_atoms(path)
    assert atoms.elements == ("C", "N")
    assert atoms.positions_angst[0, 0] == 12  # the more occupied location; no mark of a membrane
    assert list(atoms.occupancies) == [1.0, 0.5]
    assert list(atoms.b_factors_angst2) == [25.0, 20.0]
    assert len(read_atoms(path, keep_waters=True, keep_hydrogens=True).elements) == 5
    assert set(read_atoms(path, b_factor_angst2=7.0).b_factors_angst2) == {7.0}
    zipped = tmp_path / "m.pdb.gz"
    zipped.write_bytes(gzip.compress(PDB.encode()))
    assert read_atoms(zipped).elements == ("C", "N")
    (tmp_path / "emd.map.gz").write_bytes(zipped.read_bytes())
    with pytest.raises(CryoreconError, match="compressed map"):
        load_model(tmp_path / "emd.map.gz", SimulateConfig())


def test_mmcif_gives_the_same_atoms(tmp_path):
    import gemmi

    gemmi.read_structure(str(MODEL)).make_mmcif_document().write_file(str(tmp_path / "m.cif"))
    a, b = read_atoms(MODEL), read_atoms(tmp_path / "m.cif")
    assert a.elements == b.elements
    assert np.allclose(a.positions_angst, b.positions_angst)


def test_bad_models_are_named(tmp_path):
    (tmp_path / "a.pdb").write_text("HEADER nothing\nEND\n")
    (tmp_path / "w.pdb").write_text(PDB.splitlines()[3] + "\nEND\n")
    for path, words in (
        (tmp_path / "none.pdb", "does not exist"),
        (tmp_path, "is a directory"),
        (tmp_path / "a.pdb", "holds no atoms"),
        (tmp_path / "w.pdb", "besides waters"),
    ):
        with pytest.raises(CryoreconError, match=words):
            read_atoms(path)


@pytest.mark.parametrize("box", [24, 25])
@pytest.mark.parametrize("b", [0.5, 30.0])
def test_an_atom_has_its_scattering_factor(box, b):
    import gemmi

    pixel = 1.0
    transform = fft_centred(potential_map(atom(b=b), box, pixel).double(), 3) * pixel**3
    s2 = (radius_grid(box, 3) / (box * pixel)) ** 2
    coefficients = gemmi.Element("C").c4322
    expected = sum(
        a * torch.exp(-w * s2 / 4) for a, w in zip(coefficients.a, coefficients.b, strict=True)
    ) * torch.exp(-b * s2 / 4)
    inside = radius_grid(box, 3) < box / 2
    error = (transform - expected).abs()[inside].max()
    assert error < 0.02 * expected.max()


@pytest.mark.parametrize("box", [20, 21])
def test_the_mass_centre_is_the_box_centre_and_axes_are_zyx(box):
    atoms = Atoms(
        np.array([[4.0, 0, 0], [-4.0, 0, 0], [0, 0, 0]]),
        ("C", "C", "C"),
        np.ones(3),
        np.full(3, 20.0),
    )
    volume = potential_map(atoms, box, 1.0)
    centre = box // 2
    line = volume[centre, centre]
    assert line[centre + 4] > 0.8 * line[centre]
    assert volume[centre, centre + 4, centre] < 0.1 * line[centre]


def test_a_molecule_larger_than_the_box_is_refused():
    atoms = Atoms(np.array([[0.0, 0, 0], [50.0, 0, 0]]), ("C", "C"), np.ones(2), np.full(2, 20.0))
    with pytest.raises(CryoreconError, match="needs 50 A around its centre of mass"):
        potential_map(atoms, 20, 1.0)


def clean(folder):
    particles = read_particles(folder / "particles.star")
    volume = torch.from_numpy(read_map(folder / "map.mrc").data)
    pixel = particles.pixel_size_angst
    plane = half_plane(particles.box)
    gain = ctf(plane.frequencies, particles.ctf_parameters(), particles.box, pixel).float()
    rotations = euler_to_matrix(torch.from_numpy(particles.euler_deg())).float()
    offsets = torch.from_numpy(particles.origins_angst() / pixel).float()
    images = torch.from_numpy(particles.images(range(len(particles))))
    return images, render(volume, rotations, offsets, gain, padding=3)


def test_snr_is_as_defined_and_noise_is_white(stack_32):
    images, signal = clean(stack_32)
    noise = images - signal
    assert float(signal.var() / noise.var()) == pytest.approx(0.2, rel=0.03)
    power = (fft_centred(noise, 2).abs() ** 2).mean(0)
    radius = radius_grid(32, 2)
    low, high = power[radius < 6].mean(), power[radius > 10].mean()
    assert float(low / high) == pytest.approx(1, abs=0.03)


def test_coloured_noise_has_the_stated_spectrum_and_variance(tmp_path):
    config = SimulateConfig(
        n_particles=300,
        box=24,
        pixel_size_angst=3.2,
        snr=0.05,
        noise="coloured",
        noise_falloff_angst=20.0,
    )
    simulate(MODEL, tmp_path, config)
    images, signal = clean(tmp_path)
    noise = images - signal
    assert float(signal.var() / noise.var()) == pytest.approx(0.05, rel=0.05)
    power = (fft_centred(noise, 2).abs() ** 2).mean(0)
    s = radius_grid(24, 2) / (24 * 3.2)
    expected = 1 / (1 + (s * 20.0) ** 2)
    ratio = power / expected
    assert float(ratio.std() / ratio.mean()) < 0.1


def test_one_seed_gives_one_stack(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        simulate(MODEL, tmp_path / name, SimulateConfig(n_particles=40, box=16, seed=seed))
    a, b, c = (np.array(open_stack(tmp_path / n / "particles.mrcs")) for n in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_memory_does_not_grow_with_the_number_of_particles(tmp_path):
    """Peak memory of 3,000 images, 47 MB on disk, is that of 600."""
    code = (
        "import resource, sys; from cryorecon.run.simulate import simulate;"
        "from cryorecon.run.simulate_config import SimulateConfig as C\n"
        "for n in (600, 600, 3000):\n"
        "    simulate(sys.argv[1], sys.argv[2], C(n_particles=n))\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    command = [sys.executable, "-c", code, MODEL, str(tmp_path)]
    # Else the C library keeps what is freed, as it likes.
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=given_back)
    # What the first call leaves behind, 70 MB, the second finds.
    _, few, many = map(float, done.stdout.split())
    assert (tmp_path / "particles.mrcs").stat().st_size > 45e6
    assert many - few < 20


def test_views_cluster_when_asked(tmp_path):
    config = SimulateConfig(n_particles=200, box=16, view_clusters=1, view_concentration=50.0)
    simulate(MODEL, tmp_path, config)
    angles = torch.from_numpy(read_particles(tmp_path / "particles.star").euler_deg())
    assert euler_to_matrix(angles)[:, 2].mean(0).norm() > 0.95


@pytest.mark.parametrize("box", [24, 25])
def test_a_map_is_cut_about_its_centre(tmp_path, box):
    config = SimulateConfig(n_particles=30, box=box, snr=float("inf"))
    simulate(GOLDEN / "map_32.mrc", tmp_path, config)
    found, source = read_map(tmp_path / "map.mrc"), read_map(GOLDEN / "map_32.mrc")
    assert found.pixel_size_angst == pytest.approx(2.6)
    low = 16 - box // 2
    assert np.array_equal(found.data, source.data[(slice(low, low + box),) * 3])


@pytest.mark.parametrize("pixel", [3.2, 2.3])
def test_a_map_is_resampled_to_a_pixel_size(tmp_path, pixel):
    config = SimulateConfig(n_particles=3, pixel_size_angst=pixel, snr=float("inf"))
    simulate(GOLDEN / "map_32.mrc", tmp_path, config)
    found, source = read_map(tmp_path / "map.mrc"), read_map(GOLDEN / "map_32.mrc")
    assert found.pixel_size_angst == pytest.approx(pixel, rel=1e-4)
    assert len(found.data) == round(32 * 2.6 / pixel)
    # The integral of the density and its centre stay where they are.
    for data, size in ((found.data, pixel), (source.data, 2.6)):
        away = (np.arange(len(data)) - len(data) // 2) * size
        total = data.sum()
        moments = [total * size**3, (data.sum((0, 1)) * away).sum() / total]
        if size == pixel:
            mine = moments
    assert mine[0] == pytest.approx(moments[0], rel=0.02)
    assert mine[1] == pytest.approx(moments[1], abs=0.3)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"b_factor_angst2": 500.0}, "is a map and has no atoms"),
        ({"keep_waters": True}, "is a map and has no atoms"),
        ({"shift_angst": 500.0}, "500 A off the middle do not lie in images"),
    ],
)
def test_options_that_a_map_cannot_follow_are_refused(tmp_path, changed, words):
    with pytest.raises(CryoreconError, match=words):
        simulate(GOLDEN / "map_32.mrc", tmp_path, SimulateConfig(n_particles=2, **changed))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"voltage_kv": 5000.0}, r"--voltage is 5000\. It must be between 1 and 2000"),
        ({"voltage_kv": 300_000.0}, r"--voltage is 300000\. It must be between 1 and 2000"),
        ({"defocus_max_angst": 1e12}, "--defocus-max is 1e"),
        ({"defocus_max_angst": float("inf")}, "--defocus-max is inf"),
        ({"phase_shift_deg": float("nan")}, "--phase-shift is nan"),
        ({"pixel_size_angst": float("inf")}, r"--pixel-size is inf\. It must be finite"),
    ],
)
def test_optics_that_no_command_would_read_are_not_simulated(changed, words):
    """Particles at 5,000 kV were written, and refused by all that was to read them."""
    with pytest.raises(CryoreconError, match=words):
        SimulateConfig(**changed)


def test_wrong_requests_are_named(tmp_path):
    with pytest.raises(CryoreconError, match=r"--snr is 0\. It must be positive"):
        SimulateConfig(snr=0)
    with pytest.raises(CryoreconError, match=r"83.2 A wide: 4 px at 20.8 A/px are too few"):
        simulate(GOLDEN / "map_32.mrc", tmp_path, SimulateConfig(pixel_size_angst=20.8))
    with pytest.raises(CryoreconError, match="--defocus-min 20000 exceeds --defocus-max 10000"):
        SimulateConfig(defocus_min_angst=20_000.0, defocus_max_angst=10_000.0)
    with pytest.raises(CryoreconError, match=r"--n is 0\. It must be at least 1"):
        SimulateConfig(n_particles=0)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="RELION not installed")
def test_relion_reconstructs_our_stack(stack_32):
    command = ["relion_reconstruct", "--i", stack_32 / "particles.star", "--o"]
    command += [stack_32 / "relion.mrc", "--ctf"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    theirs = torch.from_numpy(read_map(stack_32 / "relion.mrc").data)
    truth = torch.from_numpy(read_map(stack_32 / "map.mrc").data)
    assert fsc_curve(theirs, truth)[1:8].min() > 0.9
