"""The benchmark suite's own logic, with made programs: selection, resuming, limits, the table."""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
LIMITS = {
    "true_poses_fsc_0.5_angst": 2.5,
    "true_poses_fsc_0.143_angst": 2.4,
    "true_map_pose_error_deg": 0.75,
    "true_map_offset_error_angst": 0.1,
}
NAMES = ("made", "slow", "broken")


class Made:
    """A program of one shell command; it counts its runs and leaves nothing to judge."""

    peer = True

    def __init__(self, suite, name, command):
        self.suite, self.name, self.command = suite, name, command

    def missing(self):
        return None

    def version(self, _tools):
        return f"{self.name} 1.0"

    def steps(self, run):
        words = ["sh", "-c", f"echo ran >> {run.stack}/{self.name}; {self.command}"]
        yield self.suite.Step("step", run.folder, words)

    def found(self, _run):
        return self.suite.Found(note="a note")


@pytest.fixture
def suite(monkeypatch):
    """The modules of the suite, with programs and stacks that cost nothing."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import suite
    import suite_programs

    def make_stack(case, out, _prody, _threads):
        stack = out / "stacks" / case.name
        stack.mkdir(parents=True, exist_ok=True)
        (stack / "limits.json").write_text(json.dumps(LIMITS))
        (stack / "images.json").write_text('"made"')
        return stack

    commands = dict(zip(NAMES, ("true", "sleep 60", "exit 3"), strict=True))
    programs = {name: Made(suite_programs, name, words) for name, words in commands.items()}
    monkeypatch.setattr(suite, "PROGRAMS", programs)
    monkeypatch.setattr(suite, "make_stack", make_stack)
    yield suite
    for name in [n for n in sys.modules if n.split("_")[0] in ("suite", "measure")]:
        del sys.modules[name]


def rows_of(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_rows_are_selected_by_every_option(suite, tmp_path):
    words = ["--programs", "made", "--n", "20", "--snr", "0.1", "0.03", "--shifts", "3px"]
    rows = suite.parsed([str(tmp_path), *words, "--molecules", "4ake", "ribosome"]).rows
    assert len(rows) == 2 * 2 * 3
    assert {(name, seed) for _, name, seed in rows} == {("made", 0), ("made", 1), ("made", 2)}
    names = {case.name for case, _, _ in rows}
    assert "4ake_n20_snr0.03_3px" in names
    own = suite.parsed([str(tmp_path), "--molecules", "mine=a,b.pdb,1.5,80"]).rows[0][0].molecule
    assert (own.name, own.pixel_size_angst, own.diameter_angst) == ("mine", 1.5, 80.0)
    assert own.file == str(Path("a,b.pdb").resolve())


def test_an_unknown_molecule_is_refused(suite, tmp_path, capsys):
    with pytest.raises(SystemExit):
        suite.parsed([str(tmp_path), "--molecules", "1abc"])
    assert "known are 4ake" in capsys.readouterr().err


def test_what_is_on_record_is_not_run_again(suite, tmp_path):
    words = [str(tmp_path), "--programs", *NAMES, "--molecules", "4ake", "--n", "20"]
    words += ["--snr", "0.1", "--shifts", "none", "--seeds", "0", "1", "--limit-s", "0.2"]
    suite.main(words)
    stack = tmp_path / "stacks" / "4ake_n20_snr0.1_none"
    row = tmp_path / "runs" / stack.name / "made" / "seed1" / "row.json"
    before = row.read_text()
    assert (tmp_path / "table.md").exists()
    ended = {r["program"]: r["ended"] for r in rows_of(tmp_path)}
    assert ended == {"made": "done", "slow": "at the limit", "broken": "failed"}
    row.unlink()  # As if the suite had been killed before the row was written.
    suite.main(words)
    assert {name: (stack / name).read_text().count("ran") for name in NAMES} == dict.fromkeys(
        NAMES, 2
    )
    assert json.loads(row.read_text()) == json.loads(before)
    (row.parent / "step.json").unlink()  # As if killed within the command.
    row.unlink()
    suite.main(words)
    assert (stack / "made").read_text().count("ran") == 3


def test_absent_programs_are_left_out_with_a_reason(suite, tmp_path, monkeypatch, capsys):
    import suite_programs

    monkeypatch.setattr(suite, "PROGRAMS", {"relion": suite_programs.Relion("relion", False)})
    monkeypatch.setenv("PATH", str(tmp_path))
    suite.main([str(tmp_path), "--programs", "relion", "--molecules", "4ake", "--n", "20"])
    assert "relion_refine is not on the PATH: install RELION 3.1" in capsys.readouterr().out
    assert rows_of(tmp_path) == []


def test_the_table_has_medians_beside_their_limits(suite, tmp_path):
    import suite_table

    for seed, error in enumerate((0.8, 40.0, 0.9)):
        folder = tmp_path / "runs" / "case" / "made" / f"seed{seed}"
        folder.mkdir(parents=True)
        row = {"molecule": "4ake", "n": 20, "snr": 0.1, "shifts": "none", "program": "made"}
        row |= {"seed": seed, "ended": "done" if seed else "failed", "limits": LIMITS, "note": ""}
        row |= {"wall_s": 10 * seed, "cpu_s": 5.0, "peak_mb": 7, "fsc_0.5_angst": 2.6}
        row |= {"median_deg": error, "within_5_deg": 0.5} if seed < 2 else {"median_deg": error}
        (folder / "row.json").write_text(json.dumps(row))
    line = suite_table.write_table(tmp_path, ["made"]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    told = dict(zip(suite_table.HEAD, cells, strict=True))
    assert told["seeds"] == "0, 1, 2"
    assert told["ended"] == "1 failed, 2 done"
    assert told["wall s"] == "10"
    assert told["median deg / limit"] == "0.90 / 0.75"
    assert told["within 5 deg"] == "50.0 %"
    assert told["FSC 0.143 (A) / limit"] == "- / 2.40"
    assert [row["seed"] for row in rows_of(tmp_path)] == [0, 1, 2]


def test_the_rate_of_a_pose_search_is_read_from_its_log(suite):
    import suite_programs

    line = "(INFO) (abinit.py) ({}) # [Train Epoch: {}/30] [{}/2000 particles]\n"
    told = [("22-Nov-2026 00:00:00", 0, 100), ("22-Nov-2026 00:10:00", 1, 100)]
    log = "".join(line.format(*t) for t in told)
    assert suite_programs.cryodrgn_rate(log) == "no pose searched"
    log += line.format("22-Nov-2026 00:20:00", 1, 300)
    assert suite_programs.cryodrgn_rate(log) == (
        "epoch 1 of 30, image 300: 3 s an image, 1.7 h an epoch"
    )


def test_stacks_are_found_from_any_folder(tmp_path, monkeypatch):
    """Peers run in folders of their own, the suite in any: within it names were relative."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    from blind import write_blind

    from cryorecon.io.star import read_star
    from cryorecon.run.simulate import simulate
    from cryorecon.run.simulate_config import SimulateConfig

    model = str(files("cryorecon") / "data" / "4ake_chain_a_heavy.pdb")
    simulate(model, tmp_path / "made", SimulateConfig(n_particles=3, box=16, pixel_size_angst=5))
    made = tmp_path / "made" / "particles.star"
    write_blind(made, tmp_path / "blind.star")
    tables = [read_star(p)["particles"] for p in (tmp_path / "blind.star", made)]
    for table in tables:
        names = [f"{i:06d}@{tmp_path}/made/particles.mrcs" for i in (1, 2, 3)]
        assert list(table["rlnImageName"]) == names
    assert ["rlnAngleRot" in table for table in tables] == [False, True]
