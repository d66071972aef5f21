"""Thousands of mutated files: each is refused by a `ValueError` that names it.

`FUZZ_FILES=20000 pytest tests/test_fuzz_files.py` tries more; `.ci/slow` does.
"""

import copy
import json
import os

import jax
import numpy as np
import pytest
from checkpoint_cases import make_fit

import lore_jax as lore
from lore_jax._train.resume import seal
from lore_jax.io import checkpoint, files
from lore_jax.io.tree import VERSION
from lore_jax.results import Metrics, Progress

NUMBER = int(os.environ.get("FUZZ_FILES", "2100"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
EDGES = [np.nan, np.inf, -np.inf, -1.0, 0.0, 1e30, -0.0, 2.0]
TEXTS = [
    *("", "null", "[]", "{}", "-1", "1e999", "NaN", "[" * 50_000, "9" * 5000),
    *('{"a": ' * 3000, "\\ud83d", "\0", "0" * 32, '["a", "a"]', "[[1]]", "true"),
]
VALUES = [
    *(None, True, False, -1, 0, 3, 0.5, -0.0, float("nan"), float("inf"), 2**70),
    *("", "text", [], [1], [[]], {}, {"kind": "array"}, {"kind": "tuple", "items": []}),
    *({"kind": "dict", "items": {}}, {"kind": "Ids"}, {"kind": "Search", "fields": {}}),
]


def make_users():
    rng = np.random.default_rng(0)
    prior = jax.tree.map(np.asarray, make_fit().model.prior)
    basis = rng.normal(size=(5, 3)).astype(np.float32)
    rows = [rng.normal(size=(3, 5)).astype(np.float32) for _ in range(2)]
    prefs = lore.Preferences.from_ragged(rows, user_ids=["a", "b"])
    model = lore.RewardModel(basis, prior, temperature=100.0)
    start = lore.streaming.init(model, user_ids=["a", "b"])
    return lore.streaming.update(model, start, prefs)


def make_progress():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    steps, trail = np.asarray(4, np.int32), (normal(2, 5, 3), normal(2, 7))
    row = {"holdout": "items", "rank": 3, "smoothing": 1.0, "ridge": 0.1}
    row |= {"tempering": 0.4, "log_loss": 0.6, "chosen": True, "kept": True}
    return seal(
        Progress(
            state=(normal(5, 3), normal(7), steps, normal(5, 3), steps),
            metrics=Metrics(*(abs(normal(4)) for _ in Metrics._fields)),
            trail=trail,
            best=trail,
            losses=(abs(normal(6)),),
            finished=(abs(normal(1)), *(x[0] for x in trail), *(normal(3),) * 3),
            name="search 0",
            rows=(row,),
            fingerprint="0" * 32,
        )
    )


KINDS = {
    "fit": (checkpoint.save, checkpoint.load, lambda: make_fit(pruned=True)),
    "users": (checkpoint.save_users, checkpoint.load_users, make_users),
    "progress": (checkpoint.save_progress, checkpoint.load_progress, make_progress),
}


def flip(rng, content):
    out = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        out[rng.integers(len(out))] ^= 1 << rng.integers(8)
    return bytes(out)


def cut(rng, content):
    return content[: rng.integers(len(content))]


def lengthen(rng, content):
    return content + rng.bytes(rng.integers(1, 50))


def overwrite(rng, content):
    start, size = rng.integers(len(content)), rng.integers(1, 64)
    return content[:start] + rng.bytes(size) + content[start + size :]


def move(rng, content):
    a, b = sorted(rng.integers(len(content), size=2))
    return content[:a] + content[b:] + content[a:b]


def header(rng, content):
    """The header's JSON with something replaced that the digest may not cover."""
    size = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + size].decode()
    old = rng.choice(["F32", "[", "]", "{", "}", ":", ",", "0", "1", '"', "shape", "5"])
    new = rng.choice(
        ["F64", "[", "{", "", "-1", "null", "1e5", '"', "true", "99999999"]
    )
    places = [i for i in range(len(text)) if text.startswith(old, i)]
    place = places[rng.integers(len(places))]
    text = (text[:place] + new + text[place + len(old) :]).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


BYTES = (flip, cut, lengthen, overwrite, move, header)


def change_array(rng, arrays, metadata):
    """One number of one array."""
    name = rng.choice(sorted(arrays))
    array = np.array(arrays[name])
    if not array.size:
        return None
    flat = array.reshape(-1)
    place, old = rng.integers(flat.size), flat.copy()
    value = EDGES[rng.integers(len(EDGES))]
    if array.dtype.kind == "f":
        flat[place] = value
    else:
        flat[place] ^= 1 + rng.integers(3)
    if np.array_equal(old, flat, equal_nan=old.dtype.kind == "f"):
        return None
    return {**arrays, name: flat.reshape(array.shape)}, metadata


def change_shape(rng, arrays, metadata):
    name = rng.choice(sorted(arrays))
    array = np.asarray(arrays[name])
    array = np.nan_to_num(array, nan=0, posinf=0, neginf=0)
    options = [array[..., None], np.concatenate([np.atleast_1d(array)] * 2)]
    options += [array.astype(t) for t in ("f8", "i4", "u1") if array.dtype != t]
    return {**arrays, name: options[rng.integers(len(options))]}, metadata


def change_names(rng, arrays, metadata):
    name, other = rng.choice(sorted(arrays), 2, replace=False)
    if rng.random() < 0.5:
        return {n: x for n, x in arrays.items() if n != name}, metadata
    return {**arrays, name: arrays[other], other: arrays[name]}, metadata


def change_text(rng, arrays, metadata):
    name = rng.choice(sorted(metadata))
    if rng.random() < 0.2:
        return arrays, {n: x for n, x in metadata.items() if n != name}
    return arrays, {**metadata, name: TEXTS[rng.integers(len(TEXTS))]}


def change_record(rng, arrays, metadata):
    """One value of the record's JSON, or a part of it, is another."""
    record = json.loads(metadata["record"])
    places = list(places_of(record))
    holder, key = places[rng.integers(len(places))]
    other, name = places[rng.integers(len(places))]
    values = (*VALUES, other[name])
    value = values[rng.integers(len(values))]
    if json.dumps(value) == json.dumps(holder[key]):
        return None
    holder[key] = copy.deepcopy(value)
    return arrays, {**metadata, "record": json.dumps(record)}


def places_of(tree):
    """(dict or list, key or place) of everything in a tree of JSON."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield tree, key
        if isinstance(value, dict | list):
            yield from places_of(value)


CONTENT = (change_array, change_shape, change_names, change_text, change_record)


def same(first, second) -> bool:
    left, right = jax.tree.leaves(first), jax.tree.leaves(second)
    return len(left) == len(right) and all(
        np.shape(a) == np.shape(b)
        and np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")
        for a, b in zip(left, right)
    )


def refuses(load, path) -> bool:
    """Whether a file is refused as it should be; an unexpected exception goes on."""
    try:
        load(path)
    except ValueError as error:
        if str(path) in str(error):
            return True
        raise AssertionError(f"{error!r} does not name the file") from error
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_no_changed_byte_gets_in(tmp_path, kind):
    save, load, make = KINDS[kind]
    path = tmp_path / kind
    save(path, make())
    content = path.read_bytes()
    rng = np.random.default_rng([SEED, len(kind)])
    for trial in range(NUMBER // 6):
        change = BYTES[trial % len(BYTES)]
        changed = change(rng, content)
        if changed == content:
            continue
        path.write_bytes(changed)
        assert refuses(load, path), f"trial {trial}, {change.__name__}: it loads"


@pytest.mark.parametrize("kind", KINDS)
def test_no_wrong_exception_where_the_digest_is_right(tmp_path, kind):
    """Put together by hand: what loads must survive saving, and load as the same."""
    save, load, make = KINDS[kind]
    path = tmp_path / kind
    save(path, make())
    arrays, metadata = files.read_record(path, f"lore_jax.{kind}", VERSION, kind)
    rng = np.random.default_rng([SEED, len(kind), 1])
    refused = 0
    for trial in range(NUMBER // 6):
        changed = CONTENT[trial % len(CONTENT)](rng, arrays, metadata)
        if changed is None:
            continue
        files.write_record(path, *changed)
        if refuses(load, path):
            refused += 1
            continue
        found = load(path)
        save(path, found)
        assert same(found, load(path))
    assert refused > NUMBER // 12
