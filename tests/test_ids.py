"""Ids are names unless they are plainly indices; nothing is missing, mixed or huge."""

import decimal
import tracemalloc

import jax
import numpy as np
import pyarrow
import pytest

import lore_jax as lore
from lore_jax.io.tree import from_record, to_record
from lore_jax.preferences import Ids

X = np.eye(4, dtype=np.float32)
MODEL = lore.RewardModel(np.eye(4, 2, dtype=np.float32))


class NAType:
    """Like the missing value of pandas: any comparison is undecided."""

    def __eq__(self, other):
        return self

    __ne__ = __eq__
    __hash__ = object.__hash__

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")


def pairs(user, chosen=(0, 1), rejected=(1, 2), **changes):
    return lore.Preferences.from_pairs(X, chosen, rejected, user, **changes)


@pytest.mark.parametrize(
    ("user", "names"),
    [
        ([7, 1_234_567_890_123], [7, 1_234_567_890_123]),
        ([3_000_000, 7], [7, 3_000_000]),
        ([2, 2], [2]),
        (np.array([2**63 + 5, 3], np.uint64), [3, 2**63 + 5]),
        (np.array([-(2**62), 5]), [-(2**62), 5]),
        (np.array([2**31, 2**31 + 1], ">i8"), [2**31, 2**31 + 1]),
        (pyarrow.array([9, 4]), [4, 9]),
        (pyarrow.chunked_array([["b"], ["a"]]), ["a", "b"]),
        (np.array(["b", "a"], object), ["a", "b"]),
        ([np.int64(9), 4], [4, 9]),
        (np.array([b"b", b"\xc3\xbc"]), ["b", "ü"]),
        (memoryview(np.array([9, 4])), [4, 9]),
        (np.ma.array(["b", "a"]), ["a", "b"]),
    ],
)
def test_what_is_no_index_is_a_name(user, names):
    prefs = pairs(user)
    assert prefs.num_users == len(names)
    assert prefs.ids.users.tolist() == names
    given = np.asarray(user).tolist() if not isinstance(user, list) else user
    given = [x.decode() if isinstance(x, bytes) else x for x in given]
    found = prefs.ids.users[prefs.user][np.argsort(prefs.order)]
    assert found.tolist() == given


@pytest.mark.parametrize("user", [[0, 1], [1, 0], [0, 0], np.array([1, 0], np.uint8)])
def test_every_number_from_zero_is_an_index(user):
    prefs = pairs(user)
    assert prefs.ids is None
    assert prefs.num_users == max(user) + 1


def test_num_users_makes_integers_indices():
    assert pairs([2, 0], num_users=5).ids is None
    assert pairs([2, 0], num_users=5).num_users == 5


def test_num_users_makes_integers_indices_of_strings():
    prefs = pairs([1, 0], num_users=2, user_ids=["b", "a"])
    assert prefs.ids.users[prefs.user].tolist() == ["b", "a"]
    np.testing.assert_array_equal(prefs.order, [1, 0])
    prefs = pairs([1, 0], num_users=2, user_ids=[1, 0])
    np.testing.assert_array_equal(prefs.order, [0, 1])


def test_what_names_are_given_for_is_referred_to_by_name():
    prefs = pairs(["u"], [2], [0], item_ids=[2, 0, 1, 3])
    assert prefs.ids.items[prefs.chosen].tolist() == [2]
    assert prefs.ids.items[prefs.rejected].tolist() == [0]
    assert (prefs.chosen[0], prefs.rejected[0]) == (0, 1)
    prefs = pairs([0, 0, 1], [0, 1, 2], [1, 2, 3], user_ids=[1, 0])
    assert prefs.ids.users.tolist() == [1, 0]
    np.testing.assert_array_equal(prefs.counts, [1, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: pairs(["a", "b"], item_ids=list("abcd")),
            TypeError,
            r"chosen holds integers and item_ids strings",
        ),
        (
            lambda: pairs([0, 1], user_ids=["0", "1"]),
            TypeError,
            "user holds integers and user_ids strings",
        ),
        (
            lambda: pairs(["7", "8"], user_ids=[7, 8]),
            TypeError,
            "user holds strings and user_ids integers",
        ),
        (lambda: pairs([0, 1, -1]), ValueError, r"user\[2\] is -1"),
        (lambda: pairs([2**64, 5]), ValueError, r"user\[0\] is 18446744073709551616"),
        (lambda: pairs([2**63, -1]), ValueError, "all signed or all unsigned"),
        (lambda: pairs(["a", "b" * 257]), ValueError, r"256 .*user\[1\] has 257"),
        (
            lambda: pairs(np.array(["a", "b" * 257])),
            ValueError,
            r"256 .*user\[1\] has 257",
        ),
        (lambda: pairs(["a", "a\0"]), ValueError, r"user\[1\] holds a null character"),
        (lambda: pairs([b"a", b"\xff"]), ValueError, r"user\[1\] .* not UTF-8"),
        (lambda: pairs([True, False]), TypeError, "user must hold integers or strings"),
        (lambda: pairs([1, decimal.Decimal(2)]), TypeError, r"user\[1\]"),
        (lambda: pairs(np.array(["NaT"], "M8[s]")), TypeError, "user .*datetime64"),
        (
            lambda: pairs([0, 1], item_ids=[3, 1, 3, 0]),
            ValueError,
            r"item_ids must be distinct; 3 repeats, at \[0, 2\]",
        ),
        (
            lambda: pairs(["a", "b"], chosen=[0, 1], item_ids=[5, 6, 7, 8]),
            ValueError,
            r"chosen\[0\] is 0, which is not in item_ids",
        ),
    ],
)
def test_wrong_ids_are_refused_with_the_place(call, error, message):
    with pytest.raises(error, match=message):
        call()


MISSING = {
    "none": ["ann", None],
    "nan_in_a_list": ["ann", float("nan")],
    "numpy_nan": np.array([7, np.nan]),
    "integers_and_none": [7, None],
    "na": ["ann", NAType()],
    "empty": ["ann", ""],
    "empty_in_an_array": np.array(["ann", ""]),
    "decimal": [7, decimal.Decimal("nan")],
    "arrow_null": pyarrow.array(["ann", None]),
    "arrow_integer_null": pyarrow.array([7, None]),
    "arrow_scalar": [pyarrow.scalar("ann"), pyarrow.scalar(None, pyarrow.string())],
    "objects": np.array(["ann", None], object),
    "not_a_time": ["ann", np.datetime64("NaT")],
}


@pytest.mark.parametrize("values", MISSING.values(), ids=MISSING)
@pytest.mark.parametrize("name", ["user", "group", "user_ids", "chosen"])
def test_a_missing_id_is_refused_with_its_place(name, values):
    arguments = {"user": [0, 1], name: values}
    if name == "user_ids":
        arguments["user"] = []
        arguments.update(chosen=[], rejected=[])
    with pytest.raises(ValueError, match=rf"{name}\[1\] is missing"):
        pairs(**arguments)


def test_a_masked_id_is_refused_with_its_place():
    with pytest.raises(ValueError, match=r"user must have no masked entry; user\[1\]"):
        pairs(np.ma.array([7, 8], mask=[False, True]))
    with pytest.raises(ValueError, match=r"user\[0\] is missing"):
        pairs([np.ma.masked, 8])


@pytest.mark.parametrize("name", ["user", "group", "user_ids", "item_ids"])
def test_one_and_the_string_one_are_never_mixed(name):
    arguments = {"user": [], "chosen": [], "rejected": [], name: ["1", 1]}
    if name in ("user", "group"):
        arguments.update(chosen=[0, 1], rejected=[1, 2])
        arguments.setdefault("user", [0, 1])
        arguments["user"] = arguments["user"] or [0, 1]
    with pytest.raises(ValueError, match=rf"{name}\[0\] is '1' and {name}\[1\] is 1"):
        pairs(**arguments)


def test_memory_does_not_depend_on_the_size_of_an_id():
    tracemalloc.start()
    pairs([7, 10**12])
    pairs([7, 2**63])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_ids_compare_by_value():
    def make(users=("a", "b"), items=None):
        arrays = (None if x is None else np.array(x) for x in (users, items))
        return Ids(*arrays)

    assert make() == make()
    assert hash(make()) == hash(make())
    assert make(np.array(["a", "b"], "<U9")) == make()
    different = [
        make(),
        make(("b", "a")),
        make(None, ("a", "b")),
        make(("a",), ("b",)),
        make(("1", "2")),
        make((1, 2)),
        make(("ab", "c")),
        make(("a", "bc")),
    ]
    assert len(set(different)) == len(different)
    assert make() != "a"


def test_ids_are_read_only_and_of_their_own():
    names = np.array(["a", "b"])
    prefs = pairs(["a", "b"], user_ids=names)
    names[0] = "z"
    assert prefs.ids.users.tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="read-only"):
        prefs.ids.users[0] = "z"


def test_equal_names_do_not_retrace():
    traces = []

    @jax.jit
    def loss(prefs):
        traces.append(1)
        return prefs.features[prefs.chosen].sum()

    for _ in range(3):
        loss(pairs(["a", "b"], item_ids=None))
    assert len(traces) == 1
    loss(pairs(["a", "c"]))
    assert len(traces) == 2


def test_named_records_are_trees():
    first, second = pairs(["a", "b"]), pairs(["a", "b"])
    both = jax.tree.map(lambda a, b: a + b, first, second)
    np.testing.assert_array_equal(both.chosen, 2 * first.chosen)
    assert both.ids.users.tolist() == ["a", "b"]
    prior = lore.Prior(
        atoms=np.eye(2, dtype=np.float32),
        log_weights=np.log(np.float32([0.5, 0.5])),
        concentration=np.float32(1),
        tempering=np.float32(0),
    )
    model = MODEL.replace(prior=prior)
    states = [
        lore.streaming.init(model, user_ids=names) for names in (["a", "b"], [7, 9])
    ]
    count = jax.jit(lambda state: state.num_pairs.sum())
    assert [float(count(states[i])) for i in (0, 0, 1)] == [0.0, 0.0, 0.0]
    moved = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state))(states[1])
    assert moved.user_ids.tolist() == [7, 9]
    merged = lore.streaming.merge(
        states[1], lore.streaming.init(model, user_ids=[9, 3])
    )
    assert merged.user_ids.tolist() == [7, 9, 3]
    with pytest.raises(TypeError, match="b holds integers and a strings"):
        lore.streaming.merge(*states)
    assert from_record(*to_record(states[1])).user_ids.tolist() == [7, 9]


def adapted(weights, names):
    weights = np.array(weights, np.float32)
    rest = (np.log(weights + 1e-9), *np.zeros((4, len(weights))))
    return lore.Adapted(weights, *rest, user_ids=names and np.array(names))


def test_weights_of_records_are_matched_by_name():
    new = adapted([[1, 0], [0, 1], [0.5, 0.5]], ["bob", "ann", "eve"])
    prefs = pairs(["ann", "bob"])
    bare = np.array([[0, 1], [1, 0]], np.float32)
    for function in (lore.margins, lore.accuracy, lore.log_loss):
        by_name = function(MODEL, new, prefs)
        np.testing.assert_array_equal(by_name, function(MODEL, bare, pairs([0, 1])))
        same = function(MODEL, bare[::-1], prefs, user_ids=["bob", "ann"])
        np.testing.assert_array_equal(by_name, same)
    scores, rows = lore.top_k(MODEL, new, X, user=["ann", "bob"], k=1)
    np.testing.assert_array_equal(rows[:, 0], [1, 0])
    np.testing.assert_array_equal(
        lore.score_rows(MODEL, new, X, ["ann", "bob"], [1, 1]), [1, 0]
    )
    np.testing.assert_array_equal(lore.score(MODEL, new, X)[:, 0], [1, 0, 0.5])
    np.testing.assert_array_equal(scores[:, 0], [1, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda new: lore.accuracy(MODEL, new, pairs(["ann", "joe"])),
            ValueError,
            "'joe', which is not in weights",
        ),
        (
            lambda new: lore.accuracy(MODEL, new, pairs([0, 1])),
            ValueError,
            "weights names its users and prefs does not",
        ),
        (
            lambda new: lore.accuracy(
                MODEL,
                new._replace(user_ids=None),
                pairs(["ann", "bob"]),
            ),
            ValueError,
            "prefs names its users and weights does not",
        ),
        (
            lambda new: lore.accuracy(MODEL, new.weights, pairs(["ann", "bob"])),
            ValueError,
            "prefs names its users and weights is a plain array: pass what adapt",
        ),
        (
            lambda new: lore.accuracy(
                MODEL, new.weights, pairs(["ann", "bob"]), user_ids=["ann"]
            ),
            ValueError,
            "user_ids must name every row of weights: 1 names for 2 rows",
        ),
        (
            lambda new: lore.accuracy(
                MODEL, new, pairs(["ann", "bob"]), user_ids=["ann", "bob"]
            ),
            ValueError,
            "user_ids belongs to plain weights",
        ),
        (
            lambda new: lore.top_k(MODEL, new, X, user=[0], k=1),
            TypeError,
            "user holds integers and the users of weights strings",
        ),
        (
            lambda new: lore.top_k(MODEL, new.weights, X, user=["ann"], k=1),
            TypeError,
            "user holds names, so weights must name its users",
        ),
        (
            lambda new: lore.score_rows(MODEL, new, X, ["joe"], [1]),
            ValueError,
            r"user\[0\] is 'joe', which is not in the users of weights",
        ),
    ],
)
def test_users_who_do_not_match_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(adapted([[1, 0], [0, 1]], ["ann", "bob"]))


def test_integer_names_are_saved_and_read(tmp_path, fitted):
    names = np.arange(len(fitted.weights)) * 10**10 + 5
    lore.save(tmp_path / "fit", fitted.replace(ids=Ids(names, None)))
    assert lore.load(tmp_path / "fit").user_ids.tolist() == names.tolist()
