"""Files of users: round trips, damage, and a crash while saving."""

import os

import jax
import numpy as np
import pytest
from checkpoint_cases import NAN, make_fit, rewrite

import lore_jax as lore
from lore_jax.io.tree import to_record


def test_users_round_trip(tmp_path, users):
    model, prefs, state = users
    lore.save_users(tmp_path / "users", state)
    loaded = lore.load_users(tmp_path / "users")
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    assert loaded.user_ids.tolist() == ["Ünal", "b c"]
    assert loaded.temperature == 100.0
    np.testing.assert_array_equal(
        lore.streaming.weights(loaded), lore.streaming.weights(state)
    )
    assert list(lore.streaming.update(model, loaded, prefs).num_pairs) == [8, 8]
    with pytest.raises(ValueError, match="fingerprint"):
        lore.streaming.update(model.replace(basis=model.basis + 1), loaded, prefs)


def test_damaged_and_foreign_users_are_refused(tmp_path, users, saved):
    path = tmp_path / "users"
    with pytest.raises(FileNotFoundError):
        lore.load_users(path)
    with pytest.raises(TypeError, match="state"):
        lore.save_users(path, make_fit())
    with pytest.raises(ValueError, match="not a lore_jax users"):
        lore.load_users(saved)
    lore.save_users(path, users[2])
    with pytest.raises(ValueError, match="not a lore_jax fit"):
        lore.load(path)
    content = path.read_bytes()
    for share in (0.0, 0.01, 0.5, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match="users is truncated"):
            lore.load_users(path)
    path.write_bytes(content)
    rewrite(path, arrays={"linear": users[2].linear[:1]})
    with pytest.raises(ValueError, match="users is damaged: linear"):
        lore.load_users(path)


def test_a_crash_while_saving_users_keeps_the_old_file(tmp_path, users, monkeypatch):
    path = tmp_path / "users"
    lore.save_users(path, users[2])
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        lore.save_users(path, users[2])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


USERS_DAMAGE = {
    "nan_table": ("table", (0, 1), NAN, "table must be finite"),
    "table": ("table", (1, 0), 0.5, "table must be at most 0.*user 1"),
    "nan_linear": ("linear", (0, 0), NAN, "linear must be finite"),
    "count": ("num_pairs", (1,), -1, "num_pairs must be at least 0.*user 1"),
    "no_pairs": ("num_pairs", (0,), 0, "table must be 0 for users without pairs"),
    "diagonal": ("quadratic", (1, 0), -1, "at least 0 on its diagonal.*user 1"),
    "mixed": ("quadratic", (0, 1), 1e6, "positive semi-definite.*user 0"),
    "atoms": ("prior.atoms", (0, 0), 2, "atoms must lie on the simplex"),
    "log_weights": ("prior.log_weights", (0,), -5, "log_weights must be normalised"),
    "margin_scale": ("prior.margin_scale", (), 0, "margin_scale is 0, which is out"),
    "variance_scale": ("prior.variance_scale", (), NAN, "variance_scale is nan"),
}


@pytest.mark.parametrize(
    ("name", "place", "value", "message"), USERS_DAMAGE.values(), ids=USERS_DAMAGE
)
def test_sums_that_no_pairs_have_are_refused(
    tmp_path, users, name, place, value, message
):
    path = tmp_path / "users"
    lore.save_users(path, users[2])
    array = np.array(to_record(users[2])[0][name])
    array[place] = value
    rewrite(path, arrays={name: array})
    with pytest.raises(ValueError, match=f"users is damaged: .*{message}"):
        lore.load_users(path)
