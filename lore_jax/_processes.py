"""What the processes of a mesh tell one another: bytes, arrays, and what went wrong.

Every function here is called by all processes, in the same order and from one thread.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

T = TypeVar("T")

_PIECE = 1 << 28  # bytes that all processes together send at a time
_LEAST = 1 << 10


def gather_bytes(data: bytes) -> list[bytes]:
    """The bytes of every process, in order."""
    size = np.array(divmod(len(data), _PIECE), np.int32)
    sizes = np.asarray(multihost_utils.process_allgather(size)).reshape(-1, 2)
    lengths = [int(whole) * _PIECE + int(rest) for whole, rest in sizes]
    out = [bytearray() for _ in lengths]
    most = max(_LEAST, _PIECE // len(lengths))  # of each; all of them are received
    for start in range(0, max(lengths), most):
        longest = min(most, max(lengths) - start)
        # Few lengths, so that few programs are compiled.
        piece = np.zeros(max(_LEAST, 1 << (longest - 1).bit_length()), np.uint8)
        mine = np.frombuffer(data[start : start + most], np.uint8)
        piece[: len(mine)] = mine
        pieces = np.asarray(multihost_utils.process_allgather(piece))
        for whole, length, one in zip(out, lengths, pieces, strict=True):
            whole += one[: max(0, min(most, length - start))].tobytes()
    return [bytes(x) for x in out]


def gather_arrays(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Named arrays of every process, of any shape, in order."""
    kinds = [
        (name, x.dtype.name if x.dtype.kind == "V" else x.dtype.str, x.shape)
        for name, x in arrays.items()
    ]
    head = json.dumps(kinds).encode()
    parts = [len(head).to_bytes(8, "little"), head]
    parts += [np.asarray(x, order="C").tobytes() for x in arrays.values()]
    return [_read_arrays(memoryview(x)) for x in gather_bytes(b"".join(parts))]


def _read_arrays(data: memoryview) -> dict[str, np.ndarray]:
    start = 8 + int.from_bytes(data[:8], "little")
    out = {}
    for name, kind, shape in json.loads(bytes(data[8:start])):
        dtype, size = np.dtype(kind), math.prod(shape)
        array = np.frombuffer(data[start : start + size * dtype.itemsize], dtype)
        out[name] = array.reshape(shape)
        start += size * dtype.itemsize
    return out


def of_first(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Named arrays of process 0, on all: rounding may differ between processors."""
    return gather_arrays(arrays if here() == 0 else {})[0]


def add(array: Any) -> np.ndarray:
    """The sum of an array over the processes, in their order, in float64."""
    parts = gather_arrays({"x": np.asarray(array, np.float64)})
    return np.sum([part["x"] for part in parts], axis=0)


def together(check: Callable[[], T]) -> T:
    """`check` on every process; if one of them refuses, all do.

    Raises:
      ValueError: naming the process and what it said.
    """
    value, said, cause = None, "", None
    try:
        value = check()
    except Exception as error:
        said, cause = str(error) or type(error).__name__, error
    for process, text in enumerate(gather_bytes(said.encode())):
        if text:
            raise ValueError(f"process {process}: {text.decode()}") from cause
    return value  # pyright: ignore[reportReturnType]


def end_together(function: Callable[[], Any]) -> None:
    """`function` on every process; where it raises on one, the others end too.

    Raises:
      BaseException: what `function` raised here.
      RuntimeError: naming the process where it raised.
    """
    said, cause = "", None
    try:
        function()
    except BaseException as error:
        said, cause = f"{type(error).__name__}: {error}", error
    for process, text in enumerate(gather_bytes(said.encode())):
        if text:
            raise cause or RuntimeError(f"process {process} ended: {text.decode()}")


def agree(**values: Any) -> None:
    """Raises `ValueError` on every process where one has another value; by repr."""
    for name, value in values.items():
        found = [x.decode() for x in gather_bytes(repr(value).encode())]
        other = next((i for i, x in enumerate(found) if x != found[0]), None)
        if other is not None:
            raise ValueError(
                f"{name} must be the same on every process: process 0 has "
                f"{found[0]:.200}, process {other} has {found[other]:.200}"
            )


def spans(mesh: Any) -> bool:
    """Whether a mesh has devices of other processes.

    Raises:
      ValueError: it has those of some of the processes only; the others would wait.
    """
    if not isinstance(mesh, Mesh):
        return False
    found = {device.process_index for device in mesh.devices.flat}
    if found != {jax.process_index()} and len(found) < jax.process_count():
        raise ValueError(
            f"mesh must have devices of this process alone, or of all "
            f"{jax.process_count()} processes; it has those of {sorted(found)}"
        )
    return found != {jax.process_index()}


def here() -> int:
    """The number of this process."""
    return jax.process_index()
