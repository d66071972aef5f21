"""What depends on the backend: sizes of chunks, LAPACK, and a thread a core."""

import functools
import itertools
import multiprocessing
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
from jax import lax

T = TypeVar("T")
_END = object()


def sized(cpu: int, accelerator: int) -> int:
    """A size for the caches of a CPU, or for the many cores of an accelerator."""
    return cpu if jax.default_backend() == "cpu" else accelerator


def cholesky(matrix: jax.Array) -> jax.Array:
    """Lower factors of symmetric float[U, K, K], on any number of threads.

    On a CPU, batches that as many threads factor at once as there are cores were seen
    to wait for each other for ever (jaxlib 0.10.2); single systems do not, nor are they
    slower.
    """
    one = functools.partial(lax.linalg.cholesky, symmetrize_input=False)
    each = functools.partial(lax.map, one)
    return lax.platform_dependent(matrix, cpu=each, default=one)


def for_each(function: Callable[[T], None], items: Iterable[T]) -> None:
    """Calls `function` on every item, in any order, on as many threads as cores.

    XLA runs the loops of a chunk on one core of a CPU. Threads do not inherit JAX's
    context managers: those that change numbers are entered again.

    Args:
      function: runs a compiled program and waits for it.
      items: its arguments; no more are asked for than are being worked on.

    Raises:
      Exception: the first that `function` raised; items not yet begun are left.
    """
    items = iter(items)
    first = list(itertools.islice(items, 2))
    if len(first) < 2:
        for item in first:
            function(item)
        return
    waiting = itertools.chain(first, items)
    turn, failed = threading.Lock(), threading.Event()
    config: Any = jax.config
    double, device = config.jax_enable_x64, config.jax_default_device

    def work():
        with jax.enable_x64(double), jax.default_device(device):
            while not failed.is_set():
                with turn:
                    item = next(waiting, _END)
                if item is _END:
                    return
                try:
                    function(item)  # pyright: ignore[reportArgumentType]
                except BaseException:
                    failed.set()
                    raise

    others = multiprocessing.cpu_count() - 1
    with ThreadPoolExecutor(max(1, others)) as pool:
        futures = [pool.submit(work) for _ in range(others)]
        work()
        for future in futures:
            future.result()
