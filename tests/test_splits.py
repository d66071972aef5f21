"""Hold-outs of items, and tables without the rows that no pair uses."""

import numpy as np
import pytest

import lore_jax as lore
from lore_jax._pairs import used_rows
from lore_jax.data import splits


def make_pairs(kind="prompts", num_pairs=600, seed=0, **fields):
    """40 prompts of 5 responses, or 200 rows that anyone may compare."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(200, size=num_pairs)
    rejected = (chosen + rng.integers(1, 200, size=num_pairs)) % 200
    if kind == "prompts":
        rejected = chosen // 5 * 5 + (chosen + rng.integers(1, 5, size=num_pairs)) % 5
    return lore.Preferences.from_pairs(
        rng.normal(size=(200, 3)).astype(np.float32),
        chosen,
        None if kind == "differences" else rejected,
        rng.integers(30, size=num_pairs),
        30,
        **fields,
    )


def rows_of(prefs):
    columns = [x for x in (prefs.chosen, prefs.rejected) if x is not None]
    return set(np.concatenate([np.asarray(x) for x in columns]).tolist())


def place(prefs):
    """One number for every pair, whatever the order that it is stored in."""
    rejected = 0 if prefs.rejected is None else np.asarray(prefs.rejected, np.int64)
    key = (np.asarray(prefs.user, np.int64) * 999 + prefs.chosen) * 999 + rejected
    return np.sort(key)


@pytest.mark.parametrize("kind", ["prompts", "rows", "differences"])
def test_no_item_is_on_both_sides(kind):
    prefs = make_pairs(kind)
    held = splits.hold_out(prefs, share=0.4, seed=1, unit="items")
    assert held.training.num_pairs
    assert held.heldout.num_pairs
    assert not rows_of(held.training) & rows_of(held.heldout)
    total = held.training.num_pairs + held.heldout.num_pairs + held.num_dropped
    assert total == 600
    assert held.training.num_users == held.heldout.num_users == 30
    # Only pairs of rows that are drawn apart fall between the sides.
    assert (held.num_dropped > 0) == (kind == "rows")


def test_prompts_are_held_out_whole():
    prefs = make_pairs()
    held = splits.hold_out(prefs, share=0.4, seed=1, unit="items")
    prompts = [{row // 5 for row in rows_of(part)} for part in held[:2]]
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) / 40 == pytest.approx(0.4, abs=0.2)
    judged = splits.hold_out(prefs, share=0.4, seed=1)
    shared = {r // 5 for r in rows_of(judged[0])} & {r // 5 for r in rows_of(judged[1])}
    assert len(shared) > 30  # "judgements" are not items.


@pytest.mark.parametrize("kind", ["prompts", "rows"])
def test_groups_are_respected(kind):
    group = np.random.default_rng(2).integers(60, size=600)
    if kind == "prompts":  # Two prompts each, so that they join.
        group = np.asarray(make_pairs().chosen[np.argsort(make_pairs().order)]) // 10
    prefs = make_pairs(kind, group=group)
    held = splits.hold_out(prefs, share=0.3, seed=3, unit="items")
    first, second = held.training, held.heldout
    assert first.num_pairs
    assert not rows_of(first) & rows_of(second)
    assert not set(np.asarray(first.group)) & set(np.asarray(second.group))
    if kind == "prompts":
        assert held.num_dropped == 0
        parts = [{row // 10 for row in rows_of(x)} for x in (first, second)]
        assert parts[0] | parts[1] == set(range(20))
        assert not parts[0] & parts[1]


@pytest.mark.parametrize("unit", ["judgements", "items"])
@pytest.mark.parametrize("kind", ["prompts", "rows"])
def test_a_split_is_seeded(kind, unit):
    prefs = make_pairs(kind)
    first, again, other = (
        splits.hold_out(prefs, share=0.4, seed=seed, unit=unit) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(place(first.heldout), place(again.heldout))
    assert not np.array_equal(place(first.heldout), place(other.heldout))


@pytest.mark.parametrize("unit", ["judgements", "items"])
@pytest.mark.parametrize("kind", ["prompts", "rows"])
def test_the_order_of_pairs_and_rows_without_pairs_change_nothing(kind, unit):
    prefs = make_pairs(kind)
    want = splits.hold_out(prefs, share=0.4, seed=5, unit=unit)
    order = np.random.default_rng(6).permutation(600)
    shuffled = lore.Preferences.from_pairs(
        prefs.features,
        *(np.asarray(x)[order] for x in (prefs.chosen, prefs.rejected, prefs.user)),
        30,
    )
    got = splits.hold_out(shuffled, share=0.4, seed=5, unit=unit)
    for a, b in zip(got[:2], want[:2], strict=True):
        np.testing.assert_array_equal(place(a), place(b))
    # 7 rows before each, and 1000 behind.
    table = np.ones((9 * 200 + 1000, 3), np.float32)
    table[7 : 9 * 200 : 9] = prefs.features
    sparse = prefs.replace(
        features=table,
        chosen=np.asarray(prefs.chosen) * 9 + 7,
        rejected=np.asarray(prefs.rejected) * 9 + 7,
    )
    got = splits.hold_out(sparse, share=0.4, seed=5, unit=unit)
    for a, b in zip(got[:2], want[:2], strict=True):
        a = a.replace(
            chosen=(np.asarray(a.chosen) - 7) // 9,
            rejected=(np.asarray(a.rejected) - 7) // 9,
        )
        np.testing.assert_array_equal(place(a), place(b))


def permuted(prefs, order):
    """The same pairs over rows in another order, with their names."""
    names = np.asarray([f"item {row:03d}" for row in range(200)])
    sides = names[prefs.chosen], names[prefs.rejected]
    return [
        lore.Preferences.from_pairs(
            prefs.features[rows], *sides, prefs.user, 30, item_ids=names[rows]
        )
        for rows in (np.arange(200), order)
    ]


@pytest.mark.parametrize("unit", ["judgements", "items"])
@pytest.mark.parametrize("kind", ["prompts", "rows"])
def test_the_order_of_rows_with_names_changes_nothing(kind, unit):
    order = np.random.default_rng(7).permutation(200)
    first, second = permuted(make_pairs(kind), order)
    want, got = (
        splits.hold_out(p, share=0.4, seed=5, unit=unit) for p in (first, second)
    )
    for a, b in zip(got[:2], want[:2], strict=True):
        a = a.replace(chosen=order[a.chosen], rejected=order[a.rejected])
        np.testing.assert_array_equal(place(a), place(b))
    # Without names it is another split.
    bare = splits.hold_out(second.replace(ids=None), share=0.4, seed=5, unit=unit)
    bare = bare.heldout.replace(
        chosen=order[bare.heldout.chosen], rejected=order[bare.heldout.rejected]
    )
    assert not np.array_equal(place(bare), place(want.heldout))


def test_rows_with_names_are_put_in_their_order():
    order = np.random.default_rng(7).permutation(200)
    both = permuted(make_pairs(num_pairs=100), order)
    first, second = map(used_rows.without_unused_rows, both)
    assert first.features.shape[0] < 200
    for name in ("features", "chosen", "rejected", "user"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    np.testing.assert_array_equal(first.ids.items, second.ids.items)


@pytest.mark.parametrize("source", [False, True])
def test_rows_that_no_pair_uses_are_left_out(source):
    prefs = make_pairs(num_pairs=60)
    used = sorted(rows_of(prefs))
    table = np.asarray(prefs.features)
    if source:
        prefs = prefs.replace(features=lore.ArraySource(table, 32))
    got = used_rows.without_unused_rows(prefs)
    assert got.features.shape == (len(used), 3)
    rows = got.features
    if source:
        blocks = list(rows.blocks())
        assert all(len(block) for block in blocks)
        rows = np.concatenate(blocks)
    np.testing.assert_array_equal(rows, table[used])
    for name in ("chosen", "rejected"):
        np.testing.assert_array_equal(
            rows[getattr(got, name)], table[getattr(prefs, name)]
        )
    assert used_rows.without_unused_rows(got) is got


def test_a_whole_table_is_not_copied():
    prefs = make_pairs(num_pairs=2000)
    assert rows_of(prefs) == set(range(200))
    assert used_rows.without_unused_rows(prefs) is prefs


def test_components_are_those_of_a_flood():
    rng = np.random.default_rng(8)
    for num_edges in (0, 1, 20, 60, 200):
        first, second = rng.integers(100, size=(2, num_edges))
        want = np.arange(100)
        for _ in range(100):
            for a, b in zip(first, second, strict=True):
                want[want == max(want[a], want[b])] = min(want[a], want[b])
        got = splits.connected(100, first, second)
        np.testing.assert_array_equal(got, np.unique(want, return_inverse=True)[1])
    chain = np.arange(999)
    assert not splits.connected(1000, chain, chain + 1).any()


def test_rows_are_items_where_most_pairs_hang_together():
    chosen, rejected = np.array([[0, 1, 2, 8], [1, 2, 3, 9]])
    rows = np.stack([chosen, rejected])
    np.testing.assert_array_equal(splits.items_of(rows, None), rows)
    apart = np.array([[0, 1, 5, 8], [1, 2, 6, 9]])
    np.testing.assert_array_equal(
        splits.items_of(apart, None)[0], splits.items_of(apart, None)[1]
    )
    assert len(set(splits.items_of(apart, None)[0])) == 3


def test_who_shares_items():
    assert splits.shares_items(make_pairs())
    own = lore.Preferences.from_pairs(
        np.eye(6, dtype=np.float32), [0, 2, 0, 4], [1, 3, 2, 5], [0, 0, 0, 1]
    )
    assert not splits.shares_items(own)
    assert not splits.shares_items(
        lore.Preferences.from_ragged(np.ones((3, 4, 2), np.float32))
    )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything(share):
    held = splits.hold_out(make_pairs(), share=share, unit="items")
    sizes = held.training.num_pairs, held.heldout.num_pairs
    assert sizes == ((600, 0) if share == 0 else (0, 600))


def test_another_unit_is_refused():
    with pytest.raises(ValueError, match="unit must be 'judgements' or 'items', got"):
        splits.hold_out(make_pairs(), unit="pairs")
