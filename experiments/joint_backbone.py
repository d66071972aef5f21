"""A Flax transformer and a reward head, trained together on planted preferences.

    python -m experiments.joint_backbone

Texts are words of three styles among filler words; "not" turns the next word round. A
user's reward weighs the styles. Seen users train backbone and head. Then the backbone
is frozen: their pairs give the prior (`fit_prior`), and new users are adapted from ten
pairs (`adapt`). Held-out texts are new; "population" is the prior's mean weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lore_jax as lore

STYLES = ("please thanks kindly", "because therefore hence", "wow haha cool")
WORDS = ["not", *" ".join(STYLES).split(), *"the a it is of on at by to in".split()]
LENGTH, WIDTH, RANK, MARGIN = 6, 32, len(STYLES), 3.0


def style_counts(tokens: np.ndarray) -> np.ndarray:
    """float[M, K]: words of each style, minus one where "not" stands before."""
    sign = np.ones(tokens.shape)
    sign[:, 1:] = np.where(tokens[:, :-1] == 0, -1, 1)
    styles = np.where(tokens > 0, (tokens - 1) // 3, -1)
    return (sign[..., None] * (styles[..., None] == np.arange(RANK))).sum(1)


def draw(rng, pairs: int, weights: np.ndarray):
    """(tokens int[M, L], columns of pairs over its rows); every text is new."""
    user = np.repeat(np.arange(len(weights)), pairs)
    chance = [0.2] + [0.06] * 9 + [0.026] * 10
    tokens = rng.choice(len(WORDS), (2 * len(user), LENGTH), p=chance)
    rewards = MARGIN * (style_counts(tokens) * np.tile(weights[user], (2, 1))).sum(1)
    rows = np.arange(len(tokens)).reshape(2, -1)
    first = rng.random(len(user)) < 1 / (1 + np.exp(np.diff(rewards[rows], axis=0)[0]))
    chosen, rejected = np.where(first, rows, rows[::-1])
    return tokens, (chosen, rejected, user, len(weights))


class Backbone(nnx.Module):
    """A pre-norm transformer block; a text is the mean of its hidden states."""

    def __init__(self, *, rngs: nnx.Rngs):
        """Draws the parameters."""
        self.words = nnx.Embed(len(WORDS), WIDTH, rngs=rngs)
        self.places = nnx.Param(rngs.params.normal((LENGTH, WIDTH)) / 2)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attend = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """float[..., D] from int[..., L]."""
        x = self.words(tokens) + self.places[...]
        x = x + self.attend(self.norms[0](x))
        x = x + self.down(nnx.gelu(self.up(self.norms[1](x))))
        return jnp.mean(x, axis=-2)


@nnx.jit
def train_step(model: nnx.Dict, optimizer: nnx.Optimizer, texts, user) -> jax.Array:
    """One step on pairs of texts int[B, 2, L], chosen first; returns the loss."""

    def loss(model):
        hidden = model.backbone(texts)
        return model.head.pair_loss(hidden[:, 0], hidden[:, 1], user)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def run(steps=400, seen=150, new=200, pairs=100, few=10, seed=0) -> dict:
    """{users: (own, population)}, macro accuracies on held-out pairs in %."""
    rng, rngs = np.random.default_rng(seed), nnx.Rngs(seed)
    weights = rng.dirichlet(np.full(RANK, 0.3), seen + new)
    tokens, (chosen, rejected, user, _) = draw(rng, pairs, weights[:seen])
    model = nnx.Dict(backbone=Backbone(rngs=rngs))
    model.head = head = lore.heads.RewardHead(WIDTH, RANK, seen, rngs=rngs)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    texts = tokens[np.stack([chosen, rejected], axis=1)]
    for batch in rng.integers(len(user), size=(steps, 256)):
        train_step(model, optimizer, texts[batch], user[batch])

    embed = nnx.jit(lambda backbone, tokens: backbone(tokens))

    def embedded(tokens, columns) -> lore.Preferences:
        table = np.asarray(embed(model.backbone, tokens))
        return lore.Preferences.from_pairs(table, *columns)

    shown = embedded(tokens, (chosen, rejected, user, seen))
    fitted = lore.fit_prior(head.basis[...], shown, key=jax.random.key(seed))
    adapted = lore.adapt(fitted.model, embedded(*draw(rng, few, weights[seen:])))
    old, fresh = (embedded(*draw(rng, 50, w)) for w in np.split(weights, [seen]))

    def compared(weights, heldout) -> tuple:
        everybody = np.tile(fitted.model.prior.mean, (heldout.num_users, 1))
        both = (lore.accuracy(fitted.model, w, heldout) for w in (weights, everybody))
        return tuple(100 * lore.evaluation.macro_mean(x) for x in both)

    return {
        "seen users, the head": compared(head.weights, old),
        "seen users, adapted": compared(fitted, old),
        f"new users, {few} pairs": compared(adapted, fresh),
    }


def main() -> None:
    """Prints a table."""
    print(f"{'held-out accuracy in %':24}{'own':>8}{'population':>12}")
    for name, (own, population) in run().items():
        print(f"{name:24}{own:8.1f}{population:12.1f}")


if __name__ == "__main__":
    main()
