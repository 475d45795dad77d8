"""``cryorecon fit-image``: multiplicative filter networks fit pictures, coarse to fine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table

from cryorecon.cli.command import COMPUTE, EXPERT, INPUT, examples
from cryorecon.cli.console import (
    console,
    count_progress,
    prepare_folder,
    print_json,
    use_threads,
)
from cryorecon.cli.options import (
    LEARNING_RATE_HELP,
    Folder,
    Json,
    Overwrite,
    Seed,
    Threads,
    argument,
    option,
)
from cryorecon.errors import CryoreconError

if TYPE_CHECKING:
    from cryorecon.engines.image_fit import ImageFitConfig
    from cryorecon.run.fit_image import Row


EXAMPLES = examples(
    ("all networks, as published: hours", "cryorecon fit-image camera.png -o fits"),
    (
        "one network at 128 px, in a minute",
        "cryorecon fit-image camera.png -o fits --method residual --size 128 --width 64"
        " --iterations 100,100,200,800",
    ),
    (
        "two networks beside each other",
        "cryorecon fit-image a.png b.png -o fits --method residual --method sape",
    ),
)


def fit_image_command(
    images: Annotated[list[Path], argument("Pictures (PNG, JPEG, TIFF).", "PICTURE")],
    output: Folder,
    method: Annotated[
        list[str] | None,
        option(
            COMPUTE,
            "residual, residual-bacon, bacon-fair, bacon-unfair, bacon-unstaged or sape; "
            "repeatable.",
            metavar="NAME",
            default="all",
        ),
    ] = None,
    size: Annotated[
        int | None,
        option(INPUT, "Full side, even [px].", metavar="PX", min=16, default="the picture's"),
    ] = None,
    width: Annotated[int, option(COMPUTE, "Hidden units a layer.", metavar="N", min=4)] = 256,
    iterations: Annotated[
        str,
        option(COMPUTE, "Length of each scale's stage, coarse to fine.", metavar="N,N,..."),
    ] = "500,500,1000,8000",
    learning_rate: Annotated[float, option(EXPERT, LEARNING_RATE_HELP, metavar="X")] = 5e-3,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Fit networks to pictures at half size, scale by scale, and query them at full size.

    Tells how much each scale's spectrum still changes after its own stage, and the PSNR at full
    size. The defaults are those of Shekarforoush et al. 2022, section 5, and take hours on a CPU.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.engines.image_fit import METHODS
    from cryorecon.run.fit_image import fit_picture, read_image, summarise, write_table

    use_threads(threads)
    unknown = [m for m in method or [] if m not in METHODS]
    if unknown:
        raise CryoreconError(f"Unknown method {unknown[0]}", f"Known: {', '.join(METHODS)}")
    config = _config(size, width, iterations, learning_rate)
    named = {path.stem: path for path in reversed(images)}
    other = next((path for path in images if named[path.stem] != path), None)
    if other is not None:
        raise CryoreconError(
            f"{named[other.stem]} and {other} would be written to one folder, {other.stem}",
            "Rename one, or give them one by one",
        )
    chosen = [m for m in METHODS if not method or m in method]
    for path in images:
        read_image(path, size)
    prepare_folder(output, overwrite)
    rows: list[Row] = []
    total = sum(config.iterations)
    for path in images:
        with count_progress(f"Fitting {path.name}", "iterations") as bar:
            for row in fit_picture(
                path,
                output,
                chosen,
                config,
                size,
                seed,
                lambda m, done, _: bar(chosen.index(m) * total + done, len(chosen) * total),
            ):
                rows.append(row)
                # Each takes up to hours: what is done stays if the rest is stopped.
                write_table(output / "fits.csv", rows)
    summary = summarise(rows)
    write_table(output / "summary.csv", summary)
    if json:
        print_json({"fits": output / "fits.csv", "images": len(images), "methods": summary})
        return
    console.print(_shown(summary))
    console.print(f"{output / 'fits.csv'}  {output / 'summary.csv'}")


def _config(size: int | None, width: int, iterations: str, learning_rate: float) -> ImageFitConfig:
    from cryorecon.engines.image_fit import ImageFitConfig

    if size is not None and size % 2:
        raise CryoreconError(f"--size {size} is odd", "Give an even number")
    if not 0 < learning_rate < math.inf:
        raise CryoreconError(f"--learning-rate {learning_rate} is not positive", "Try 5e-3")
    try:
        return ImageFitConfig(tuple(map(int, iterations.split(","))), width, learning_rate)
    except ValueError as error:
        raise CryoreconError(
            f"--iterations {iterations} is not a list of lengths", "Write 500,500,1000,8000"
        ) from error


def _shown(summary: list[Row]) -> Table:
    table = Table(title="Mean and standard deviation over images", title_justify="left")
    keys = [k for k in dict.fromkeys(k for row in summary for k in row) if f"{k}_std" in summary[0]]
    for name in ("method", *keys):
        table.add_column(name.replace("_", " "), justify="left" if name == "method" else "right")
    for row in summary:
        cells = [f"{row[k]:.2f} +- {row[f'{k}_std']:.2f}" if k in row else "-" for k in keys]
        table.add_row(str(row["method"]), *cells)
    return table
