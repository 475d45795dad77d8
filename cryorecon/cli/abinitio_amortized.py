"""``cryorecon abinitio-amortized``: poses and map by an encoder that learns to read poses."""

from __future__ import annotations

from cryorecon.cli.abinitio_options import (
    AssignAll,
    Box,
    Continue,
    Decoder,
    Encoder,
    Finish,
    FirstResolution,
    Halves,
    Heads,
    ImagesSeen,
    InputSize,
    Keep,
    LastResolution,
    Mask,
    OffsetRange,
    RefineAll,
    Subset,
    Symmetry,
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
    Threads,
)

EXAMPLES = examples(
    ("a map of particles 120 A wide", "cryorecon abinitio-amortized p.star -o j1 --diameter 120"),
    (
        "the map of 20,000 particles; the encoder reads the poses of all others",
        "cryorecon abinitio-amortized p.star -o j2 --subset 20000",
    ),
    (
        "a longer training on the second GPU",
        "cryorecon abinitio-amortized p.star -o j3 --images-seen 400000 --device cuda:1",
    ),
)


def abinitio_amortized_command(
    particles: Particles,
    output: Job,
    diameter: Diameter = None,
    offset_range: OffsetRange = None,
    encoder: Encoder = "dense",
    volume: Decoder = "grid",
    heads: Heads = 4,
    input_size: InputSize = 0,
    images_seen: ImagesSeen = 150_000,
    first_resolution: FirstResolution = None,
    last_resolution: LastResolution = None,
    finish: Finish = True,
    halves: Halves = "shared",
    contrast: Contrast = "auto",
    symmetry: Symmetry = "C1",
    mask: Mask = None,
    box: Box = None,
    images: Keep = "auto",
    subset: Subset = None,
    assign_all: AssignAll = True,
    refine_all: RefineAll = True,
    device: Device = "auto",
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
    """Find a map and poses by an encoder that learns to read poses off images.

    No pose column of the STAR file is read. Half sets (rlnRandomSubset) are honoured. Training
    sees a fixed number of images however many there are; --subset trains and refines on some
    and reads the poses of all others at the encoder's speed.
    """
    del continue_job  # Then another function runs instead.
    from cryorecon.engines.amortized import AmortizedConfig
    from cryorecon.ranks import joined
    from cryorecon.run.abinitio import abinitio
    from cryorecon.run.abinitio_input import AbinitioOptions, assignment
    from cryorecon.run.dry_run import describe_abinitio
    from cryorecon.run.settings import named, with_settings

    use_threads(threads)
    given = AmortizedConfig(
        encoder=encoder,
        decoder=volume,
        heads=heads,
        input_size=input_size,
        images_seen=images_seen,
        finish=finish,
    )
    engine = with_settings(given, config, settings or [])
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
        keep=images,
        subset=subset,
        assign=assignment(everyone=assign_all, refine=refine_all),
        first_angst=first_resolution,
        last_angst=last_resolution,
        device=place,
        engine=engine,
    )
    if dry_run:
        prepare_folder(output, overwrite)
        estimate = describe_abinitio(particles, options, messages(json))
        if json:
            print_json({"engine": "amortized", **estimate})
        return
    with joined() as ranks:
        prepare_folder(output, overwrite, ranks)
        abinitio(particles, output, options, messages(json), ranks=ranks)
    print_job(output, json)
