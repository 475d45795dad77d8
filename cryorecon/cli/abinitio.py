"""``cryorecon abinitio``, ``abinitio-rmfn``, ``abinitio-amortized``: poses and map from scratch."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from cryorecon.cli.console import console, prepare_folder
from cryorecon.errors import CryoreconError


class Method(StrEnum):
    """Ab initio engines."""

    RMFN = "rmfn"
    AMORTIZED = "amortized"


Particles = Annotated[Path, typer.Argument(help="Particle STAR file (RELION 3.0, 3.1 or 5).")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Job directory.")]
Diameter = Annotated[float | None, typer.Option(help="Of the particle, A; default 0.8 of the box.")]
OffsetRange = Annotated[
    float | None, typer.Option(help="Largest in-plane offset, A; default a tenth of the box.")
]
Starts = Annotated[
    int, typer.Option(min=1, help="Searches from different random poses; the likeliest goes on.")
]
Project = Annotated[Path | None, typer.Option(help="Folder that image paths are relative to.")]
Seed = Annotated[int, typer.Option(help="One seed gives one result on one machine.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Rarely needed engine settings, as key=value; repeatable."),
]
Config = Annotated[Path | None, typer.Option(help="YAML file of engine settings.")]
Halves = Annotated[
    Literal["independent", "shared", "none"],
    typer.Option(help="Both half sets from scratch; half sets of one search; no half maps."),
]
Contrast = Annotated[
    Literal["auto", "white", "black"],
    typer.Option(help="Particles white on black, black on white, or as the images tell."),
]
Symmetry = Annotated[
    str, typer.Option(help="Point group: C1, Cn, Dn, T, O or I. The C1 map is kept as well.")
]
Mask = Annotated[
    Path | None,
    typer.Option(help="Map from 0 to 1 that holds in any orientation, such as a shell."),
]
InitMap = Annotated[
    Path | None,
    typer.Option(help="Start from this map, coarsely, instead of searching."),
]
Keep = Annotated[
    Literal["auto", "memory", "disk"],
    typer.Option("--images", help="Hold images in memory, or read them again when needed."),
]
Volume = Annotated[
    Literal["rmfn", "grid"],
    typer.Option(help="What holds the map in the search: the network or a plain grid."),
]
Init = Annotated[
    Literal["random", "perturbed"],
    typer.Option(help="Ab initio, or the published protocol, which starts near known poses."),
]
Encoder = Annotated[
    Literal["dense", "small", "paper"],
    typer.Option(help="Fully connected, a narrow convolutional network, or the paper's."),
]
Decoder = Annotated[
    Literal["grid", "log-grid", "rmfn", "fouriernet", "siren", "positional"],
    typer.Option(help="What holds the map in training: voxels, coefficients or a network."),
]
Heads = Annotated[int, typer.Option(min=1, help="Guesses of the pose; the likeliest counts.")]
InputSize = Annotated[
    int, typer.Option(min=0, help="Side of the encoder's images, px; 0: what the band needs.")
]
ImagesSeen = Annotated[int, typer.Option(min=1, help="Length of the training, in images.")]
FirstAngst = Annotated[
    float | None,
    typer.Option(min=0.1, help="Resolution that training begins at, A; default diameter / 4."),
]
LastAngst = Annotated[
    float | None,
    typer.Option(min=0.1, help="Resolution that training ends at, A; default diameter / 6.4."),
]
Finish = Annotated[
    bool, typer.Option(help="Refine a table of poses after the training, or keep the encoder's.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a non-empty folder.")]


Subset = Annotated[
    int | None, typer.Option(min=20, help="Make the map of this many particles, drawn at random.")
]
AssignAll = Annotated[
    bool, typer.Option(help="With --subset: give all other particles poses, or leave them out.")
]
RefineAll = Annotated[
    bool, typer.Option(help="With --assign-all: refine these poses, or keep them as first read.")
]
Device = Annotated[
    str, typer.Option(help="Where networks are trained: cpu, cuda, cuda:1 ... or auto.")
]


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise CryoreconError(f"--device {name} cannot be used: {error}", "Give cpu") from error
    return name


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
    place = _device(device)
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


def abinitio_command(
    particles: Particles,
    output: Output,
    method: Annotated[Method, typer.Option(help="Engine.")] = Method.RMFN,
    diameter: Diameter = None,
    offset_range: OffsetRange = None,
    starts: Annotated[int | None, typer.Option(min=1, help="Searches; engine rmfn.")] = None,
    volume: Annotated[
        Literal["rmfn", "grid"] | None, typer.Option(help="Map of the search; engine rmfn.")
    ] = None,
    init_map: Annotated[
        Path | None, typer.Option(help="Map in place of the search; engine rmfn.")
    ] = None,
    halves: Halves = "shared",
    contrast: Contrast = "auto",
    symmetry: Symmetry = "C1",
    mask: Mask = None,
    images: Keep = "auto",
    subset: Subset = None,
    assign_all: AssignAll = True,
    refine_all: RefineAll = True,
    project: Project = None,
    seed: Seed = 0,
    settings: Settings = None,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Map and poses from scratch with the chosen engine.

    Each engine's own command, abinitio-METHOD, has more options.
    """
    own = {"starts": starts, "volume": volume, "init_map": init_map}
    given = {name: value for name, value in own.items() if value is not None}
    if given and method is not Method.RMFN:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"{names} belong to engine rmfn, not to {method.value}")
    commands: dict[Method, Callable[..., None]] = {
        Method.RMFN: abinitio_rmfn_command,
        Method.AMORTIZED: abinitio_amortized_command,
    }
    commands[method](
        particles,
        output,
        diameter=diameter,
        offset_range=offset_range,
        halves=halves,
        contrast=contrast,
        symmetry=symmetry,
        mask=mask,
        images=images,
        subset=subset,
        assign_all=assign_all,
        refine_all=refine_all,
        project=project,
        seed=seed,
        settings=settings,
        config=config,
        overwrite=overwrite,
        **given,
    )
