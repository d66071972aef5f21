"""Votes: their numbers, their names, the order of a changed one."""

import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax import _ids


def votes(user, item, vote, **settings):
    return lore.data.pairs_from_votes(user, item, vote, limit=10, **settings)


def test_a_changed_vote_needs_an_order():
    arrays = [0, 0, 0], [3, 4, 3], [-1, 1, 1]
    with pytest.raises(
        ValueError, match=r"that of 0 on 3 stands at 0 and at 2\. Pass time="
    ):
        votes(*arrays)
    assert [len(x) for x in votes(*arrays, time=[1, 2, 3])] == [0, 0, 0]
    # Earlier, user 0 disagreed with item 3; later votes stand first here.
    kept = votes(*arrays, time=[3.0, 2.0, 1.0])
    assert [x.tolist() for x in kept] == [[4], [3], [0]]
    moments = np.array(["2024-01-03", "2024-01-02", "2024-01-01"], "M8[D]")
    assert [x.tolist() for x in votes(*arrays, time=moments)] == [[4], [3], [0]]
    with pytest.raises(ValueError, match="stands at 0 and at 2 at the same time"):
        votes(*arrays, time=[1, 1, 1])
    three = [0] * 4, [3, 4, 3, 3], [1, 1, 1, -1]  # A tie before the latest is none.
    assert [x.tolist() for x in votes(*three, time=[1, 2, 1, 3])] == [[4], [3], [0]]


@pytest.mark.parametrize(
    ("vote", "error", "message"),
    [
        ([True, False], TypeError, "signed numbers, got booleans"),
        ([1.0, np.nan], ValueError, r"vote must be finite .*vote\[1\] is nan"),
        ([1, None], ValueError, r"vote\[1\] is missing"),
        ([1, np.inf], ValueError, r"vote\[1\] is inf"),
        (["agree", "disagree"], TypeError, "vote must hold numbers"),
        ([1], ValueError, "vote must have one entry per pair"),
    ],
)
def test_wrong_votes_are_refused(vote, error, message):
    with pytest.raises(error, match=message):
        votes([0, 0], [0, 1], vote)


def test_names_and_large_numbers_may_vote():
    got = votes(["ann", "ann"], [10**12, 5], [0.5, -2.0])
    assert [x.tolist() for x in got] == [[10**12], [5], ["ann"]]
    with pytest.raises(ValueError, match=r"user\[1\] is missing"):
        votes(["ann", None], [1, 2], [1, -1])


def test_a_column_on_a_device_is_read():
    assert _ids.column(jnp.array([3, 1]), "user").tolist() == [3, 1]
