"""What depends on the backend: sizes of chunks, LAPACK, and a thread a core."""

import atexit
import contextlib
import functools
import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

T = TypeVar("T")

_END = object()

_PATIENCE = 0.5  # seconds that Ctrl-C waits for programs of other threads

_local = threading.local()

_left: list[Any] = []  # one result each of programs that still run

_FEW = 100_000  # operations of a batch that LAPACK's caller keeps on its thread


def sized(cpu: T, accelerator: T) -> T:
    """A size for the caches of a CPU, or for the many cores of an accelerator."""
    return cpu if jax.default_backend() == "cpu" else accelerator


def apart(function: Callable[..., Any], some: jax.Array, *arrays) -> Any:
    """`function` of arrays as loops of its own on a CPU; zeros unless `some`, bool[].

    XLA's CPU code fuses what it can: with every reader, each of which then works it
    out again, and with a reshape, whose places it then divides for one by one. It
    leaves a branch alone.
    """

    def nothing(*arrays):
        shapes = jax.eval_shape(function, *arrays)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    if sized(False, True):
        return function(*arrays)
    return lax.cond(some, function, nothing, *arrays)


def _few_at_once(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function` of float[K, K] and more, which `vmap` takes a few at once on a CPU.

    There a large batch of `cholesky` or `triangular_solve` hands its work to the
    threads that it runs on: as many such batches as there are cores, of one program or
    of several, wait for each other for ever (jaxlib 0.10.2). A batch that costs less
    than 2e5 operations stays where it is, and so does a single system.
    """
    single = jax.custom_batching.custom_vmap(function)
    together = jax.custom_batching.sequential_vmap(jax.vmap(function))

    @single.def_vmap
    def _(size, batched, *arrays):
        arrays = [
            x if many else jnp.broadcast_to(x, (size, *x.shape))
            for x, many in zip(arrays, batched, strict=True)
        ]
        few = 1 << max(1, _FEW // arrays[0].shape[-1] ** 3).bit_length() - 1
        whole = size // few * few

        def in_groups(*arrays):
            groups = [x[:whole].reshape(-1, few, *x.shape[1:]) for x in arrays]
            out = lax.map(lambda group: together(*group), groups)
            out = out.reshape(whole, *out.shape[2:])
            if whole == size:
                return out
            return jnp.concatenate([out, together(*(x[whole:] for x in arrays))])

        default = jax.vmap(function)
        return lax.platform_dependent(*arrays, cpu=in_groups, default=default), True

    return single


@_few_at_once
def cholesky(matrix: jax.Array) -> jax.Array:
    """L of a positive definite float[K, K] = L Lᵀ."""
    return lax.linalg.cholesky(matrix, symmetrize_input=False)


@_few_at_once
def solve_lower(root: jax.Array, rhs: jax.Array) -> jax.Array:
    """L⁻¹ rhs, float[K, R]."""
    return lax.linalg.triangular_solve(root, rhs, left_side=True, lower=True)


@_few_at_once
def solve_upper(root: jax.Array, rhs: jax.Array) -> jax.Array:
    """L⁻ᵀ rhs, float[K, R]."""
    return lax.linalg.triangular_solve(
        root, rhs, left_side=True, lower=True, transpose_a=True
    )


def for_each(function: Callable[[T], None], items: Iterable[T]) -> None:
    """Calls `function` on every item, in any order, on as many threads as cores.

    XLA runs the loops of a chunk on one core of a CPU; on an accelerator one of two
    threads copies while it is busy with the other's. Threads do not inherit JAX's
    context managers: those that change numbers are entered again.

    Args:
      function: runs a compiled program and waits for it.
      items: its arguments; no more are asked for than are being worked on.

    Raises:
      Exception: the first that `function` raised; items not yet begun are left, and
        those begun end where they call `check_stopped`.
    """
    items = iter(items)
    first = list(itertools.islice(items, 2))
    if len(first) < 2:
        for item in first:
            function(item)
        return
    waiting = itertools.chain(first, items)
    turn, failed = threading.Lock(), threading.Event()
    outer = getattr(_local, "stops", ())
    config: Any = jax.config
    managers = (
        "enable_x64",
        "default_device",
        "default_prng_impl",
        "threefry_partitionable",
        "numpy_dtype_promotion",
        "debug_nans",
        "debug_infs",
    )
    values = {name: getattr(config, f"jax_{name}") for name in managers}

    def work():
        before, _local.stops = getattr(_local, "stops", ()), (*outer, failed)
        try:
            run_items()
        except _Stopped:
            if not failed.is_set():  # Stopped from outside, not by a neighbour.
                failed.set()
                raise
        finally:
            _local.stops = before

    def run_items():
        with contextlib.ExitStack() as stack:
            for name, value in values.items():
                stack.enter_context(getattr(jax, name)(value))
            while not failed.is_set():
                with turn:
                    item = next(waiting, _END)
                if item is _END:
                    return
                check_stopped()
                try:
                    function(item)  # pyright: ignore[reportArgumentType]
                except _Stopped:
                    raise
                except BaseException:
                    failed.set()
                    raise

    others = sized(multiprocessing.cpu_count(), 2) - 1
    futures = [_pool(max(1, others)).submit(work) for _ in range(others)]
    begun: list = []
    try:
        work()
        # One that has not begun has nothing left to do; it may never begin, where the
        # caller itself is of the pool.
        begun = [future for future in futures if not future.cancel()]
        wait(begun)
    except BaseException as error:
        failed.set()
        begun = [future for future in futures if not future.cancel()]
        # After Ctrl-C a thread ends by itself when its program does.
        wait(begun, _PATIENCE if isinstance(error, KeyboardInterrupt) else None)
        raise
    for future in begun:
        future.result()


class _Stopped(Exception):
    """Ends work whose result nothing needs any more."""


def check_stopped() -> None:
    """Ends a long `function` of `for_each` when another one of them has failed."""
    if any(stop.is_set() for stop in getattr(_local, "stops", ())):
        raise _Stopped


def wait_for(arrays: T) -> T:
    """`jax.block_until_ready` that Ctrl-C and `check_stopped` can end."""
    leaves: list[Any] = jax.tree.leaves(arrays)
    start = time.monotonic()
    try:
        while not all(x.is_ready() for x in leaves):
            check_stopped()
            time.sleep(min(0.02, max(1e-4, 0.02 * (time.monotonic() - start))))
    except BaseException:
        _left[:] = [x for x in _left if not x.is_ready()]
        _left.append(min(leaves, key=lambda x: x.size))
        raise
    return jax.block_until_ready(arrays)


@atexit.register
def _finish() -> None:
    """Waits for programs that nothing waited for: XLA must not end before them."""
    jax.block_until_ready(_left)


def on_threads(function: Callable[[T], Any], items: Iterable[T]) -> list[Any]:
    """`function` of every item, in order; several at once by `for_each`."""
    items = list(items)
    out: list[Any] = [None] * len(items)

    def call(i):
        out[i] = function(items[i])

    for_each(call, range(len(items)))
    return out


@functools.cache
def _pool(size: int) -> ThreadPoolExecutor:
    """Threads that stay: starting one costs a millisecond."""
    return ThreadPoolExecutor(size, thread_name_prefix="lore_jax")
