"""Bytes that a training step moves on an accelerator, counted without one.

    python -m benchmarks.step_bytes M=48000,N=1000000,D=4096,K=5,U=20000

The step is traced as for an accelerator. Counted are the two reads of the table, and
what every product, gather, sum, concatenation and barrier between them reads and
writes; what lies between those is fused. At the speed of the memory the ratio to the
two reads is that of the times.
"""

import argparse
import collections
from typing import Any

import jax
import numpy as np

from benchmarks.__main__ import shape_of
from benchmarks.bench_train import iterations, make_problem
from lore_jax import _backend
from lore_jax._train import steps

_WIDTH = 16  # of the table that is traced; its products are counted at D
_MOVES = {"dot_general", "reduce_sum", "concatenate", "sort", "transpose"}
_SCATTERS = {"scatter", "scatter-add"}


def count(M: int, N: int, D: int, K: int, U: int) -> dict[str, dict[str, float]]:
    """{"alternating" and "default": {"table": bytes, an operation: bytes, …}}."""
    before = _backend.CPU
    _backend.CPU = _backend.ACCELERATOR
    jax.clear_caches()
    try:
        prefs = make_problem(M, N, _WIDTH, K, U, differences=N == M)
        return {
            name: _counted(one, len(prefs.features), D)
            for name, one in iterations(prefs, K).items()
        }
    finally:
        _backend.CPU = before
        jax.clear_caches()


def _counted(iteration, rows: int, num_features: int) -> dict[str, float]:
    state, problem, parts = iteration.state, iteration.problem, iteration.parts
    traced = jax.make_jaxpr(lambda *x: steps.step(parts, *x))(state, problem)
    inner = getattr(problem, "problem", None)
    trips = [int(x) for x in getattr(inner, "num_chunks", ())]
    total: collections.Counter = collections.Counter()
    _add(traced.jaxpr, 1, total, trips, (rows, num_features))
    return dict(total)


def _add(jaxpr, times: int, total, trips: list[int], table: tuple[int, int]) -> None:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = [
            (key, getattr(x, "jaxpr", x))
            for key, value in equation.params.items()
            for x in (value if isinstance(value, tuple | list) else [value])
            if hasattr(getattr(x, "jaxpr", x), "eqns")
        ]
        if name == "while":  # The loops over chunks, in the order of the buckets.
            loops = trips.pop(0) if trips else 1
            inner = [(key, x) for key, x in inner if "body" in key]
            times_inside = times * loops
        else:
            times_inside = times
        for _, x in inner:
            _add(x, times_inside, total, trips, table)
        if not inner:
            found = _bytes(equation, name, table)
            total[found[0]] += times * found[1]


def _bytes(equation, name: str, table: tuple[int, int]) -> tuple[str, float]:
    inputs = [_size(x) for x in equation.invars]
    outputs = [_size(x) for x in equation.outvars]
    rows, num_features = table
    whole = (rows, _WIDTH)
    if name == "dot_general" and any(x.aval.shape == whole for x in equation.invars):
        return "table", 4 * rows * num_features
    if name in _SCATTERS:
        return "scatter", sum(inputs) + sum(outputs)
    if name == "gather":
        return name, 2 * outputs[0] + inputs[1]
    if name == "dynamic_update_slice":
        return name, 2 * inputs[1]
    if name == "optimization_barrier":
        return name, 2 * sum(outputs)
    return name, sum(inputs) + sum(outputs) if name in _MOVES else 0


def _size(variable: Any) -> int:
    shape = getattr(variable.aval, "shape", ())
    return int(np.prod(shape)) * variable.aval.dtype.itemsize


def main(argv=None) -> None:
    """Prints a row per recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shape", type=shape_of("MNDKU"), help="M=…,N=…,D=…,K=…,U=…")
    for name, found in count(**parser.parse_args(argv).shape).items():
        table = found.pop("table")
        rest = {key: value for key, value in found.items() if value}
        parts = ", ".join(f"{key} {value / 1e9:.3f}" for key, value in rest.items())
        ratio = 1 + sum(rest.values()) / table
        print(f"{name}: table {table / 1e9:.3f} GB; {parts}; {ratio:.2f}× two reads")


if __name__ == "__main__":
    main()
