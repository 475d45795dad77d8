"""Where the stacks that a STAR file names lie on disk."""

from __future__ import annotations

from pathlib import Path

from cryorecon.errors import CryoreconError


def resolve_stacks(star: Path, names: list[str], project: str | Path | None) -> list[Path]:
    """Find each stack, never by its base name alone.

    A relative name is looked for from the current directory, then from `project`, then from the
    ancestors of the STAR file's folder, nearest first, then from that folder.

    Raises
    ------
    CryoreconError
        Saying how many stacks are missing, the first three, and the flag that mends it.
    """
    folder = star.resolve().parent
    bases = [Path()]
    if project is not None:
        bases.append(Path(project))
    bases += [*folder.parents, folder]
    found: list[Path] = []
    missing: list[str] = []
    for name in names:
        candidates = [Path(name)] if Path(name).is_absolute() else [b / name for b in bases]
        hit = next((c for c in candidates if c.exists()), None)
        if hit is None:
            missing.append(name)
        else:
            found.append(hit)
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CryoreconError(
            f"{star} names {len(missing)} of {len(names)} stacks that do not exist: {shown}",
            "Run from the RELION project folder or give it with --project",
        )
    return found
