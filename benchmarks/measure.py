"""How the benchmarks measure: alternatives interleaved, medians, ratios in one run.

A busy machine slows everything alike, so the numbers to trust are ratios of medians
between calls that took turns. Compilation is timed apart, on the first call.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

PRECISION = jax.lax.Precision.HIGHEST  # what the library names for float32


class Compilations:
    """Programs and seconds that XLA compiled, and hits of the compilation cache."""

    def __init__(self):
        self.programs, self.seconds, self.hits = 0, 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)

    def _duration(self, event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self.programs += 1
            self.seconds += seconds

    def _event(self, event, **_):
        self.hits += event == "/jax/compilation_cache/cache_hits"

    @contextlib.contextmanager
    def counted(self) -> Iterator[dict[str, Any]]:
        """Fills a dict with what was compiled inside the block."""
        before = self.programs, self.seconds, self.hits
        out: dict[str, Any] = {}
        yield out
        out["programs"] = self.programs - before[0]
        out["compile_s"] = self.seconds - before[1]
        out["cache_warm"] = self.hits > before[2]


COMPILATIONS = Compilations()


def _in_a_row(call: Callable[[], Any]) -> int:
    """Calls to wait for together: an accelerator's wait alone costs 0.2 ms."""
    if jax.default_backend() == "cpu":
        return 1
    start = time.perf_counter()
    jax.block_until_ready(call())
    return max(1, min(20, int(0.01 / (time.perf_counter() - start))))


def interleave(
    calls: dict[str, Callable[[], Any]], *, repeats: int = 15, seconds: float = 20.0
) -> dict[str, dict[str, Any]]:
    """Times every call in turn, round after round, all first calls apart.

    Args:
      calls: name → function without arguments; its result is waited for.
      repeats: rounds at most.
      seconds: no new round starts after this long, and three always run.

    Returns:
      name → median_s, interquartile (range / median), min_s, repeats, calls in
      a row, and the compilations of the first call.
    """
    out = {}
    for name, call in calls.items():
        with COMPILATIONS.counted() as row:
            start = time.perf_counter()
            jax.block_until_ready(call())
        row["first_s"] = time.perf_counter() - start
        out[name] = {**row, "in_a_row": _in_a_row(call)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            number = out[name]["in_a_row"]
            start = time.perf_counter()
            for _ in range(number):
                result = call()
            jax.block_until_ready(result)
            times[name].append((time.perf_counter() - start) / number)
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        interquartile = (high - low) / middle
        out[name].update(
            median_s=statistics.median(values),
            interquartile=interquartile,
            min_s=min(values),
        )
        out[name]["repeats"] = len(values)
    return out


def timed(call: Callable[[], Any], repeats: int = 15, seconds: float = 20.0):
    """`interleave` of one call."""
    return interleave({"": call}, repeats=repeats, seconds=seconds)[""]


def temporaries(fn, *args, **kwargs) -> dict[str, Any]:
    """Compile seconds and bytes of one jitted program, without running it."""
    start = time.perf_counter()
    compiled = fn.lower(*args, **kwargs).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    if memory is None:
        return {"lower_and_compile_s": seconds}
    return {
        "lower_and_compile_s": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Memory that `call` needs above what was in use before; None where unknown.

    The high-water mark of the resident set, which Linux lets us reset, or of the
    accelerator's allocator, which is known only where the call raises it.
    """
    before = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in before:
        jax.block_until_ready(call())
        after = jax.devices()[0].memory_stats() or {}
        if after["peak_bytes_in_use"] == before["peak_bytes_in_use"]:
            return None
        return after["peak_bytes_in_use"] - before["bytes_in_use"]
    status, reset = (pathlib.Path("/proc/self") / n for n in ("status", "clear_refs"))
    if not reset.exists():
        return None

    def resident(name):
        text = status.read_text(encoding="ascii").split(name + ":")[1]
        return int(text.split()[0]) << 10

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or pages that were freed would be used unseen
    reset.write_text("5", encoding="ascii")
    start = resident("VmRSS")
    jax.block_until_ready(call())
    return resident("VmHWM") - start


def copy_bandwidth(megabytes: int = 1024) -> float:
    """Bytes per second read and written by a jitted x + 1 between warm buffers."""
    x = jnp.zeros(megabytes << 18, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # no fresh pages every time
    size, box = 2 * x.nbytes, [x]
    del x

    def copy():
        box[0] = add(box[0])
        return box[0]

    return size / timed(copy, 9, 3.0)["median_s"]


def environment() -> dict[str, Any]:
    """What the numbers belong to."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "matmul_precision": str(PRECISION),
        "compilation_cache": jax.config.jax_compilation_cache_dir is not None,
    }


def emit(row: dict[str, Any]) -> dict[str, Any]:
    """Prints one JSON line, rounded to four digits, and returns it."""
    row = {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in {**row, **environment()}.items()
    }
    print(json.dumps(row), flush=True)
    return row


def command_line(cases: Callable[..., Any], doc: str, argv=None) -> None:
    """Runs one benchmark: cases(size, torch) → rows, a JSON line each."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--compare", metavar="OLD_JSON")
    args = parser.parse_args(argv)
    rows = [emit(row) for row in cases("quick" if args.quick else "full", args.torch)]
    for row in compare(rows, read_rows(args.compare)) if args.compare else ():
        emit(row)


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of an earlier run."""
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def compare(
    rows: list[dict[str, Any]], earlier: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows that an earlier run has too, with their ratios now over then.

    A row is known by its case and shapes; `ratio_*` and `median_s` are compared.
    """
    old = {_identity(row): row for row in earlier}
    out = []
    for row in rows:
        then = old.get(_identity(row))
        if then is None or "median_s" not in row:
            continue
        change = {
            f"{key}_now_over_then": row[key] / then[key]
            for key in row
            if (key == "median_s" or key.startswith("ratio_")) and then.get(key)
        }
        names = ("case", *"MNDKUP")
        out.append({**{name: row.get(name) for name in names}, **change})
    return out


def _identity(row):
    return tuple(row.get(name) for name in ("case", *"MNDKUP"))
