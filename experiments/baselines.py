"""What is compared: the library's default, the published recipes, and the baselines.

A recipe fits on the seen users' training pairs and adapts to a new user's few. Hyper-
parameters are chosen on grouped validation inside those training pairs, or are the
published ones; nothing here ever sees a held-out pair.
"""

import dataclasses

import jax
import numpy as np

import lore_jax as lore
from experiments.parts import Split

HEAD = "base reward head"
GLOBAL = "global Bradley-Terry"
LORE = "library default"
CHOSEN = "library default, rank by validation"
PLUG_IN = "library default, weights plugged in"
MAXIMUM = "library basis, maximum likelihood"
POPULATION = "population mean"
OTHER = "another user's weights"
JOINT = "published joint"
ALTERNATING = "published alternating"
ALONE = "each user alone"
METHODS = {
    "head": HEAD,
    "global": GLOBAL,
    "lore": LORE,
    "auto": CHOSEN,
    "joint": JOINT,
    "alternating": ALTERNATING,
    "alone": ALONE,
}
PUBLISHED = {"joint": lore.PublishedJoint, "alternating": lore.PublishedAlternating}
PUBLISHED_STEPS = {"joint": 1000, "alternating": 20_000}
PUBLISHED_NORM = 100.0  # mean norm of the centred features that the recipes assume
OWN = -1  # stands for no rank: "each user alone", or a rank that validation chose
ALONE_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to learn, at one rank.

    Attributes:
        method: a key of ``METHODS``.
        rank: K, or ``OWN``.
        train: settings of the library's recipe; a published one's, or those of
            ``lore.Marginal`` and ``lore.Search`` in one.
        fewshot: settings of ``lore.PublishedAdam``, for the published recipes.
    """

    method: str
    rank: int
    train: dict = dataclasses.field(default_factory=dict)
    fewshot: dict = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """What tables call it: an anchor, and steps that are not the published ones."""
        alpha = self.train.get("alpha", 0)
        steps = self.train.get("num_steps")
        usual = PUBLISHED_STEPS.get(self.method, steps)
        return (
            METHODS[self.method]
            + (f", anchor {alpha:g}" if alpha else "")
            + (f", {steps:,} steps" if steps not in (None, usual) else "")
        )

    @property
    def published(self) -> bool:
        """Whether this is one of the two published recipes."""
        return self.method in ("joint", "alternating")

    def fit(self, split: Split, seed: int) -> lore.Fitted:
        """Learn on the seen users' training pairs; the basis is for raw features."""
        seen, key = split.data.seen, jax.random.key(seed)
        if self.method == "head":
            return lore.fit(seen, rank=0, key=key, anchor=split.head)
        if not self.published:
            rank = "auto" if self.method == "auto" else self.rank
            return lore.fit(seen, rank=rank, key=key, recipe=marginal(**self.train))
        table = np.asarray(seen.features).astype(np.float32)
        if seen.rejected is not None:  # the mean of differences is the signal
            table = table - table.mean(0, dtype=np.float64).astype(np.float32)
        scale = PUBLISHED_NORM / max(float(np.linalg.norm(table, axis=1).mean()), 1e-30)
        recipe = PUBLISHED[self.method](**self.train)
        anchor = None
        if recipe.alpha and split.head is not None:
            anchor = split.head / np.float32(scale)
        fitted = lore.fit(
            seen.replace(features=table * np.float32(scale)),
            rank=self.rank,
            key=key,
            recipe=recipe,
            anchor=anchor,
        )
        model = fitted.model.replace(basis=fitted.model.basis * scale)
        return fitted.replace(model=model, unpruned=None, kept=None)

    def adapt(self, fitted: lore.Fitted, shown: lore.Preferences, seed: int):
        """Weights float[U, K] of new users from what they have shown.

        ``shown`` has projected features: the basis has already been applied.
        """
        method = None
        if self.published:
            method = lore.PublishedAdam(key=jax.random.key(seed), **self.fewshot)
        return lore.adapt(projected_model(fitted), shown, method=method).weights


def marginal(**settings) -> lore.Marginal:
    """The default recipe with settings of its own and of its search."""
    names = {field.name for field in dataclasses.fields(lore.Search)}
    search = {name: x for name, x in settings.items() if name in names}
    own = {name: x for name, x in settings.items() if name not in names}
    return lore.Marginal(search=lore.Search(**search), **own)


def projected_model(fitted: lore.Fitted) -> lore.RewardModel:
    """The model of features that are projected already: V is the identity."""
    eye = np.eye(fitted.model.rank, dtype=np.float32)
    return fitted.model.replace(basis=eye)


def projected_table(prefs: lore.Preferences, basis) -> lore.Preferences:
    """The same choices with projected features [M, K], users by number."""
    source = lore.ArraySource(np.asarray(prefs.features))
    proj = lore.project(source, basis)
    return prefs.replace(features=proj, ids=None)


def shuffled_weights(weights, seed: int) -> np.ndarray:
    """float[U, K]: everybody gets the weights of another user, drawn at random."""
    weights = np.asarray(weights)
    order = np.random.default_rng(seed).permutation(len(weights))
    other = np.empty_like(weights)
    other[order] = weights[np.roll(order, 1)]
    return other


def mean_weights(fitted: lore.Fitted, prefs: lore.Preferences) -> np.ndarray:
    """float[U, K]: the population's mean weights for every user."""
    return np.tile(np.asarray(fitted.model.prior.mean), (prefs.num_users, 1))


def ml_weights(fitted: lore.Fitted, shown: lore.Preferences):
    """float[U, K]: certified maximum likelihood on projected pairs."""
    method = lore.MaximumLikelihood()
    return lore.adapt(projected_model(fitted), shown, method=method).weights


class PerUserBradleyTerry:
    """Every user's own Bradley-Terry direction with ridge, from that user's pairs.

    minimise_v Σ_n weight_n ℓ(v · Δ_n) + λ/2 ‖v‖² s, s the mean squared norm of a
    difference; solved exactly on the user's own n × n Gram matrix. λ is shared, and
    chosen on grouped validation among the seen users.

    Attributes:
        ridge: λ.
        scale: s.
        selection: [λ, macro log-loss on the validation pairs] of every candidate.
    """

    def __init__(self, ridge: float, scale: float, selection: list | None = None):
        """Keep the settings."""
        self.ridge, self.scale, self.selection = ridge, scale, selection or []

    @classmethod
    def select(
        cls, prefs: lore.Preferences, seed: int, *, most_users: int = 200
    ) -> "PerUserBradleyTerry":
        """Choose λ on grouped validation, with at most so many users."""
        order = np.random.default_rng(seed).permutation(prefs.num_users)
        some = lore.take_users(prefs, np.sort(order[:most_users]))
        held = lore.data.hold_out(some, share=0.3, seed=seed)
        squared = [np.sum(differences(some, u) ** 2, 1) for u in range(some.num_users)]
        scale = float(np.concatenate(squared).mean())
        selection = []
        for ridge in ALONE_RIDGES:
            directions = cls(ridge, scale).directions(held.training)
            loss = np.asarray(log_losses(directions, held.heldout))
            selection.append([ridge, lore.evaluation.macro_mean(loss)])
        best = min(selection, key=lambda row: np.nan_to_num(row[1], nan=np.inf))
        return cls(best[0], scale, selection)

    def directions(self, prefs: lore.Preferences) -> np.ndarray:
        """float32[D, U]: each user's direction, 0 for users without a pair."""
        out = np.zeros((prefs.num_features, prefs.num_users), np.float32)
        for user in np.flatnonzero(np.asarray(prefs.counts)):
            pairs = slice(prefs.offsets[user], prefs.offsets[user + 1])
            delta = differences(prefs, user)
            label = 1.0 if prefs.label is None else prefs.label[pairs]
            weight = 1.0 if prefs.sample_weight is None else prefs.sample_weight[pairs]
            gram = delta @ delta.T / self.scale
            beta = kernel_logistic(gram, label, weight, self.ridge)
            out[:, user] = beta @ delta / self.scale
        return out


def differences(prefs: lore.Preferences, user: int) -> np.ndarray:
    """float64[n, D], chosen − rejected of one user's pairs."""
    pairs = slice(prefs.offsets[user], prefs.offsets[user + 1])
    chosen = np.asarray(prefs.features[prefs.chosen[pairs]]).astype(np.float64)
    if prefs.rejected is None:
        return chosen
    return chosen - np.asarray(prefs.features[prefs.rejected[pairs]]).astype(np.float64)


def kernel_logistic(gram, label, weight, ridge: float, steps: int = 50) -> np.ndarray:
    """β minimising Σ weight ℓ(Gβ, label) + ridge/2 βᵀGβ, by damped Newton steps.

    Args:
        gram: G, float[n, n].
        label: P(chosen is preferred), float[n] or one number.
        weight: float[n] or one number.
        ridge: λ > 0.
        steps: at most so many.
    """
    beta = np.zeros(len(gram))
    for _ in range(steps):
        p = 0.5 * (1 + np.tanh(gram @ beta / 2))
        residual = weight * (p - label) + ridge * beta
        curvature = np.broadcast_to(weight * p * (1 - p), beta.shape)[:, None] * gram
        step = np.linalg.solve(curvature + ridge * np.eye(len(gram)), residual)
        size = np.abs(gram @ step).max()
        beta -= step * min(1.0, 4 / max(size, 1e-30))
        if size < 1e-6:
            break
    return beta


def own_margins(directions: np.ndarray, prefs: lore.Preferences) -> np.ndarray:
    """float32[N] in stored order: margins of every pair under its user's direction."""
    out = np.empty(prefs.num_pairs, np.float32)
    source = lore.ArraySource(np.asarray(prefs.features))
    for start in range(0, prefs.num_users, 256):
        end = min(start + 256, prefs.num_users)
        pairs = slice(prefs.offsets[start], prefs.offsets[end])
        scores = lore.project(source, directions[:, start:end])
        mine = prefs.user[pairs] - start
        out[pairs] = scores[prefs.chosen[pairs], mine]
        if prefs.rejected is not None:
            out[pairs] -= scores[prefs.rejected[pairs], mine]
    return out


def log_losses(directions: np.ndarray, prefs: lore.Preferences) -> np.ndarray:
    """float[U]: like ``lore.log_loss``, every user with an own direction."""
    loss = lore.losses.pair_loss(own_margins(directions, prefs), prefs.label)
    return np.asarray(lore.evaluation.per_user_mean(loss, prefs))
