"""Numbers of a table, a source or a caller: refused with the place, or read rightly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from number_cases import (
    BASIS,
    MODEL,
    ONES,
    PREFS,
    PRIOR,
    STATE,
    WEIGHTS,
    X,
    Z,
    fit,
    spoiled,
)

import lore_jax as lore


@pytest.mark.parametrize("block", [np.nan, "wide", "short"])
def test_blocks_of_a_source_are_checked_by_every_reader(block):
    class Source(lore.ArraySource):
        def blocks(self):
            first, second = np.array(X[:5]), np.array(X[5:])
            if block == "wide":
                second = np.ones((3, 5), np.float32)
            elif block == "short":
                second = second[:2]
            else:
                second[1, 2] = block
            yield from (first, second)

    source = Source(X)
    prefs = PREFS.replace(features=source)
    what = {"wide": "float.rows, D. with D=4", "short": "M=8 rows"}
    message = what.get(block, "features must be finite; row 6, column 2 is nan")
    for call in (
        lambda: lore.project(source, BASIS),
        lambda: lore.score(MODEL, WEIGHTS, source),
        lambda: lore.top_k(MODEL, WEIGHTS, source, user=[0], k=1),
        lambda: lore.accuracy(MODEL, WEIGHTS, prefs),
        lambda: lore.adapt(MODEL, prefs),
        lambda: lore.predict_proba(MODEL, PREFS, prefs),
        lambda: lore.streaming.update(MODEL, STATE, prefs),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_source_promises_a_table_of_floats():
    source = lore.ArraySource(X.astype(int))
    with pytest.raises(TypeError, match="features must be floating point"):
        lore.Preferences.from_pairs(source, [0], [1], [0])


def pairs(**changes):
    arguments = dict(features=X, chosen=[0, 1], rejected=[2, 3], user=[0, 1])
    return lore.Preferences.from_pairs(**{**arguments, **changes})


class Unreadable:
    """Like a tensor of bfloat16, which NumPy cannot read."""

    def __array__(self, *args, **kwargs):
        raise TypeError("Got unsupported ScalarType BFloat16")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: pairs(features=spoiled(X.astype(np.float64), 1e300)),
            ValueError,
            "features must be finite; row 1, column 0 is 1e.300, which overflows",
        ),
        (
            lambda: pairs(features=spoiled(X.astype(np.longdouble), 1e300)),
            ValueError,
            "row 1, column 0 .*overflows",
        ),
        (
            lambda: pairs(features=np.ma.masked_less(X, 0)),
            ValueError,
            "features must have no masked entry",
        ),
        (
            lambda: pairs(features=Unreadable()),
            TypeError,
            "features must be an array that NumPy can read.*BFloat16",
        ),
        (
            lambda: pairs(sample_weight=[1.0, 1e300]),
            ValueError,
            r"sample_weight must sum to at most 3\.4e\+38.*weight\[1\] is 1e\+300",
        ),
        (
            lambda: pairs(sample_weight=[3e38, 3e38]),
            ValueError,
            "sample_weight must sum to at most .*their sum is 6e",
        ),
        (
            lambda: pairs(sample_weight=np.ma.array([1.0, 2.0], mask=[False, True])),
            ValueError,
            r"sample_weight must have no masked entry; sample_weight\[1\]",
        ),
        (
            lambda: pairs(sample_weight=[1.0, None]),
            ValueError,
            r"sample_weight\[1\] is missing",
        ),
        (lambda: pairs(label=[None, 0.5]), ValueError, r"label\[0\] is missing"),
        (
            lambda: lore.project(X * np.float32(1e20), BASIS * np.float32(1e20)),
            ValueError,
            r"features · basis must stay below 8\.51e\+37 in float32 .*row 0 gives inf",
        ),
        (
            lambda: lore.log_loss(MODEL.replace(temperature=1e-38), WEIGHTS, PREFS),
            ValueError,
            "features · basis must stay below .*times T",
        ),
        (
            lambda: lore.adapt(
                lore.RewardModel(spoiled(BASIS.astype(np.float64), 1e300)), PREFS
            ),
            ValueError,
            r"model\.basis must be finite; model\.basis\[1, 0\] is not: 1e\+300, which",
        ),
        (
            lambda: lore.data.store_as(pairs(features=X * 1e5), np.float16),
            ValueError,
            r"finite in float16; row \d, column \d .*overflows float16",
        ),
        (
            lambda: fit(PREFS.replace(sample_weight=np.zeros(4, np.float32))),
            ValueError,
            r"prefs\.sample_weight is 0 for every pair",
        ),
        (
            lambda: lore.adapt_users(jnp.ones((3, 2)), jnp.ones(3), PRIOR),
            ValueError,
            r"z must be float\[U, P, K\], got shape \(3, 2\)",
        ),
        (
            lambda: lore.adapt_users(Z, ONES[:, :2], PRIOR),
            ValueError,
            r"sample_weight must be float\[U, P\] with U=2, P=3 like z, got shape "
            r"\(2, 2\)",
        ),
        (
            lambda: lore.adapt_users(Z, ONES, PRIOR, label=ONES[0]),
            ValueError,
            r"label must be float\[U, P\] .*got shape \(3,\)",
        ),
        (
            lambda: lore.adapt_users(np.ones((2, 3, 5)), ONES, PRIOR),
            ValueError,
            r"prior\.atoms must be float\[A, K\] with K=5",
        ),
        (
            lambda: lore.adapt_users(Z, -ONES, PRIOR),
            ValueError,
            r"sample_weight must be in \[0, inf\]; sample_weight\[0, 0\] is -1",
        ),
        (
            lambda: lore.best_pairs(np.array([1, np.nan, 2, 3]), PREFS),
            ValueError,
            r"scores\[1\] is nan",
        ),
        (
            lambda: lore.evaluation.macro_mean([0.5, np.inf]),
            ValueError,
            r"values\[1\] is inf",
        ),
        (
            lambda: lore.top_k(MODEL, WEIGHTS, X, user=[0], k=1.0),
            TypeError,
            "k must be an integer",
        ),
    ],
)
def test_wrong_numbers_are_refused_with_the_place(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_other_layouts_of_the_same_numbers_are_read_rightly():
    want = pairs(sample_weight=[1.0, 2.0], label=[0.25, 0.5])
    for dtype in (">f4", ">f8", np.longdouble):
        got = pairs(
            features=X.astype(dtype),
            chosen=np.array([0, 1], ">i8"),
            sample_weight=np.array([1, 2], dtype),
            label=np.array([0.25, 0.5], dtype),
        )
        assert got.features.dtype == np.float32
        assert got.sample_weight.dtype.isnative
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(pairs(features=np.ma.array(X)).features, X)


def test_only_the_table_is_shared_with_the_caller():
    chosen, weight = np.array([0, 1], np.int32), np.array([1, 2], np.float32)
    prefs = pairs(chosen=chosen, sample_weight=weight)
    chosen[:], weight[:] = 7, 9
    np.testing.assert_array_equal(prefs.chosen, [0, 1])
    np.testing.assert_array_equal(prefs.sample_weight, [1, 2])
    assert np.shares_memory(prefs.features, X)
