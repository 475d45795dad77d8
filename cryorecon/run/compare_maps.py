"""The Fourier shell correlation of two map files, with mask and alignment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import Map, read_map
from cryorecon.maps.align import Alignment, align_maps, apply_alignment
from cryorecon.maps.fsc import fsc_curve, masked_fsc
from cryorecon.physics.rotations import log_map
from cryorecon.run.curves import FscCurve, fsc_as_dict, matrix_as_list

# Headers store the cell in float32, and programs round the pixel size differently.
_PIXEL_SIZE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class MapComparison:
    """What comparing two maps gave.

    Attributes
    ----------
    curve : FscCurve
    alignment : Alignment, optional
        How the first map was moved onto the second.
    moved : Tensor, shape (N, N, N)
        The first map as it was compared, before the mask.
    """

    curve: FscCurve
    alignment: Alignment | None
    moved: Tensor

    @property
    def alignment_text(self) -> str:
        """What the alignment did to the first map, in words."""
        found = self.alignment
        if found is None:
            return "maps compared where they lie"
        angle_deg = math.degrees(float(log_map(found.rotation).norm()))
        x, y, z = (float(value) for value in found.shift_px)
        return (
            f"first map {'mirrored, ' if found.flipped else ''}turned by {angle_deg:.2f} degrees, "
            f"shifted by ({x:.2f}, {y:.2f}, {z:.2f}) px; correlation {found.correlation:.4f} "
            f"up to {self.curve.box * self.curve.pixel_size_angst / found.band:.2f} A"
        )


def compare_maps(
    first_path: Path, second_path: Path, mask_path: Path | None = None, *, align: bool = False
) -> MapComparison:
    """Measure the FSC of two maps; with `align`, the first is moved onto the second before.

    The mask lies in the frame of the second map; what it brings is taken out.

    Raises
    ------
    CryoreconError
        If box or voxel size differ, a map is constant, or the mask is empty or not within 0..1.
    """
    first, second = read_map(first_path), read_map(second_path)
    _require_same_grid(first_path, first, second_path, second)
    mask = None if mask_path is None else _read_mask(mask_path, second_path, second)
    moving, reference = torch.tensor(first.data), torch.tensor(second.data)
    for path, volume in ((first_path, moving), (second_path, reference)):
        if volume.min() == volume.max():
            raise CryoreconError(
                f"{path} is empty: all its voxels are {float(volume[0, 0, 0]):g}",
                "Give a map that holds density",
            )
    alignment = None
    if align:
        try:
            alignment = align_maps(moving, reference, second.pixel_size_angst)
        except ValueError as error:
            raise CryoreconError(f"{first_path}: {error}", "Leave out --align") from error
        moving = apply_alignment(moving, alignment)
    parts = None
    if mask is not None:
        # The same maps give the same curve.
        parts = masked_fsc(moving, reference, mask, torch.Generator().manual_seed(0))
    curve = FscCurve(
        fsc_curve(moving, reference) if parts is None else parts.corrected,
        box=len(reference),
        pixel_size_angst=second.pixel_size_angst,
        maps=f"{first_path.name} and {second_path.name}",
        mask=None if mask_path is None else mask_path.name,
        aligned=align,
        parts=parts,
    )
    return MapComparison(curve, alignment, moving)


def _require_same_grid(first_path: Path, first: Map, second_path: Path, second: Map) -> None:
    if first.data.shape != second.data.shape:
        raise CryoreconError(
            f"The boxes differ: {first_path} has {len(first.data)} px, "
            f"{second_path} {len(second.data)} px",
            "Rescale or crop one of them to the other's box",
        )
    sizes = first.pixel_size_angst, second.pixel_size_angst
    if abs(sizes[0] - sizes[1]) > _PIXEL_SIZE_TOLERANCE * sizes[1]:
        raise CryoreconError(
            f"The voxel sizes differ: {first_path} has {sizes[0]:.5g} A, "
            f"{second_path} {sizes[1]:.5g} A",
            "Correct the header that is wrong, or rescale one map to the other's voxel size",
        )


def _read_mask(path: Path, map_path: Path, reference: Map) -> Tensor:
    mask = read_map(path)
    _require_same_grid(path, mask, map_path, reference)
    low, high = float(mask.data.min()), float(mask.data.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise CryoreconError(
            f"{path} is no mask: its values run from {low:.4g} to {high:.4g}",
            "A mask lies between 0 and 1; check that the file is a mask and not a map",
        )
    if high <= 0:
        raise CryoreconError(f"{path} is an empty mask: every voxel is 0", "Give another mask")
    return torch.tensor(mask.data)


def comparison_as_dict(comparison: MapComparison) -> dict[str, object]:
    """The curve, its conditions and the alignment as plain data."""
    data = fsc_as_dict(comparison.curve)
    alignment = comparison.alignment
    data["alignment"] = alignment and {
        "rotation": matrix_as_list(alignment.rotation),
        "shift_px": [float(value) for value in alignment.shift_px],
        "mirrored": alignment.flipped,
        "correlation": alignment.correlation,
    }
    return data
