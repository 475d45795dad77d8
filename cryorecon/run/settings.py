"""Engine settings from a YAML file and from ``key=value`` pairs."""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from torch import Tensor

from cryorecon.errors import CryoreconError, require_file
from cryorecon.physics.symmetry import symmetry_group

# Lists that hold each other, in eight lines of YAML, have more words than fit anywhere.
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel = 2
# Settings take a few lines; yaml takes long over megabytes.
_LARGEST_FILE = 2**16
Settings = TypeVar("Settings")


def point_group(symmetry: str) -> Tensor:
    """Rotations of a point group, shape (g, 3, 3), float64.

    Raises
    ------
    CryoreconError
        If there is none of this name.
    """
    try:
        return symmetry_group(symmetry)
    except ValueError as error:
        raise CryoreconError(
            f"--symmetry {symmetry} is unknown",
            "Give C1, Cn, Dn, T, O, I or I1 to I4, such as C4 or D2",
        ) from error


def with_settings(config: Settings, path: Path | None, pairs: list[str]) -> Settings:
    """A frozen config with some fields replaced: first the file's, then the pairs'.

    Nested configs are reached with dots: ``fit.n_steps=8``.

    Raises
    ------
    CryoreconError
        For an unknown key (with the nearest known one) or a value of the wrong kind.
    """
    if path is not None:
        for key, value in _of_file(path).items():
            try:
                config = _replaced(config, str(key).split("."), value, str(key))
            except CryoreconError as error:
                raise CryoreconError(f"{path}: {error.problem}", error.remedy) from error
    updates: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise CryoreconError(f"--set {pair} has no value", "Write --set key=value")
        try:
            updates[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise CryoreconError(f"--set {pair} is not valid YAML", "Correct the value") from error
    for key, value in updates.items():
        config = _replaced(config, str(key).split("."), value, str(key))
    return config


def named(path: Path | None, pairs: list[str]) -> set[str]:
    """Which settings a file and pairs name, as :func:`with_settings` reads them."""
    in_file = set() if path is None else {str(key) for key in _of_file(path)}
    return in_file | {pair.partition("=")[0].strip() for pair in pairs}


def _of_file(path: Path) -> dict[Any, Any]:
    require_file(path, "YAML file")
    no_yaml = CryoreconError(f"{path} is not valid YAML", "Write lines of key: value")
    if path.stat().st_size > _LARGEST_FILE:
        raise no_yaml
    try:
        loaded = yaml.safe_load(path.read_text("utf-8-sig")) or {}
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, KeyError, OSError) as error:
        # Dates that do not exist, numbers of thousands of digits, lists as keys.
        raise no_yaml from error
    if not isinstance(loaded, dict):
        raise CryoreconError(f"{path} is not a list of settings", "Write lines of key: value")
    return loaded


def _replaced(config: Settings, path: list[str], value: Any, full_key: str) -> Settings:
    if not dataclasses.is_dataclass(config):
        raise CryoreconError(f"Unknown setting {full_key}", "It has no parts: leave out the dot")
    fields = {f.name for f in dataclasses.fields(config)}
    name = path[0]
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"Did you mean {near[0]}" if near else f"Known settings: {', '.join(sorted(fields))}"
        raise CryoreconError(f"Unknown setting {full_key}", hint)
    current = getattr(config, name)
    if len(path) > 1:
        new = _replaced(current, path[1:], value, full_key)
    else:
        choices = get_args(get_type_hints(type(config))[name])
        new = _converted(current, value, full_key, choices)
    try:
        return dataclasses.replace(config, **{name: new})  # type: ignore[type-var]
    except ValueError as error:
        told = str(error).splitlines()[0] if str(error) else "it does not fit the others"
        raise CryoreconError(
            f"Setting {full_key} cannot be {_SHOWN.repr(value)}: {told}", "Correct the setting"
        ) from error


def _converted(current: Any, value: Any, key: str, choices: tuple[Any, ...] = ()) -> Any:
    """A value of the kind of the current one; of words, one of the choices."""
    try:
        if isinstance(current, tuple) and isinstance(value, (list, tuple)):
            return tuple(type(current[0])(_scalar(v)) for v in value)
        if isinstance(current, str) and value in choices:
            return value
        if isinstance(current, bool) == isinstance(value, bool):
            exact = _number(current, value)
            if exact is not None:
                return exact
    except (TypeError, ValueError, OverflowError):
        pass
    words = [c for c in choices if isinstance(c, str)] if isinstance(current, str) else []
    kind = "a list" if isinstance(current, tuple) else type(current).__name__
    remedy = f"Give one of {', '.join(words)}" if words else f"Give {kind}, such as {current!r}"
    raise CryoreconError(f"Setting {key} cannot be {_SHOWN.repr(value)}", remedy)


def _scalar(value: Any) -> Any:
    """What is no list of lists: those may be endless."""
    if isinstance(value, (list, tuple, dict, set)):
        raise TypeError
    return value


def _number(current: Any, value: Any) -> Any:
    """The value as a number of the current one's kind; None if it is none."""
    if not isinstance(current, (int, float)) or not isinstance(value, (int, float, str)):
        return None
    # YAML takes 3e-4 for a word.
    number = float(value) if isinstance(value, str) else value
    exact = type(current)(number)
    return (
        exact if math.isfinite(number) and (isinstance(current, float) or exact == number) else None
    )
