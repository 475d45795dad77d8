from __future__ import annotations

import gzip
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import GOLDEN, MODEL

from cryorecon.errors import CryoreconError
from cryorecon.io.atoms import read_atoms
from cryorecon.io.mrc import read_map
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.potential import Atoms
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig

PDB = """\
ATOM      1  CA AALA A   1      10.000   0.000   0.000  0.40 15.00           C
ATOM      2  CA BALA A   1      12.000   0.000   0.000  0.60 25.00           C
ATOM      3  H   ALA A   1      11.000   1.000   0.000  1.00 10.00           H
HETATM    4  O   HOH A   2       0.000   0.000   9.000  1.00 10.00           O
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
    assert atoms.positions_angst[0, 0] == 12  # the more occupied location
    assert list(atoms.occupancies) == [1.0, 0.5]
    assert list(atoms.b_factors_angst2) == [25.0, 20.0]
    assert len(read_atoms(path, keep_waters=True, keep_hydrogens=True).elements) == 4
    assert set(read_atoms(path, b_factor_angst2=7.0).b_factors_angst2) == {7.0}
    zipped = tmp_path / "m.pdb.gz"
    zipped.write_bytes(gzip.compress(PDB.encode()))
    assert read_atoms(zipped).elements == ("C", "N")


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
