"""Ctrl-C: threads end with the one that was interrupted, and a record is kept."""

import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax import _backend
from lore_jax._train import steps
from lore_jax.io import checkpoint

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Python's own handler: a shell starts programs in the background without one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(*_):
    signal.raise_signal(signal.SIGINT)


def test_threads_stop_where_they_may_when_another_one_fails():
    """Without `check_stopped` the others would go on for ever."""
    together, stopped = threading.Barrier(2, timeout=60), []

    def work(item):
        together.wait()
        if item == 0:
            raise KeyError("first")
        try:
            while True:
                _backend.check_stopped()
        except Exception:
            stopped.append(item)
            raise

    with pytest.raises(KeyError, match="first"):
        _backend.for_each(work, range(2))
    assert stopped == [1]
    _backend.check_stopped()  # What stopped them is gone with them.


def test_ctrl_c_stops_threads_inside_threads():
    """An outer item that fails ends the inner ones of its neighbours."""
    begun, ended = threading.Event(), []

    def inner(item):
        begun.set()
        try:
            while True:
                _backend.check_stopped()
        finally:
            ended.append(item)

    def outer(item):
        if item == 0:
            assert begun.wait(60)
            raise KeyboardInterrupt
        _backend.for_each(inner, range(2))

    with pytest.raises(KeyboardInterrupt):
        _backend.for_each(outer, range(2))
    assert ended


def test_waiting_for_a_program_gives_its_results():
    x = _backend.wait_for((jnp.arange(3) * 2, jnp.ones(())))
    assert x[0].tolist() == [0, 2, 4]


def test_a_program_that_was_left_is_waited_for_at_the_end(monkeypatch):
    class Slow:
        """An array of a program that does not end."""

        size = 1

        def is_ready(self):
            interrupt()
            return False

    monkeypatch.setattr(_backend, "_left", [])
    slow = Slow()
    with pytest.raises(KeyboardInterrupt):
        _backend.wait_for([slow])
    assert _backend._left == [slow]


def counted(monkeypatch, at):
    """Counts programs of training; Ctrl-C comes with the one of this number."""
    real, calls, lock = steps.run, [], threading.Lock()

    def run(*args, **settings):
        with lock:
            calls.append(settings["num_steps"])
            due = len(calls) == at
        if due:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if 0 < at <= len(calls):
            time.sleep(0.1)  # Python tells the main thread when that runs next.
        return real(*args, **settings)

    monkeypatch.setattr(steps, "run", run)
    return calls


@pytest.fixture(scope="module")
def prefs():
    rng = np.random.default_rng(3)
    first = rng.integers(30, size=90)
    second = (first + rng.integers(1, 30, size=90)) % 30
    features = rng.normal(size=(30, 4)).astype(np.float32)
    user = np.repeat(np.arange(9), 10)
    return lore.Preferences.from_pairs(features, first, second, user)


def test_ctrl_c_ends_candidates_on_threads(prefs, monkeypatch):
    """The whole search takes more than a hundred programs of ten a candidate."""
    search = lore.Search(ridges=(0.4, 0.2, 0.1, 0.05, 0.02, 0.01))
    recipe = lore.Marginal(num_steps=40, search=search)
    calls = counted(monkeypatch, at=14)
    with pytest.raises(KeyboardInterrupt):
        lore.fit(prefs, rank=2, key=KEY, recipe=recipe)
    monkeypatch.undo()
    assert len(calls) < 14 + 30


def test_ctrl_c_keeps_the_record(prefs, tmp_path, monkeypatch):
    recipe = lore.PublishedJoint(num_steps=6, temperature=5.0)
    path = tmp_path / "progress"

    def fit(**settings):
        return lore.fit(prefs, rank=2, key=KEY, recipe=recipe, **settings)

    def save(progress):
        checkpoint.save_progress(path, progress)

    want = fit(on_progress=lambda _: None, every=2)
    counted(monkeypatch, at=3)
    with pytest.raises(KeyboardInterrupt):
        fit(on_progress=save, every=2)
    monkeypatch.undo()
    progress = checkpoint.load_progress(path)
    assert progress.num_steps == 4
    got = fit(on_progress=lambda _: None, every=2, resume=progress)
    np.testing.assert_array_equal(got.model.basis, want.model.basis)


def test_long_trainings_are_several_programs(prefs, monkeypatch):
    calls = counted(monkeypatch, at=0)
    recipe = lore.PublishedJoint(num_steps=1200, temperature=5.0)
    lore.fit(prefs, rank=2, key=KEY, recipe=recipe)
    assert calls == [400] * 3
    assert [steps._stride(n) for n in (0, 7, 500, 20000, 503)] == [
        0,
        7,
        500,
        500,
        500,
    ]
