"""Image fitting from picture files to pictures and a table."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cryorecon.engines.image_fit import ImageFit, ImageFitConfig, Method, fit_image
from cryorecon.errors import CryoreconError, require_file
from cryorecon.io.files import make_folder, replacing
from cryorecon.networks.mfn import paper_bands

_MOST_PIXELS = 2**25
Row = dict[str, str | float]


def read_image(path: str | Path, size: int | None) -> tuple[Tensor, Tensor]:
    """An RGB picture cut to a centred square, at half and at full size.

    Parameters
    ----------
    size : int, optional
        Full side in pixels, even; default the largest even one that fits.

    Returns
    -------
    train : Tensor, shape (N, N, 3), float32
        Values in [0, 1]; resized by Lanczos interpolation.
    full : Tensor, shape (2 N, 2 N, 3), float32

    Raises
    ------
    CryoreconError
        If the file is no picture or is smaller than 16 px.
    """
    path = require_file(path, "picture")
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > _MOST_PIXELS:
                raise CryoreconError(
                    f"{path} has {opened.width} x {opened.height} pixels", "Give a smaller picture"
                )
            picture = _eight_bits(opened, path).convert("RGB")
    except CryoreconError:
        raise
    except Exception as error:
        # Pillow reports damage by exceptions of many kinds.
        raise CryoreconError(
            f"{path} cannot be read as a picture", "Give a PNG, JPEG or TIFF file"
        ) from error
    side = min(picture.size) // 2 * 2
    if side < 16:
        raise CryoreconError(f"{path} is only {side} px wide", "Give a picture of 16 px or more")
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    side = size or side
    full = picture.resize((side, side), Image.Resampling.LANCZOS)
    train = full.resize((side // 2, side // 2), Image.Resampling.LANCZOS)
    half, whole = (torch.from_numpy(np.asarray(p, np.float32) / 255) for p in (train, full))
    return half, whole


def _eight_bits(picture: Image.Image, path: Path) -> Image.Image:
    """Grey values of more bits, which Pillow would cut off at 255."""
    if picture.mode != "F" and not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture, np.float64)
    most = 1.0 if picture.mode == "F" else 65535.0
    if not (values.min() >= 0 and values.max() <= most):
        raise CryoreconError(
            f"{path} holds values from {values.min():g} to {values.max():g}, of which 0 to "
            f"{most:g} can be shown",
            "Give a picture of 8 or 16 bits, or scale it to 0 to 1",
        )
    return Image.fromarray((values / most * 255).round().astype(np.uint8))


def write_picture(path: Path, values: Tensor) -> None:
    """Write (N, N, C) values in [0, 1] as a PNG; clipped for display only."""
    pixels = (values.clamp(0, 1) * 255).round().byte().numpy()
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def spectrum_picture(values: Tensor) -> Tensor:
    """Logarithm of the centred Fourier modulus, scaled to [0, 1], grey; shape (N, N, 3)."""
    modulus = torch.fft.fftshift(torch.fft.fft2(values.mean(-1))).abs()
    logged = torch.log10(modulus + 1e-3)
    logged = (logged - logged.min()) / (logged.max() - logged.min()).clamp(min=1e-9)
    return logged[..., None].expand(-1, -1, 3)


def fit_picture(
    path: Path,
    output: Path,
    methods: list[Method],
    config: ImageFitConfig,
    size: int | None,
    seed: int,
    progress: Callable[[Method, int, float], None],
) -> Iterator[Row]:
    """Fit one picture with every method; write pictures; give a row of figures as each is done.

    Each method starts from the same seed, so that a row does not depend on the others.

    Raises
    ------
    CryoreconError
        If the picture is too small for the number of scales.
    """
    train, full = read_image(path, size)
    if len(paper_bands(len(train) // 2, len(config.iterations))) < len(config.iterations):
        raise CryoreconError(
            f"{path} at {len(full)} px has too few frequencies for {len(config.iterations)} scales",
            "Give a larger picture or fewer stages in --iterations",
        )
    for method in methods:
        generator = torch.Generator().manual_seed(seed)

        def told(done: int, loss: float, method: Method = method) -> None:
            progress(method, done, loss)

        fit = fit_image(train, full, method, config, generator, told)
        folder = output / path.stem / method
        make_folder(folder)
        _write_fit(folder, fit)
        row: Row = {"image": path.name, "method": method, "psnr_db": fit.psnr_db}
        for scale, change in enumerate(fit.spectrum_change[:-1], 1):
            row[f"spectrum_change_{scale}"] = change
        yield row


def _write_fit(folder: Path, fit: ImageFit) -> None:
    write_picture(folder / "full_size.png", fit.full)
    for name, outputs in (("stage_end", fit.at_stage_end), ("end", fit.at_end)):
        for scale, values in enumerate(outputs, 1):
            write_picture(folder / f"scale{scale}_{name}.png", values)
            write_picture(folder / f"scale{scale}_{name}_spectrum.png", spectrum_picture(values))


def summarise(rows: list[Row]) -> list[Row]:
    """Mean and standard deviation over images, a row a method."""
    summary: list[Row] = []
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        mine = [row for row in rows if row["method"] == method]
        line: Row = {"method": method, "images": len(mine)}
        for key in mine[0]:
            if key not in ("image", "method"):
                values = np.array([float(row[key]) for row in mine])
                line[key] = float(values.mean())
                line[f"{key}_std"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        summary.append(line)
    return summary


def write_table(path: Path, rows: list[Row]) -> None:
    """Write rows as CSV; columns that a row lacks stay empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
