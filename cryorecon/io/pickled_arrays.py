"""Arrays in pickles of other programs, without running what such a file holds.

A pickle is a program for a small stack machine, and may call any function there is. Here only the
instructions are followed that put together numbers, text and tuples; numpy's functions are known
by name, never called; and the arrays are made from the shape, type and bytes that the file states.
"""

from __future__ import annotations

import math
import pickletools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryorecon.errors import CryoreconError, require_file

# A pickle of two arrays takes less than a hundred.
_MOST_INSTRUCTIONS = 10_000
_MOST_DIMENSIONS = 4
_REMEDY = "Give poses.pkl or ctf.pkl as cryoDRGN writes them; nothing else in a pickle is opened"

# numpy 1 and numpy 2.
_RECONSTRUCT = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
_FROM_BUFFER = {f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")}
_BYTES = {"__builtin__.bytes", "builtins.bytes"}
_ENCODE = {"_codecs.encode"}
_DTYPE, _NDARRAY = {"numpy.dtype"}, {"numpy.ndarray"}
_KNOWN = _RECONSTRUCT | _FROM_BUFFER | _BYTES | _ENCODE | _DTYPE | _NDARRAY

_PLAIN = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_PLAIN |= {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES"}
_PLAIN |= {"BINBYTES8", "BYTEARRAY8"}
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _RefusedError(Exception):
    """What the file asks for and does not get."""


@dataclass
class _Function:
    name: str


@dataclass
class _Kind:
    """An element type: code such as f8, then byte order."""

    code: str
    order: str = "<"


@dataclass
class _Array:
    shape: tuple[int, ...] = ()
    kind: _Kind | None = None
    by_columns: bool = False
    data: bytes = b""
    axes: tuple[int, ...] | None = None


def read_pickled_arrays(path: str | Path, what: str) -> tuple[NDArray[Any], ...]:
    """Arrays of numbers in a pickle: one, or those of a tuple or a list.

    Written by numpy 1 or 2, pickle protocols 2 to 5. Memory stays within a few times the file's
    size, whatever the file says.

    Parameters
    ----------
    what : str
        Kind of file, for messages.

    Raises
    ------
    CryoreconError
        If the file is damaged, or asks for anything but arrays of real numbers: by name.
    """
    path = require_file(path, what)
    try:
        raw = path.read_bytes()
        found = _Machine(len(raw)).run(raw)
        items = found if isinstance(found, (tuple, list)) else [found]
        return tuple(_numbers(item) for item in items)
    except _RefusedError as refused:
        raise CryoreconError(f"{path} holds {refused}, not just arrays", _REMEDY) from refused
    except OSError as error:
        raise CryoreconError(f"{path} cannot be read: {error.strerror}", "Check it") from error
    except Exception as error:
        # Damage shows as exceptions of many kinds: a stack too short, text that is none.
        raise CryoreconError(f"{path} is no undamaged pickle of arrays", _REMEDY) from error


class _Machine:
    """The stack machine, as far as arrays need it."""

    def __init__(self, size: int) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._left = size

    def run(self, raw: bytes) -> Any:
        """Follow the instructions; what is left at the end."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
            if count > _MOST_INSTRUCTIONS:
                raise _RefusedError("too many parts")
            if opcode.name == "STOP":
                break
            self._step(opcode.name, argument)
        (found,) = self._stack
        return found

    def _step(self, name: str, argument: Any) -> None:
        stack, memo = self._stack, self._memo
        if name in _PLAIN:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self._group(len(stack) - _TUPLES[name])
        elif name == "TUPLE":
            self._group(self._marks.pop())
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            self._step_object(name, argument)

    def _step_object(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name == "EMPTY_LIST":
            stack.append([])
        elif name in ("APPEND", "APPENDS"):
            at = len(stack) - 1 if name == "APPEND" else self._marks.pop()
            items = stack[at:]
            del stack[at:]
            if not isinstance(stack[-1], list):
                raise _RefusedError("a list that is none")
            stack[-1].extend(items)
        elif name in ("GLOBAL", "INST"):
            stack.append(_function(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            of, what = stack.pop(-2), stack.pop()
            stack.append(_function(of, what))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack[-1] = self._called(stack[-1], arguments)
        elif name == "BUILD":
            state = stack.pop()
            _fill(stack[-1], state)
        elif name not in ("PROTO", "FRAME"):
            raise _RefusedError(f"the pickle instruction {name}")

    def _group(self, at: int) -> None:
        if at < 0:
            raise _RefusedError("a tuple of nothing")
        items = tuple(self._stack[at:])
        del self._stack[at:]
        self._stack.append(items)

    def _called(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, _Function) else ""
        if name in _RECONSTRUCT:
            return _Array()
        if name in _DTYPE:
            return _Kind(str(arguments[0]))
        if name in _FROM_BUFFER:
            # With axes, the shape is that of the bytes, and the axes are exchanged afterwards.
            data, kind, shape, order, *axes = arguments
            return _Array(shape, kind, order == "F", data, axes[0] if axes else None)
        if name in _BYTES and arguments == ():
            return b""
        if name in _ENCODE and arguments[1:] == ("latin1",):
            # One text may be asked for many times.
            self._left -= len(arguments[0])
            if self._left < 0:
                raise _RefusedError("more bytes than the file has")
            return arguments[0].encode("latin1")
        raise _RefusedError(f"a call of {name or 'something unknown'}")


def _function(module: str, name: str) -> _Function:
    full = f"{module}.{name}"
    if full not in _KNOWN:
        shown = full if full.isprintable() and len(full) < 100 else "something unknown"
        raise _RefusedError(shown)
    return _Function(full)


def _fill(target: Any, state: Any) -> None:
    if isinstance(target, _Array):
        _, target.shape, target.kind, target.by_columns, target.data = state
    elif isinstance(target, _Kind):
        _, order, parts, names, *_ = state
        if parts is not None or names is not None:
            raise _RefusedError("an array of records")
        target.order = order
    else:
        raise _RefusedError("an object")


def _numbers(item: Any) -> NDArray[Any]:
    """The array that was described, in this machine's byte order."""
    if not isinstance(item, _Array) or not isinstance(item.kind, _Kind):
        raise _RefusedError("something else")
    if not re.fullmatch(r"f[248]|[iu][1248]", item.kind.code):
        raise _RefusedError("an array of something other than numbers")
    dtype = np.dtype(item.kind.code).newbyteorder(">" if item.kind.order == ">" else "<")
    shape = item.shape
    if not isinstance(shape, tuple) or len(shape) > _MOST_DIMENSIONS:
        raise _RefusedError("an array of a strange shape")
    if not isinstance(item.data, (bytes, bytearray)):
        raise _RefusedError("an array without bytes")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(item.data):
        raise _RefusedError(f"an array of another size than its {len(item.data)} bytes")
    values = np.frombuffer(item.data, dtype).reshape(shape, order="F" if item.by_columns else "C")
    if item.axes is not None:
        values = values.transpose(item.axes)
    return values.astype(dtype.newbyteorder("="), order="C")
