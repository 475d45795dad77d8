"""Which images a STAR file names, and where their stacks lie on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from cryorecon.errors import CryoreconError, MissingStacksError
from cryorecon.io.mrc import Header, read_header
from cryorecon.io.text_table import TextTable

_LONGEST_SHOWN = 200


def _places(star: Path) -> tuple[list[Path], list[Path]]:
    """Folders that hold the STAR file, and those above, nearest first."""
    # A link's stacks may lie beside it or beside what it points to.
    own = [star.resolve().parent, Path(os.path.abspath(star)).parent]
    above = [parent for folder in own for parent in folder.parents]
    return list(dict.fromkeys(own)), list(dict.fromkeys(above))


def _of_job(star: Path, depth: int = 3) -> list[Path]:
    """Where the particles of the job lie that a table stands beside, and those of theirs."""
    record = star.parent / "job.yaml"
    if depth == 0 or not record.is_file():
        return []
    try:
        told = yaml.safe_load(record.read_text("utf-8"))
        source = Path(told.get("directory") or ".") / told["input"]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, UnicodeDecodeError, OSError):
        return []
    here = [source.parent, Path(told["input"]).parent]  # The project may have moved.
    return [*here, *_of_job(source, depth - 1)]


def _is_of_the_folder(name: str) -> bool:
    """Whether a name is relative to its table's folder, not to a project as RELION's are."""
    parts = Path(name).parts
    return len(parts) < 2 or parts[0] == ".."


def resolve_stacks(star: Path, names: list[str], project: str | Path | None) -> list[Path]:
    """Find each stack, never by its base name alone.

    A relative name is looked for from `project`, then from the current directory, then from the
    ancestors of the STAR file's folder, nearest first, then from that folder; a name without
    folders, or that begins with ``..``, from that folder before its ancestors. A job's table has
    the names of the particles that the job was given: these are looked for from their folder, too.

    Raises
    ------
    MissingStacksError
        Saying how many stacks are missing, the first three, and the flag that mends it.
    """
    own, above = _places(star)
    of_job = _of_job(star)
    first = [Path()] if project is None else [Path(project), Path()]
    found: list[Path] = []
    missing: list[str] = []
    for name in names:
        of_folder = [*own, *of_job, *above]
        bases = first + (of_folder if _is_of_the_folder(name) else [*above, *own, *of_job])
        candidates = [Path(name)] if Path(name).is_absolute() else [b / name for b in bases]
        hit = next((c for c in candidates if os.path.isfile(c)), None)
        hit = hit or next((c for c in candidates if os.path.exists(c)), None)
        if hit is None:
            missing.append(name if len(name) < _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}...")
        else:
            found.append(hit)
    if missing:
        more = len(missing) - 3
        shown = ", ".join(missing[:3]) + (f" and {more} more" if more > 0 else "")
        raise MissingStacksError(
            f"{star} names {len(missing)} of {len(names)} stacks that do not exist: {shown}",
            "Run from the project folder of RELION or cryoSPARC, or give it with --project",
        )
    return found


def one_a_file(
    stacks: list[Path], stack_of: NDArray[np.int32]
) -> tuple[list[Path], NDArray[np.int32]]:
    """Stacks without those that are the same file as another, by link or by spelling."""
    files = [os.path.realpath(stack) for stack in stacks]
    first: dict[str, Path] = {}
    for file, stack in zip(files, stacks, strict=True):
        first.setdefault(file, stack)
    if len(first) == len(stacks):
        return stacks, stack_of
    place = {file: number for number, file in enumerate(first)}
    return list(first.values()), np.array([place[file] for file in files], np.int32)[stack_of]


def names_for_relion(names: pd.Series) -> pd.Series:
    """Names of images with the kind of the file behind a stack that is named as RELION's maps."""
    return names.str.replace(r"^(\d+@.+\.mrc)(?::mrcs?)?$", r"\1:mrcs", regex=True)


def bare_names(names: pd.Series) -> pd.Series:
    """Names of images without the kind of the file, which is no part of the image's name."""
    return names.str.replace(r":mrcs?$", "", regex=True)


class ImageNames(NamedTuple):
    """Where a table's images are.

    Attributes
    ----------
    stack_of, section : array of int32, shape (n,)
        Stack and section of each particle, both from 0.
    stacks : list of str
        Names of the stacks.
    whole : set of int
        Stacks that a row names without the number of an image, as a file that holds one.
    """

    stack_of: NDArray[np.int32]
    section: NDArray[np.int32]
    stacks: list[str]
    whole: set[int]


def parse_image_names(path: Path, table: TextTable) -> ImageNames:
    """What the names of a table's images say.

    Raises
    ------
    CryoreconError
        If an image has no name or is numbered 0.
    """
    section = np.empty(len(table), np.int32)
    stack_of = np.empty(len(table), np.int32)
    number_of: dict[str, int] = {}
    whole: set[int] = set()
    done = 0
    for names in table.text("rlnImageName"):
        # RELION takes `:mrcs` behind a name for the kind of the file.
        parts = names.str.extract(r"^(?:(\d+)@)?(.+?)(?::mrcs?)?$")
        here = slice(done, done + len(names))
        if parts[1].isna().any():
            raise CryoreconError(
                f"{path}, row {done + int(parts[1].isna().argmax()) + 1}: it names no image",
                "Correct rlnImageName in such rows, or remove them",
            )
        section[here] = pd.to_numeric(parts[0].fillna("1")).clip(upper=2**31 - 1) - 1
        if (section[here] < 0).any():
            row = int(np.flatnonzero(section[here] < 0)[0])
            raise CryoreconError(
                f"{path}, row {done + row + 1}: image number 0 in {names.iloc[row]}",
                "RELION counts images from 1; correct the image names",
            )
        codes, stacks = pd.factorize(parts[1])
        known = [number_of.setdefault(str(stack), len(number_of)) for stack in stacks]
        stack_of[here] = np.array(known, np.int32)[codes]
        whole.update(stack_of[here][parts[0].isna().to_numpy()].tolist())
        done += len(names)
    return ImageNames(stack_of, section, list(number_of), whole)


def find_images(
    path: Path, table: TextTable, project: str | Path | None
) -> tuple[NDArray[np.int32], NDArray[np.int32], list[Path], tuple[Header, ...]]:
    """Stack and section of each particle, the stacks, each once, and their headers.

    Raises
    ------
    CryoreconError
        If images cannot be found, or are not as the table says.
    """
    named = parse_image_names(path, table)
    resolved = resolve_stacks(path, named.stacks, project)
    stacks, stack_of = one_a_file(resolved, named.stack_of)
    headers = check_stacks(path, stacks, stack_of, named.section)
    for stack in (resolved[number] for number in named.whole):
        count = read_header(stack).shape[0]
        if count > 1:
            raise CryoreconError(
                f"{path} names {stack} without the number of an image, and it holds {count}",
                "Name each image as NUMBER@STACK; volumes and the tilt series of a particle are "
                "not read as images",
            )
    return stack_of, named.section, stacks, headers


def check_stacks(
    path: Path, stacks: list[Path], stack_of: NDArray[np.int32], section: NDArray[np.int32]
) -> tuple[Header, ...]:
    """Read the headers of all stacks and compare them with what is asked of them.

    Returns
    -------
    tuple of Header
        Of square images of one size.

    Raises
    ------
    CryoreconError
        If a section does not exist, images are not square, or boxes differ.
    """
    boxes: dict[tuple[int, int], Path] = {}
    headers = []
    for stack in stacks:
        try:
            headers.append(read_header(stack))
        except CryoreconError as error:
            problem = f"{path} names a stack that cannot be read: {error.problem}"
            raise CryoreconError(problem, error.remedy) from error
        boxes.setdefault(headers[-1].shape[1:], stack)
    counts = np.array([header.shape[0] for header in headers], np.int64)
    beyond = np.flatnonzero(section >= counts[stack_of])
    if len(beyond):
        row = int(beyond[0])
        raise CryoreconError(
            f"{path}, row {row + 1}: asks for image {section[row] + 1} of {stacks[stack_of[row]]}, "
            f"which holds {counts[stack_of[row]]} ({len(beyond)} such rows)",
            "The STAR file and the stack do not belong together; check both",
        )
    if len(boxes) > 1:
        (a, first), (b, second) = list(boxes.items())[:2]
        raise CryoreconError(
            f"{path} mixes box sizes: {first} has {a[1]} x {a[0]} px "
            f"and {second} {b[1]} x {b[0]} px",
            "Extract all particles with one box size",
        )
    (ny, nx), stack = next(iter(boxes.items()))
    if ny != nx:
        raise CryoreconError(f"{stack} holds {nx} x {ny} px images", "Particles must be square")
    return tuple(headers)
