"""The mra commands with real files, run in this process through the program's own entry."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cryorecon.engines.mra.problem import observe, orbit_error
from cryorecon.engines.mra.training import draw_pairs
from cryorecon.physics.mixtures import MixtureConfig
from cryorecon.run.mra.jobs import _log


@pytest.fixture
def observed(tmp_path):
    """A file of 60,000 observations of 16 points, noise 0.5; its signal and density."""
    generator = torch.Generator().manual_seed(4)
    family = MixtureConfig(2, narrowest=0.08)
    signal, density = (part[0] for part in draw_pairs(family, 1, 16, generator))
    images = observe(signal, density, 60_000, 0.5, generator)
    np.save(tmp_path / "observed.npy", images.numpy())
    return tmp_path / "observed.npy", signal.double(), density.double()


@pytest.mark.parametrize(("method", "limit"), [("direct", 0.05), ("spectral", 0.15)])
def test_solve_finds_signal_density_and_noise(method, limit, cryorecon, observed, tmp_path):
    path, signal, density = observed
    out = tmp_path / "out"
    words = ["--method", method] if method != "direct" else []
    code, text, _ = cryorecon("mra", "solve", path, "-o", out, *words)
    assert code == 0
    assert "smallest eigenvalues" in text
    found = torch.from_numpy(np.load(out / "signal.npy"))
    shifts = torch.from_numpy(np.load(out / "density.npy"))
    assert float(orbit_error(found, signal)) < limit
    assert float(orbit_error(shifts, density)) < 3 * limit
    with (out / "solution.csv").open() as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_array_equal([float(r["signal"]) for r in rows], found.numpy())
    np.testing.assert_array_equal([float(r["density"]) for r in rows], shifts.numpy())
    told = json.loads((out / "solution.json").read_text())
    assert told["noise_std"] == pytest.approx(0.5, rel=0.01)
    assert told["observations"] == 60_000
    with Image.open(out / "solution.png") as picture:
        assert picture.width > 400
    code, _, err = cryorecon("mra", "solve", path, "-o", out)
    assert code == 1
    assert "--overwrite" in err


@pytest.mark.parametrize(("method", "limit"), [("direct", 0.06), ("spectral", 0.2)])
@pytest.mark.parametrize("baseline", [-30.0, 1000.0])
def test_a_baseline_changes_nothing(method, limit, baseline, cryorecon, observed, tmp_path):
    """Raw counts: what noise makes of a baseline is far larger than the signal's moments."""
    path, signal, density = observed
    np.save(tmp_path / "raised.npy", np.load(path).astype(np.float64) + baseline)
    words = "mra", "solve", tmp_path / "raised.npy", "-o", tmp_path / "out", "--method", method
    assert cryorecon(*words)[0] == 0
    found = torch.from_numpy(np.load(tmp_path / "out" / "signal.npy"))
    assert float(orbit_error(found - baseline, signal)) < limit
    shifts = torch.from_numpy(np.load(tmp_path / "out" / "density.npy"))
    assert float(orbit_error(shifts, density)) < 3 * limit


def test_options_of_another_method_are_refused(cryorecon, observed, tmp_path):
    solve = "mra", "solve", observed[0], "-o", tmp_path / "out"
    for words in (("--method", "spectral", "--starts", 2), ("--iterations", 5)):
        code, _, err = cryorecon(*solve, *words)
        assert code == 2
        assert "belongs to --method" in err


def test_nothing_of_an_earlier_call_is_left_by_one_that_fails(cryorecon, observed, tmp_path):
    out, model = tmp_path / "out", tmp_path / "model"
    assert cryorecon("mra", "solve", observed[0], "-o", out)[0] == 0
    # A name that was misspelt costs nothing.
    assert cryorecon("mra", "solve", tmp_path / "none.npy", "-o", out, "--overwrite")[0] == 1
    assert len(list(out.iterdir())) == 5
    np.save(tmp_path / "noise.npy", np.random.default_rng(1).normal(size=(5000, 32)))
    assert cryorecon("mra", "solve", tmp_path / "noise.npy", "-o", out, "--overwrite")[0] == 1
    assert list(out.iterdir()) == []
    train = ["mra", "train", "-o", model, "--points", 8, "--batch", 32, "--epochs", 1,
             "--pairs", 320, "--set", "encoder.hidden=[32]",
             "--set", "mixture.narrowest=0.1"]  # fmt: skip
    assert cryorecon(*train)[0] == 0
    code, _, err = cryorecon(*train, "--learning-rate", 1e30, "--overwrite")
    assert code == 1
    assert "diverged" in err
    assert not {"encoder.safetensors", "training.json"} & {path.name for path in model.iterdir()}


def test_a_training_that_goes_on_has_a_line_for_each_epoch(tmp_path):
    for epoch in (1, 2, 3, 2, 3):
        _log(tmp_path, epoch, [0.5, 0.25 * epoch])
    with (tmp_path / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    # An epoch that is missing hides none that follow.
    (tmp_path / "training.csv").write_text("epoch,signal_loss,density_loss\n1,0,0\n3,0,0\n")
    _log(tmp_path, 4, [0.5, 0.5])
    assert (tmp_path / "training.csv").read_text().count("\n") == 4


def test_solve_takes_other_number_types_and_a_given_noise(cryorecon, observed, tmp_path):
    path, signal, _ = observed
    values = np.load(path)
    for name, changed in {
        "half": values.astype(np.float16),
        "fortran": np.asfortranarray(values),
        "whole": np.round(values * 100).astype(np.int16),
    }.items():
        np.save(tmp_path / f"{name}.npy", changed)
        noise = 50 if name == "whole" else 0.5
        out = tmp_path / name
        words = ["--noise-std", noise, "--starts", 0]
        code, text, err = cryorecon("mra", "solve", tmp_path / f"{name}.npy", "-o", out, *words)
        assert code == 0, err
        assert "given" in text
        found = torch.from_numpy(np.load(out / "signal.npy")) / (100 if name == "whole" else 1)
        assert float(orbit_error(found, signal)) < 0.05


def bad_files(folder):
    """Files that must be refused, with a word that the message must hold."""
    good = np.random.default_rng(0).normal(size=(50, 8))
    np.save(folder / "flat.npy", good.ravel())
    yield folder / "flat.npy", "shape"
    np.save(folder / "cube.npy", good.reshape(5, 10, 8))
    yield folder / "cube.npy", "shape"
    np.save(folder / "wide.npy", np.zeros((3, 600)))
    yield folder / "wide.npy", "shape"
    np.save(folder / "one.npy", good[:1])
    yield folder / "one.npy", "shape"
    np.save(folder / "complex.npy", good + 1j)
    yield folder / "complex.npy", "complex128"
    np.save(folder / "words.npy", np.array([["a", "b"], ["c", "d"]]))
    yield folder / "words.npy", "real numbers"
    np.save(folder / "objects.npy", np.array([[{}, {}], [{}, {}]], dtype=object))
    yield folder / "objects.npy", "cannot be read"
    holed = good.copy()
    holed[17, 3] = np.nan
    np.save(folder / "holed.npy", holed)
    yield folder / "holed.npy", "observation 17"
    np.save(folder / "whole.npy", good)
    (folder / "cut.npy").write_bytes((folder / "whole.npy").read_bytes()[:-100])
    yield folder / "cut.npy", "cannot be read"
    (folder / "empty.npy").write_bytes(b"")
    yield folder / "empty.npy", "cannot be read"
    (folder / "text.npy").write_text("1 2 3\n4 5 6\n")
    yield folder / "text.npy", "cannot be read"
    np.savez(folder / "archive.npz", good)
    yield folder / "archive.npz", "cannot be read"
    yield folder / "missing.npy", "does not exist"
    yield folder, "is a directory"
    np.save(folder / "huge.npy", 1e150 * good)
    yield folder / "huge.npy", "overflow"
    np.save(folder / "noise.npy", good)
    yield folder / "noise.npy", "no signal"


def test_bad_files_are_refused_by_name(cryorecon, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for path, word in bad_files(folder):
        code, _, err = cryorecon("mra", "solve", path, "-o", tmp_path / "out", "--noise-std", 1)
        assert code == 1, path
        assert str(path) in err
        assert word in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_noise_whose_level_is_told_from_it_holds_no_signal(cryorecon, tmp_path, seed):
    noise = np.random.default_rng(seed).normal(size=(5000, 32))
    np.save(tmp_path / "noise.npy", noise)
    code, _, err = cryorecon("mra", "solve", tmp_path / "noise.npy", "-o", tmp_path / "out")
    assert code == 1
    assert "no signal found" in err
    assert not (tmp_path / "out").exists()


def test_noise_that_cannot_be_told_must_be_given(cryorecon, tmp_path):
    signal = np.random.default_rng(1).normal(size=12)
    shifts = np.random.default_rng(2).integers(0, 12, 5000)
    np.save(tmp_path / "clean.npy", np.stack([np.roll(signal, s) for s in shifts]))
    code, _, err = cryorecon("mra", "solve", tmp_path / "clean.npy", "-o", tmp_path / "out")
    assert code == 1
    assert "--noise-std" in err


def test_train_continue_and_solve_with_the_encoder(cryorecon, observed, tmp_path):
    path, signal, _ = observed
    model = tmp_path / "model"
    words = ["mra", "train", "-o", model, "--points", 16, "--pairs", 300, "--epochs", 2,
             "--set", "encoder.hidden=[32]", "--set", "mixture.narrowest=0.08"]  # fmt: skip
    code, text, err = cryorecon(*words)
    assert code == 0, err
    assert "unseen pairs" in text
    told = json.loads((model / "training.json").read_text())
    assert 0 < told["signal_error_mean"] < 1.2
    assert len((model / "training.csv").read_text().splitlines()) == 3
    assert cryorecon(*words)[0] == 1  # not empty
    assert cryorecon(*words, "--continue")[0] == 0
    code, _, err = cryorecon(*words, "--continue", "--seed", 5)
    assert code == 1
    assert "other settings" in err
    out = tmp_path / "out"
    solve = ["mra", "solve", path, "-o", out, "--method", "encoder"]
    code, _, err = cryorecon(*solve)
    assert code == 1
    assert "--model" in err
    code, _, err = cryorecon(*solve, "--model", model, "--learning-rate", 5e-3, "--iterations", 300)
    assert code == 0, err
    assert float(orbit_error(torch.from_numpy(np.load(out / "signal.npy")), signal)) < 0.3


def test_a_training_that_teaches_nothing_is_told(cryorecon, tmp_path):
    """Not a number: no encoder. No better than one guess for all: a warning."""
    words = ["mra", "train", "--points", 8, "--batch", 32, "--set", "encoder.hidden=[32]",
             "--epochs", 1, "--set", "mixture.narrowest=0.1"]  # fmt: skip
    short = ["-o", tmp_path / "a", "--pairs", 320, "--learning-rate", 1e30]
    code, _, err = cryorecon(*words, *short)
    assert code == 1
    assert "diverged at batch" in err
    assert "--learning-rate" in err
    code, _, err = cryorecon(*words, "-o", tmp_path / "a", "--overwrite", "--learning-rate", 0)
    assert code == 1
    assert "learning_rate cannot be 0.0: needs pairs, epochs, a batch and a positive rate." in err
    assert not (tmp_path / "a" / "encoder.safetensors").exists()
    for rate, pairs, warned in ((3.0, 320, True), (6e-3, 6400, False)):
        folder = tmp_path / str(rate)
        given = ["-o", folder, "--pairs", pairs, "--learning-rate", rate]
        code, text, err = cryorecon(*words, *given)
        assert code == 0, err
        assert ("taught nothing" in text) == warned, text
        told = json.loads((folder / "training.json").read_text())
        assert (told["signal_error_mean"] >= told["signal_error_of_the_mean"]) == warned


def test_bad_models_and_settings_are_refused(cryorecon, observed, tmp_path):
    path, _, _ = observed
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "encoder.safetensors").write_bytes(b"not a model")
    (tmp_path / "model" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    solve = ["mra", "solve", path, "-o", tmp_path / "out", "--method", "encoder", "--model"]
    train = ["mra", "train", "-o", tmp_path / "m"]
    for words, word in (
        ([*solve, tmp_path / "model"], "no trained encoder"),
        ([*solve, tmp_path / "none"], "does not exist"),
        ([*train, "--set", "encoder.kernl=3"], "kernel"),
        ([*train, "--set", "encoder.kernel=4"], "odd kernel"),
        ([*train, "--set", "mixture.narrowest=2"], "widths"),
        (["mra", "train", "-o", tmp_path / "model", "--continue"], "no checkpoint"),
        ([*train, "--continue"], "does not exist"),
    ):
        code, _, err = cryorecon(*words)
        assert code == 1, words
        assert word in err, err
    assert cryorecon("mra", "train", "-o", tmp_path / "m", "--gaussians", 0)[0] == 2


def test_an_encoder_of_another_length_is_refused(cryorecon, observed, tmp_path):
    model = tmp_path / "model"
    words = ["mra", "train", "-o", model, "--points", 12, "--pairs", 20, "--epochs", 1]
    assert cryorecon(*words, "--recipe", "paper")[0] == 0
    code, _, err = cryorecon(
        "mra", "solve", observed[0], "-o", tmp_path / "out", "--method", "encoder",
        "--model", model,
    )  # fmt: skip
    assert code == 1
    assert "12 points" in err


@pytest.mark.slow
def test_reproduce_writes_its_tables_and_keeps_finished_trainings(tmp_path):
    words = ["mra", "reproduce", "-o", "r", "--pairs", "300", "--epochs", "1", "--iterations", "10",
             "--instances", "2", "--observations", "20000"]  # fmt: skip
    command = [sys.executable, "-m", "cryorecon", *words]
    written = []
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        model = tmp_path / "r" / "encoder_2_gaussians" / "encoder.safetensors"
        written.append(model.stat().st_mtime_ns)
    assert written[0] == written[1]
    words[words.index("300")] = "301"
    again = [*command[:3], *words]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "holds an encoder of a training with other settings" in done.stderr
    with (tmp_path / "r" / "table1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["gaussians"] for row in rows] == ["1", "2", "3"]
    assert [row["paper_signal"] for row in rows] == ["0.052", "0.17", "0.206"]
    with (tmp_path / "r" / "rivals.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {
        "spectral", "direct", "encoder", "encoder, refined",
    }  # fmt: skip
    assert (tmp_path / "r" / "figure4.png").stat().st_size > 1000
