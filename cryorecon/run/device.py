"""Where a job computes."""

from __future__ import annotations

import hashlib
import socket

import torch

from cryorecon.errors import CryoreconError
from cryorecon.ranks import Ranks, own_gpu, wanted


def usable_device(name: str) -> str:
    """A torch device by name; auto is a GPU where there is one that can be used.

    Raises
    ------
    CryoreconError
        If it cannot be used.
    """
    if name == "auto":
        return _gpu_or_cpu()
    try:
        # Memory alone is given by GPUs that torch was not built for, too; others lack precision.
        torch.ones(1, dtype=torch.float64, device=own_gpu(name)).add_(1).tolist()
    except (RuntimeError, AssertionError, TypeError) as error:
        remedy = "Give --device cpu"
        if name.startswith("cuda"):
            remedy += ", or use a machine with a GPU and a torch that is built for it"
        reason = str(error).splitlines()[0]
        raise CryoreconError(f"--device {name} cannot be used: {reason}", remedy) from error
    _full_precision(name)
    return name


def _gpu_or_cpu() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    try:
        return usable_device("cuda")
    except CryoreconError:
        if wanted() > 1:  # All must compute on the same kind.
            raise
        return "cpu"


def _full_precision(name: str) -> None:
    """Single precision: containers may allow products of ten bits, which tell no poses.

    In convolutions, of encoders, torch allows them by itself.
    """
    if name.startswith("cuda"):
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False


def own_device(name: str, ranks: Ranks) -> str:
    """Where this process computes: each of several on a GPU of its own.

    Raises
    ------
    CryoreconError
        If it cannot be used: a job may go on on another machine. If processes share a GPU, which
        the library that adds up their sums refuses.
    """
    device = usable_device(ranks.device(name))
    if device.startswith("cuda") and ranks.count > 1:
        torch.cuda.set_device(device)
        _refuse_shared(f"{socket.gethostname()} {_identity(device)}", ranks)
    return device


def _identity(device: str) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _refuse_shared(gpu: str, ranks: Ranks) -> None:
    number = int.from_bytes(hashlib.sha256(gpu.encode()).digest()[:7], "big")
    everyones = ranks.everyones(torch.tensor([number]), [1] * ranks.count)
    gpus = len(everyones.unique())
    if gpus < ranks.count:
        raise CryoreconError(
            f"{ranks.count} processes have {gpus} GPU{'s' * (gpus > 1)} between them",
            "Start no more processes on a machine than it has GPUs, see torchrun's "
            "--nproc-per-node",
        )


def device_text(name: str) -> str:
    """A device with the name of its GPU."""
    device = torch.device(name)
    if device.type != "cuda":
        return name
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    return f"{name} ({torch.cuda.get_device_name(device)}, {memory:.0f} GB)"
