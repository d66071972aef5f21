"""Damaged and foreign files of fits are refused."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from checkpoint_cases import INFINITY, NAN, make_fit, rewrite

import lore_jax as lore
from lore_jax.io.tree import to_record


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
