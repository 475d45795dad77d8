"""``cryorecon abinitio-amortized``: poses and map by an encoder that learns to read poses."""

from __future__ import annotations

from cryorecon.cli.abinitio_options import (
    AssignAll,
    Config,
    Contrast,
    Decoder,
    Device,
    Diameter,
    Encoder,
    Finish,
    FirstAngst,
    Halves,
    Heads,
    ImagesSeen,
    InputSize,
    Keep,
    LastAngst,
    Mask,
    OffsetRange,
    Output,
    Overwrite,
    Particles,
    Project,
    RefineAll,
    Seed,
    Settings,
    Subset,
    Symmetry,
)
from cryorecon.cli.console import console, prepare_folder, usable_device


def abinitio_amortized_command(
    particles: Particles,
    output: Output,
    diameter: Diameter = None,
    offset_range: OffsetRange = None,
    encoder: Encoder = "dense",
    decoder: Decoder = "grid",
    heads: Heads = 4,
    input_size: InputSize = 0,
    images_seen: ImagesSeen = 150_000,
    first_angst: FirstAngst = None,
    last_angst: LastAngst = None,
    finish: Finish = True,
    halves: Halves = "shared",
    contrast: Contrast = "auto",
    symmetry: Symmetry = "C1",
    mask: Mask = None,
    images: Keep = "auto",
    subset: Subset = None,
    assign_all: AssignAll = True,
    refine_all: RefineAll = True,
    device: Device = "auto",
    project: Project = None,
    seed: Seed = 0,
    settings: Settings = None,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Map and poses from scratch, with an encoder that learns to read poses off images.

    No pose column of the STAR file is read. Half sets (rlnRandomSubset) are honoured. Training
    sees a fixed number of images however many there are; --subset trains and refines on some
    and reads the poses of all others at the encoder's speed.
    """
    from cryorecon.engines.amortized import AmortizedConfig
    from cryorecon.run.abinitio import AbinitioOptions, abinitio, assignment
    from cryorecon.run.settings import with_settings

    given = AmortizedConfig(
        encoder=encoder,
        decoder=decoder,
        heads=heads,
        input_size=input_size,
        images_seen=images_seen,
        finish=finish,
    )
    engine = with_settings(given, config, settings or [])
    place = usable_device(device)
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
        keep=images,
        subset=subset,
        assign=assignment(everyone=assign_all, refine=refine_all),
        first_angst=first_angst,
        last_angst=last_angst,
        device=place,
        engine=engine,
    )
    abinitio(particles, output, options, console)
