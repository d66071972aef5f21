"""What depends on the backend: sizes of chunks, and a thread for every core."""

import collections
import itertools
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def sized(cpu: int, accelerator: int) -> int:
    """A size for the caches of a CPU, or for the many cores of an accelerator."""
    return cpu if jax.default_backend() == "cpu" else accelerator


def for_each(
    function: Callable[[T], None], items: Iterable[T], *, library: bool = False
) -> None:
    """Calls `function` on every item, in any order, on as many threads as cores.

    XLA runs the loops of a chunk on one core of a CPU. Threads do not inherit JAX's
    context managers: those that change numbers are entered again.

    Args:
      function: runs a compiled program and waits for it.
      items: its arguments.
      library: the program calls LAPACK. On a CPU as many of those at once as there are
        cores were seen to wait for each other for ever, so they go one by one.
    """
    items = iter(items)
    first = list(itertools.islice(items, 2))
    if len(first) < 2 or (library and jax.default_backend() == "cpu"):
        for item in itertools.chain(first, items):
            function(item)
        return
    config: Any = jax.config
    double, device = config.jax_enable_x64, config.jax_default_device

    def call(item):
        with jax.enable_x64(double), jax.default_device(device):
            function(item)

    cores = multiprocessing.cpu_count()
    waiting = collections.deque()
    with ThreadPoolExecutor(cores) as pool:
        for item in itertools.chain(first, items):
            waiting.append(pool.submit(call, item))
            if len(waiting) > 2 * cores:
                waiting.popleft().result()
        for future in waiting:
            future.result()
