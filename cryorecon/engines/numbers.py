"""Numbers of settings: those that make no sense are refused before anything begins."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

# What its limits are, in angstrom, the images tell.
_WITH_IMAGES = ("offset_range", "farthest_offset")


def refuse_senseless(config: Any, positive: str, shares: str) -> None:
    """Refuse a config whose numbers are negative, or 0 where they must not be.

    Parameters
    ----------
    config : dataclass
        Words, flags and configs in it are left to others.
    positive, shares : str
        Names of fields that must be more than 0, as all numbers of tuples must, and of those that
        must be less than 1.

    Raises
    ------
    ValueError
        Naming the field.
    """
    for name in (f.name for f in fields(config) if f.name not in _WITH_IMAGES):
        value = getattr(config, name)
        if isinstance(value, tuple):
            if not value or min(value) <= 0:
                raise ValueError(f"{name} needs positive numbers")
        elif isinstance(value, (int, float)):
            if value < 0:
                raise ValueError(f"{name} must not be negative")
            if value == 0 and name in positive.split():
                raise ValueError(f"{name} must be positive")
            if value >= 1 and name in shares.split():
                raise ValueError(f"{name} must be less than 1")
