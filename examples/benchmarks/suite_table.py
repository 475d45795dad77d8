"""One table of all finished rows of the suite: Markdown, and JSON lines."""

import json
from pathlib import Path
from statistics import median

HEAD = (
    "molecule", "N", "SNR", "shifts", "program", "seeds", "ended", "wall s", "CPU s", "peak MB",
    "FSC 0.5 (A) / limit", "FSC 0.143 (A) / limit", "median deg / limit", "within 5 deg",
    "offset (A) / limit", "note",
)  # fmt: skip
CASE = ("molecule", "n", "snr", "shifts")


def read_rows(out: Path) -> list[dict]:
    """The rows on record, as they stand in the folders of the runs."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("runs/*/*/*/row.json"))]


def write_table(out: Path, order: list[str]) -> str:
    """table.md and rows.jsonl; programs in the given order. Returns the Markdown."""
    rows = read_rows(out)
    rows.sort(key=lambda r: (*(str(r[k]) for k in CASE), order.index(r["program"]), r["seed"]))
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((*(row[k] for k in CASE), row["program"]), []).append(row)
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    lines += ["| " + " | ".join(cells(group)) + " |" for group in groups.values()]
    text = "\n".join(lines) + "\n"
    (out / "table.md").write_text(text)
    return text


def cells(group: list[dict]) -> list[str]:
    """One line of the table: medians over the seeds of one program on one stack."""
    first = group[0]

    def middle(name: str, digits: int) -> str:
        told = [row[name] for row in group if row.get(name) is not None]
        return f"{median(told):.{digits}f}" if told else "-"

    def beside(name: str, limit: str) -> str:
        return f"{middle(name, 2)} / {first['limits'][limit]:.2f}"

    ends = [row["ended"] for row in group]
    ended = ends[0] if len(set(ends)) == 1 else ", ".join(
        f"{ends.count(end)} {end}" for end in dict.fromkeys(ends)
    )  # fmt: skip
    within = [row["within_5_deg"] for row in group if row.get("within_5_deg") is not None]
    return [
        first["molecule"], str(first["n"]), f"{first['snr']:g}", first["shifts"], first["program"],
        ", ".join(str(row["seed"]) for row in group), ended,
        middle("wall_s", 0), middle("cpu_s", 0), middle("peak_mb", 0),
        beside("fsc_0.5_angst", "true_poses_fsc_0.5_angst"),
        beside("fsc_0.143_angst", "true_poses_fsc_0.143_angst"),
        beside("median_deg", "true_map_pose_error_deg"),
        f"{100 * median(within):.1f} %" if within else "-",
        beside("median_offset_angst", "true_map_offset_error_angst"),
        first["note"] or "",
    ]  # fmt: skip
