"""A job's results, or a table or a map, in the formats of other programs."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cryorecon.conventions import angst_to_shell, euler_to_matrix, matrix_to_euler
from cryorecon.errors import CryoreconError, require_file
from cryorecon.io.cryodrgn import write_ctf, write_poses
from cryorecon.io.cryosparc_export import write_cryosparc
from cryorecon.io.files import make_folder, refuse_to_replace, replacing
from cryorecon.io.mrc import read_map, write_map
from cryorecon.io.particles import PRIORS_OF_ANGLES, Particles
from cryorecon.io.relion_dialects import Columns, relion30, relion31
from cryorecon.io.star import write_star
from cryorecon.maps.align import mirror_map
from cryorecon.maps.contour import contour_level
from cryorecon.maps.poses import mirror_poses
from cryorecon.physics.fourier import crop_or_pad_centred, lowpass
from cryorecon.physics.resampling import sample_volume

_ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
_LARGEST_BOX = 4096
_TABLES = (".star", ".cs")


@dataclass(frozen=True)
class Source:
    """What there is to export.

    Attributes
    ----------
    path : Path
        The job directory or file that was named.
    table, volume : Path or None
        Particle table; map.
    halves : tuple of Path
        Both half maps, or none.
    mask : Path or None
        The soft mask around the map's molecule.
    """

    path: Path
    table: Path | None
    volume: Path | None
    halves: tuple[Path, ...] = ()
    mask: Path | None = None

    def need_table(self) -> Path:
        """The particle table.

        Raises
        ------
        CryoreconError
            If there is none.
        """
        if self.table is None:
            raise CryoreconError(
                f"{self.path} has no particle table", "Give run_data.star, a .cs file, or a job"
            )
        return self.table

    def need_volume(self) -> Path:
        """The map.

        Raises
        ------
        CryoreconError
            If there is none.
        """
        if self.volume is None:
            raise CryoreconError(f"{self.path} has no map", "Give an MRC file or a job directory")
        return self.volume


def find_source(path: Path) -> Source:
    """Tell what a path is: a job directory, a particle table (.star, .cs) or a map.

    Raises
    ------
    CryoreconError
        If it does not exist, or is a directory without results.
    """
    if not path.is_dir():
        require_file(path, "job directory, table or map")
        is_table = path.suffix in _TABLES
        return Source(path, path if is_table else None, None if is_table else path)
    table, volume = path / "run_data.star", path / "initial_model.mrc"
    mask = path / "initial_model_mask.mrc"
    halves = tuple(path / f"run_half{k}_class001_unfil.mrc" for k in (1, 2))
    if not table.is_file() and not volume.is_file():
        raise CryoreconError(
            f"{path} holds neither run_data.star nor initial_model.mrc",
            "Give the directory of a finished abinitio job",
        )
    return Source(
        path,
        table if table.is_file() else None,
        volume if volume.is_file() else None,
        halves if all(half.is_file() for half in halves) else (),
        mask if mask.is_file() else None,
    )


def poses_of(particles: Particles, flip: bool) -> Tensor | None:
    """Matrices A of the particles, of the other hand's map if `flip`; None without poses.

    Raises
    ------
    CryoreconError
        If the other hand is asked for and there are no poses.
    """
    if not flip and not all(name in particles.table for name in _ANGLES):
        return None
    rotations = euler_to_matrix(torch.from_numpy(particles.euler_deg()))
    return mirror_poses(rotations) if flip else rotations


def to_relion(
    particles: Particles, output: Path, *, flip: bool, old: bool, overwrite: bool
) -> None:
    """Write a RELION 3.1 STAR file, or 3.0 if `old`: every row, in order, every column.

    The other hand's has no priors of angles, which were of this one; origins are those of both.
    """
    refuse_to_replace([output], [particles.path], overwrite=overwrite)
    new: Columns = {}
    if flip:
        rotations = poses_of(particles, flip)
        assert rotations is not None
        new = dict(zip(_ANGLES, matrix_to_euler(rotations).numpy().T, strict=True))
    stale = PRIORS_OF_ANGLES if flip else set()
    write_star(output, (relion30 if old else relion31)(particles, new, stale))


def to_cryosparc(particles: Particles, output: Path, *, flip: bool, overwrite: bool) -> None:
    """Write a cryoSPARC ``.cs`` file."""
    refuse_to_replace([output], [particles.path], overwrite=overwrite)
    _refuse_flipped(particles, "cryoSPARC")
    write_cryosparc(output, particles, poses_of(particles, flip))


def to_cryodrgn(particles: Particles, folder: Path, *, flip: bool, overwrite: bool) -> list[Path]:
    """Write cryoDRGN's ``ctf.pkl`` and, where there are poses, ``poses.pkl``; what was written."""
    _refuse_flipped(particles, "cryoDRGN")
    rotations = poses_of(particles, flip)
    poses, ctf = folder / "poses.pkl", folder / "ctf.pkl"
    written = [ctf] if rotations is None else [poses, ctf]
    refuse_to_replace(written, [particles.path], overwrite=overwrite)
    make_folder(folder)
    write_ctf(ctf, particles)
    if rotations is not None:
        write_poses(poses, particles, rotations)
    return written


def _refuse_flipped(particles: Particles, program: str) -> None:
    """Files of other programs do not say that phases are flipped: their maps would be wrong."""
    if bool(particles.ctf_parameters().phase_flipped.any()):
        raise CryoreconError(
            f"{particles.path} says that images are phase flipped, which {program}'s files cannot",
            f"Extract the particles without phase flipping for {program}",
        )


@dataclass(frozen=True)
class MapEdits:
    """What is done to a map, in this order.

    Attributes
    ----------
    invert : bool
        Change the sign of the density.
    flip : bool
        Mirror along x about the centre: the other hand.
    lowpass_angst : float, optional
        Resolution where the gain has fallen to one half, with a raised-cosine edge two shells wide.
    resample_angst : float, optional
        New voxel size.
    crop_px : int, optional
        New box side, after resampling; larger boxes are padded with zeros.
    """

    invert: bool = False
    flip: bool = False
    lowpass_angst: float | None = None
    resample_angst: float | None = None
    crop_px: int | None = None


def edited(volume: Tensor, pixel_size_angst: float, edits: MapEdits) -> tuple[Tensor, float]:
    """A map after `edits`, and its voxel size in angstrom.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)

    Raises
    ------
    CryoreconError
        If the low-pass is finer than the voxels can hold, or nothing would be left.
    """
    if edits.invert:
        volume = -volume
    if edits.flip:
        volume = mirror_map(volume)
    if edits.lowpass_angst is not None:
        if edits.lowpass_angst < 2 * pixel_size_angst:
            raise CryoreconError(
                f"A low-pass at {edits.lowpass_angst:g} A is finer than voxels of "
                f"{pixel_size_angst:g} A can hold",
                f"Give --lowpass of {2 * pixel_size_angst:g} A or more",
            )
        band = angst_to_shell(edits.lowpass_angst, volume.shape[-1], pixel_size_angst)
        volume = lowpass(volume, band, 3)
    if edits.resample_angst is not None:
        volume = _resampled(volume, pixel_size_angst, edits.resample_angst)
        pixel_size_angst = edits.resample_angst
    if edits.crop_px is not None:
        volume = crop_or_pad_centred(volume, edits.crop_px, 3)
    return volume, pixel_size_angst


def _resampled(volume: Tensor, old_angst: float, new_angst: float) -> Tensor:
    """On voxels of exactly the new size; the largest box of the same parity that the old holds."""
    side = volume.shape[-1]
    box = int(side * old_angst / new_angst + 1e-6)
    box -= (box - side) % 2
    if box > _LARGEST_BOX:
        raise CryoreconError(
            f"Voxels of {new_angst:g} A divide {side * old_angst:g} A into {box} px a side",
            "Give a larger --resample, and check the voxel size in the map's header",
        )
    if box < 2:
        raise CryoreconError(
            f"Voxels of {new_angst:g} A are too large for a box of {side * old_angst:g} A",
            "Give a smaller --resample",
        )
    return sample_volume(volume, box, new_angst / old_angst)


def to_mrc(source: Source, output: Path, edits: MapEdits, *, overwrite: bool) -> list[Path]:
    """Write the map, and a job's half maps and mask beside it; what was written.

    All are edited alike, but that a mask keeps its sign and its edge, and stays within 0 and 1.
    """
    names = [output, *(output.with_name(f"{output.stem}_half{k}_unfil.mrc") for k in (1, 2))]
    pairs = list(zip((source.need_volume(), *source.halves), names, strict=False))
    mask = output.with_name(f"{output.stem}_mask.mrc")
    written = [name for _, name in pairs] + ([mask] if source.mask else [])
    read = [source.volume, *source.halves, source.mask]
    refuse_to_replace(written, read, overwrite=overwrite)
    for path, name in pairs:
        result, pixel = _edited_file(path, edits)
        write_map(name, result.numpy(), pixel)
    if source.mask is not None:
        geometry = replace(edits, invert=False, lowpass_angst=None)
        result, pixel = _edited_file(source.mask, geometry)
        write_map(mask, result.clamp(0, 1).numpy(), pixel)
    return written


def _edited_file(path: Path, edits: MapEdits) -> tuple[Tensor, float]:
    found = read_map(path)
    try:
        return edited(torch.from_numpy(found.data), found.pixel_size_angst, edits)
    except CryoreconError as error:
        raise CryoreconError(f"{path}: {error.problem}", error.remedy) from error


def to_chimerax(source: Source, output: Path, *, overwrite: bool) -> float:
    """Write a ChimeraX command file that shows the map; its contour level.

    Paths are relative to the command file: ChimeraX runs it in its own folder. Half maps are
    opened hidden, at the same level.
    """
    volume = source.need_volume()
    refuse_to_replace([output], [], overwrite=overwrite)
    level = contour_level(torch.from_numpy(read_map(volume).data))
    opened = (volume, *source.halves)
    lines = ["# Contour level: half way between the mean density inside it and that outside it."]
    for number, path in enumerate(opened, 1):
        name = Path(os.path.relpath(path.resolve(), output.resolve().parent)).as_posix()
        if '"' in name or not name.isprintable():
            raise CryoreconError(f"ChimeraX cannot open {name!r}", "Rename the file or its folder")
        lines.append(f'open "{name}"')
        lines.append(f"volume #{number} style surface step 1 level {level:.6g}")
    lines += [f"hide #{number} models" for number in range(2, len(opened) + 1)]
    lines += ["volume #1 color cornflowerblue", "set bgColor white", "lighting soft", "view #1"]
    with replacing(output) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return level
