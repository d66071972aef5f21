"""The data set in the package is whole, attributed, and splits without leaks."""

import numpy as np
import pytest

import lore_jax as lore


@pytest.fixture(scope="module")
def votes():
    return lore.data.load_bowling_green()


def test_the_shipped_votes_are_whole(votes):
    assert votes.features.shape == (607, 384)
    assert votes.features.dtype == np.float32
    assert len(votes.user_ids) == len(np.unique(votes.user)) == 1066
    assert len(votes.user) == len(votes.item) == len(votes.vote) == 196_812
    assert set(np.unique(votes.vote)) == {-1, 0, 1}
    assert (votes.item.min(), votes.item.max()) == (0, 606)
    np.testing.assert_allclose(np.linalg.norm(votes.features, axis=1), 1, atol=1e-3)


def test_nobody_votes_twice_on_a_statement(votes):
    key = votes.user.astype(np.int64) * 1000 + votes.item
    assert len(np.unique(key)) == len(key)


def test_texts_and_names_belong_to_the_rows(votes):
    assert len(votes.text) == len(votes.item_ids) == 607
    assert len(set(votes.item_ids.tolist())) == 607
    assert all(text.strip() for text in votes.text)


def test_the_licence_and_attribution_are_there(votes):
    assert "CC BY 4.0" in votes.readme
    assert "Computational Democracy" in votes.readme


def test_neighbouring_embeddings_are_about_neighbouring_things(votes):
    """Rows match texts: identical words raise the similarity of the embeddings."""
    words = [set(text.lower().split()) for text in votes.text[:200]]
    similarity = votes.features[:200] @ votes.features[:200].T
    first, second = np.triu_indices(200, 1)
    shared = np.array(
        [
            len(words[i] & words[j]) / len(words[i] | words[j])
            for i, j in zip(first, second)
        ]
    )
    assert np.corrcoef(shared, similarity[first, second])[0, 1] > 0.2


def test_the_split_of_the_shipped_votes_leaks_nothing(votes):
    parts = votes.split(seed=1)
    sides = []
    for training, heldout in (parts[:2], parts[2:]):
        names = training.ids.users
        sides.append(set(names.tolist()))
        held = []
        for part in (training, heldout):
            user = np.asarray(part.user, np.int64)
            rows = [part.chosen + 1000 * user, part.rejected + 1000 * user]
            held.append(np.unique(np.concatenate(rows)))
        assert not np.intersect1d(*held).size
        assert np.asarray(training.counts).max() == 40
        assert np.asarray(heldout.counts).max() == 20
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [853, 213]
    assert parts.seen.features is not None
    assert parts.seen.ids.items.tolist() == votes.item_ids.tolist()
