"""Threads see every item once, the caller's precision, and each other's errors."""

import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax import _backend


@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_every_item_is_seen_once(count):
    seen, lock = [], threading.Lock()

    def see(item):
        with lock:
            seen.append(item)

    _backend.for_each(see, iter(range(count)))
    assert sorted(seen) == list(range(count))


def test_items_run_at_the_same_time(monkeypatch):
    """Both wait for each other: one thread alone would time out."""
    monkeypatch.setattr(_backend, "tuning", lambda: _backend.CPU._replace(threads=2))
    barrier = threading.Barrier(2)
    _backend.for_each(lambda _: barrier.wait(timeout=30), range(2))


def test_an_item_may_have_items_of_its_own():
    """Though every thread is taken: the caller does what nobody else can."""
    seen = []

    def outer(i):
        _backend.for_each(lambda j: seen.append((i, j)), range(3))

    caller = threading.Thread(
        target=_backend.for_each, args=(outer, range(20)), daemon=True
    )
    caller.start()
    caller.join(timeout=60)
    assert sorted(seen) == [(i, j) for i in range(20) for j in range(3)]


def test_threads_keep_the_precision_of_the_caller():
    kinds = [None] * 4

    def look(item):
        kinds[item] = jnp.ones(()).dtype

    for double, kind in ((True, np.float64), (False, np.float32)):
        with jax.enable_x64(double):
            _backend.for_each(look, range(4))
        assert kinds == [kind] * 4


def test_threads_draw_the_random_numbers_of_the_caller():
    def draw(_):
        return np.asarray(jax.random.normal(jax.random.key(0), (5,)))

    for context in (
        jax.threefry_partitionable(False),
        jax.threefry_partitionable(True),
        jax.default_prng_impl("rbg"),
    ):
        with context:
            want = draw(0)
            for got in _backend.on_threads(draw, range(8)):
                np.testing.assert_array_equal(got, want)


def test_results_come_in_the_order_of_the_items(monkeypatch):
    """Though the first is the last to be ready."""
    monkeypatch.setattr(_backend, "tuning", lambda: _backend.CPU._replace(threads=2))
    others = threading.Event()

    def square(x):
        if x == 0:
            assert others.wait(timeout=30)
        others.set()
        return x * x

    assert _backend.on_threads(square, iter(range(5))) == [0, 1, 4, 9, 16]


def test_an_error_of_one_item_reaches_the_caller():
    def fail(item):
        if item == 3:
            raise ValueError("item 3")

    with pytest.raises(ValueError, match="item 3"):
        _backend.for_each(fail, range(5))


def test_a_batch_of_several_chunks_is_adapted_in_double_precision():
    rng = np.random.default_rng(0)
    model, start = lore.RewardModel(np.eye(3)), rng.normal(size=(1100, 3))

    def adapt(prefs, init):
        method = lore.PublishedAdam(num_steps=3, init=init)
        return lore.adapt(model, prefs, method=method)

    with jax.enable_x64(True):
        prefs = lore.Preferences.from_ragged(list(rng.normal(size=(1100, 2, 3))))
        new = adapt(prefs, start)
        last = lore.take_users(prefs, np.arange(1090, 1100))
        few = adapt(last, start[1090:])
    assert new.weights.dtype == np.float64
    np.testing.assert_allclose(new.weights[1090:], few.weights, atol=1e-12)


_MANY_SYSTEMS = """
import threading, jax, numpy as np
from lore_jax import _backend
x = np.random.default_rng(0).normal(size=(256, 64, 80)).astype(np.float32)
matrices = x @ x.transpose(0, 2, 1)
@jax.jit
def solve(m):
    root = jax.vmap(_backend.cholesky)(m)
    return [jax.vmap(_backend.solve_lower)(root, m[..., k:k + 9]) for k in range(6)]
def work():
    for _ in range(20):
        jax.block_until_ready(solve(matrices))
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
"""


def test_large_systems_never_wait_for_each_other():
    """In large batches they did, of one program or several, where cores are few."""
    command = [sys.executable, "-c", _MANY_SYSTEMS]
    subprocess.run(command, timeout=100, check=True)


@pytest.mark.parametrize(("size", "rank"), [(1, 3), (130, 20), (5, 64)])
def test_groups_of_systems_are_solved_like_one(size, rank):
    x = np.random.default_rng(0).normal(size=(2, size, rank, 2 * rank))
    with jax.enable_x64(True):
        matrices = jnp.asarray(x @ x.transpose(0, 1, 3, 2))
        root = jax.vmap(jax.vmap(_backend.cholesky))(matrices)
        rhs = jnp.ones((rank, 1))
        half = jax.vmap(jax.vmap(lambda r: _backend.solve_lower(r, rhs)))(root)
        out = jax.vmap(jax.vmap(_backend.solve_upper))(root, half)
    np.testing.assert_allclose(root, np.linalg.cholesky(matrices), atol=1e-10)
    want = np.linalg.solve(np.asarray(matrices), np.ones((2, size, rank, 1)))
    np.testing.assert_allclose(out, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("some", [True, False])
def test_a_branch_is_its_function_where_there_is_something(some):
    x = jnp.arange(3.0)
    total, twice = _backend.cpu_branch(lambda x: (x.sum(), 2 * x), jnp.array(some), x)
    np.testing.assert_array_equal(total, 3.0 * some)
    np.testing.assert_array_equal(twice, [0, 2 * some, 4 * some])
