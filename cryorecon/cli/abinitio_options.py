"""Options that the ab initio commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Particles = Annotated[
    Path, typer.Argument(help="Particle STAR file (RELION 3.0, 3.1, 5) or cryoSPARC .cs file.")
]
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
