"""A map's surface: as a mesh for a viewer, and shaded as a picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from cryorecon.maps.contour import contour_level
from cryorecon.physics.resampling import resample_volume

# Triangles that a browser turns smoothly, and that make about half a megabyte of the report.
_MOST_FACES = 40_000
_MOST_VOXELS = 96
_LEAST_VOXELS = 24
# Side of shaded pictures, px.
_PICTURE = 256


@dataclass(frozen=True)
class Mesh:
    """Triangles of a surface.

    Attributes
    ----------
    vertices_angst : array, shape (v, 3), float32
        (x, y, z) from the centre of the box.
    faces : array, shape (f, 3), int32
        Vertices of each triangle, counterclockwise seen from where the map is lower.
    level : float
        Of the map, where the surface lies.
    voxels : int
        Side of the grid that the map was resampled to.
    """

    vertices_angst: NDArray[np.float32]
    faces: NDArray[np.int32]
    level: float
    voxels: int


def surface_mesh(
    volume: NDArray[np.floating], pixel_size_angst: float, most_faces: int = _MOST_FACES
) -> Mesh | None:
    """Marching cubes at the map's contour, on a grid coarse enough for few triangles.

    Parameters
    ----------
    volume : array, shape (N, N, N)
        Indexed [z, y, x].
    most_faces : int
        The map is low-passed onto coarser grids, down to 24 voxels a side, until it has no more.

    Returns
    -------
    Mesh, or None for a map without a surface.
    """
    # Slow to import, and only reports need it.
    from skimage.measure import marching_cubes

    full, box = torch.from_numpy(np.ascontiguousarray(volume)), len(volume)
    level = contour_level(full)
    voxels = min(box, _MOST_VOXELS)
    while True:
        grid = resample_volume(full, voxels).double().numpy()
        if not grid.min() < level < grid.max():
            return None
        points, faces, _, _ = marching_cubes(grid, level)
        if len(faces) <= most_faces or voxels <= _LEAST_VOXELS:
            break
        voxels = max(_LEAST_VOXELS, int(voxels * min(0.9, (most_faces / len(faces)) ** 0.5)))
    step = pixel_size_angst * box / voxels
    centred = (points[:, ::-1] - voxels // 2) * step
    return Mesh(centred.astype(np.float32), faces.astype(np.int32), level, voxels)


def shaded_views(volume: NDArray[np.floating]) -> list[NDArray[np.float32]]:
    """The surface at the contour seen along z, y and x, lit from the eye; NaN where there is none.

    Returns
    -------
    list of three arrays, shape (P, P)
        Brightness from 0 to 1, first row at the bottom; the axes are those of
        :func:`cryorecon.run.plots.map_figure`.
    """
    full = torch.from_numpy(np.ascontiguousarray(volume))
    small = resample_volume(full, min(len(full), _MOST_VOXELS)).double().numpy()
    level = contour_level(full)
    return [_shaded(np.moveaxis(small, axis, 0), level) for axis in range(3)]


def _shaded(volume: NDArray[np.float64], level: float) -> NDArray[np.float32]:
    """Seen from the far end of the first axis, where z points at the eye."""
    zoom = _PICTURE / volume.shape[1]
    fine = ndimage.zoom(volume, (2, 2, 2), order=1)[::-1]
    inside = fine > level
    hit = inside.any(0)
    first = inside.argmax(0)
    before = np.take_along_axis(fine, np.maximum(first - 1, 0)[None], 0)[0]
    at = np.take_along_axis(fine, first[None], 0)[0]
    # Between the two samples, linearly.
    within = (at - level) / np.where(at > before, at - before, 1.0)
    depth = first - within.clip(0, 1)
    depth = ndimage.gaussian_filter(np.where(hit, depth, len(fine)), 0.7)
    slope_y, slope_x = np.gradient(depth)
    bright = 0.25 + 0.75 / np.sqrt(1 + 0.6 * (slope_x**2 + slope_y**2))
    # Far parts are a little darker.
    near = 1 - 0.35 * depth / len(fine)
    shade = ndimage.zoom(np.where(hit, bright * near, 0.0), zoom / 2, order=1)
    mask = ndimage.zoom(hit.astype(np.float32), zoom / 2, order=1) > 0.5
    return np.where(mask, shade, np.nan).astype(np.float32)
