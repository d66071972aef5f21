"""The joint example: what it plants, what it learns, and what it leaves frozen."""

import jax
import numpy as np
import pytest
from flax import nnx

import lore_jax as lore
from experiments import joint_backbone as joint

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _flax_broadcasts():
    """Layers of Flax promote ranks, which the suite refuses."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_not_turns_the_next_word_round():
    words = {word: n for n, word in enumerate(joint.WORDS)}
    texts = (
        "please not thanks the the the",
        "wow cool because not the hence",
        "not not wow not hence please",
    )
    tokens = np.array([[words[word] for word in text.split()] for text in texts])
    want = [[0, 0, 0], [0, 2, 2], [1, -1, -1]]
    np.testing.assert_array_equal(joint.style_counts(tokens), want)


def test_choices_follow_the_planted_rewards():
    weights = np.eye(3)[np.zeros(400, int)]
    tokens, (chosen, rejected, user, users) = joint.draw(
        np.random.default_rng(0), 5, weights
    )
    assert users == 400
    assert len(user) == 2000
    assert len(np.unique(np.concatenate([chosen, rejected]))) == len(tokens)
    counts = joint.style_counts(tokens)[:, 0]
    margin = joint.MARGIN * (counts[chosen] - counts[rejected])
    size = np.abs(margin)
    for m in np.unique(size[size > 0]):
        mine = size == m
        want = 1 / (1 + np.exp(-m))
        error = np.sqrt(want * (1 - want) / mine.sum())
        assert abs((margin[mine] > 0).mean() - want) < 4 * error + 1e-9


def test_a_step_trains_backbone_and_head():
    rngs = nnx.Rngs(0)
    model = nnx.Dict(backbone=joint.Backbone(rngs=rngs))
    model.head = lore.heads.RewardHead(joint.WIDTH, joint.RANK, 4, rngs=rngs)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    optimizer = nnx.Optimizer(model, joint.optax.sgd(1.0), wrt=nnx.Param)
    texts = np.random.default_rng(0).integers(20, size=(8, 2, joint.LENGTH))
    joint.train_step(model, optimizer, texts, np.arange(8) % 4)
    after = nnx.to_pure_dict(nnx.state(model))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert moved["backbone"]["words"]["embedding"] > 1e-4
    assert moved["backbone"]["attend"]["query"]["kernel"] > 1e-6
    assert moved["head"]["basis"] > 1e-4
    assert moved["head"]["logits"] > 1e-4


def test_own_weights_beat_the_population():
    """Seen and new users, by points of held-out accuracy; a whole run."""
    found = joint.run(steps=300, new=120)
    assert list(found) == [
        "seen users, the head",
        "seen users, adapted",
        "new users, 10 pairs",
    ]
    for own, population in found.values():
        assert population > 60
        assert own > population + 2
    head, adapted = (found[name][0] for name in list(found)[:2])
    assert adapted > head - 1


def test_the_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(joint, "run", lambda: {"new users": (75.25, 70.0)})
    joint.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["held-out", "accuracy", "in", "%", "own", "population"]
    assert lines[1].split() == ["new", "users", "75.2", "70.0"]
