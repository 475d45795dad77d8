"""The map that a simulation looks at: from an atomic model or another map."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cryorecon.errors import CryoreconError
from cryorecon.io.atoms import read_atoms
from cryorecon.io.mrc import read_map
from cryorecon.physics.fourier import crop_or_pad_centred
from cryorecon.physics.potential import potential_map
from cryorecon.physics.resampling import resample_volume
from cryorecon.run.simulate_config import SimulateConfig

_MAP_SUFFIXES = (".mrc", ".map", ".ccp4", ".mrcs")
_DEFAULT_BOX = 64
_LARGEST_BOX = 4096
_LEAST_PIXEL_ANGST = 0.5


def load_model(path: str | Path, config: SimulateConfig) -> tuple[Tensor, float]:
    """The true map on the simulation's grid, and its pixel size in angstrom.

    Atomic models become potentials. A map keeps its voxel size unless the config has another one:
    then it is resampled in Fourier space. It is cut or padded about its centre to the box.

    Returns
    -------
    volume : Tensor, shape (N, N, N), float32
    pixel_size_angst : float
    """
    if Path(path).suffix.lower() in _MAP_SUFFIXES:
        return _load_map(path, config)
    if [s.lower() for s in Path(path).suffixes[-2:]] in [[s, ".gz"] for s in _MAP_SUFFIXES]:
        raise CryoreconError(f"{path} is a compressed map", f"Unpack it: gunzip -k {path}")
    atoms = read_atoms(
        path,
        keep_hydrogens=config.keep_hydrogens,
        keep_waters=config.keep_waters,
        b_factor_angst2=config.b_factor_angst2,
    )
    box = config.box or _DEFAULT_BOX
    pixel_size = config.pixel_size_angst
    if pixel_size is None:
        pixel_size = max(round(2.6 * atoms.radius_angst() / box, 2), _LEAST_PIXEL_ANGST)
    return potential_map(atoms, box, pixel_size), pixel_size


def _load_map(path: str | Path, config: SimulateConfig) -> tuple[Tensor, float]:
    if config.b_factor_angst2 is not None or config.keep_hydrogens or config.keep_waters:
        raise CryoreconError(
            f"{path} is a map and has no atoms",
            "Leave out --b-factor, --keep-hydrogens and --keep-waters, or give an atomic model",
        )
    source = read_map(path)
    volume, pixel_size = torch.from_numpy(source.data), source.pixel_size_angst
    field_of_view = len(volume) * pixel_size
    wanted = config.pixel_size_angst
    if wanted is not None and abs(wanted / pixel_size - 1) > 1e-4:
        if field_of_view / wanted > _LARGEST_BOX:
            raise CryoreconError(
                f"{path} is {field_of_view:g} A wide: more than {_LARGEST_BOX} px of {wanted:g} A",
                "Use a larger --pixel-size, and check the voxel size in the map's header",
            )
        volume, pixel_size = _at_pixel_size(volume, pixel_size, wanted)
    box = config.box or round(field_of_view / pixel_size)
    if box < 8:
        raise CryoreconError(
            f"{path} is {field_of_view:g} A wide: {box} px at {pixel_size:g} A/px are too few",
            "Use a smaller --pixel-size",
        )
    return crop_or_pad_centred(volume, box, 3).float().contiguous(), pixel_size


def _at_pixel_size(volume: Tensor, pixel_size: float, wanted: float) -> tuple[Tensor, float]:
    """Fourier-resample a map, padded just enough that the new pixel size is right to 1e-4."""
    box = len(volume)

    def reached(padded: int) -> float:
        return padded * pixel_size / max(round(padded * pixel_size / wanted), 1)

    def deviation(padded: int) -> float:
        return abs(reached(padded) / wanted - 1)

    close = (padded for padded in range(box, 2 * box) if deviation(padded) < 1e-4)
    padded = next(close, min(range(box, 2 * box), key=deviation))
    size = max(round(padded * pixel_size / wanted), 1)
    return resample_volume(crop_or_pad_centred(volume, padded, 3), size), reached(padded)
