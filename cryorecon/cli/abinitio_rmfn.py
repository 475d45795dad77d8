"""``cryorecon abinitio-rmfn``: poses and map by a global search and refinement."""

from __future__ import annotations

from cryorecon.cli.abinitio_options import (
    AssignAll,
    Config,
    Contrast,
    Diameter,
    Halves,
    Init,
    InitMap,
    Keep,
    Mask,
    OffsetRange,
    Output,
    Overwrite,
    Particles,
    Project,
    RefineAll,
    Seed,
    Settings,
    Starts,
    Subset,
    Symmetry,
    Volume,
)
from cryorecon.cli.console import console, prepare_folder


def abinitio_rmfn_command(
    particles: Particles,
    output: Output,
    init: Init = "random",
    diameter: Diameter = None,
    offset_range: OffsetRange = None,
    starts: Starts = 2,
    halves: Halves = "shared",
    contrast: Contrast = "auto",
    symmetry: Symmetry = "C1",
    mask: Mask = None,
    init_map: InitMap = None,
    images: Keep = "auto",
    subset: Subset = None,
    assign_all: AssignAll = True,
    refine_all: RefineAll = True,
    volume: Volume = "rmfn",
    project: Project = None,
    seed: Seed = 0,
    settings: Settings = None,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Map and poses from random starts, with a residual multiplicative filter network.

    No pose column of the STAR file is read. Half sets (rlnRandomSubset) are honoured. --init
    perturbed runs the published protocol instead, which starts 45 to 90 degrees from the poses
    in the file; of the options it takes --diameter, --project, --seed, --set and --config.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.engines.rmfn import RmfnConfig
    from cryorecon.engines.rmfn_paper import PaperConfig
    from cryorecon.run.abinitio import AbinitioOptions, abinitio, assignment
    from cryorecon.run.paper_protocol import PaperOptions, abinitio_perturbed
    from cryorecon.run.settings import with_settings

    if init == "perturbed":
        paper = with_settings(PaperConfig(), config, settings or [])
        prepare_folder(output, overwrite)
        paper_options = PaperOptions(diameter, project, seed, paper)
        abinitio_perturbed(particles, output, paper_options, console)
        return
    engine = with_settings(RmfnConfig(n_starts=starts, volume=volume), config, settings or [])
    prepare_folder(output, overwrite)
    options = AbinitioOptions(
        diameter_angst=diameter,
        offset_range_angst=offset_range,
        project=project,
        seed=seed,
        halves=halves,
        contrast=contrast,
        symmetry=symmetry,
        mask=mask,
        init_map=init_map,
        keep=images,
        subset=subset,
        assign=assignment(everyone=assign_all, refine=refine_all),
        engine=engine,
    )
    abinitio(particles, output, options, console)
