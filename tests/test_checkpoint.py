"""Round trips, damaged and foreign files, and a crash while saving."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import lore_jax as lore
from lore_jax.io import files
from lore_jax.io.tree import to_record
from lore_jax.preferences import Ids
from lore_jax.results import History


def make_fit(num_users=4, num_features=5, *, pruned=False, names=True, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    wide = lore.RewardParams(normal(num_features, 7), normal(num_users, 7))
    kept = jnp.array([0, 2, 6])
    params = lore.RewardParams(wide.basis[:, kept], wide.logits[:, kept])
    users = np.array(["Ünal", "b c", "", "zoe"][:num_users])
    prior = lore.Prior(
        atoms=jnp.eye(3),
        log_weights=jnp.full(3, -np.log(3), jnp.float32),
        concentration=jnp.asarray(np.inf, jnp.float32),
        tempering=jnp.asarray(0.25, jnp.float32),
        decay=jnp.asarray(0.5, jnp.float32),
    )
    return lore.Fitted(
        model=lore.RewardModel(params.basis, prior, temperature=100.0),
        weights=params.weights,
        logits=params.logits,
        history=History(
            loss=abs(normal(6)),
            weights_norm=abs(normal(6)),
            basis_norm=abs(normal(6)),
            selection=({"log_loss": 0.5, "chosen": True}, {"log_loss": float("inf")}),
        ),
        unpruned=wide if pruned else None,
        kept=kept if pruned else None,
        recipe=lore.PublishedAlternating(num_steps=6, prune=pruned),
        ids=Ids(users, np.array(["row 0", "row 1"])) if names else None,
    )


def assert_same(first, second):
    left, right = jax.tree.leaves_with_path(first), jax.tree.leaves_with_path(second)
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, a), (_, b) in zip(left, right, strict=True):
        assert np.shape(a) == np.shape(b), path
        assert np.asarray(a).dtype == np.asarray(b).dtype, path
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    assert first.model.temperature == second.model.temperature
    assert first.recipe == second.recipe
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
    first, second = (lore.adapt(f.model, planted.heldout) for f in (fitted, loaded))
    np.testing.assert_array_equal(first.weights, second.weights)


def test_a_fit_without_a_prior_round_trips(tmp_path):
    original = make_fit()
    original = original.replace(model=original.model.replace(prior=None))
    lore.save(tmp_path / "fit", original)
    loaded = lore.load(tmp_path / "fit")
    assert_same(original, loaded)
    assert loaded.model.prior is None


def test_rank_zero_round_trips(tmp_path, make_preferences):
    prefs = make_preferences()
    anchor = np.arange(6, dtype=np.float32)
    original = lore.fit(prefs, rank=0, key=jax.random.key(0), anchor=anchor)
    lore.save(tmp_path / "fit", original)
    assert_same(original, lore.load(tmp_path / "fit"))


@pytest.mark.parametrize("temperature", [5, np.float32(5)])
def test_any_number_may_be_the_temperature(tmp_path, make_preferences, temperature):
    recipe = lore.PublishedJoint(num_steps=0, temperature=temperature, prior=None)
    original = lore.fit(
        make_preferences(), rank=2, key=jax.random.key(0), recipe=recipe
    )
    lore.save(tmp_path / "fit", original)
    assert lore.load(tmp_path / "fit").model.temperature == 5.0


def test_double_precision_round_trips(tmp_path):
    with jax.enable_x64(True):
        fit = make_fit()
        wide = jax.tree.map(lambda x: x.astype(np.float64), fit.params)
        original = fit.replace(
            model=fit.model.replace(basis=wide.basis),
            logits=wide.logits,
            weights=wide.weights,
        )
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


def rewrite(path, arrays=None, drop=(), record=None, **changes):
    """Saves the file again with other arrays, metadata and record.

    A record is a text, or values by their place in the file's own; `...` is none.
    """
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = {**file.metadata(), **changes}
        held = {name: file.get_tensor(name) for name in file.keys()}
    held.update(arrays or {})
    held = {name: x for name, x in held.items() if name not in drop}
    if isinstance(record, str):
        metadata["record"], record = record, None
    for place, value in (record or {}).items():
        tree = json.loads(metadata["record"])
        *parents, last = place.split(".")
        fields = tree["fields"]
        for name in parents:
            fields = fields[name]["fields"]
        fields[last] = value
        if value is ...:
            del fields[last]
        metadata["record"] = json.dumps(tree)
    metadata = {n: x for n, x in metadata.items() if n not in ("digest", *drop)}
    files.write_record(path, held, metadata)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def text(names):
    return np.frombuffer(json.dumps(names).encode(), np.uint8)


def change(name, place, value):
    """The array `name` of the saved fit with one entry, or row, replaced."""
    array = np.array(to_record(make_fit(pruned=True))[0][name])
    array[place] = value
    return dict(arrays={name: array})


def without(name):
    """A file whose record says that the array is None."""
    return dict(drop=[name], record={name: None})


DEEP = "[" * 100_000
NAN, INFINITY = np.float32("nan"), np.float32("inf")
HALF = np.array([1, -1, 0], np.float32)
NO_STEPS = {
    f"history.{name}": zeros(0) for name in ("loss", "weights_norm", "basis_norm")
}
DAMAGE = {
    "foreign_format": (dict(format="other.fit"), "not a lore_jax fit.*'other.fit'"),
    "no_format": (dict(drop=["format"]), "not a lore_jax fit"),
    "newer_version": (dict(version="99"), "version '99'; this lore_jax reads version"),
    "no_version": (dict(drop=["version"]), "version None"),
    "no_basis": (dict(drop=["model.basis"]), r"array model\.basis is missing"),
    "no_atoms": (dict(drop=["model.prior.atoms"]), r"prior\.atoms is missing"),
    "no_variance_scale": (
        dict(drop=["model.prior.variance_scale"]),
        r"array model\.prior\.variance_scale is missing",
    ),
    "no_name": (dict(drop=["ids.users"]), r"array ids\.users is missing"),
    "basis_none": (without("model.basis"), r"damaged: model\.basis is missing"),
    "atoms_none": (without("model.prior.atoms"), "is damaged"),
    "weights_none": (without("weights"), "damaged: weights is missing"),
    "loss_none": (without("history.loss"), r"damaged: history\.loss is missing"),
    "unexpected": (dict(arrays={"evil": zeros(1)}), r"unexpected arrays \['evil'\]"),
    "half_pruned": (without("kept"), "only part of .*kept"),
    "other_features": (dict(arrays={"unpruned.basis": zeros(6, 7)}), "shape .*D is"),
    "other_users": (dict(arrays={"weights": zeros(9, 3)}), "logits has shape .*U is 9"),
    "other_rank": (
        dict(arrays={"model.prior.atoms": zeros(3, 9)}),
        "atoms has shape .*K is",
    ),
    "flat_basis": (
        dict(arrays={"model.basis": zeros(5)}),
        r"model\.basis must be \[D, K\]",
    ),
    "integer_basis": (
        dict(arrays={"model.basis": zeros(5, 3, dtype=np.int32)}),
        r"model\.basis has dtype int32",
    ),
    "float_kept": (dict(arrays={"kept": zeros(3)}), "kept has dtype float32"),
    "temperature": (dict(record={"model.temperature": -1.0}), "temperature -1"),
    "temperature_nan": (
        dict(record={"model.temperature": float("nan")}),
        "temperature nan",
    ),
    "temperature_words": (dict(record={"model.temperature": "1"}), "temperature '1'"),
    "temperature_other": (
        dict(record={"model.temperature": 50.0}),
        "50, but that of its recipe",
    ),
    "no_record": (dict(drop=["record"]), "is damaged: missing 'record'"),
    "record_not_json": (dict(record="{"), "record is not JSON"),
    "record_deep": (dict(record=DEEP), "record is not JSON"),
    "record_list": (dict(record="[1]"), "is damaged: unexpected arrays"),
    "record_kind": (
        dict(record='{"kind": "os.system", "fields": {}}'),
        "the record is of the unknown kind 'os.system'",
    ),
    "model_kind": (dict(record={"model": {"kind": "eval"}}), "model is of the unknown"),
    "model_none": (dict(record={"model": None}), "is damaged: unexpected arrays"),
    "recipe_field": (dict(record={"recipe.exec": 1}), "recipe has the fields.*exec"),
    "recipe_value": (dict(record={"recipe.num_steps": -1}), "is damaged.*num_steps"),
    "recipe_list": (dict(record={"recipe": [1]}, arrays=NO_STEPS), "damaged.*recipe"),
    "recipe_name": (dict(record={"recipe.prior": {}}), r"recipe\.prior is of the unk"),
    "recipe_grid": (dict(record={"recipe.prior.decays": 0.5}), "is damaged.*decays"),
    "recipe_short": (
        dict(record={"recipe.num_steps": 3}),
        r"loss has 6 steps, but recipe\.num_steps is 3",
    ),
    "no_recipe": (dict(record={"recipe": None}, arrays=NO_STEPS), "damaged.*recipe"),
    "selection": (dict(record={"history.selection": "oops"}), "selection must be a tu"),
    "selection_list": (dict(record={"history.selection": []}), "selection must be a t"),
    "selection_object": (
        dict(record={"history.selection": {"kind": "dict", "items": {}}}),
        "selection must be a tuple of objects",
    ),
    "selection_rows": (
        dict(record={"history.selection": {"kind": "tuple", "items": [1]}}),
        "selection must be a tuple of objects",
    ),
    "starts": (dict(record={"history.starts": 1}), "starts must be an object"),
    "names_not_json": (
        dict(arrays={"ids.users": np.frombuffer(b"\xff[", np.uint8)}),
        r"ids\.users is not JSON",
    ),
    "names_deep": (
        dict(arrays={"ids.items": np.frombuffer(DEEP.encode(), np.uint8)}),
        r"ids\.items is not JSON",
    ),
    "too_few_names": (dict(arrays={"ids.users": text(["a"])}), "user_ids names 1 user"),
    "names_twice": (dict(arrays={"ids.users": text(["a", "b", "a", "c"])}), "distinct"),
    "names_nested": (dict(arrays={"ids.users": text([["a"]] * 4)}), "list of strings"),
    "names_mixed": (dict(arrays={"ids.items": text([1, "a"])}), "list of strings"),
    "names_null": (dict(arrays={"ids.items": text(["a", "a\0"])}), "null character"),
    "nan_basis": (
        change("model.basis", (2, 1), NAN),
        r"basis must be finite; model\.basis\[2, 1\]",
    ),
    "inf_logits": (change("logits", (0, 0), INFINITY), "logits must be finite"),
    "nan_loss": (change("history.loss", 3, NAN), r"history\.loss\[3\] is not"),
    "negative_loss": (change("history.loss", 3, -1), r"history\.loss must hold"),
    "nan_weights": (change("weights", (0, 0), NAN), "weights must be? ?.*finite"),
    "weights_off": (change("weights", 1, HALF), "weights must lie on the simplex"),
    "weights_of_another": (
        change("weights", 1, np.array([1, 0, 0], np.float32)),
        r"weights must be softmax\(logits\); of user 1",
    ),
    "atoms_off": (
        change("model.prior.atoms", 0, HALF),
        "atoms must lie on the simplex",
    ),
    "nan_atoms": (
        change("model.prior.atoms", (0, 1), NAN),
        "atoms must lie on the simplex",
    ),
    "log_weights": (
        change("model.prior.log_weights", 1, -0.5),
        "log_weights must be normalised",
    ),
    "nan_log_weights": (
        change("model.prior.log_weights", 1, NAN),
        "log_weights must be log",
    ),
    "kept_twice": (change("kept", 1, 0), r"kept must ascend within 0 … 6"),
    "kept_beyond": (change("kept", 2, 7), "kept must ascend"),
    "kept_others": (change("kept", 1, 3), "basis must be the columns"),
    "unpruned": (change("unpruned.basis", (0, 2), 9.0), "basis must be the columns"),
    "validation_steps": (
        dict(
            arrays={
                "history.validation": np.ones(2, np.float32),
                "history.validation_steps": np.array([4, 7], np.int32),
            }
        ),
        r"validation_steps must ascend up to 6",
    ),
}
for _name, _values in {
    "concentration": (-1, NAN),
    "tempering": (-0.1, NAN, INFINITY),
    "variance_scale": (-0.1, NAN, INFINITY),
    "decay": (NAN, INFINITY, -INFINITY),
    "margin_scale": (0, -1, NAN, INFINITY),
}.items():
    for _value in _values:
        DAMAGE[f"{_name}_{_value}"] = (
            dict(arrays={f"model.prior.{_name}": np.array(_value, np.float32)}),
            f"{_name} is .*out of its range",
        )


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused(saved, change, message):
    """Its digest is right, so only what the numbers mean can tell."""
    rewrite(saved, **change)
    with pytest.raises(ValueError, match=message) as caught:
        lore.load(saved)
    assert str(saved) in str(caught.value)


def test_a_single_changed_byte_is_refused(saved):
    content = saved.read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        saved.write_bytes(changed)
        with pytest.raises(ValueError, match=r"fit (is|has) "):
            lore.load(saved)


def test_a_file_without_a_digest_is_refused(saved):
    with safetensors.safe_open(saved, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    del metadata["digest"]
    saved.write_bytes(safetensors.numpy.save(arrays, metadata))
    with pytest.raises(ValueError, match=r"fit is damaged: the digest .*says None"):
        lore.load(saved)


HEADERS = {
    "deep": b'{"a":' + b"[" * 100_000,
    "list": b"[]",
    "twice": b'{"a": {}, "a": {}}',
    "no_entry": b'{"a": 3}',
    "dtype": b'{"a": {"dtype": "F99", "shape": [], "data_offsets": [0, 4]}}',
    "dtype_list": b'{"a": {"dtype": [], "shape": [], "data_offsets": [0, 4]}}',
    "shape": b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    "shape_bool": b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
    "huge": b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": '
    b"[0, 4398046511104]}}",
    "huge_empty": b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 0], '
    b'"data_offsets": [0, 0]}}',
    "overlap": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    "one_offset": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
    "metadata": b'{"__metadata__": {"a": 1}}',
    "metadata_list": b'{"__metadata__": []}',
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("load", ["load", "load_users", "load_progress"])
def test_a_header_that_cannot_be_is_refused(tmp_path, header, load):
    path = tmp_path / "record"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="record is"):
        getattr(lore, load)(path)


def test_a_header_longer_than_its_file_is_not_read(tmp_path):
    path = tmp_path / "record"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=f"its header has {2**40} bytes, the file 10"):
        lore.load(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda f: f.replace(model=f.model.replace(temperature=50.0)),
            "temperature 50, but that of its recipe is 100",
        ),
        (
            lambda f: f.replace(model=f.model.replace(basis=f.model.basis * NAN)),
            "basis must be finite",
        ),
        (lambda f: f.replace(weights=f.weights[::-1]), r"be softmax\(logits\)"),
        (
            lambda f: f.replace(
                model=f.model.replace(
                    prior=f.model.prior.replace(atoms=-f.model.prior.atoms)
                )
            ),
            "atoms",
        ),
        (lambda f: f.replace(ids=Ids(np.array(["a"] * 4), None)), "must be distinct"),
    ],
    ids=["temperature", "basis", "weights", "atoms", "names"],
)
def test_what_loading_would_refuse_is_not_saved(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        lore.save(tmp_path / "fit", changed(make_fit()))
    assert list(tmp_path.iterdir()) == []


def test_a_fit_without_a_recipe_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"fitted\.recipe must be a recipe"):
        lore.save(tmp_path / "fit", make_fit().replace(recipe=None))


@pytest.mark.parametrize("step", ["replace", "fsync", "write"])
def test_a_crash_while_saving_leaves_the_old_file(saved, monkeypatch, step):
    before = saved.read_bytes()

    def crash(*_, **__):
        raise KeyboardInterrupt

    def tear(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    if step == "write":
        monkeypatch.setattr(pathlib.Path, "write_bytes", tear)
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
        arrays["model.basis"], np.asarray(make_fit(pruned=True).model.basis)
    )


@pytest.fixture(scope="module")
def users():
    """(model, pairs, state) of two users with names, one of them far from ASCII."""
    rng = np.random.default_rng(0)
    prior = make_fit().model.prior.replace(variance_scale=jnp.float32(0.5))
    basis = rng.normal(size=(5, 3)).astype(np.float32)
    rows = [rng.normal(size=(4, 5)).astype(np.float32) for _ in range(2)]
    names = ["Ünal", "b c"]
    prefs = lore.Preferences.from_ragged(rows, user_ids=names)
    model = lore.RewardModel(basis, prior, temperature=100.0)
    start = lore.streaming.init(model, user_ids=names)
    return model, prefs, lore.streaming.update(model, start, prefs)


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


@pytest.mark.parametrize("mark", ["", "0" * 31, "G" * 32])
def test_fingerprints_are_32_hex_digits(tmp_path, users, mark):
    path = tmp_path / "users"
    lore.save_users(path, users[2])
    rewrite(path, record={"fingerprint": mark})
    with pytest.raises(ValueError, match="users is damaged: fingerprint"):
        lore.load_users(path)
    with pytest.raises(ValueError, match="fingerprint"):
        lore.save_users(path, users[2].replace(fingerprint=mark))
