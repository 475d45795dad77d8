"""Maps between the particle box, where moments are fitted, and the images' grid."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cryorecon.engines.moments.forms import MomentsGeometry
from cryorecon.engines.moments.models import VolumeModel, grid_size
from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.fourier import crop_or_pad_centred, lowpass
from cryorecon.physics.resampling import sample_volume


def on_images(volume: VolumeModel, geometry: MomentsGeometry, radius: int) -> Tensor:
    """The map on the images' grid, low-passed to the radii that were fitted; voxel sums."""
    size = 2 * grid_size(radius)
    with torch.no_grad():
        dense = volume.density(size).cpu()
    step = geometry.pixel_size_angst * size / geometry.side_angst
    # Beyond the particle box there is nothing.
    inside = sample_volume(dense, min(geometry.box, int(size / step)), step) * step**3
    whole = crop_or_pad_centred(inside, geometry.box, 3)
    band = radius * geometry.image_side_angst / geometry.side_angst
    return lowpass(whole, min(band, (geometry.box - 1) / 2), 3)


def on_particle_box(volume: Tensor, geometry: MomentsGeometry, radius: int) -> Tensor:
    """A map of the images' grid on the particle box, as fine as maps are read; voxel sums."""
    size = grid_size(radius)
    step = geometry.side_angst / size / geometry.pixel_size_angst
    return sample_volume(volume, size, step) * step**3


def aligned(moving: Tensor, fixed: Tensor, geometry: MomentsGeometry, radius: int) -> Tensor:
    """A map turned, shifted and if need be mirrored onto another by the radii that were fitted."""
    finest = geometry.side_angst / (radius + 1)
    found = align_maps(moving, fixed, geometry.pixel_size_angst, finest_angst=finest)
    return apply_alignment(moving, found)


def fsc_by_radius(first: Tensor, second: Tensor, geometry: MomentsGeometry, radius: int) -> Tensor:
    """FSC at whole cycles per particle box, shape (K + 1,), float64; between shells interpolated.

    Parameters
    ----------
    first, second : Tensor, shape (N, N, N)
        On the images' grid.
    radius : int
        K.
    """
    curve = fsc_curve(first, second).numpy()
    shells = np.arange(radius + 1) * (geometry.image_side_angst / geometry.side_angst)
    return torch.from_numpy(np.interp(shells, np.arange(len(curve)), curve))
