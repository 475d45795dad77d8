"""``cryorecon abinitio --method all``: every engine, then what they agree on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import typer

from cryorecon.cli.abinitio_amortized import abinitio_amortized_command
from cryorecon.cli.abinitio_rmfn import abinitio_rmfn_command
from cryorecon.cli.console import (
    error_console,
    messages,
    prepare_folder,
    print_job,
    use_threads,
)
from cryorecon.cli.moments_reconstruct import moments_command
from cryorecon.io.files import METHODS_PLAN

_PARTS = ("rmfn", "amortized", "moments", "consensus")


def all_command(
    taken: dict[str, Any], more: dict[str, Any], starts: int | None, *, allow_ambiguous: bool
) -> None:
    """Run engines rmfn, amortized and moments, a folder each, and compare them.

    Parameters
    ----------
    taken : dict
        Options that all engines have, and `particles`, `output`, `settings`, `overwrite`.
    more : dict
        Options that engine moments does not have.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.run.consensus.compare import ConsensusOptions, consensus
    from cryorecon.run.consensus.every_engine import run_engines
    from cryorecon.run.settings import with_settings

    taken = dict(taken)
    star, output, overwrite = (taken.pop(k) for k in ("particles", "output", "overwrite"))
    settings, threads, json = taken.pop("settings") or [], taken.pop("threads"), taken.pop("json")
    dry_run = taken.pop("dry_run")
    use_threads(threads)
    console = messages(json)
    if taken.pop("config") is not None:
        raise typer.BadParameter("--config belongs to one engine: use --set ENGINE.key=value")
    own = _by_engine(settings)
    count = {} if starts is None else {"starts": starts}
    plain = ConsensusOptions(
        diameter_angst=taken["diameter"],
        symmetry=more["symmetry"],
        allow_ambiguous=allow_ambiguous,
        seed=taken["seed"],
    )
    options = with_settings(plain, None, own["consensus"])

    def engine(command: Any, name: str, **given: Any) -> Any:
        def run(folder: Path) -> None:
            shared = {**taken, "settings": own[name], "config": None, "overwrite": True}
            shared |= {"threads": None, "json": json and dry_run, "dry_run": dry_run}
            partial(command, star, folder)(**shared, **given)

        return run

    engines = {
        "rmfn": engine(abinitio_rmfn_command, "rmfn", **more, **count),
        "amortized": engine(abinitio_amortized_command, "amortized", **more),
        "moments": engine(moments_command, "moments", allow_ambiguous=False, **count),
    }
    if dry_run:
        for name, run in engines.items():
            console.print(f"engine {name}:")
            run(output / name)
        return
    kept = [s for s in settings if not s.startswith("consensus.")]
    plan = {**taken, **more, **count, "settings": kept}
    plan = {key: str(v) if isinstance(v, Path) else v for key, v in plan.items()}
    if not (output / METHODS_PLAN).exists():
        prepare_folder(output, overwrite)
    with _telling_how_to_go_on():
        folders, failed = run_engines(engines, star, output, plan, console, overwrite=overwrite)
    consensus(folders, output, options, console, failed=failed, inputs=star)
    print_job(output, json)


@contextmanager
def _telling_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["cryorecon", *(a for a in sys.argv[1:] if a != "--overwrite")])
        error_console.print(
            f"This goes on with it, and with the other engines:\n{again}", markup=False
        )
        raise


def _by_engine(settings: list[str]) -> dict[str, list[str]]:
    """``ENGINE.key=value`` pairs sorted by engine, the name taken off."""
    found: dict[str, list[str]] = {name: [] for name in _PARTS}
    for pair in settings:
        name, dot, rest = pair.partition(".")
        if not dot or name not in found:
            raise typer.BadParameter(
                f"--set {pair}: with --method all, begin with one of {', '.join(_PARTS)} and a dot"
            )
        found[name].append(rest)
    return found
