"""A few particles beside what the map predicts of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryorecon.errors import CryoreconError
from cryorecon.io.particles import Particles
from cryorecon.io.stacks import bare_names
from cryorecon.physics.ctf import ctf
from cryorecon.physics.fourier import (
    HalfPlane,
    half_plane,
    max_band,
    to_coefficients,
    to_images,
)
from cryorecon.physics.imaging import predict
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.projection import padded_transform
from cryorecon.physics.resampling import downsample_images, resample_sums
from cryorecon.run.load import divided_by_noise
from cryorecon.run.report.inputs import ReportInputs

# Larger boxes are cropped in Fourier space: nothing finer is shown.
_MOST_PIXELS = 96
# Detail that is shown, in cycles per particle diameter: noise hides all else from the eye.
_CYCLES = 8.0


@dataclass(frozen=True)
class Examples:
    """Images, predictions and what is left, all low-passed alike.

    Attributes
    ----------
    names : list of str
    images, predictions, residuals : Tensor, shape (k, M, M)
        In units of the noise's standard deviation outside the particle.
    correlations : list of float
        Of image and prediction, over the coefficients that are shown.
    resolution_angst : float
        Of the low-pass filter.
    scale : float
        Factor on the predictions, fitted to all that are shown; negative where particles are
        black on white.
    """

    names: list[str]
    images: Tensor
    predictions: Tensor
    residuals: Tensor
    correlations: list[float]
    resolution_angst: float
    scale: float


def example_particles(inputs: ReportInputs, count: int = 4) -> Examples | None:
    """Particles spread over the table, through the project's image model.

    Returns
    -------
    Examples, or None without map, poses or images.

    Raises
    ------
    CryoreconError
        If the images are not those of the map or of the poses.
    """
    if inputs.map is None or inputs.poses is None or inputs.particles is None:
        return None
    poses, box = inputs.poses, len(inputs.map.data)
    if not poses.names:
        raise CryoreconError(f"{poses.path} names no images", "Add a column rlnImageName")
    shown = np.linspace(0, len(poses.rotations) - 1, count + 2)[1:-1].round().astype(int)
    shown = np.unique(shown)
    names = [poses.names[row] for row in shown]
    rows = _rows_of(shown, inputs.particles, inputs)
    diameter = inputs.diameter or 0.8
    outside = 1 - soft_ball(box, diameter / 2 * box, 2.0, 2)
    recorded = torch.from_numpy(inputs.particles.images(rows))
    images, spreads = divided_by_noise(recorded, outside)
    small = min(box, _MOST_PIXELS)
    pixel_angst = inputs.side_angst / small
    plane = half_plane(small)
    band = min(_CYCLES / diameter, max_band(small))
    gain = ((band + 1 - plane.radius) / 2).clamp(0, 1)
    images = downsample_images(images, small)
    optics = inputs.particles.ctf_parameters()[torch.from_numpy(rows)]
    transfer = ctf(plane.frequencies, optics, small, pixel_angst).float()
    model = padded_transform(resample_sums(torch.from_numpy(inputs.map.data).float(), small))
    rotations = poses.rotations[shown].float()
    offsets_px = (poses.origins_angst[shown] / pixel_angst).float()
    # Of the map's projections on the scale of these images, in fewer pixels.
    gain_of_map = gain * (small / box) ** 2 / spreads.mean()
    told = predict(model, rotations, offsets_px, transfer, plane) * gain_of_map
    seen = to_coefficients(images, plane) * gain
    return _compared(names, seen, told, plane, inputs.side_angst / band)


def _rows_of(
    shown: NDArray[np.int64], particles: Particles, inputs: ReportInputs
) -> NDArray[np.int64]:
    """Rows of some poses' images in the particle file, which must be that of the map."""
    assert inputs.map is not None
    assert inputs.poses is not None
    remedy = "Give the particles that the map was made of with --particles"
    if particles.box != len(inputs.map.data):
        raise CryoreconError(
            f"{particles.path} has images of {particles.box} px, {inputs.folder / inputs.map_name} "
            f"has {len(inputs.map.data)} px",
            remedy,
        )
    images = bare_names(particles.table["rlnImageName"])
    names = bare_names(pd.Series(inputs.poses.names, dtype=object))
    # An image may be in two rows, with a CTF and a pose of each: names alone do not tell them.
    if len(images) == len(names) and (images == names).all():
        return shown
    wanted = names.iloc[shown]
    first = images.drop_duplicates()
    found = pd.Index(first).get_indexer(pd.Index(wanted))
    if (found < 0).any():
        name = wanted.iloc[int((found < 0).argmax())]
        raise CryoreconError(
            f"{particles.path} does not name the image {name} of {inputs.poses.path}", remedy
        )
    return first.index.to_numpy(np.int64)[found]


def _compared(
    names: list[str], seen: Tensor, told: Tensor, plane: HalfPlane, resolution_angst: float
) -> Examples:
    weight = plane.multiplicity.to(told.real)

    def inner(first: Tensor, second: Tensor) -> Tensor:
        return ((first.conj() * second).real * weight).sum(-1)

    scale = float(inner(told, seen).sum() / inner(told, told).sum().clamp(min=1e-30))
    told = told * scale
    norm = (inner(told, told) * inner(seen, seen)).sqrt().clamp(min=1e-30)
    images, predictions, residuals = (to_images(v, plane) for v in (seen, told, seen - told))
    correlations = (inner(told, seen) / norm).tolist()
    return Examples(names, images, predictions, residuals, correlations, resolution_angst, scale)
