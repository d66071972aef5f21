"""Four fake devices, no silent broadcasting, and a counter of compilations.

Most of the suite's time would go into compiling: LLVM's optimiser is off here, and so
are the fusion emitters where jaxlib still has that flag. `XLA_FLAGS= pytest` compiles
as users do; `.ci/slow` does so for what solves, and the README's code always runs so.
Both workers, and the processes that tests start, share what they compile: two programs
in three are there already, which saves an eighth of the time.
"""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

_FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # Workers inherit it.
    _programs = tempfile.mkdtemp(prefix="lore_jax-")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402 (XLA reads its flags once)
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

import lore_jax as lore  # noqa: E402 (the devices come first)


class Compilations:
    """How many programs XLA compiled so far."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **_):
        del duration
        self.count += event == "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="session")
def compilations():
    return Compilations()


def random_preferences(
    num_users=5, num_pairs=40, num_features=6, num_rows=30, *, seed=0, **fields
):
    """Random pairs over a shared table; the last user has none.

    `fields` may be `label=True` or `sample_weight=True` for random ones, or
    `from_pairs`' own.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(num_rows, size=num_pairs)
    rejected = (chosen + rng.integers(1, num_rows, size=num_pairs)) % num_rows
    if fields.get("label") is True:
        fields["label"] = rng.random(num_pairs)
    if fields.get("sample_weight") is True:
        fields["sample_weight"] = rng.random(num_pairs) + 0.1
    return lore.Preferences.from_pairs(
        rng.normal(size=(num_rows, num_features)).astype(np.float32),
        chosen,
        rejected,
        rng.integers(num_users - 1, size=num_pairs),
        num_users,
        **fields,
    )


@pytest.fixture(scope="session")
def make_preferences():
    return random_preferences


@pytest.fixture(scope="session")
def planted():
    """24 users, 2 directions, choices nearly without noise."""
    return lore.data.planted(
        jax.random.key(7),
        num_users=24,
        pairs_per_user=15,
        num_features=6,
        rank=2,
        margin_scale=8.0,
    )


@pytest.fixture(scope="session")
def fitted(planted):
    """The default recipe on `planted`, with named users."""
    names = [f"user-{u}" for u in range(planted.prefs.num_users)]
    prefs = lore.Preferences.from_ragged(
        np.split(np.asarray(planted.prefs.features), planted.prefs.num_users),
        user_ids=names,
    )
    return lore.fit(prefs, rank=2, key=jax.random.key(0))


@pytest.fixture(scope="session")
def small_prior():
    """20 atoms over 3 directions, refined and tempered; used at T = 2."""
    rng = np.random.default_rng(0)
    return lore.Prior(
        atoms=rng.dirichlet(np.ones(3), 20).astype(np.float32),
        log_weights=np.log(rng.dirichlet(np.ones(20))).astype(np.float32),
        concentration=np.float32(5.0),
        tempering=np.float32(0.2),
        decay=np.float32(-0.5),
    )


@pytest.fixture(scope="session")
def small_basis():
    """float[6, 3], for `make_preferences`."""
    return np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
