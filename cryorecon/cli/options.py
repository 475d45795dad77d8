"""Options that commands share: for one thing one name, one short flag and one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cryorecon.cli.command import COMPUTE, EXPERT, INPUT, MOLECULE, OUTPUT


def option(panel: str, text: str, *names: str, default: str | bool = True, **more: Any) -> Any:
    """An option in a group of the help.

    Parameters
    ----------
    panel : str
        One of :data:`cryorecon.cli.command.OPTION_PANELS`.
    text : str
        Its help, with the unit in brackets.
    default : str, optional
        What happens without the option, where its default value does not say so.
    """
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=default, **more)


def argument(text: str, metavar: str) -> Any:
    """A file that a command reads."""
    return typer.Argument(help=text, metavar=metavar, rich_help_panel=INPUT)


def output(text: str, metavar: str) -> Any:
    """Where a command writes to."""
    return option(OUTPUT, text, "-o", "--output", metavar=metavar)


# Input.
PARTICLES_HELP = "Particle STAR file (RELION 3.0, 3.1, 5) or cryoSPARC .cs file."
Particles = Annotated[Path, argument(PARTICLES_HELP, "PARTICLES")]
Project = Annotated[
    Path | None,
    option(
        INPUT,
        "Folder that image paths start from.",
        metavar="DIR",
        exists=True,
        file_okay=False,
        default="here, else the file's folder or one above",
    ),
]
CtfFile = Annotated[
    Path | None,
    option(INPUT, "ctf.pkl of cryoDRGN, if PARTICLES is a stack.", "--ctf-file", metavar="FILE"),
]
PosesFile = Annotated[
    Path | None,
    option(INPUT, "poses.pkl of cryoDRGN, in place of the file's.", "--poses", metavar="FILE"),
]
NoiseStd = Annotated[
    float | None,
    option(
        INPUT,
        "Standard deviation of the white noise, in the file's units.",
        metavar="X",
        min=0,
        default="measured",
        hidden=True,
    ),
]

# Molecule.
DIAMETER_HELP = "Diameter of the particle [A]."
Diameter = Annotated[
    float | None,
    option(
        MOLECULE,
        DIAMETER_HELP,
        metavar="A",
        default="as the images tell; engine moments: 80 % of the box",
    ),
]
OFFSET_RANGE_HELP = "How far off the image centre particles lie at most [A]."
Contrast = Annotated[
    Literal["auto", "white", "black"],
    option(
        MOLECULE,
        "Particles white on black, black on white, or as the images tell.",
        hidden=True,
    ),
]

# Compute.
Seed = Annotated[
    int,
    option(
        COMPUTE,
        "Seed of random numbers; the same seed gives the same result on one machine.",
        metavar="N",
    ),
]
Threads = Annotated[
    int | None,
    option(
        COMPUTE,
        "CPU threads.",
        metavar="N",
        min=1,
        default="one a core, or OMP_NUM_THREADS",
    ),
]
DEVICE_HELP = "Where to compute: cpu, cuda, cuda:1, ..., or auto."
Device = Annotated[str, option(COMPUTE, DEVICE_HELP, metavar="NAME")]
Starts = Annotated[
    int,
    option(COMPUTE, "Random starts; the one that fits best goes on.", metavar="N", min=1),
]

LEARNING_RATE_HELP = "Learning rate of Adam."

# Output.
Job = Annotated[Path, output("Job directory to write.", "DIR")]
Folder = Annotated[Path, output("Folder to write.", "DIR")]
N = Annotated[int, option(OUTPUT, "Particles to simulate.", "-n", "--n", metavar="N")]
Snr = Annotated[
    float,
    option(
        INPUT,
        "Signal-to-noise ratio: variance of the CTF-modulated signal over that of the noise; inf "
        "for no noise.",
        metavar="X",
    ),
]
Overwrite = Annotated[bool, option(OUTPUT, "Write over what is there.", "--overwrite")]
Json = Annotated[
    bool,
    option(OUTPUT, "Print one JSON object; messages go to stderr.", "--json"),
]
DryRun = Annotated[
    bool,
    option(OUTPUT, "Tell what the job will work on and take; write nothing.", "--dry-run"),
]
JsonFile = Annotated[
    Path | None, option(OUTPUT, "Write the JSON object to a file.", metavar="FILE", hidden=True)
]
Plot = Annotated[
    Path | None, option(OUTPUT, "Draw the result: .png, .svg or .pdf.", metavar="FILE")
]

# Expert.
Settings = Annotated[
    list[str] | None,
    option(
        EXPERT,
        "A setting that has no option; repeatable. A YAML file of them: --config.",
        "--set",
        metavar="KEY=VALUE",
    ),
]
Config = Annotated[
    Path | None, option(EXPERT, "YAML file of settings.", metavar="FILE", hidden=True)
]
