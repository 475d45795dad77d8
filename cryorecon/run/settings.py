"""Engine settings from a YAML file and from ``key=value`` pairs."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cryorecon.errors import CryoreconError, require_file

Settings = TypeVar("Settings")


def with_settings(config: Settings, path: Path | None, pairs: list[str]) -> Settings:
    """A frozen config with some fields replaced: first the file's, then the pairs'.

    Nested configs are reached with dots: ``fit.n_steps=8``.

    Raises
    ------
    CryoreconError
        For an unknown key (with the nearest known one) or a value of the wrong kind.
    """
    updates: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(require_file(path, "YAML file").read_text("utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CryoreconError(
                f"{path} is not valid YAML", "Write lines of key: value"
            ) from error
        if not isinstance(loaded, dict):
            raise CryoreconError(f"{path} is not a list of settings", "Write lines of key: value")
        updates.update(loaded)
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise CryoreconError(f"--set {pair} has no value", "Write --set key=value")
        updates[key.strip()] = yaml.safe_load(text)
    for key, value in updates.items():
        config = _replaced(config, key.split("."), value, key)
    return config


def _replaced(config: Settings, path: list[str], value: Any, full_key: str) -> Settings:
    fields = {f.name for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    name = path[0]
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"Did you mean {near[0]}" if near else f"Known settings: {', '.join(sorted(fields))}"
        raise CryoreconError(f"Unknown setting {full_key}", hint)
    current = getattr(config, name)
    if len(path) > 1:
        new = _replaced(current, path[1:], value, full_key)
    else:
        new = _converted(current, value, full_key)
    try:
        return dataclasses.replace(config, **{name: new})  # type: ignore[type-var]
    except ValueError as error:
        raise CryoreconError(
            f"Setting {full_key} cannot be {value!r}: {error}", "Correct it"
        ) from (error)


def _converted(current: Any, value: Any, key: str) -> Any:
    if isinstance(current, tuple) and isinstance(value, (list, tuple)):
        return tuple(type(current[0])(v) for v in value)
    numeric = isinstance(value, (int, float)) and isinstance(current, (int, float))
    if numeric and isinstance(current, bool) == isinstance(value, bool):
        exact = type(current)(value)
        if isinstance(current, float) or exact == value:
            return exact
    kind = "a list" if isinstance(current, tuple) else type(current).__name__
    raise CryoreconError(f"Setting {key} cannot be {value!r}", f"Give {kind}, such as {current!r}")
