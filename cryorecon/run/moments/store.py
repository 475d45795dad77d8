"""Moments and their sums between the engines and the disk; merging of files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from cryorecon.engines.moments.forms import Moments, MomentsGeometry
from cryorecon.engines.moments.sums import MomentSums, merge_arrays
from cryorecon.engines.moments.sums_full import FullSums
from cryorecon.engines.moments.sums_steerable import SteerableSums
from cryorecon.errors import CryoreconError
from cryorecon.io.files import sha256_of
from cryorecon.io.moments_file import MomentsData, read_moments_data, write_moments
from cryorecon.run.moments.check import array_of, count_of, geometry_of, moments_of_file

_ABOUT = {
    "first": "M1, unnormalised transform of the images; particles white",
    "second": "M2, squared units of M1; steerable: order, radius, radius; full: Y(q) Y(q')*",
    "pseudo": "E Y(q) Y(q'), squared units of M1",
    "first_error": "standard error of M1",
    "second_error": "root mean square modulus of the error of M2",
    "third": "M3, cubed units of M1; pair of orders, radius, radius, radius",
    "third_error": "root mean square modulus of the error of M3",
    "noise": "noise subtracted from M2, in its units",
    "measured": "entries that images measure",
    "conditioning": "smallest over largest weight by radius",
    "frequencies": "kx, ky in cycles per image",
    "radii_per_angst": "spatial frequency of the radii, 1/angstrom",
    "noise_power": "mean noise power of the images by shell, cycles per image",
}


@dataclass(frozen=True)
class Progress:
    """Sums and how far they have come.

    Attributes
    ----------
    sums : MomentSums
    images_done, images_total : int
    sources : tuple of str
        SHA-256 of the STAR files.
    """

    sums: MomentSums
    images_done: int
    images_total: int
    sources: tuple[str, ...]


def new_sums(geometry: MomentsGeometry, device: str = "cpu") -> MomentSums:
    """Empty sums of either form."""
    return (
        SteerableSums(geometry, device)
        if geometry.form == "steerable"
        else FullSums(geometry, device)
    )


def save_progress(path: Path, done: Progress, result: Moments | None = None) -> None:
    """Write sums, and the moments if they are finished, as a whole or not at all."""
    geometry = done.sums.geometry
    arrays = {f"sums/{name}": array.cpu().numpy() for name, array in done.sums.arrays.items()}
    about: dict[str, str] = {}
    if result is not None:
        values = {
            field.name: getattr(result, field.name)
            for field in dataclasses.fields(result)
            if isinstance(getattr(result, field.name), torch.Tensor)
        }
        values["noise_power"] = done.sums.arrays["noise_power"].cpu() / max(done.sums.n_images, 1)
        if geometry.form == "steerable":
            values["radii_per_angst"] = geometry.radii_per_angst
        arrays |= {f"moments/{name}": value.numpy() for name, value in values.items()}
        about = {f"moments/{name}": _ABOUT[name] for name in values}
    attributes = geometry.attributes() | {
        "n_images": done.sums.n_images,
        "images_done": done.images_done,
        "images_total": done.images_total,
        "complete": result is not None,
        "input_sha256": " ".join(done.sources),
    }
    write_moments(path, MomentsData(attributes, arrays, about))


def _read_sums(path: Path, device: str = "cpu") -> tuple[Progress, bool]:
    data = read_moments_data(path)
    sums = new_sums(geometry_of(path, data), device)
    for name, array in sums.arrays.items():
        array.copy_(array_of(path, data, f"sums/{name}", array))
    numbers = [count_of(path, data, k) for k in ("n_images", "images_done", "images_total")]
    sums.n_images = numbers[0]
    sources = tuple(str(data.attributes.get("input_sha256", "")).split())
    return Progress(sums, numbers[1], numbers[2], sources), bool(data.attributes.get("complete"))


def load_progress(state: Path, geometry: MomentsGeometry, source: str, device: str) -> Progress:
    """The state of an interrupted run.

    Raises
    ------
    CryoreconError
        If there is none, or it is of other particles or options.
    """
    if not state.exists():
        raise CryoreconError(
            f"There is no {state} to continue from", "Start anew without --continue"
        )
    progress, _ = _read_sums(state, device)
    if progress.sources != (source,):
        raise CryoreconError(
            f"{state} is of another STAR file", "Give the one it was begun with, or start anew"
        )
    mine, other = progress.sums.geometry.attributes(), geometry.attributes()
    for name, value in mine.items():
        if value != other[name]:
            raise CryoreconError(
                f"{state} was begun with {name} = {value}, now it is {other[name]}",
                "Give the same options, or start anew without --continue",
            )
    return progress


def read_moments(path: str | Path) -> Moments:
    """The moments in a file that ``cryorecon moments`` finished.

    Raises
    ------
    CryoreconError
        If the file is damaged, foreign or unfinished.
    """
    path = Path(path)
    data = read_moments_data(path)
    if not data.attributes.get("complete"):
        raise CryoreconError(
            f"{path} is not finished", "Go on with `cryorecon moments estimate --continue`"
        )
    return moments_of_file(path, data)


def finished_moments(path: Path, star: Path) -> Moments | None:
    """The moments of a STAR file, if an earlier run of the job has finished them."""
    if not path.exists():
        return None
    progress, complete = _read_sums(path)
    return read_moments(path) if complete and progress.sources == (sha256_of(star),) else None


def merge_moments(first: Path, second: Path, output: Path) -> Moments:
    """Moments of the images of two files together, from their sums.

    Raises
    ------
    CryoreconError
        If the files differ in geometry, are unfinished, or come from the same STAR file. Other
        selections that share images are not noticed.
    """
    parts = []
    for path in (first, second):
        progress, complete = _read_sums(path)
        if not complete:
            raise CryoreconError(
                f"{path} is not finished", "Go on with `cryorecon moments estimate --continue`"
            )
        parts.append(progress)
    one, other = parts
    if set(one.sources) & set(other.sources):
        raise CryoreconError(
            f"{first} and {second} were made from the same STAR file",
            "Its images would count twice; give files of different particles",
        )
    try:
        merge_arrays(one.sums, other.sums)
    except ValueError as error:
        raise CryoreconError(
            f"{first} and {second} cannot be merged: {error}",
            "Estimate both with the same options, from images of one box and pixel size",
        ) from error
    done = one.images_done + other.images_done
    merged = Progress(one.sums, done, done, (*one.sources, *other.sources))
    result = merged.sums.finalise()
    save_progress(output, merged, result)
    return result
