"""Options that the ab initio commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cryorecon.cli.command import COMPUTE, EXPERT, INPUT, MOLECULE, OUTPUT
from cryorecon.cli.continuing import continue_job_callback
from cryorecon.cli.options import OFFSET_RANGE_HELP, option

Halves = Annotated[
    Literal["independent", "shared", "none"],
    option(OUTPUT, "Half maps: two searches (gold standard), two halves of one search, or none."),
]
Symmetry = Annotated[
    str,
    option(
        MOLECULE,
        "Point group: C1, Cn, Dn, T, O, I, I1 to I4. The C1 map is kept.",
        metavar="GROUP",
    ),
]
Mask = Annotated[
    Path | None,
    option(
        INPUT,
        "MRC mask, 0 to 1, that holds in any orientation, such as a shell.",
        metavar="FILE",
        hidden=True,
    ),
]
OffsetRange = Annotated[
    float | None,
    option(
        MOLECULE,
        OFFSET_RANGE_HELP,
        metavar="A",
        min=0,
        default="10 % of the box, to 25 % if many do",
        hidden=True,
    ),
]
Box = Annotated[
    int | None,
    option(
        COMPUTE,
        "Side that larger images are Fourier cropped to as they are read [px].",
        metavar="PX",
        min=16,
        default="128",
        hidden=True,
    ),
]
InitMap = Annotated[
    Path | None,
    option(
        INPUT,
        "MRC map to start from, low-passed, in place of the search.",
        metavar="FILE",
        hidden=True,
    ),
]
Keep = Annotated[
    Literal["auto", "memory", "disk"],
    option(
        COMPUTE,
        "Hold images in memory, or read them from disk whenever they are needed.",
        "--images",
        hidden=True,
    ),
]
Volume = Annotated[
    Literal["rmfn", "grid"],
    option(EXPERT, "What holds the map in the search: the network or a plain grid.", hidden=True),
]
Init = Annotated[
    Literal["random", "perturbed"],
    option(
        EXPERT,
        "Poses at the start: random, or 45 to 90 deg from those in the file, as published.",
        hidden=True,
    ),
]
Encoder = Annotated[
    Literal["dense", "small", "paper"],
    option(
        EXPERT,
        "Network that reads poses: fully connected, convolutional, or the paper's.",
        hidden=True,
    ),
]
Decoder = Annotated[
    Literal["grid", "log-grid", "rmfn", "fouriernet", "siren", "positional"],
    option(
        EXPERT,
        "What holds the map in the training: voxels, Fourier coefficients or a network.",
        hidden=True,
    ),
]
Heads = Annotated[
    int,
    option(
        EXPERT,
        "Poses that the encoder proposes for an image; the likeliest counts.",
        metavar="N",
        min=1,
        hidden=True,
    ),
]
InputSize = Annotated[
    int,
    option(
        EXPERT,
        "Side of the images that the encoder sees [px].",
        metavar="PX",
        min=0,
        default="what the resolution needs",
        hidden=True,
    ),
]
ImagesSeen = Annotated[
    int,
    option(COMPUTE, "Length of the training, in images.", metavar="N", min=1, hidden=True),
]
FirstResolution = Annotated[
    float | None,
    option(
        EXPERT,
        "Resolution that the training begins at [A].",
        metavar="A",
        min=0.1,
        default="diameter / 4",
        hidden=True,
    ),
]
LastResolution = Annotated[
    float | None,
    option(
        EXPERT,
        "Resolution that the training ends at [A].",
        metavar="A",
        min=0.1,
        default="diameter / 6.4",
        hidden=True,
    ),
]
Finish = Annotated[
    bool,
    option(EXPERT, "Refine poses after the training, or keep the encoder's.", hidden=True),
]
Subset = Annotated[
    int | None,
    option(
        COMPUTE,
        "Make the map of this many particles, drawn at random.",
        metavar="N",
        min=20,
        default="all",
    ),
]
AssignAll = Annotated[
    bool,
    option(
        COMPUTE,
        "With --subset: give all other particles poses, or leave them out.",
        hidden=True,
    ),
]
RefineAll = Annotated[
    bool,
    option(
        COMPUTE,
        "With --assign-all: refine these poses, or keep them as first read.",
        hidden=True,
    ),
]
Ambiguous = Annotated[
    bool,
    option(
        EXPERT,
        "Write the best map even if starts (engine moments) or jobs disagree.",
        "--allow-ambiguous",
        hidden=True,
    ),
]
Continue = Annotated[
    Path | None,
    option(
        INPUT,
        "Go on with the interrupted job in DIR; all else is taken from it.",
        "--continue",
        metavar="DIR",
        is_eager=True,
        callback=continue_job_callback,
    ),
]
