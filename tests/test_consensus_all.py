"""`cryorecon abinitio --method all`: engines, what goes on when one fails, and going on later."""

from __future__ import annotations

import signal
import sys

import numpy as np
import pytest
import torch
from conftest import MODEL
from rich.console import Console
from typer.testing import CliRunner

from cryorecon.cli.main import app, main
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.engines.rounds import refine_round
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map, stack_writer, write_map
from cryorecon.io.star import read_star, write_star
from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import fsc_curve
from cryorecon.run import refining, stages
from cryorecon.run.abinitio import abinitio
from cryorecon.run.abinitio_input import AbinitioOptions
from cryorecon.run.consensus.compare import ConsensusOptions, consensus
from cryorecon.run.consensus.every_engine import run_engines
from cryorecon.run.continuing import continue_job
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig
from cryorecon.run.stopping import StoppedError

QUIET = Console(quiet=True)


def run(*arguments):
    """Through the command; errors that a user can mend are raised."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(result.exception, CryoreconError):
        raise result.exception
    return result


def test_engines_that_fail_are_told_and_the_others_go_on(stack_32, tmp_path):
    star, out = stack_32 / "particles.star", tmp_path / "out"
    ran = []

    def good(folder):
        ran.append(folder.name)
        folder.mkdir(exist_ok=True)
        (folder / "RELION_JOB_EXIT_SUCCESS").touch()

    def ambiguous(folder):
        ran.append(folder.name)
        folder.mkdir(exist_ok=True)
        (folder / "starts.star").touch()
        (folder / "RELION_JOB_EXIT_FAILURE").touch()
        raise CryoreconError("They disagree", "See starts.star")

    def broken(folder):
        ran.append(folder.name)
        raise RuntimeError("no such kernel\nand more")

    engines = {"one": broken, "two": good, "three": ambiguous}
    folders, failed = run_engines(engines, star, out, {"seed": 1}, QUIET, overwrite=False)
    assert ran == ["one", "two", "three"]
    assert folders == [out / "two", out / "three"]
    assert failed == {"one": "RuntimeError: no such kernel"}
    # Going on: what has said all it has to say is not repeated.
    engines["one"] = good
    folders, failed = run_engines(engines, star, out, {"seed": 1}, QUIET, overwrite=False)
    assert ran[3:] == ["one"]
    assert (len(folders), failed) == (3, {})
    with pytest.raises(CryoreconError, match="begun with other seed"):
        run_engines(engines, star, out, {"seed": 2}, QUIET, overwrite=False)
    run_engines(engines, star, out, {"seed": 2}, QUIET, overwrite=True)
    assert ran[4:] == ["one", "two", "three"]


def test_engines_are_not_run_twice_at_a_time(stack_32, tmp_path):
    star, out, ran = stack_32 / "particles.star", tmp_path / "out", []

    def again(folder):
        ran.append(folder.name)
        (folder.parent / "rmfn").mkdir()
        before = (out / "methods.yaml").read_text()
        for overwrite in (False, True):
            with pytest.raises(CryoreconError, match=r"at work in .*out"):
                run_engines({"rmfn": again}, star, out, {"seed": 2}, QUIET, overwrite=overwrite)
        assert (out / "methods.yaml").read_text() == before

    run_engines({"rmfn": again}, star, out, {"seed": 1}, QUIET, overwrite=False)
    assert ran == ["rmfn"]
    assert sorted(path.name for path in out.iterdir()) == ["methods.yaml", "rmfn"]


def test_an_engine_that_was_interrupted_goes_on(few, tmp_path, monkeypatch):
    engine = RmfnConfig(
        n_starts=1, temperatures=(2.0, 1.0), search_nside=2, half_rounds=4, joint_rounds=1,
        final_steps=1, width=32, hard_poses=0,
    )  # fmt: skip
    out, plan, begun, done = tmp_path / "out", {"seed": 1}, [], []

    def run_it(folder):
        begun.append(folder.name)
        abinitio(few, folder, AbinitioOptions(engine=engine), QUIET)

    def third_is_interrupted(*arguments, **options):
        done.append(1)
        if len(done) == 3:
            signal.raise_signal(signal.SIGTERM)
        return refine_round(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(refining, "refine_round", third_is_interrupted)
        run_engines({"rmfn": run_it}, few, out, plan, QUIET, overwrite=False)
    with pytest.raises(CryoreconError, match="holds the jobs of --method all"):
        continue_job(out, QUIET)
    run_engines({"rmfn": run_it}, few, out, plan, QUIET, overwrite=False)
    assert begun == ["rmfn"]
    assert "3 rounds done" in (out / "rmfn" / "run.log").read_text()
    assert (out / "rmfn" / "RELION_JOB_EXIT_SUCCESS").exists()


def test_how_all_engines_go_on_is_told(few, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise StoppedError("now")

    monkeypatch.setattr("cryorecon.run.consensus.every_engine.run_engines", interrupted)
    words = ["abinitio", "--method", "all", str(few), "-o", str(tmp_path / "a b"), "--overwrite"]
    monkeypatch.setattr(sys, "argv", ["cryorecon", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 3
    again = f"cryorecon abinitio --method all {few} -o '{tmp_path / 'a b'}'\n"
    assert again in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [({"agree_to_angst": 2.0}, "beyond the maps' Nyquist"), ({"within_deg": -5.0}, "-5 degrees")],
)
def test_what_cannot_be_asked_for_removes_nothing(tmp_path, options, told):
    volume = np.random.default_rng(1).random((16, 16, 16), np.float32)
    maps = [tmp_path / "a.mrc", tmp_path / "b.mrc"]
    for path in maps:
        write_map(path, volume, 3.0)
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "agreement.star").write_text("the last one")
    with pytest.raises(CryoreconError, match=told):
        consensus(maps, tmp_path / "job", ConsensusOptions(**options), QUIET)
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["agreement.star"]


def test_options_of_one_engine_are_refused(stack_32, tmp_path):
    star = stack_32 / "particles.star"
    for options in (("--volume", "grid"), ("--set", "heads=2"), ("--set", "heads.x=2")):
        result = run("abinitio", "--method", "all", star, "-o", tmp_path / "out", *options)
        assert result.exit_code == 2
    assert not (tmp_path / "out").exists()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").touch()
    with pytest.raises(CryoreconError, match="is not empty"):
        run("abinitio", "--method", "all", star, "-o", tmp_path / "else")


@pytest.mark.slow
def test_all_engines_from_start_to_finish(tmp_path):
    """300 particles of 24 px; the moments of so few determine no map, which is said."""
    config = SimulateConfig(
        n_particles=300, box=24, pixel_size_angst=3.2, snr=1, shift_angst=4.0, seed=1
    )
    simulate(MODEL, tmp_path, config)
    out = tmp_path / "out"
    short = ["half_rounds=5", "joint_rounds=1"]
    settings = [f"{name}.{pair}" for name in ("rmfn", "amortized") for pair in short]
    settings += [
        # With 16,000 one seed of ten does not converge.
        "amortized.images_seen=24000",
        "moments.iterations=40",
        "moments.settling=10",
        "moments.beads=10",
    ]
    settings += ["consensus.chance_trials=2"]
    words = ["abinitio", "--method", "all", tmp_path / "particles.star", "-o", out]
    words += ["--starts", 2, *(part for pair in settings for part in ("--set", pair))]
    done = run(*words)
    assert done.exit_code == 0, done.output
    tables = read_star(out / "agreement.star")
    roles = dict(zip(tables["jobs"]["cryoreconJob"], tables["jobs"]["cryoreconRole"], strict=True))
    assert (roles["rmfn"], roles["amortized"]) == ("agrees", "agrees")
    assert roles["moments"] in {"no_map", "coarse_but_agrees", "coarse_and_disagrees"}
    pair = tables["pairs"].iloc[0]
    # One seed draws one set of halves.
    assert pair["cryoreconCompared"] == "half_sets_crossed"
    assert float(pair["cryoreconPosesWithinLimit"]) > 0.7
    assert len(read_star(out / "run_data.star")["particles"]) == 300
    source = read_map(tmp_path / "map.mrc")
    truth = torch.from_numpy(source.data)
    found = torch.from_numpy(read_map(out / "initial_model.mrc").data)
    moved = apply_alignment(found, align_maps(found, truth, source.pixel_size_angst))
    assert fsc_curve(moved, truth)[1:8].min() > 0.8

    before = [(out / name / "job.yaml").stat().st_mtime_ns for name in ("rmfn", "amortized")]
    again = run(*words, "--set", "consensus.agree_to_angst=9")
    assert again.exit_code == 0, again.output
    after = [(out / name / "job.yaml").stat().st_mtime_ns for name in ("rmfn", "amortized")]
    assert before == after
    assert again.output.count("finished before") == 3
    with pytest.raises(CryoreconError, match="begun with other seed"):
        run(*words, "--seed", 3)


@pytest.mark.slow
def test_maps_of_the_same_noise_do_not_agree(tmp_path, monkeypatch):
    """Were the jobs not to stop at "No signal found": the same images, other random starts."""
    config = SimulateConfig(n_particles=300, box=24, pixel_size_angst=3.2, seed=1)
    simulate(MODEL, tmp_path, config)
    noise = torch.randn(300, 24, 24, generator=torch.Generator().manual_seed(3))
    with stack_writer(tmp_path / "noise.mrcs", 24, 3.2) as stack:
        stack.append(noise.numpy())
    tables = read_star(tmp_path / "particles.star")
    tables["particles"]["rlnImageName"] = [f"{i + 1}@noise.mrcs" for i in range(300)]
    tables["particles"]["rlnRandomSubset"] = [1 + i % 2 for i in range(300)]
    write_star(tmp_path / "noise.star", tables)
    monkeypatch.setattr(stages, "_SURE", float("-inf"))
    for seed in (0, 1):
        words = ["abinitio", tmp_path / "noise.star", "-o", tmp_path / f"job{seed}"]
        words += ["--seed", seed, "--starts", 1, "--set", "half_rounds=3"]
        assert run(*words, "--set", "joint_rounds=1").exit_code == 0
    with pytest.raises(CryoreconError, match="No agreement"):
        run("consensus", tmp_path / "job0", tmp_path / "job1", "-o", tmp_path / "out")
    assert not (tmp_path / "out" / "initial_model.mrc").exists()
