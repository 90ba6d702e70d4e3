"""Messages of the policy protocol: msgpack, with numpy arrays encoded as openpi's clients and servers do.

An array is a map with the keys (bytes) `__ndarray__`, `data`, `dtype`, `shape`; a numpy scalar with `__npgeneric__`,
`data`, `dtype`. Only plain values come out of `unpack`, whatever came in: nothing is unpickled, nothing is called.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import msgpack
import numpy as np

MAX_BYTES = 32 * 2**20
MAX_ITEMS = 1 << 16  # of all lists and maps of a message together: a byte can ask for an object of a hundred bytes
MAX_DEPTH = 8
_MAX_LENGTH = 4096  # of one list or map
_MAX_DIMS = 8
_DTYPE = re.compile(r"[<>|][biufSU][1-9][0-9]{0,4}")
_PLAIN = (str, bytes, int, float, bool, type(None), np.ndarray, np.generic)


class MessageError(ValueError):
    """A message that is not one of the protocol's, or that is beyond its limits."""


def pack(obj: Any) -> bytes:
    """Plain values, lists, maps, numpy arrays and scalars as msgpack, byte for byte as openpi writes them.

    Raises MessageError for what has no place in a message, such as arrays of objects, structures or complex numbers.
    """
    try:
        return msgpack.packb(obj, default=_encode)  # pyright: ignore[reportReturnType]
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise MessageError(f"cannot be sent: {error}") from error


def unpack(data: bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """What `pack` has written; lists for tuples, arrays read-only.

    Raises MessageError, and nothing else, for any other bytes: broken, longer than `max_bytes`, deeper than `MAX_DEPTH`
    or of more than `MAX_ITEMS` values.
    """
    if len(data) > max_bytes:
        raise MessageError(f"the message has {len(data)} bytes, at most {max_bytes} are taken")
    counter = _Counter()
    try:
        obj = msgpack.unpackb(
            data,
            object_hook=counter.map,
            list_hook=counter.list,
            max_array_len=_MAX_LENGTH,
            max_map_len=_MAX_LENGTH,
            max_ext_len=0,
        )
    except MessageError:
        raise
    except Exception as error:  # msgpack and numpy raise some ten types; a message is broken for all of them
        raise MessageError(f"not a message: {type(error).__name__} {error}"[:300]) from error
    _check(obj, 0)
    return obj


def _encode(obj: Any) -> Any:
    if not isinstance(obj, np.ndarray | np.generic):
        raise TypeError(f"{type(obj).__name__} is no plain value, list, map or numpy array")
    if obj.dtype.kind not in "biufSU":
        raise TypeError(f"arrays of dtype {obj.dtype} are not sent; convert them to numbers")
    if isinstance(obj, np.ndarray):
        # pictures are not copied on their way into the message
        data = obj.data if obj.flags.c_contiguous and obj.dtype.kind in "biuf" else obj.tobytes()
        return {b"__ndarray__": True, b"data": data, b"dtype": obj.dtype.str, b"shape": obj.shape}
    return {b"__npgeneric__": True, b"data": obj.item(), b"dtype": obj.dtype.str}


class _Counter:
    """The hooks of the decoder, called from the inside out; it gives up before memory is spent."""

    def __init__(self) -> None:
        self.items = 0

    def _count(self, container: Any) -> None:
        self.items += 1 + len(container)
        if self.items > MAX_ITEMS:
            raise MessageError(f"the message has more than {MAX_ITEMS} values")

    def list(self, values: Any) -> Any:
        self._count(values)
        return values

    def map(self, values: dict[Any, Any]) -> Any:
        self._count(values)
        if b"__ndarray__" in values:
            return _array(values)
        if b"__npgeneric__" in values:
            return _dtype(values).type(values[b"data"])
        return values


def _dtype(values: dict[Any, Any]) -> np.dtype[Any]:
    name = values.get(b"dtype")
    if not isinstance(name, str):
        raise MessageError(f"dtype {name!r:.40} is not taken; text is, as '<f4'")
    return _dtype_of(name)


@lru_cache(maxsize=64)
def _dtype_of(name: str) -> np.dtype[Any]:
    if not _DTYPE.fullmatch(name):
        raise MessageError(f"dtype {name!r:.40} is not taken; bool, integers, floats and text are, as '<f4'")
    return np.dtype(name)


def _array(values: dict[Any, Any]) -> np.ndarray:
    dtype, shape, data = _dtype(values), values.get(b"shape"), values.get(b"data")
    if not isinstance(data, bytes) or not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        raise MessageError(f"an array needs bytes in data and at most {_MAX_DIMS} sizes in shape")
    size = dtype.itemsize
    for n in shape:
        if type(n) is not int or n < 0:
            raise MessageError(f"an array's shape is {shape!r:.80}, expected sizes >= 0")
        size *= n
    if size != len(data):
        raise MessageError(f"an array of shape {shape!r:.80} and dtype {dtype.str} has {size} bytes, got {len(data)}")
    return np.ndarray(shape, dtype, buffer=data)


def _check(obj: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise MessageError(f"the message is nested deeper than {MAX_DEPTH}")
    if isinstance(obj, dict):
        for value in obj.values():
            _check(value, depth + 1)
    elif isinstance(obj, list):
        for value in obj:
            _check(value, depth + 1)
    elif not isinstance(obj, _PLAIN):
        raise MessageError(f"a {type(obj).__name__} has no place in a message")


__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_ITEMS", "MessageError", "pack", "unpack"]
