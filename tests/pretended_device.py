"""A device that is none: tensors say that they lie on it, and are computed on the CPU.

Device "meta" plays the part, so that torch itself has nothing to refuse and whole jobs run with
real numbers. As on a GPU, tensors of both sides must not meet in one operation but in copies; a
number (a tensor without axes) of the CPU may go into arithmetic with tensors of the device.
Stricter than on a GPU, indices must lie where the tensor lies: torch would move them by itself,
and wait.

The program waits for a GPU when it copies from it, or to it but from page-locked memory, and when
an operation tells how large its result is. Processes exchange what lies on the device, too.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("meta")
# What a GPU's results must be waited for, besides copies to the CPU.
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "unique_dim"}
_WAITS |= {"_unique2", "unique_consecutive", "linalg_matrix_exp", "repeat_interleave"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}
_SOURCE = str(Path(__file__).parents[1] / "cryorecon")


class OnDevice(torch.Tensor):
    """A tensor of the CPU that claims to be on the device."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> OnDevice:
        strides, offset = real.stride(), real.storage_offset()
        made = torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=strides, storage_offset=offset, dtype=real.dtype, device=DEVICE
        )
        made.inner = real
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})

    def tolist(self):
        _wait()
        return self.inner.tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    def new_tensor(self, data, **kwargs):
        """Torch would ask the real device "meta", which keeps no numbers."""
        _wait()
        return OnDevice(self.inner.new_tensor(data, **kwargs))

    def __repr__(self):
        return f"OnDevice({self.inner})"

    def __reduce_ex__(self, protocol):
        raise RuntimeError("a tensor of the device must not be written")


class _Everything(TorchDispatchMode):
    """What makes tensors is seen too, not only what takes them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


_waits: Counter[str] = Counter()
# Operations on the device, by name, but for those that only look at memory in another way.
operations: Counter[str] = Counter()
_NONE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach"}


@contextmanager
def pretended_device() -> Iterator[Counter[str]]:
    """Let ``device="meta"`` compute; gives how often each line of the program waits for it."""
    _waits.clear()
    operations.clear()
    with _Everything():
        yield _waits


def _wait() -> None:
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_SOURCE):
        frame = frame.f_back
    # What is taken to a GPU is page-locked first, see there.
    if frame is not None and frame.f_code.co_name != "taken_to":
        name = frame.f_code.co_filename[len(_SOURCE) + 1 :]
        _waits[f"{name}:{frame.f_lineno} {frame.f_code.co_name}"] += 1


def _refuse_lacking(func, tensors) -> None:
    """What the CPU can do and a GPU cannot."""
    whole = any(not (t.is_floating_point() or t.is_complex()) for t in tensors)
    if whole and func.overloadpacket.__name__ in _PRODUCTS:
        raise RuntimeError(f"{func}: a GPU has no products of matrices of whole numbers")


def _refuse_mix(func, tensors) -> None:
    numbers = torch.Tag.pointwise in func.tags or func.overloadpacket.__name__ in ("fill_", "where")
    for tensor in tensors:
        if not isinstance(tensor, OnDevice) and not (numbers and tensor.dim() == 0):
            raise RuntimeError(f"{func}: a tensor of the CPU among those of the device")


def _each(value, work):
    """The same lists, tuples and dicts with work done on their tensors."""
    if isinstance(value, torch.Tensor):
        return work(value)
    if isinstance(value, dict):
        return {key: _each(item, work) for key, item in value.items()}
    return type(value)(_each(v, work) for v in value) if type(value) in (list, tuple) else value


def _inner(tensor):
    return tensor.inner if isinstance(tensor, OnDevice) else tensor


def _outer(tensor):
    # A tensor that is only marked as conjugated would lose the mark.
    plain = isinstance(tensor, OnDevice)
    return tensor if plain else OnDevice(tensor.resolve_conj().resolve_neg())


def _compute(func, args, kwargs):
    name, tensors = func.overloadpacket.__name__, []
    _each((args, kwargs), tensors.append)
    on = before = any(isinstance(t, OnDevice) for t in tensors)
    if kwargs.get("device") is not None:
        on = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif name == "copy_":
        on = isinstance(args[0], OnDevice)
    elif on:
        _refuse_mix(func, tensors)
        _refuse_lacking(func, tensors)
    masks = name == "index" and any(t.dtype == torch.bool for t in tensors[1:])
    copies = on and name in ("_to_copy", "copy_")
    taken = copies and not all(isinstance(t, OnDevice) for t in tensors)
    if taken or (before and (not on or name in _WAITS or masks)):
        _wait()
    result = (
        func(*_each(args, _inner), **_each(kwargs, _inner)) if before else func(*args, **kwargs)
    )
    if name == "copy_":
        return args[0]
    if on and not func.is_view and name not in _NONE:
        operations[name] += 1
    if not on or func.namespace == "c10d":  # What an exchange returns is never looked at.
        return result
    return return_and_correct_aliasing(func, args, kwargs, _each(result, _outer))
