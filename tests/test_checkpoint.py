"""Round trips, damaged and foreign files, and a crash while saving."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import lore_jax as lore
from lore_jax.results import History
from lore_jax.types import Ids


def make_fit(num_users=4, num_features=5, rank=3, *, pruned=False, names=True, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = lore.RewardParams(normal(num_features, rank), normal(num_users, rank))
    users = np.array(["Ünal", "b c", "", "zoe"][:num_users])
    return lore.Fitted(
        params=params,
        weights=params.weights,
        prior=lore.Prior(
            atoms=jnp.eye(rank),
            log_weights=jnp.full(rank, -np.log(rank), jnp.float32),
            concentration=jnp.asarray(np.inf, jnp.float32),
            tempering=jnp.asarray(0.25, jnp.float32),
            decay=jnp.asarray(0.5, jnp.float32),
            temperature=100.0,
        ),
        history=History(
            loss=normal(6),
            weights_norm=normal(6),
            basis_norm=normal(6),
            selection=({"log_loss": 0.5, "chosen": True}, {"log_loss": float("inf")}),
        ),
        unpruned=lore.RewardParams(normal(num_features, 7), normal(num_users, 7))
        if pruned
        else None,
        kept=jnp.array([0, 2, 6]) if pruned else None,
        temperature=100.0,
        config=lore.TrainConfig.reference_alternating(6, prune=pruned),
        ids=Ids(users, np.array(["row 0", "row 1"])) if names else None,
    )


def assert_same(first, second):
    left, right = jax.tree.leaves_with_path(first), jax.tree.leaves_with_path(second)
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, a), (_, b) in zip(left, right, strict=True):
        assert np.shape(a) == np.shape(b), path
        assert np.asarray(a).dtype == np.asarray(b).dtype, path
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    assert first.temperature == second.temperature
    assert first.prior.temperature == second.prior.temperature
    assert first.config == second.config
    assert first.history.selection == second.history.selection
    for name in ("users", "items"):
        a, b = (getattr(x.ids, name, None) for x in (first, second))
        assert (a is None) == (b is None)
        if a is not None:
            assert a.tolist() == b.tolist()


@pytest.mark.parametrize("names", [True, False], ids=["names", "numbers"])
@pytest.mark.parametrize("pruned", [True, False], ids=["pruned", "whole"])
def test_round_trip(tmp_path, pruned, names):
    original = make_fit(pruned=pruned, names=names)
    lore.save(tmp_path / "fit", original)
    assert_same(original, lore.load(tmp_path / "fit"))


def test_round_trip_of_a_real_fit(tmp_path, fitted, planted):
    path = str(tmp_path / "fit.safetensors")
    lore.save(path, fitted)
    loaded = lore.load(path)
    assert_same(fitted, loaded)
    assert loaded.user_ids.tolist() == [f"user-{u}" for u in range(24)]
    first, second = (
        lore.adapt(f.basis, planted.heldout, prior=f.prior) for f in (fitted, loaded)
    )
    np.testing.assert_array_equal(first.weights, second.weights)


def test_rank_zero_round_trips(tmp_path, make_preferences):
    prefs = make_preferences()
    anchor = np.arange(6, dtype=np.float32)
    original = lore.fit(prefs, rank=0, key=jax.random.key(0), anchor=anchor)
    lore.save(tmp_path / "fit", original)
    assert_same(original, lore.load(tmp_path / "fit"))


def test_double_precision_round_trips(tmp_path):
    with jax.enable_x64(True):
        fit = make_fit()
        wide = jax.tree.map(lambda x: x.astype(np.float64), fit.params)
        original = fit.replace(params=wide, weights=wide.weights)
        lore.save(tmp_path / "fit", original)
        assert_same(original, lore.load(tmp_path / "fit"))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "fit"
    lore.save(path, make_fit(pruned=True))
    return path


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="fit is truncated or not a safetensors file"):
        lore.load(saved)


@pytest.mark.parametrize(
    "content",
    [b"hello, world, this is text", b"\x80\x04K\x01.", b"\x93NUMPY" + bytes(99)],
)
def test_a_file_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        lore.load(tmp_path / "x")


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file at .*absent"):
        lore.load(tmp_path / "absent")


def rewrite(path, arrays=None, drop=(), **changes):
    """Saves the file again with other arrays and metadata."""
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = {**file.metadata(), **changes}
        held = {name: file.get_tensor(name) for name in file.keys()}
    held.update(arrays or {})
    held = {name: x for name, x in held.items() if name not in drop}
    metadata = {name: x for name, x in metadata.items() if name not in drop}
    safetensors.numpy.save_file(held, path, metadata)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def text(names):
    return np.frombuffer(json.dumps(names).encode(), np.uint8)


DAMAGE = {
    "foreign_format": (dict(format="other.fit"), "not a lore_jax fit.*'other.fit'"),
    "no_format": (dict(drop=["format"]), "not a lore_jax fit"),
    "newer_version": (dict(version="99"), "version '99'; this lore_jax reads version"),
    "no_version": (dict(drop=["version"]), "version None"),
    "no_basis": (dict(drop=["basis"]), r"missing \['basis'\]"),
    "no_atoms": (dict(drop=["atoms"]), r"missing \['atoms'\]"),
    "unexpected": (dict(arrays={"evil": zeros(1)}), r"unexpected \['evil'\]"),
    "half_pruned": (dict(drop=["kept"]), "only part of .*kept"),
    "other_features": (dict(arrays={"unpruned.basis": zeros(6, 7)}), "shape .*D is"),
    "other_users": (dict(arrays={"weights": zeros(9, 3)}), "weights has shape .*U is"),
    "other_rank": (dict(arrays={"atoms": zeros(3, 9)}), "atoms has shape .*K is"),
    "flat_basis": (dict(arrays={"basis": zeros(5)}), r"basis must be \[D, K\]"),
    "integer_basis": (
        dict(arrays={"basis": zeros(5, 3, dtype=np.int32)}),
        "basis has dtype int32",
    ),
    "float_kept": (dict(arrays={"kept": zeros(3)}), "kept has dtype float32"),
    "rank": (dict(rank="7"), "says rank 7, but its basis"),
    "rank_words": (dict(rank="seven"), "damaged metadata"),
    "temperature": (dict(temperature="-1.0"), "temperature -1.0, expected above 0"),
    "temperature_nan": (dict(temperature="nan"), "temperature nan"),
    "config_not_json": (dict(config="{"), "damaged metadata"),
    "config_field": (dict(config='{"exec": 1}'), "damaged metadata"),
    "config_value": (dict(config='{"num_steps": -1}'), "damaged metadata.*num_steps"),
    "config_list": (dict(config="[1]"), "damaged metadata"),
    "no_config": (dict(drop=["config"]), "damaged metadata"),
    "selection": (dict(selection="oops"), "damaged metadata"),
    "names_not_json": (
        dict(arrays={"user_ids": np.frombuffer(b"\xff[", np.uint8)}),
        "damaged metadata",
    ),
    "too_few_names": (dict(arrays={"user_ids": text(["a"])}), "user_ids"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused(saved, change, message):
    rewrite(saved, **change)
    with pytest.raises(ValueError, match=message) as caught:
        lore.load(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("step", ["replace", "fsync", "write"])
def test_a_crash_while_saving_leaves_the_old_file(saved, monkeypatch, step):
    before = saved.read_bytes()

    def crash(*_, **__):
        raise KeyboardInterrupt

    class Torn:
        """A file that takes half of what is written, then crashes."""

        def __init__(self, handle, mode):
            self.file = original(handle, mode)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            raise KeyboardInterrupt

    original = os.fdopen
    if step == "write":
        monkeypatch.setattr(os, "fdopen", Torn)
    else:
        monkeypatch.setattr(os, step, crash)
    with pytest.raises(KeyboardInterrupt):
        lore.save(saved, make_fit(seed=5))
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    lore.load(saved)


def test_saving_again_replaces_the_file(saved):
    lore.save(saved, make_fit(seed=5))
    assert_same(make_fit(seed=5), lore.load(saved))
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_folder_that_does_not_exist_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="absent"):
        lore.save(tmp_path / "absent" / "fit", make_fit())


def test_the_file_is_plain_safetensors(saved):
    """Nothing in it is pickled; anybody can read the arrays."""
    arrays = safetensors.numpy.load_file(saved)
    np.testing.assert_array_equal(
        arrays["basis"], np.asarray(make_fit(pruned=True).basis)
    )


@pytest.fixture(scope="module")
def users():
    """(basis, pairs, state) of two users with names, one of them far from ASCII."""
    rng = np.random.default_rng(0)
    prior = make_fit().prior.replace(spread=jnp.asarray(0.5, jnp.float32))
    basis = rng.normal(size=(5, 3)).astype(np.float32)
    rows = [rng.normal(size=(4, 5)).astype(np.float32) for _ in range(2)]
    names = ["Ünal", "b c"]
    prefs = lore.Preferences.from_ragged(rows, user_ids=names)
    start = lore.start_users(prior, 2, names)
    return basis, prefs, lore.observe(start, basis, prefs)


def test_users_round_trip(tmp_path, users):
    basis, prefs, state = users
    lore.checkpoint.save_users(tmp_path / "users", state)
    loaded = lore.checkpoint.load_users(tmp_path / "users")
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    assert loaded.user_ids.tolist() == ["Ünal", "b c"]
    assert loaded.prior.temperature == 100.0
    np.testing.assert_array_equal(lore.weights(loaded), lore.weights(state))
    assert list(lore.observe(loaded, basis, prefs).num_pairs) == [8, 8]
    with pytest.raises(ValueError, match="fingerprint"):
        lore.observe(loaded, basis + 1, prefs)


def test_damaged_and_foreign_users_are_refused(tmp_path, users, saved):
    path = tmp_path / "users"
    with pytest.raises(FileNotFoundError):
        lore.checkpoint.load_users(path)
    with pytest.raises(TypeError, match="state"):
        lore.checkpoint.save_users(path, make_fit())
    with pytest.raises(ValueError, match="not a lore_jax set of users"):
        lore.checkpoint.load_users(saved)
    lore.checkpoint.save_users(path, users[2])
    with pytest.raises(ValueError, match="not a lore_jax fit"):
        lore.load(path)
    content = path.read_bytes()
    for share in (0.0, 0.01, 0.5, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match="users is truncated"):
            lore.checkpoint.load_users(path)
    arrays, metadata = lore.streaming.to_arrays(users[2])
    arrays["linear"] = arrays["linear"][:1]
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    with pytest.raises(ValueError, match="users is damaged: linear"):
        lore.checkpoint.load_users(path)


def test_a_crash_while_saving_users_keeps_the_old_file(tmp_path, users, monkeypatch):
    path = tmp_path / "users"
    lore.checkpoint.save_users(path, users[2])
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        lore.checkpoint.save_users(path, users[2])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_from_before_the_spread_take_the_default(saved):
    with safetensors.safe_open(saved, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    assert arrays.pop("spread") == np.float32(0.1)
    saved.write_bytes(safetensors.numpy.save(arrays, metadata))
    assert lore.load(saved).prior.spread == np.float32(0.1)
