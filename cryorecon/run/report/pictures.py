"""Small pictures of a report: pixels that the page and the PDF share."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO

import healpix
import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cryorecon.run.report.particles import Examples
from cryorecon.run.report.surface import shaded_views

_SLICE_PX = 192


def png(picture: NDArray[np.uint8]) -> str:
    """A data URI of grey (h, w) or colour (h, w, 3 or 4) pixels, first row on top."""
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def grey(picture: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """Values between two limits as grey levels, first row at the bottom; at most 192 px a side."""
    scaled = (picture - low) / max(high - low, 1e-30)
    levels = (scaled.clip(0, 1) * 255).round().astype(np.uint8)[::-1]
    image = Image.fromarray(levels)
    if max(image.size) > _SLICE_PX:
        image.thumbnail((_SLICE_PX, _SLICE_PX), Image.Resampling.BOX)
    return np.asarray(image)


@dataclass(frozen=True)
class Picture:
    """Pixels, first row on top, and what they show.

    Attributes
    ----------
    what : str
        slice, projection or surface.
    axis, across, up : str
        The axis that is looked along, and those that point right and up.
    pixels : array, shape (h, w) or (h, w, 2) with opacity, uint8
    """

    what: str
    axis: str
    across: str
    up: str
    pixels: NDArray[np.uint8]

    @property
    def uri(self) -> str:
        """For the page."""
        return png(self.pixels)


def map_pictures(volume: NDArray[np.floating]) -> list[Picture]:
    """Central slices, projections and shaded surfaces along z, y and x."""
    box, pictures = len(volume), []
    shaded = shaded_views(volume)
    for axis, (name, across, up) in enumerate((("z", "x", "y"), ("y", "x", "z"), ("x", "y", "z"))):
        flat = {
            "slice": np.take(volume, box // 2, axis),
            "projection": volume.sum(axis),
        }
        for what, picture in flat.items():
            low, high = np.quantile(picture, (0.005, 0.9995))
            pictures.append(Picture(what, name, across, up, grey(picture, low, high)))
        layers = [np.nan_to_num(shaded[axis]) * 255, np.isfinite(shaded[axis]) * 255]
        solid = np.stack([layer.round().astype(np.uint8)[::-1] for layer in layers], -1)
        pictures.append(Picture("surface", name, across, up, solid))
    return pictures


def particle_pictures(examples: Examples) -> list[list[NDArray[np.uint8]]]:
    """Image, prediction and residual of each particle, all of a particle at the same levels."""
    rows = []
    stacks = (examples.images, examples.predictions, examples.residuals)
    for number in range(len(examples.names)):
        limit = float(np.quantile(np.abs(examples.images[number].numpy()), 0.998))
        rows.append([grey(stack[number].numpy(), -limit, limit) for stack in stacks])
    return rows


def mosaic(rows: list[list[NDArray[np.uint8]]], side: int = 192, gap: int = 8) -> NDArray[np.uint8]:
    """Square pictures side by side on white; opacity, where they have it, lets white through."""
    height, width = len(rows) * (side + gap), len(rows[0]) * (side + gap)
    page = np.full((height, width), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            flat = pixels
            if pixels.ndim == 3:
                opacity = pixels[..., 1] / 255
                flat = (pixels[..., 0] * opacity + 255 * (1 - opacity)).astype(np.uint8)
            scaled = Image.fromarray(flat).resize((side, side), Image.Resampling.BILINEAR)
            top, left = y * (side + gap), x * (side + gap)
            page[top : top + side, left : left + side] = np.asarray(scaled)
    return page


def sphere_picture(
    density: NDArray[np.floating], width: int = 720
) -> tuple[NDArray[np.uint8], float]:
    """A density over the sphere in Mollweide's equal-area projection, and its highest colour.

    Longitude is rlnAngleRot from -180 to 180, latitude 90 - rlnAngleTilt. Clear outside.

    Parameters
    ----------
    density : array, shape (12 nside^2,)
        Relative to uniform, in HEALPix cells (ring order).
    """
    nside = round((len(density) / 12) ** 0.5)
    y, x = np.mgrid[1 : -1 : 1j * (width // 2), -2 : 2 : 1j * width]
    inside = (x / 2) ** 2 + y**2 <= 1
    angle = np.arcsin(y.clip(-1, 1))
    latitude = np.arcsin(((2 * angle + np.sin(2 * angle)) / np.pi).clip(-1, 1))
    longitude = (np.pi / 2 * x / np.maximum(np.cos(angle), 1e-9)).clip(-np.pi, np.pi)
    cells = healpix.ang2pix(nside, np.pi / 2 - latitude, longitude)
    highest = max(2.0, float(np.max(density)))
    colours = mpl.colormaps["viridis"](density[cells].clip(0) / highest)
    for lines in (np.rad2deg(longitude) / 60, np.rad2deg(latitude) / 30):
        # A line where the next pixel is in another stripe.
        stripe = np.floor(lines)
        edge = np.zeros(inside.shape, bool)
        edge[:, 1:] |= stripe[:, 1:] != stripe[:, :-1]
        edge[1:] |= stripe[1:] != stripe[:-1]
        colours[edge, :3] = 0.65 * colours[edge, :3] + 0.35
    colours[..., 3] = inside
    return (colours * 255).round().astype(np.uint8), highest
