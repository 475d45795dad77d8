"""``cryorecon abinitio-rmfn``: poses and map by a global search and refinement."""

from __future__ import annotations

import inspect

import typer

from cryorecon.cli.abinitio_options import (
    AssignAll,
    Box,
    Continue,
    Halves,
    Init,
    InitMap,
    Keep,
    Mask,
    OffsetRange,
    RefineAll,
    Subset,
    Symmetry,
    Volume,
)
from cryorecon.cli.command import examples
from cryorecon.cli.console import (
    messages,
    prepare_folder,
    print_job,
    print_json,
    usable_device,
    use_threads,
)
from cryorecon.cli.options import (
    Config,
    Contrast,
    Device,
    Diameter,
    DryRun,
    Job,
    Json,
    Overwrite,
    Particles,
    Project,
    Seed,
    Settings,
    Starts,
    Threads,
)

EXAMPLES = examples(
    ("a map of particles 120 A wide", "cryorecon abinitio-rmfn p.star -o job001 --diameter 120"),
    (
        "from a coarse map, in place of the search",
        "cryorecon abinitio-rmfn p.star -o job002 --init-map moments/initial_model.mrc",
    ),
    (
        "the map of 20,000 particles, poses of all",
        "cryorecon abinitio-rmfn p.star -o job003 --subset 20000 --starts 4",
    ),
)


def abinitio_rmfn_command(
    particles: Particles,
    output: Job,
    init: Init = "random",
    diameter: Diameter = None,
    offset_range: OffsetRange = None,
    starts: Starts = 2,
    halves: Halves = "shared",
    contrast: Contrast = "auto",
    symmetry: Symmetry = "C1",
    mask: Mask = None,
    init_map: InitMap = None,
    box: Box = None,
    images: Keep = "auto",
    subset: Subset = None,
    assign_all: AssignAll = True,
    refine_all: RefineAll = True,
    volume: Volume = "rmfn",
    device: Device = "cpu",
    project: Project = None,
    seed: Seed = 0,
    threads: Threads = None,
    settings: Settings = None,
    config: Config = None,
    json: Json = False,
    overwrite: Overwrite = False,
    continue_job: Continue = None,
    dry_run: DryRun = False,
) -> None:
    """Find a map and poses by a global search and refinement (engine rmfn).

    No pose column of the STAR file is read. Half sets (rlnRandomSubset) are honoured. --init
    perturbed runs the published protocol instead, which starts 45 to 90 degrees from the poses
    in the file; of the options it takes --diameter, --contrast, --project, --seed, --set and
    --config.
    """
    given = dict(locals())
    del continue_job  # Then another function runs instead.
    # torch takes seconds to load: only when the command runs.
    from cryorecon.engines.rmfn import RmfnConfig
    from cryorecon.engines.rmfn_paper import PaperConfig
    from cryorecon.ranks import joined
    from cryorecon.run.abinitio import abinitio
    from cryorecon.run.abinitio_input import AbinitioOptions, assignment
    from cryorecon.run.dry_run import describe_abinitio
    from cryorecon.run.paper_protocol import PaperOptions, abinitio_perturbed
    from cryorecon.run.settings import named, with_settings

    use_threads(threads)
    told = messages(json)
    if init == "perturbed":
        if dry_run:
            raise typer.BadParameter("--init perturbed has no --dry-run")
        if device not in ("cpu", "auto"):
            raise typer.BadParameter("--init perturbed computes on the CPU")
        _refuse_others(given)
        paper = with_settings(PaperConfig(), config, settings or [])
        prepare_folder(output, overwrite)
        paper_options = PaperOptions(diameter, project, seed, paper, contrast)
        abinitio_perturbed(particles, output, paper_options, told)
        print_job(output, json)
        return
    engine = with_settings(RmfnConfig(n_starts=starts, volume=volume), config, settings or [])
    place = usable_device(device)
    options = AbinitioOptions(
        diameter_angst=diameter,
        diameter_set="diameter" in named(config, settings or []),
        offset_range_angst=offset_range,
        project=project,
        box=box,
        seed=seed,
        halves=halves,
        contrast=contrast,
        symmetry=symmetry,
        mask=mask,
        init_map=init_map,
        keep=images,
        subset=subset,
        assign=assignment(everyone=assign_all, refine=refine_all),
        device=place,
        engine=engine,
    )
    if dry_run:
        prepare_folder(output, overwrite)
        estimate = describe_abinitio(particles, options, told)
        if json:
            print_json({"engine": "rmfn", **estimate})
        return
    with joined() as ranks:
        prepare_folder(output, overwrite, ranks)
        abinitio(particles, output, options, told, ranks=ranks)
    print_job(output, json)


# What the published protocol listens to, or need not.
_OF_PAPER = {
    *("particles", "output", "init", "diameter", "contrast", "project", "device", "seed"),
    *("threads", "settings", "config", "json", "overwrite", "continue_job", "dry_run"),
}


def _refuse_others(given: dict[str, object]) -> None:
    parameters = inspect.signature(abinitio_rmfn_command).parameters
    others = [
        name for name, value in given.items()
        if name not in _OF_PAPER and value != parameters[name].default
    ]  # fmt: skip
    if others:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise typer.BadParameter(f"--init perturbed has no {names}")
