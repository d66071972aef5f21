"""What depends on the backend: sizes of chunks, LAPACK, and one thread per core."""

import atexit
import contextlib
import functools
import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

T = TypeVar("T")

_END = object()

_PATIENCE = 0.5  # seconds that Ctrl-C waits for programs of other threads

_local = threading.local()

_left: list[Any] = []  # one result each of programs that still run

_FEW = 100_000  # operations of a batch that LAPACK's caller keeps on its thread


EXACT = lax.Precision.HIGHEST  # of every product with float32 numbers


class Tuning(NamedTuple):
    """Sizes that suit where the arrays are; no result depends on them.

    Attributes:
      product_columns: widths that V is padded to. A CPU's matrix product takes up to
        half as long again with 5 to 7 or 9 to 15 columns as with 8 or 16.
      lanes: pairs' rewards are padded to a multiple of so many columns, because a
        CPU's scatter adds rows of 5 one number at a time.
      rows_above: from which rank on training reads [M, K] instead of [K, M]; None never
        does. Columns need no transpose, rows touch fewer cache lines.
      row_multiple: rows of a table in training are padded to a multiple. XLA divides
        long sums among up to 128 parts of 16 bytes each; where they do not divide, it
        copies the whole table in every step.
      table_cells: users × atoms of one table of likelihoods: a core's cache.
      bucket_cells: atoms × pairs of one chunk of training.
      chunk_shapes: users of a chunk, and more than how many ask for it. On an
        accelerator padding is cheap and a call is not.
      chunk_pairs: most padded pairs of a chunk.
      gather_pairs: from how many pairs on an accelerator gathers them itself; None
        leaves that to the host.
      solver_users: users of a chunk of the solver: temporaries stay in a CPU's cache.
      written_sums: whether short sums are written out: XLA vectorises those over
        users, and its own reductions on a CPU hardly.
      branches: whether `cpu_branch` branches.
      scatters: whether training adds slopes to rows by a scatter; if not, by gathers
        (`row_sums`): 0.12 instead of 8.55 ms a million pairs on an H100.
      splits_bfloat16: whether a bfloat16 table meets V in three bfloat16 parts; if not,
        it is converted to float32, which is as exact.
      reduces_on_device: whether a table is checked where it is.
      keeps_results: whether results of users stay where they are made (`_pairs.rows`).
      threads: chunks that are worked on at once.
      columns_at_once: columns of V that share one read of the table in training. 40
        take an H100 twice as long as 5: 8 trainings in the time of 2. On a CPU a
        product of more than 8 columns is bound by arithmetic.
    """

    product_columns: tuple[int, ...]
    lanes: int
    rows_above: int | None
    row_multiple: int
    table_cells: int
    bucket_cells: int
    chunk_shapes: tuple[tuple[int, int], ...]
    chunk_pairs: int
    gather_pairs: int | None
    solver_users: int
    written_sums: bool
    branches: bool
    scatters: bool
    splits_bfloat16: bool
    reduces_on_device: bool
    keeps_results: bool
    threads: int
    columns_at_once: int


CPU = Tuning(
    product_columns=(8, 16),
    lanes=4,
    rows_above=10,
    row_multiple=1,
    table_cells=1 << 15,
    bucket_cells=1 << 16,
    chunk_shapes=((4096, 2048), (1024, 64), (64, 0)),
    chunk_pairs=1 << 20,
    gather_pairs=None,
    solver_users=128,
    written_sums=True,
    branches=True,
    scatters=True,
    splits_bfloat16=False,
    reduces_on_device=False,
    keeps_results=False,
    threads=multiprocessing.cpu_count(),
    columns_at_once=1,
)
ACCELERATOR = Tuning(
    product_columns=(),
    lanes=1,
    rows_above=None,
    row_multiple=1024,
    table_cells=1 << 22,
    bucket_cells=1 << 24,
    chunk_shapes=((131072, 16384), (16384, 2048), (2048, 64), (64, 0)),
    chunk_pairs=1 << 21,
    gather_pairs=1 << 14,
    solver_users=1 << 17,
    written_sums=False,
    branches=False,
    scatters=False,
    splits_bfloat16=True,
    reduces_on_device=True,
    keeps_results=True,
    threads=2,
    columns_at_once=40,
)


def tuning(*arrays: Any) -> Tuning:
    """The sizes for where the first JAX array among `arrays` is.

    While tracing, and for NumPy arrays, that is the default device.
    """
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
            platform = next(iter(array.devices())).platform
            return CPU if platform == "cpu" else ACCELERATOR
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    platform = getattr(device, "platform", device) or jax.default_backend()
    return CPU if platform == "cpu" else ACCELERATOR


def to_array(values: Any, dtype: Any = None) -> jax.Array:
    """`jnp.asarray` without its program for every shape that it converts."""
    if isinstance(values, jax.Array):
        return values if dtype is None else values.astype(dtype)
    values = np.asarray(values, dtype)
    return jnp.asarray(values, jax.dtypes.canonicalize_dtype(values.dtype))


def host_device() -> Any:
    """A CPU device of this process, or None where JAX was told to have none."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def cpu_branch(function: Callable[..., Any], some: jax.Array, *arrays) -> Any:
    """`function` of arrays; on a CPU in a branch, which gives zeros unless `some`.

    On a CPU, XLA recomputes what is fused for every consumer. `lax.cond` stops the
    fusion.
    """

    def nothing(*arrays):
        shapes = jax.eval_shape(function, *arrays)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    if not tuning().branches:
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
    if jax.process_count() > 1:  # Programs of several processes start in one order.
        first, items = [*first, *items], iter(())
    if len(first) < 2 or jax.process_count() > 1:
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

    others = tuning().threads - 1
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
