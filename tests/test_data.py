"""Splits leak nothing, are seeded, and shots are nested."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore

data = lore.data


def judgements(prefs):
    """Every (user name or number, row) that the pairs hold."""
    users = np.asarray(prefs.user)
    if prefs.ids is not None and prefs.ids.users is not None:
        users = prefs.ids.users[users]
    columns = [np.asarray(prefs.chosen)]
    if prefs.rejected is not None:
        columns.append(np.asarray(prefs.rejected))
    return {
        (str(u), int(row)) for c in columns for u, row in zip(users, c, strict=True)
    }


def pair_set(prefs):
    return {
        (int(u), int(c), int(r))
        for u, c, r in zip(prefs.user, prefs.chosen, prefs.rejected, strict=True)
    }


def random_votes(num_users=20, num_items=25, seed=0):
    rng = np.random.default_rng(seed)
    voted = rng.random((num_users, num_items)) < 0.7
    user, item = np.nonzero(voted)
    mix = rng.permutation(len(user))
    vote = rng.integers(-1, 2, len(user))
    return user[mix], item[mix], vote


def four_way(**settings):
    user, item, vote = random_votes()
    table = np.random.default_rng(1).normal(size=(25, 4)).astype(np.float32)
    names = np.array([f"voter {u}" for u in range(20)])
    parts = data.split_votes(
        table, user, item, vote, num_users=20, user_ids=names, **settings
    )
    return parts, (user, item, vote)


def test_hold_out_shares_no_judgement(make_preferences):
    prefs = make_preferences(num_pairs=300)
    held = data.hold_out(prefs, share=0.4, seed=1)
    assert held.training.num_pairs > 30
    assert held.heldout.num_pairs > 10
    assert held.num_dropped > 0
    assert not judgements(held.training) & judgements(held.heldout)
    total = held.training.num_pairs + held.heldout.num_pairs + held.num_dropped
    assert total == prefs.num_pairs
    assert pair_set(held.training) | pair_set(held.heldout) <= pair_set(prefs)


def test_hold_out_keeps_pairs_that_share_no_row():
    table, rows = np.eye(6000, dtype=np.float32), np.arange(6000)
    own = lore.Preferences.from_pairs(table, rows[::2], rows[1::2], rows[::2] // 200)
    held = data.hold_out(own, share=0.3, seed=0)
    assert held.num_dropped == 0
    share = held.heldout.num_pairs / own.num_pairs  # 0.155 ± 0.007
    assert abs(share - 0.3**2 / (0.3**2 + 0.7**2)) < 0.02
    # Users share rows, and no pair of one user shares any with another of his.
    pairs = (np.tile(rows[side::2], 2) for side in (0, 1))
    shared = lore.Preferences.from_pairs(table, *pairs, np.repeat([0, 1], 3000))
    assert data.hold_out(shared, share=0.3, seed=0).num_dropped == 0
    # A third row joins two pairs: they are drawn by rows again.
    chain = lore.Preferences.from_pairs(
        table, rows[:-1], rows[1:], np.repeat(np.arange(2), 3000)[1:]
    )
    held = data.hold_out(chain, share=0.3, seed=0)
    assert not judgements(held.training) & judgements(held.heldout)
    assert held.num_dropped / chain.num_pairs > 0.3


def test_hold_out_of_differences_drops_nothing():
    prefs = lore.Preferences.from_ragged(np.ones((4, 20, 3), np.float32))
    held = data.hold_out(prefs, share=0.5, seed=0)
    assert held.num_dropped == 0
    assert held.training.num_pairs + held.heldout.num_pairs == 80
    assert min(held.training.num_pairs, held.heldout.num_pairs) > 20


def test_hold_out_respects_groups(make_preferences):
    group = np.random.default_rng(0).integers(12, size=300)
    prefs = make_preferences(num_pairs=300, group=group)
    held = data.hold_out(prefs, share=0.4, seed=3)
    assert held.num_dropped == 0
    assert held.training.num_pairs + held.heldout.num_pairs == 300
    sides = [set(np.unique(side.group).tolist()) for side in held[:2]]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("grouped", [False, True])
def test_hold_out_does_not_depend_on_the_order_of_pairs(make_preferences, grouped):
    group = np.random.default_rng(0).integers(12, size=100) if grouped else None
    prefs = make_preferences(num_pairs=100, group=group)
    mix = np.random.default_rng(5).permutation(100)
    other = lore.Preferences.from_pairs(
        prefs.features,
        prefs.chosen[mix],
        prefs.rejected[mix],
        prefs.user[mix],
        prefs.num_users,
        group=None if group is None else prefs.group[mix],
    )
    first, second = (data.hold_out(p, share=0.4, seed=2) for p in (prefs, other))
    assert pair_set(first.training) == pair_set(second.training)
    assert pair_set(first.heldout) == pair_set(second.heldout)


def test_hold_out_is_seeded(make_preferences):
    prefs = make_preferences(num_pairs=100)
    first, again, other = (data.hold_out(prefs, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.heldout.chosen, again.heldout.chosen)
    assert pair_set(first.heldout) != pair_set(other.heldout)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_hold_out_of_nothing_and_of_everything(make_preferences, share):
    prefs = make_preferences()
    held = data.hold_out(prefs, share=share)
    assert held.training.num_pairs == (0 if share else prefs.num_pairs)
    assert held.heldout.num_pairs == (prefs.num_pairs if share else 0)


def test_take_pairs_keeps_users_fields_and_order(make_preferences):
    prefs = make_preferences(label=True, sample_weight=True)
    keep = np.arange(prefs.num_pairs) % 2 == 0
    part = data.take_pairs(prefs, keep)
    assert part.num_users == prefs.num_users
    for name in ("chosen", "rejected", "user", "label", "sample_weight"):
        np.testing.assert_array_equal(getattr(part, name), getattr(prefs, name)[keep])
    np.testing.assert_array_equal(part.counts, np.bincount(part.user, minlength=5))
    # Per-pair results come in the caller's order, without the pairs left out.
    want = np.argsort(np.asarray(prefs.order)[keep])
    np.testing.assert_array_equal(np.argsort(part.order), want)
    by_position = data.take_pairs(prefs, np.flatnonzero(keep)[::-1])
    np.testing.assert_array_equal(by_position.chosen, part.chosen)


def test_take_users_renumbers_in_the_order_given():
    parts = [np.full((n, 2), u, np.float32) for u, n in enumerate((2, 0, 3, 1))]
    prefs = lore.Preferences.from_ragged(parts, user_ids=["a", "b", "c", "d"])
    some = data.take_users(prefs, [3, 1, 2])
    np.testing.assert_array_equal(some.counts, [1, 0, 3])
    np.testing.assert_array_equal(some.features[some.chosen][:, 0], [3, 2, 2, 2])
    assert some.ids.users.tolist() == ["d", "b", "c"]
    np.testing.assert_array_equal(np.sort(some.order), np.arange(4))


def test_split_users_is_a_partition():
    seen, unseen = data.split_users(50, share=0.2, seed=0)
    assert len(unseen) == 10
    np.testing.assert_array_equal(
        np.sort(np.concatenate([seen, unseen])), np.arange(50)
    )
    assert (np.diff(seen) > 0).all()
    np.testing.assert_array_equal(unseen, data.split_users(50, share=0.2, seed=0)[1])
    assert not np.array_equal(unseen, data.split_users(50, share=0.2, seed=1)[1])


def test_shots_are_nested_and_seeded(make_preferences):
    prefs = make_preferences(num_pairs=120)
    counts = np.asarray(prefs.counts)
    taken = {k: data.take_shots(prefs, k, seed=4) for k in (0, 1, 3, 10)}
    for shots, part in taken.items():
        np.testing.assert_array_equal(part.counts, np.minimum(counts, shots))
    for small, large in itertools.pairwise(taken.values()):
        assert pair_set(small) <= pair_set(large)
    assert data.take_shots(prefs, None) is prefs
    again = data.take_shots(prefs, 3, seed=4)
    np.testing.assert_array_equal(again.chosen, taken[3].chosen)
    other = data.take_shots(prefs, 3, seed=5)
    assert pair_set(other) != pair_set(taken[3])


def test_shots_are_a_fair_draw():
    prefs = lore.Preferences.from_ragged(np.ones((2000, 4, 1), np.float32))
    first = np.asarray(data.take_shots(prefs, 1, seed=0).chosen) % 4
    assert np.bincount(first, minlength=4).min() > 400


def test_count_judgements(make_preferences):
    prefs = make_preferences(num_pairs=200)
    held = judgements(prefs)
    want = [sum(u == str(v) for u, _ in held) for v in range(prefs.num_users)]
    np.testing.assert_array_equal(data.count_judgements(prefs), want)


def test_pairs_from_votes_pair_agreement_with_disagreement():
    user, item, vote = random_votes()
    chosen, rejected, voter = data.pairs_from_votes(user, item, vote, limit=9, seed=0)
    cast = {(u, i): v for u, i, v in zip(user, item, vote, strict=True)}
    drawn = list(zip(voter, chosen, rejected, strict=True))
    assert all(cast[u, c] > 0 > cast[u, r] for u, c, r in drawn)
    assert len(set(drawn)) == len(drawn)
    for u in range(20):
        agreed = (vote[user == u] > 0).sum()
        disagreed = (vote[user == u] < 0).sum()
        assert (voter == u).sum() == min(9, agreed * disagreed)


def test_a_voter_of_one_opinion_gives_no_pair():
    out = data.pairs_from_votes([0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, -1], limit=5)
    assert [a.tolist() for a in out] == [[0], [1], [1]]


def test_split_votes_leaks_nothing():
    parts, (user, item, vote) = four_way()
    assert all(part.num_pairs for part in parts)
    for first, second in itertools.combinations(parts, 2):
        assert not judgements(first) & judgements(second)
    seen, unseen = (set(p.ids.users) for p in (parts.seen, parts.unseen))
    assert not seen & unseen
    assert len(seen | unseen) == 20
    assert len(unseen) == 4
    assert parts.seen.ids.users.tolist() == parts.seen_heldout.ids.users.tolist()
    assert parts.unseen.ids.users.tolist() == parts.unseen_heldout.ids.users.tolist()
    cast = {(f"voter {u}", i): v for u, i, v in zip(user, item, vote, strict=True)}
    for part in parts:
        for name, c, r in zip(part.ids.users[part.user], part.chosen, part.rejected):
            assert cast[name, c] > 0 > cast[name, r]


def test_split_votes_keeps_its_limits_and_seed():
    first, _ = four_way(max_training=6, max_heldout=2, seed=3)
    assert np.asarray(first.seen.counts).max() == 6
    assert np.asarray(first.unseen_heldout.counts).max() <= 2
    again, _ = four_way(max_training=6, max_heldout=2, seed=3)
    other, _ = four_way(max_training=6, max_heldout=2, seed=4)
    np.testing.assert_array_equal(first.seen.chosen, again.seen.chosen)
    assert judgements(first.seen) != judgements(other.seen)


def test_array_source_yields_every_row_once_in_order():
    table = np.arange(22, dtype=np.float32).reshape(11, 2)
    source = data.ArraySource(table, block_rows=4)
    blocks = list(source.blocks())
    assert [len(b) for b in blocks] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(blocks), table)
    assert (source.shape, source.dtype) == ((11, 2), np.float32)
    np.testing.assert_array_equal(np.concatenate(list(source.blocks())), table)


def test_array_source_reads_a_memory_map(tmp_path, make_preferences):
    prefs = make_preferences()
    np.save(tmp_path / "table.npy", prefs.features)
    mapped = np.load(tmp_path / "table.npy", mmap_mode="r")
    moved = prefs.replace(features=data.ArraySource(mapped, block_rows=7))
    model = lore.RewardModel(np.eye(6, 2, dtype=np.float32))
    weights = np.full((5, 2), 0.5, np.float32)
    np.testing.assert_allclose(
        lore.margins(model, weights, moved),
        lore.margins(model, weights, prefs),
        rtol=1e-6,
    )


def embeddings(rows=400, width=256, seed=0):
    """Rows like those of language models: a large common part, small differences."""
    rng = np.random.default_rng(seed)
    common = 3.0 * rng.normal(size=width)
    return (common + 0.3 * rng.normal(size=(rows, width))).astype(np.float32)


def test_store_as_centres_before_it_rounds(make_preferences):
    prefs = make_preferences(num_rows=400, num_pairs=300).replace(features=embeddings())
    basis = np.random.default_rng(1).normal(size=(256, 2)).astype(np.float32)
    model, weights = lore.RewardModel(basis), np.full((5, 2), 0.5, np.float32)
    want = np.asarray(lore.margins(model, weights, prefs))

    def error(table):
        got = lore.margins(model, weights, prefs.replace(features=table))
        return np.sqrt(np.mean((np.asarray(got) - want) ** 2) / np.mean(want**2))

    stored = data.store_as(prefs, "bfloat16")
    assert stored.features.dtype == jnp.bfloat16
    assert error(stored.features) < 4e-3
    assert error(prefs.features.astype(jnp.bfloat16)) > 1e-2


def test_store_as_never_centres_differences():
    parts = np.ones((3, 4, 2), np.float32) + np.arange(2, dtype=np.float32)
    prefs = lore.Preferences.from_ragged(parts)
    stored = data.store_as(prefs, np.float16)
    assert stored.features.dtype == np.float16
    np.testing.assert_array_equal(stored.features.astype(np.float32), prefs.features)
