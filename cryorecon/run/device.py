"""Where a job computes."""

from __future__ import annotations

import torch

from cryorecon.errors import CryoreconError


def usable_device(name: str) -> str:
    """A torch device by name; auto is a GPU where there is one.

    Raises
    ------
    CryoreconError
        If it cannot be used.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        remedy = "Give --device cpu"
        if name.startswith("cuda"):
            remedy += ", or use a machine with a GPU and a torch that is built for it"
        reason = str(error).splitlines()[0]
        raise CryoreconError(f"--device {name} cannot be used: {reason}", remedy) from error
    return name


def device_text(name: str) -> str:
    """A device with the name of its GPU."""
    device = torch.device(name)
    if device.type != "cuda":
        return name
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    return f"{name} ({torch.cuda.get_device_name(device)}, {memory:.0f} GB)"
