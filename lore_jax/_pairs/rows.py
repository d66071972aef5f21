"""Arrays of all users that are written chunk by chunk.

On a CPU they are NumPy arrays. On an accelerator they are device arrays: the programs
of all chunks are queued without waiting, and no result is copied to the host.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax._backend import for_each, tuning
from lore_jax._pairs.pack import Chunk, ladder

_LEAST = 1024  # rows on a device; their number doubles, so that few programs serve all


class HostRows:
    """Arrays [n, …] on the host."""

    def __init__(self, size: int, shapes: Sequence[tuple]):
        """Rows of (shape, dtype) each, not yet filled in."""
        self._arrays = [np.empty((size, *shape), kind) for shape, kind in shapes]

    def each(self, function: Callable[[Chunk], None], chunks: Iterable[Chunk]) -> None:
        """`function` of every chunk, on threads."""
        for_each(function, chunks)

    def put(self, chunk: Chunk, values: Sequence[Any], add: tuple[int, ...] = ()):
        """The rows of a chunk's users; those arrays of `add` are added to."""
        values = jax.device_get(list(values))
        for i, (target, new) in enumerate(zip(self._arrays, values, strict=True)):
            mine = new[: len(chunk.users)]
            target[chunk.place] = target[chunk.place] + mine if i in add else mine

    def array(self, i: int) -> np.ndarray:
        """One of them."""
        return self._arrays[i]

    def arrays(self) -> list[np.ndarray]:
        """All of them."""
        return self._arrays


class DeviceRows:
    """Arrays [n, …] where `like` is, one device."""

    def __init__(self, size: int, shapes: Sequence[tuple], like: jax.Array):
        """Rows of (shape, dtype) each, not yet filled in."""
        self.size, (self._device,) = size, like.devices()
        self._capacity = ladder([_LEAST], 2, size)[-1]
        sizes = tuple(((self._capacity, *shape), np.dtype(k)) for shape, k in shapes)
        with jax.default_device(self._device):
            self._arrays = _empty(sizes)

    def each(self, function: Callable[[Chunk], None], chunks: Iterable[Chunk]) -> None:
        """`function` of every chunk; the device queues its programs."""
        for chunk in chunks:
            function(chunk)

    def put(self, chunk: Chunk, values: Sequence[Any], add: tuple[int, ...] = ()):
        """The rows of a chunk's users; those arrays of `add` are added to."""
        values = [
            x if self._device in x.devices() else np.asarray(x).astype(old.dtype)
            for x, old in zip(values, self._arrays, strict=True)
        ]
        values = jax.device_put(values, self._device)
        self._arrays = _set(self._arrays, _place(chunk, self._capacity), values, add)

    def array(self, i: int) -> jax.Array:
        """One of them."""
        return self._arrays[i][: self.size]

    def arrays(self) -> list[jax.Array]:
        """All of them."""
        return list(_cut(self._arrays, self.size))


Rows = HostRows | DeviceRows


def make_rows(size: int, shapes: Sequence[tuple], like: Any) -> Rows:
    """Rows where results belong that are made from `like`, rewards of a table."""
    if stays_on_device(like):
        return DeviceRows(size, shapes, like)
    return HostRows(size, shapes)


def padded_rows(array: Any, chunk: Chunk, filler: float = 0) -> Any:
    """Rows of a chunk's users, float[B, …], where the array is."""
    if isinstance(array, jax.Array):
        return _get(array, _place(chunk, len(array)), filler)
    out = np.full((len(chunk.count), *array.shape[1:]), filler, array.dtype)
    out[: len(chunk.users)] = array[chunk.users]
    return out


def _place(chunk: Chunk, end: int) -> np.ndarray:
    """int32[B], where a chunk's users are; behind the end where padded."""
    behind = end + np.arange(len(chunk.count) - len(chunk.users))
    return np.concatenate([chunk.users, behind]).astype(np.int32)


def stays_on_device(proj: Any) -> bool:
    """Whether what is made from these rewards stays on their accelerator."""
    return (
        isinstance(proj, jax.Array)
        and tuning(proj).keeps_results
        and len(proj.devices()) == 1
    )


@functools.partial(jax.jit, static_argnums=0)
def _empty(sizes):
    return [jnp.zeros(*size) for size in sizes]


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _set(arrays, place, values, add):
    out = []
    for i, (array, new) in enumerate(zip(arrays, values, strict=True)):
        at, kinds = array.at[place], dict(mode="drop", unique_indices=True)
        write = at.add if i in add else at.set
        out.append(write(new.astype(array.dtype), **kinds))
    return out


@functools.partial(jax.jit, static_argnums=2)
def _get(array, place, filler):
    return array.at[place].get(mode="fill", fill_value=filler)


@functools.partial(jax.jit, static_argnums=1)
def _cut(arrays, size):
    return [x[:size] for x in arrays]
