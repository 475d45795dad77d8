"""cryorecon and RELION 3.1 on one stack in one run: initial models, and RELION's refinement.

    python examples/benchmarks/beside_relion.py STACK OUT [--runs ours short default]
        [--threads 2] [--limit-s 7200]

Reads STACK/blind.star, which has no poses, one program after the other: leave the machine to it.
`default` has RELION's schedule, `short` 25 + 50 + 25 iterations of 100 to 200 images; both are
helped to 25 to 8 A and offsets of +-2 px, because RELION's own 35 to 15 A tell nothing apart on a
small molecule and its +-6 px do not end on a CPU. `refined` goes on from `default`, with local
searches one order earlier than RELION's interface has them, so that it ends. Then every run is
judged against the truth (one row a run, one a shell) with its costs over ours; ours as both maps
that the job writes. What is done is kept.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from measure import timed
from peer_relion import initial_model, last, refinement

SHORT: dict[str, Any] = {"iterations": (25, 50, 25), "mini_batches": (100, 200)}
MASKED = "ours, masked"
HELPED: dict[str, Any] = {"resolutions_angst": (25, 8), "offset_range_px": 2}


def command_of(name: str, args: argparse.Namespace, star: Path) -> list[str]:
    out, diameter = args.output / name, args.diameter
    if name == "ours":
        words = [sys.executable, "-m", "cryorecon", "abinitio", str(star), "-o", str(out)]
        words += ["--diameter", f"{diameter:g}", "--threads", str(args.threads), "--overwrite"]
        return words
    out.mkdir(parents=True, exist_ok=True)
    if name == "refined":
        model = last(args.output / "default", "class001.mrc")
        if model is None:
            raise SystemExit("`refined` goes on from `default`: name it before in --runs")
        return refinement(
            star,
            model,
            out,
            diameter,
            low_pass_angst=15,
            offset_range_px=2,
            local_from_order=3,
            # Two processes work, one a half set.
            threads=max(1, args.threads // 2),
        )
    schedule = SHORT if name == "short" else {}
    return initial_model(star, out, diameter, threads=args.threads, **HELPED, **schedule)


def files_of(name: str, out: Path) -> tuple[Path, Path]:
    """Map and poses that a run left; of a stopped refinement one half map."""
    if name in ("ours", MASKED):
        kind = "initial_model_masked.mrc" if name == MASKED else "initial_model.mrc"
        return out / "ours" / kind, out / "ours" / "run_data.star"
    if (out / name / "run_class001.mrc").exists():
        return out / name / "run_class001.mrc", out / name / "run_data.star"
    kind = "half1_class001.mrc" if name == "refined" else "class001.mrc"
    found, poses = last(out / name, kind), last(out / name, "data.star")
    if found is None or poses is None or "it000" in found.name:
        raise SystemExit(f"{name} was stopped before it had a map: see {out / name}.log")
    return found, poses


def print_costs(costs: dict[str, dict]) -> None:
    if "refined" in costs and "default" in costs:
        both = [costs["default"], costs["refined"]]
        total = {key: sum(cost[key] for cost in both) for key in ("wall_s", "cpu_s")}
        costs = {**costs, "default + refined": {**costs["refined"], **total}}
    ours = costs.get("ours")
    print("| run | ended | wall s | CPU s | peak MB | wall over ours | CPU over ours |")
    print("|---|---|---|---|---|---|---|")
    for name, cost in costs.items():
        over = [cost[k] / ours[k] if ours else float("nan") for k in ("wall_s", "cpu_s")]
        print(
            f"| {name} | {'yes' if cost['finished'] else 'stopped'} | {cost['wall_s']:.0f} | "
            f"{cost['cpu_s']:.0f} | {cost['peak_mb']} | {over[0]:.1f} | {over[1]:.1f} |"
        )
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--runs", nargs="+", default=["ours", "short", "default"])
    parser.add_argument("--diameter", type=float, default=70, help="angstrom")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=7200, help="of each run")
    args = parser.parse_args()
    star = args.stack / "blind.star"
    costs = {}
    for name in args.runs:
        command = command_of(name, args, star)
        costs[name] = timed(command, args.output / f"{name}.json", args.limit_s)
    # These load torch, see measure.timed.
    from score import print_scores, score

    print_costs(costs)
    judged = [*args.runs, *([MASKED] * ("ours" in args.runs))]
    scores = {name: score(args.stack, *files_of(name, args.output)) for name in judged}
    (args.output / "scores.json").write_text(json.dumps(scores))
    print_scores(scores)


if __name__ == "__main__":
    main()
