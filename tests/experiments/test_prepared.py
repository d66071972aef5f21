"""The format of prepared folders, and damaged ones."""

import zipfile

import numpy as np
import pytest

from experiments import prepared, stored


def test_pair_table_keeps_everything(tmp_path):
    table = prepared.PairTable.from_columns(
        user=["b", "a", "b"], unit=["u", "v", "w"], group=["g", "h", "i"],
        chosen=[0, 1, 2], rejected=[3, 4, 5], seen=[True, False, True],
        heldout=[False, False, True], label=[1, 0.5, 1], weight=None,
    )  # fmt: skip
    assert table.users.tolist() == ["a", "b"]
    assert table.seen.tolist() == [False, True]
    table.save(tmp_path / "pairs.npz")
    again = prepared.PairTable.load(tmp_path / "pairs.npz")
    assert again.weight is None
    for name in ("users", "seen", "user", "unit", "chosen", "heldout", "label"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    assert list(tmp_path.iterdir()) == [tmp_path / "pairs.npz"]
    with pytest.raises(ValueError, match="compares row 1 with itself"):
        prepared.PairTable.from_columns(
            user=["a"], unit=["u"], group=["g"], chosen=[1], rejected=[1],
            seen=[True], heldout=[True],
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_ready_embeddings_are_written_and_read(tmp_path, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="comes with jax")
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    features = np.random.default_rng(0).normal(size=(6, 3)).astype(kind)
    prepared.write_features(tmp_path, features, head=np.ones((1, 3)))
    found = prepared.load_features(tmp_path)
    assert str(found.dtype) == ("bfloat16" if dtype == "bfloat16" else "float32")
    np.testing.assert_array_equal(found, features.astype(found.dtype))
    assert np.load(tmp_path / "head.npy").shape == (3,)


def two_pairs(**changes):
    return prepared.PairTable.from_columns(
        **{
            **dict(user=["a", "b"], unit=["u", "v"], group=["g", "h"]),
            **dict(chosen=[0, 1], rejected=[2, 3], seen=[True, False]),
            **dict(heldout=[False, True], weight=[1.0, 2.0]),
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(user=np.array([0, 5], np.int32)), "user must hold integers from 0 to 1"),
        (dict(chosen=np.array([-1, 1], np.int32)), "chosen must hold integers"),
        (dict(chosen=np.array([2, 1], np.int32)), "chosen and rejected are the same"),
        (dict(chosen=np.array([0, 1, 2], np.int32)), r"chosen has shape \(3,\)"),
        (dict(weight=np.array([np.nan, 1])), "weight must be from 0"),
        (dict(seen=np.array([1, 2])), "seen must be bool"),
        (dict(users=np.array([1, 2])), "users must be texts"),
    ],
)
def test_a_pair_table_that_cannot_be_is_refused(tmp_path, change, message):
    path = tmp_path / "pairs.npz"
    stored.write_arrays(path, **{**vars(two_pairs()), "label": np.ones(2), **change})
    with pytest.raises(ValueError, match=rf"pairs\.npz is damaged: {message}"):
        prepared.PairTable.load(path)


def test_damaged_npz_files_are_refused(tmp_path):
    path = tmp_path / "pairs.npz"
    two_pairs().save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(200):
        changed = bytearray(content)
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
        path.write_bytes(
            changed if trial % 2 else content[: rng.integers(len(content))]
        )
        try:
            found = prepared.PairTable.load(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:  # Dates and such in the archive's directory.
            np.testing.assert_array_equal(found.chosen, [0, 1])
    with zipfile.ZipFile(path, "w") as archive:
        head = {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)}
        text = repr(head).encode()
        size = len(text).to_bytes(2, "little")
        archive.writestr("users.npy", b"\x93NUMPY\x01\x00" + size + text)
    with pytest.raises(ValueError, match=r"pairs\.npz is no whole .*makes 9007"):
        prepared.PairTable.load(path)
    stored.write_arrays(path, evil=np.zeros(3))
    with pytest.raises(ValueError, match=r"no pair table: .*unexpected \['evil'\]"):
        prepared.PairTable.load(path)


def test_a_head_of_another_table_is_refused(tmp_path):
    features = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    two_pairs().save(tmp_path / "pairs.npz")
    stored.write_json(tmp_path / "config.json", {})
    prepared.write_features(tmp_path, features, head=np.ones(3))
    assert prepared.load(tmp_path).head.tolist() == [1, 1, 1]
    stored.write_array(tmp_path / "head.npy", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"head\.npy belongs to another feature table"):
        prepared.load(tmp_path)
    prepared.write_features(tmp_path, features)
    assert prepared.load(tmp_path).head is None
    assert not (tmp_path / "head.npy").exists()
    prepared.write_features(tmp_path, features[:3])
    with pytest.raises(ValueError, match="a pair asks for row 3, but there are 3"):
        prepared.load(tmp_path)


def test_damaged_feature_files_name_themselves(tmp_path):
    features = np.ones((6, 3), np.float32)
    prepared.write_features(tmp_path, features)
    path = tmp_path / "features.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"features\.npy is no whole \.npy file"):
        prepared.load_features(tmp_path)
    (tmp_path / "features.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"features\.json is no JSON"):
        prepared.load_features(tmp_path)


def test_prepared_pairs_become_preferences(tmp_path):
    features = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    table = prepared.PairTable.from_columns(
        user=["b", "a", "b"], unit=["u", "v", "w"], group=["g", "h", "i"],
        chosen=[0, 1, 2], rejected=[3, 4, 5], seen=[True, False, True],
        heldout=[False, False, True],
    )  # fmt: skip
    found = prepared.Prepared(tmp_path, table, features, None, {})
    prefs = found.preferences(table.select(table.mask(seen=True)))
    assert prefs.num_users == 1
    np.testing.assert_array_equal(np.asarray(prefs.features), features[[0, 2, 3, 5]])
    np.testing.assert_array_equal(np.asarray(prefs.chosen), [0, 1])
    np.testing.assert_array_equal(np.asarray(prefs.rejected), [2, 3])
