"""Jobs that are killed, stopped or fail, and go on to the map of an uninterrupted run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from cryorecon.cli.console import prepare_folder
from cryorecon.cli.main import main
from cryorecon.engines import rounds
from cryorecon.engines.amortized import Amortized, AmortizedConfig
from cryorecon.engines.moments.config import MomentFitConfig
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.engines.rmfn_paper import PaperConfig
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import open_stack, read_map, stack_writer, write_map
from cryorecon.io.star import read_star, write_star
from cryorecon.ranks import ALONE
from cryorecon.run import abinitio_input, amortized_stages, checkpoint, refining, stages, stopping
from cryorecon.run import job as job_module
from cryorecon.run.abinitio import abinitio
from cryorecon.run.abinitio_input import AbinitioOptions
from cryorecon.run.continuing import continue_job, from_plain
from cryorecon.run.cost import abinitio_cost, moment_fit_cost
from cryorecon.run.moments.estimate import MomentsOptions
from cryorecon.run.moments.reconstruct import MomentReconstructOptions, abinitio_moments
from cryorecon.run.paper_protocol import PaperOptions, abinitio_perturbed
from cryorecon.run.stopping import StoppedError

QUIET = Console(quiet=True)
TINY = RmfnConfig(
    n_starts=2,
    hard_poses=0,
    hard_epochs=3,
    temperatures=(5.0, 1.0),
    search_nside=2,
    half_rounds=4,
    joint_rounds=1,
    final_steps=1,
    width=32,
)
SHORT = AmortizedConfig(images_seen=640, search_nside=2, half_rounds=2, joint_rounds=1)


def map_of(job):
    return read_map(job / "initial_model.mrc").data


def body(path):
    """A STAR file without the line that says when it was written."""
    return path.read_text().split("\n", 2)[2]


def log_of(job):
    return (job / "run.log").read_text()


def stopped(*_):
    raise CryoreconError("Enough", "Stop here")


class Killed(BaseException):
    """In place of SIGKILL: nothing in the program handles it."""


def killing(monkeypatch, after):
    """Every state is written; the program dies after the given number of them."""
    put, count = checkpoint.Checkpoint.put, 0

    def dying(self, part, pack, *, force=False, hold=False):
        nonlocal count
        put(self, part, pack, force=force, hold=hold)
        count += 1
        if count == after:
            raise Killed

    saving_always(monkeypatch)
    monkeypatch.setattr(checkpoint.Checkpoint, "put", dying)


def rmfn(star, job, **options):
    abinitio(star, job, AbinitioOptions(**{"engine": TINY, **options}), QUIET)


def amortized(star, job, **options):
    abinitio(star, job, AbinitioOptions(**{"engine": SHORT, **options}), QUIET)


def moments(star, job):
    engine = MomentFitConfig(
        starts=2, iterations=4, settling=2, first_iterations=2, radius=4, beads=8
    )
    options = MomentReconstructOptions(engine, allow_ambiguous=True)
    wanted = MomentsOptions(max_radius=4, checkpoint_images=20)
    abinitio_moments(star, job, wanted, options, QUIET)


def perturbed(star, job):
    engine = PaperConfig(epochs=(2, 1, 1), width=16, pose_steps=2, structure_steps=1)
    abinitio_perturbed(star, job, PaperOptions(engine=engine), QUIET)


INDEPENDENT = RmfnConfig(
    n_starts=1,
    temperatures=(5.0, 1.0),
    search_nside=2,
    half_rounds=1,
    joint_rounds=1,
    volume="grid",
    final_steps=1,
    update_scale=True,
)
HALVES = {"halves": "independent", "symmetry": "C2", "engine": INDEPENDENT}
# The states after which the run dies, one after the other; together they lie in every stage.
CASES = {
    "rmfn": (rmfn, {}, (1, 4, 3, 3, 3, 5)),
    "perturbed": (perturbed, {}, (1, 2)),
    "amortized": (amortized, {}, (5,)),
    "amortized-subset": (amortized, {"subset": 60}, (3, 7, 2, 3)),
    "rmfn-independent": (rmfn, HALVES, (2, 4, 7, 7, 8, 2)),
    "moments": (moments, {}, (1, 2)),
}
QUICK = ("rmfn", "perturbed", "amortized")
MARKED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("seen", [0.6, None])
def test_a_job_that_goes_on_says_whence_its_diameter_is(few, tmp_path, monkeypatch, seen):
    monkeypatch.setattr(abinitio_input, "particle_extent", lambda _: seen)
    monkeypatch.setitem(abinitio.__globals__, "_read_images", stopped)
    with pytest.raises(CryoreconError):
        rmfn(few, tmp_path / "job")
    with pytest.raises(CryoreconError):
        continue_job(tmp_path / "job", QUIET)
    said = [line.partition(" s  ")[2] for line in log_of(tmp_path / "job").splitlines()]
    first, again = (n for n, line in enumerate(said) if "particle diameter" in line)
    assert said[first:again] == said[again:]
    whence = "as the images tell" if seen else "assumed: 0.8 of the box"
    assert said[first].endswith(whence)
    assert ("WARNING: the images do not tell" in said[first + 1]) == (seen is None)


@pytest.mark.parametrize("case", MARKED)
def test_a_killed_job_goes_on_to_the_same_map(case, few, tmp_path, monkeypatch):
    run, options, kills = CASES[case]
    run(few, tmp_path / "whole", **options)
    job = tmp_path / "killed"
    for number, after in enumerate(kills):
        with monkeypatch.context() as patch:
            killing(patch, after)
            with pytest.raises(Killed):
                continue_job(job, QUIET) if number else run(few, job, **options)
    assert not (job / "initial_model.mrc").exists()
    continue_job(job, QUIET)
    assert np.array_equal(map_of(job), map_of(tmp_path / "whole"))
    if case == "rmfn":
        told = re.findall(r"searching on at (\S+) A with \d+ images(, after)?", log_of(job))
        # At both bands, and begun again in either.
        assert len({band for band, _ in told}) == 2
        assert len({band for band, again in told if again}) == 2
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in job.iterdir()} - {"RELION_JOB_EXIT_FAILURE"} == names
    assert "checkpoint.pt" not in names
    for name in ("run_data.star", "fsc.star", "starts.star", "encoder_data.star"):
        if name in names:
            assert body(job / name) == body(tmp_path / "whole" / name)


@pytest.mark.parametrize("after", [12, 14, 19])
def test_amortized_goes_on_within_the_search_of_a_hard_set(few, tmp_path, monkeypatch, after):
    """From the training's map; once that has been done; from random poses' map."""
    monkeypatch.setattr(amortized_stages, "TOLD_APART", 0)
    hard = dataclasses.replace(TINY, fine_epochs=3)
    monkeypatch.setattr(amortized_stages.AmortizedStages, "search_config", hard)
    amortized(few, tmp_path / "whole")
    job = tmp_path / "killed"
    # Ten steps, then epochs of the search: three, one more state, and the same again.
    with monkeypatch.context() as patch:
        killing(patch, after)
        with pytest.raises(Killed):
            amortized(few, job)
    continue_job(job, QUIET)
    assert log_of(tmp_path / "whole").count("searching from random poses") == 1
    assert np.array_equal(map_of(job), map_of(tmp_path / "whole"))
    assert "the map is searched on from" in log_of(tmp_path / "whole")
    again = re.search(r"searching on at \S+ A with \d+ images, after \d epochs", log_of(job))
    assert (again is None) == (after == 14)
    assert body(job / "encoder_data.star") == body(tmp_path / "whole" / "encoder_data.star")
    without = AmortizedConfig(**{**vars(SHORT), "search_on": False})
    amortized(few, tmp_path / "without", engine=without)
    assert "searched on" not in log_of(tmp_path / "without")


def test_particles_outside_the_subset_of_a_hard_set_are_searched_in_the_map(
    few, tmp_path, monkeypatch
):
    """The encoder cannot tell their poses apart either."""
    told = {}
    for hardest in (0, 10**9):
        monkeypatch.setattr(amortized_stages, "TOLD_APART", hardest)
        amortized(few, tmp_path / f"{hardest}", subset=60)
        told[hardest] = re.findall("the encoder has read", log_of(tmp_path / f"{hardest}"))
    assert [len(lines) for lines in told.values()] == [1, 2]


def saving_always(monkeypatch):
    monkeypatch.setattr(checkpoint, "_EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint, "_TIMES_ITS_COST", 0.0)


def at_round(monkeypatch, number, act):
    """Do something as a round begins."""
    refine_round, count = stages.refine_round, 0

    def acting(*args, **kwargs):
        nonlocal count
        count += 1
        if count == number:
            act()
        return refine_round(*args, **kwargs)

    for module in (refining, stages):
        monkeypatch.setattr(module, "refine_round", acting)


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """An uninterrupted job."""
    job = tmp_path_factory.mktemp("uninterrupted") / "job"
    rmfn(few, job)
    return job


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        signal.SIGTERM,
        pytest.param("RELION_JOB_ABORT_NOW", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_job_keeps_its_state(how, whole, few, tmp_path, monkeypatch, capsys):
    job = tmp_path / "a job"

    def ask():
        if isinstance(how, str):
            (job / how).touch()
        else:
            signal.raise_signal(how)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        # RELION's file is looked for once a second.
        patch.setattr(stopping, "_POLL_S", 0.0)
        at_round(patch, 3, ask)
        with pytest.raises(StoppedError):
            abinitio(few, job, AbinitioOptions(engine=TINY), Console(soft_wrap=True))
    assert (job / "RELION_JOB_EXIT_ABORTED").exists()
    said = capsys.readouterr().out
    assert f"cryorecon abinitio --continue '{job}'" in said
    assert "holds the state of 0 s ago" in said
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    continue_job(job, QUIET)
    assert "map: taken from the checkpoint, 3 rounds done" in log_of(job)
    assert np.array_equal(map_of(job), map_of(whole))
    assert not (job / "RELION_JOB_EXIT_ABORTED").exists()
    assert not (job / "RELION_JOB_ABORT_NOW").exists()
    assert (job / "RELION_JOB_EXIT_SUCCESS").exists()
    continue_job(job, Console())
    assert "is finished: nothing to do" in capsys.readouterr().out


def test_a_long_step_is_not_waited_for(tmp_path):
    """Where no good point comes, the job stops a few seconds after it was asked."""
    begun = time.monotonic()
    with pytest.raises(StoppedError), stopping.listening(tmp_path, grace_s=0.1) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
        while time.monotonic() < begun + 30:
            sum(range(1000))
    assert time.monotonic() - begun < 10
    with pytest.raises(StoppedError), stopping.listening(tmp_path):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_changed_input_or_folder_is_told(whole, few, tmp_path):
    with pytest.raises(CryoreconError, match=r"holds no job\.yaml"):
        continue_job(tmp_path, QUIET)
    star, job = tmp_path / "p.star", tmp_path / "job"
    star.write_text(few.read_text().replace("particles.mrcs", str(few.parent / "particles.mrcs")))
    record = yaml.safe_load((whole / "job.yaml").read_text())
    job.mkdir()
    for change, words in (
        ({"input": str(star)}, "has changed since the job"),
        ({"input": str(tmp_path / "gone.star")}, "is gone"),
        ({"kind": "tea"}, "does not know"),
        ({"options": {**record["options"], "sugar": 2}}, "does not know"),
        ({"options": None}, "does not know"),
    ):
        (job / "job.yaml").write_text(yaml.safe_dump({**record, **change}))
        with pytest.raises(CryoreconError, match=words):
            continue_job(job, QUIET)
    del record["kind"]
    for text in (yaml.safe_dump(record), "[1, 2", "- 3"):
        (job / "job.yaml").write_text(text)
        with pytest.raises(CryoreconError, match=r"job\.yaml"):
            continue_job(job, QUIET)
    (job / "job.yaml").write_bytes((whole / "job.yaml").read_bytes())
    (job / "checkpoint.pt").write_bytes(b"PK nothing of the kind")
    with pytest.raises(CryoreconError, match="cannot be read as a checkpoint"):
        continue_job(job, QUIET)


def test_the_record_says_what_ran(whole, few):
    record = yaml.safe_load((whole / "job.yaml").read_text())
    assert record["input"] == str(few)
    assert record["input_rows"] == 80
    assert record["directory"] == str(Path.cwd())
    assert record["options"]["engine"]["temperatures"] == [5.0, 1.0]
    options = AbinitioOptions(engine=TINY)
    assert from_plain(AbinitioOptions, record["options"], Path.cwd()) == options
    away = AbinitioOptions(mask=Path("m.mrc"), engine=SHORT, diameter_angst=1e-5, subset=30)
    plain = yaml.safe_load(yaml.safe_dump(job_module._plain(away)))
    found = from_plain(AbinitioOptions, plain, Path("/elsewhere"))
    assert found.mask == Path("/elsewhere/m.mrc")
    assert found == AbinitioOptions(mask=found.mask, engine=SHORT, diameter_angst=1e-5, subset=30)


@pytest.mark.parametrize("engine", [TINY, SHORT])
def test_settings_that_are_newer_than_a_job_are_its_defaults(engine):
    plain = yaml.safe_load(yaml.safe_dump(job_module._plain(AbinitioOptions(engine=engine))))
    del plain["engine"]["farthest_offset"], plain["box"]
    assert from_plain(AbinitioOptions, plain, Path.cwd()) == AbinitioOptions(engine=engine)
    plain["engine"]["sugar"] = 2
    with pytest.raises(ValueError, match=r"^sugar$"):
        from_plain(AbinitioOptions, plain, Path.cwd())


def test_numbers_that_break_down_leave_the_last_good_state(few, tmp_path, monkeypatch):
    saving_always(monkeypatch)
    job = tmp_path / "rounds"
    with monkeypatch.context() as patch:
        refine_poses, count = rounds.refine_poses, 0

        def breaking(*args, **kwargs):
            nonlocal count
            poses, count = refine_poses(*args, **kwargs), count + 1
            if count == 5:
                poses.log_likelihood[7] = float("nan")
            return poses

        patch.setattr(rounds, "refine_poses", breaking)
        with pytest.raises(CryoreconError, match=r"Round 3 of map broke down.*of 1 images of 40"):
            rmfn(few, job)
    assert (job / "RELION_JOB_EXIT_FAILURE").exists()
    found = torch.load(job / "checkpoint.pt", weights_only=True)["parts"]["map"]
    assert found["place"]["number"] == 2
    job = tmp_path / "training"
    with monkeypatch.context() as patch:
        gain = Amortized._gain

        def bad(self, *args):
            return gain(self, *args) * (float("nan") if self.seen == 320 else 1.0)

        patch.setattr(Amortized, "_gain", bad)
        with pytest.raises(CryoreconError, match="loss nan in batch 6, after 320 images"):
            amortized(few, job)
    found = torch.load(job / "checkpoint.pt", weights_only=True)["parts"]["map"]
    assert found["training"]["seen"] == 320


def test_a_broken_state_is_never_written(tmp_path):
    kept = checkpoint.Checkpoint(tmp_path / "c.pt", stopping.Stop())
    kept.put("map", lambda: {"a": [torch.ones(3)]}, force=True)
    with pytest.raises(CryoreconError, match="not finite"):
        kept.put("map", lambda: {"a": (torch.tensor([1.0, torch.inf]),)}, force=True)
    kept.put("map", lambda: {"a": torch.zeros(2)})  # Too soon.
    again = checkpoint.Checkpoint(tmp_path / "c.pt", stopping.Stop(), resume=True)
    assert torch.equal(again.get("map")["a"][0], torch.ones(3))
    assert again.get("all") is None
    anew = checkpoint.Checkpoint(tmp_path / "c.pt", stopping.Stop())
    assert anew.get("map") is None
    assert not (tmp_path / "c.pt").exists()


def test_what_is_held_for_later_parts_is_a_copy(tmp_path):
    """The run goes on to change its tables in place."""
    kept = checkpoint.Checkpoint(tmp_path / "c.pt", stopping.Stop())
    table = torch.ones(3)
    kept.put("half 1", lambda: {"poses": table}, force=True, hold=True)
    table.zero_()
    kept.put("half 2", lambda: {"poses": torch.full((3,), 2.0)}, force=True)
    again = checkpoint.Checkpoint(tmp_path / "c.pt", stopping.Stop(), resume=True)
    assert torch.equal(again.get("half 1")["poses"], torch.ones(3))
    assert torch.equal(kept.get("half 1")["poses"], torch.ones(3))


def test_what_each_team_did_last_counts(tmp_path):
    """Both teams' files hold both half sets; an older copy of one must not come back."""

    def teams(*, resume):
        whole = checkpoint.Checkpoint(tmp_path / "c.pt", stopping.Stop(), resume=resume)
        return whole, *(whole.for_team(number, ALONE) for number in (0, 1))

    _, one, two = teams(resume=False)
    one.put("half 1", lambda: {"n": 1}, force=True)
    two.put("half 2", lambda: {"n": 1}, force=True)
    _, one, two = teams(resume=True)
    two.put("half 2", lambda: {"n": 2}, force=True)
    one.put("half 1", lambda: {"n": 99}, force=True)
    whole, *_ = teams(resume=True)
    assert (whole.get("half 1"), whole.get("half 2")) == ({"n": 99}, {"n": 2})


def test_a_state_that_is_being_written_is_written_to_its_end(tmp_path, monkeypatch):
    """However long the disk takes: the job was asked to stop and had come to a good point."""
    save = torch.save

    def slowly(whole, path):
        time.sleep(0.6)
        save(whole, path)

    monkeypatch.setattr(torch, "save", slowly)
    with stopping.listening(tmp_path, grace_s=0.3) as stop:
        kept = checkpoint.Checkpoint(tmp_path / "c.pt", stop)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(stopping.StoppedError, match="on disk"):
            kept.put("map", lambda: {"n": 1})
    again = checkpoint.Checkpoint(tmp_path / "c.pt", stopping.Stop(), resume=True)
    assert again.get("map") == {"n": 1}


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    checkpoint.Checkpoint(tmp_path / "c.pt", stopping.Stop()).put("map", dict, force=True)
    for name in (".c.pt.12345.tmp", ".c2.pt.12346.tmp"):
        (tmp_path / name).write_bytes(b"half of a state")
    checkpoint.Checkpoint(tmp_path / "c.pt", stopping.Stop(), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_copies_keep_their_strides(tmp_path):
    """Sums over another layout may differ in the last digit."""
    view = torch.randn(5, 6, dtype=torch.complex64).real.T
    copy = checkpoint.frozen({"a": [view, view[:, :1].expand(6, 4)]})["a"]
    assert copy[0].stride() == view.stride()
    assert torch.equal(copy[0], view)
    assert copy[1].shape == (6, 4)
    view.zero_()
    assert copy[0].abs().sum() > 0


@contextmanager
def files_end_at(size):
    """As on a full disk: no file of this process grows beyond a number of bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_last_good_state(tmp_path):
    kept = checkpoint.Checkpoint(tmp_path / "c.pt", stopping.Stop())
    kept.put("map", lambda: {"a": torch.ones(30_000)}, force=True)
    with files_end_at(400_000):
        refuses_a_larger_state(kept)


def refuses_a_larger_state(kept):
    with pytest.raises(CryoreconError, match=r"c\.pt could not be written: .*Free some space"):
        kept.put("map", lambda: {"a": torch.ones(110_000)}, force=True)
    again = checkpoint.Checkpoint(kept.path, stopping.Stop(), resume=True)
    assert len(again.get("map")["a"]) == 30_000
    assert [path.name for path in kept.path.parent.iterdir()] == ["c.pt"]


@pytest.mark.slow
def test_a_job_on_a_full_disk_goes_on_when_there_is_room(whole, few, tmp_path, monkeypatch, capsys):
    saving_always(monkeypatch)
    job = tmp_path / "job"
    with monkeypatch.context() as patch, ExitStack() as full:
        fill = files_end_at((whole / "initial_model.mrc").stat().st_size // 2)
        at_round(patch, 2, lambda: full.enter_context(fill))
        with pytest.raises(CryoreconError, match=r"could not be written: .*Free some space"):
            abinitio(few, job, AbinitioOptions(engine=TINY), Console())
    assert "--continue" in capsys.readouterr().out
    continue_job(job, QUIET)
    assert np.array_equal(map_of(job), map_of(whole))


def command(monkeypatch, capsys, *words):
    """Status and output of a command of this program."""
    monkeypatch.setattr(sys, "argv", ["cryorecon", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    return end.value.code, told.out + told.err


def test_continue_takes_everything_from_the_job(whole, few, monkeypatch, capsys):
    """Contradictions are usage errors, status 2."""
    words = ["abinitio", few, "-o", whole, "--seed", 3]
    record = yaml.safe_load((whole / "job.yaml").read_text())
    record["command"] = shlex.join(["cryorecon", *map(str, words)])
    (whole / "job.yaml").write_text(yaml.safe_dump(record))
    status, told = command(monkeypatch, capsys, *words, "--continue", whole)
    assert (status, told) == (0, f"{whole} is finished: nothing to do\n")
    for other, shown in (
        (["--seed", 4], "--seed 4 contradicts"),
        (["other.star"], "PARTICLES other.star contradicts"),
        (["-o", "elsewhere"], "-o elsewhere contradicts"),
        (["--contrast", "black"], "--contrast black contradicts"),
        (["--no-assign-all"], "--assign-all"),
    ):
        status, told = command(monkeypatch, capsys, "abinitio-rmfn", "--continue", whole, *other)
        assert status == 2
        assert shown in told
    plain = command(monkeypatch, capsys, "abinitio", "--continue", whole, "--halves", "shared")
    assert plain[0] == 0


def estimates(monkeypatch, capsys, *words):
    """The objects that a dry run prints, and the exit status."""
    status, told = command(monkeypatch, capsys, *words, "--dry-run", "--json")
    found: list[dict] = []
    while told.startswith("{"):  # Then come the messages, from stderr.
        one, end = json.JSONDecoder().raw_decode(told)
        found, told = [*found, one], told[end:].strip()
    return *found, status


def test_a_dry_run_tells_and_writes_nothing(few, tmp_path, monkeypatch, capsys):
    for words in (
        ["abinitio", few, "-o", tmp_path / "job", "--subset", "50"],
        ["abinitio-amortized", few, "-o", tmp_path / "job", "--images", "disk"],
        ["abinitio", few, "-o", tmp_path / "job", "--method", "moments"],
        ["moments", "estimate", few, "-o", tmp_path / "m.h5"],
        ["abinitio", few, "-o", tmp_path / "job", "--method", "all"],
        ["reconstruct", few, "-o", tmp_path / "m.mrc"],
    ):
        status, told = command(monkeypatch, capsys, *words, "--dry-run")
        assert status == 0, told
        for said in (
            "80 particles, 24 px at 3.2 A",
            "voltage 300 kV",
            "1 optics group",
            "contrast: white on black",
            "memory about",
            "time about",
        ):
            assert said in told
        assert ("50 of the particles make the map, 30 join it" in told) == ("50" in words)
        assert ("images read again when needed" in told) == ("disk" in words)
        assert told.count("time about") == (3 if "all" in words else 1)
        ours = told.count("if images hardly tell their poses")
        assert ours == (
            0 if {"moments", "reconstruct"} & set(words) else 2 if "all" in words else 1
        )
        *objects, status = estimates(monkeypatch, capsys, *words)
        assert status == 0
        assert len(objects) == (3 if "all" in words else 1)
        for found in objects:
            assert (found["particles"], found["box"], found["contrast"]) == (80, 24, "white")
            assert 1 < found["cpu_s"] <= found.get("cpu_s_hard", math.inf)
            assert found["memory_bytes"] > 1e8
            assert found.get("map_particles") == (
                None if found.get("engine") not in ("rmfn", "amortized")
                else 50 if "50" in words else 80
            )  # fmt: skip
    status, told = command(
        monkeypatch, capsys, "abinitio", few, "-o", tmp_path / "job", "--diameter", 999, "--dry-run"
    )
    assert status == 1
    assert "does not fit the images" in told
    assert not any(tmp_path.iterdir())


def test_estimates_of_fits_to_moments_count_steps_at_the_radii_they_are_at():
    """A start at radius 8 of 1,950 steps, most of them at radius 4 and 6, was measured at 28 s."""

    def cost(**settings):
        return moment_fit_cost(MomentFitConfig(**settings)).cpu_s

    start = (cost(starts=4) - cost(starts=2)) / 2
    assert 20 < start < 40
    assert cost(radius=4) < cost(radius=8) / 3 < cost(radius=16) / 10
    assert cost(third_radius=0) < cost() < cost(volume="rmfn") < cost(volume="fouriernet")


@pytest.mark.parametrize("engine", [RmfnConfig(), AmortizedConfig()])
def test_estimates_grow_with_the_work(engine):
    def cost(n, box, **more):
        return abinitio_cost(engine, n, box, **{"independent": False, "others": 0, **more})

    small = cost(2000, 64)
    assert 30 < small.cpu_s < 400
    assert 0.5e9 < small.bytes < 3e9
    assert cost(4000, 64).cpu_s > small.cpu_s
    assert cost(2000, 128).bytes > small.bytes
    assert cost(2000, 64, independent=True).cpu_s > small.cpu_s
    assert small.cpu_s < cost(2000, 64, others=1000).cpu_s < cost(4000, 64, others=1000).cpu_s
    read = cost(2000, 64, others=100_000, refine_others=False).cpu_s
    assert 10 < read - small.cpu_s < (cost(2000, 64, others=100_000).cpu_s - small.cpu_s) / 3
    assert 300 < cost(2000, 64, hard=True).cpu_s < 1000
    assert 900 < cost(10_000, 64, hard=True).cpu_s < 2000
    if isinstance(engine, AmortizedConfig):
        alone = dataclasses.replace(engine, search_on=False)
        shorter = abinitio_cost(alone, 2000, 64, independent=False, others=0, hard=True)
        assert shorter.cpu_s < cost(2000, 64, hard=True).cpu_s - 100


def test_folders_of_others_and_of_unfinished_jobs_are_kept(tmp_path):
    prepare_folder(tmp_path / "new", overwrite=False)
    for name in ("run.out", "run.err", "job.star", "job_pipeline.star", "note.txt"):
        (tmp_path / name).touch()
    prepare_folder(tmp_path, overwrite=False)
    (tmp_path / "job.yaml").touch()
    with pytest.raises(CryoreconError, match="is not empty"):
        prepare_folder(tmp_path, overwrite=False)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(CryoreconError, match=f"abinitio --continue {tmp_path}"):
        prepare_folder(tmp_path, overwrite=False)
    prepare_folder(tmp_path, overwrite=True)


@pytest.mark.slow
def test_jobs_killed_at_random_moments_end_alike(tmp_path):
    """More than 20 kills, over all engines and stages."""
    script = Path(__file__).parents[1] / "examples" / "benchmarks" / "kill.py"
    words = [sys.executable, str(script), "-o", str(tmp_path), "--kills", "6", "--seed", "2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert sum(row[1] != "end" for row in rows) == 24
    ends = [row[-1] for row in rows if row[1] == "end"]
    assert len(ends) >= 4
    assert set(ends) == {"EQUAL"}


def stopped_early(few, folder, monkeypatch):
    """A project with images of its own and a job there that was stopped."""
    folder.mkdir()
    for name in ("particles.star", "particles.mrcs"):
        shutil.copy(few.parent / name, folder / name)
    tables = read_star(folder / "particles.star")
    numbers = tables["particles"]["rlnImageName"].str.partition("@")[0]
    tables["particles"]["rlnImageName"] = numbers + "@particles.mrcs"
    write_star(folder / "particles.star", tables)
    write_map(folder / "mask.mrc", np.ones((24, 24, 24), np.float32), 3.2)
    options = AbinitioOptions(diameter_angst=60.0, mask=Path("mask.mrc"), engine=TINY)
    monkeypatch.setattr(stages.Stages, "go_through", stops)
    with monkeypatch.context() as there, pytest.raises(StoppedError):
        there.chdir(folder)
        abinitio("particles.star", "job", options, QUIET)


def stops(*_, **__):
    raise StoppedError("the state is on disk")


@pytest.mark.parametrize("changed", ["images", "mask"])
def test_images_and_masks_that_changed_are_not_gone_on_with(few, tmp_path, monkeypatch, changed):
    folder = tmp_path / "project"
    stopped_early(few, folder, monkeypatch)
    file = folder / ("particles.mrcs" if changed == "images" else "mask.mrc")
    before = file.read_bytes()
    if changed == "images":
        with stack_writer(file, 24, 3.2) as stack:
            stack.append(np.roll(open_stack(few.parent / "particles.mrcs"), 7, axis=0))
    else:
        write_map(file, np.full((24, 24, 24), 0.5, np.float32), 3.2)
    with pytest.raises(CryoreconError, match=f"The {changed} changed since the job"):
        continue_job(folder / "job", QUIET)
    file.write_bytes(before)
    with pytest.raises(StoppedError):
        continue_job(folder / "job", QUIET)


def test_a_project_that_was_moved_goes_on_from_where_it_is_now(few, tmp_path, monkeypatch):
    stopped_early(few, tmp_path / "before", monkeypatch)
    (tmp_path / "before").rename(tmp_path / "after")
    with pytest.raises(CryoreconError, match="if the project was moved, go on from the folder"):
        continue_job(tmp_path / "after" / "job", QUIET)
    monkeypatch.chdir(tmp_path / "after")
    with pytest.raises(StoppedError):
        continue_job(Path("job"), QUIET)
