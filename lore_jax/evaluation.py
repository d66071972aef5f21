"""Held-out accuracy, log-loss and calibration per user, with intervals over users."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lore_jax import _checks, _equations, _processes
from lore_jax._entry import public
from lore_jax.data.splits import FourWay
from lore_jax.model import RewardModel, stored_margins
from lore_jax.preferences import Preferences


class Interval(NamedTuple):
    """A mean and its bootstrap interval.

    Attributes:
      mean: macro mean.
      low: lower end.
      high: upper end.
      num_users: users that entered, counted once per split.
    """

    mean: float
    low: float
    high: float
    num_users: int


class Calibration(NamedTuple):
    """How far predicted probabilities are from observed frequencies.

    Attributes:
      log_loss: mean over pairs.
      brier: mean squared error of the probability.
      expected_error: Σ_b share_b · |mean probability_b − frequency_b|.
      confidence: float[B], mean probability of the predicted side in each bin.
      frequency: float[B], how often that side was chosen; NaN for an empty bin.
      count: int[B].
    """

    log_loss: float
    brier: float
    expected_error: float
    confidence: np.ndarray
    frequency: np.ndarray
    count: np.ndarray


@public()
def accuracy(
    model: RewardModel, weights: Any, prefs: Preferences, *, user_ids: Any = None
) -> jax.Array:
    """Share of each user's pairs whose chosen response gets the higher reward.

    A margin of exactly 0 counts one half; a soft label y counts y for the first and
    1 − y for the second.

    Args:
      model: the reward model.
      weights: what `adapt` or `fit` returned, whose users are matched by name where
        they have names; or float[U, K] on the simplex, row u for user u of `prefs`.
      prefs: N pairs of U users.
      user_ids: names of the rows of `weights` where those are a plain array and
        `prefs` names its users.

    Returns:
      float[U]; NaN where a user has no pair.

    Raises:
      ValueError: shapes disagree, weights are not on the simplex, or only one of
        `weights` and `prefs` names its users.
      TypeError: `model` or `prefs` is something else.

    Example:
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0, 0], [1, 2], [0, 0])
      >>> model = lore.RewardModel(np.eye(3, 2))
      >>> np.asarray(lore.accuracy(model, np.array([[0.9, 0.1]]), prefs)).tolist()
      [1.0]
    """
    return _accuracy(model, weights, prefs, user_ids)


def _accuracy(model, weights, prefs: Preferences, user_ids=None) -> jax.Array:
    hit = (1 + jnp.sign(stored_margins(model, weights, prefs, user_ids))) / 2
    if prefs.label is not None:
        hit = prefs.label * hit + (1 - prefs.label) * (1 - hit)
    return _checks.where(prefs.features, per_user_mean(hit, prefs))


@public()
def log_loss(
    model: RewardModel, weights: Any, prefs: Preferences, *, user_ids: Any = None
) -> jax.Array:
    """Mean Bradley–Terry loss of each user's pairs, at the temperature of the model.

    Args:
      model: the reward model.
      weights: as in `accuracy`.
      prefs: N pairs of U users.
      user_ids: as in `accuracy`.

    Returns:
      float[U]; NaN where a user has no pair.

    Raises:
      ValueError: as in `accuracy`.
      TypeError: `model` or `prefs` is something else.

    Example:
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0], [2], [0])
      >>> model = lore.RewardModel(np.zeros((3, 2)))
      >>> np.asarray(lore.log_loss(model, np.array([[0.9, 0.1]]), prefs)).round(2)
      array([0.69], dtype=float32)
    """
    m = stored_margins(model, weights, prefs, user_ids)
    loss = per_user_mean(_equations.pair_loss(m, prefs.label), prefs)
    return _checks.where(prefs.features, loss)


def per_user_mean(values: jax.Array, prefs: Preferences) -> jax.Array:
    """Weighted mean over each user's pairs of values float[N] in stored order."""
    return _equations.user_means(
        values, prefs.sample_weight, prefs.user, prefs.num_users
    )


@public("jax.numpy.nanmean")
def macro_mean(values: Any) -> float:
    """Mean over the users that have a value; NaN where nobody has."""
    array = _values(values, "values")
    return float(array.mean()) if array.size else float("nan")


def _values(values: Any, name: str) -> np.ndarray:
    """The values of users that have one, float64[n]; NaN says that a user has none."""
    array = _checks.host_array(values, name)
    if array.dtype.kind not in "iufb" and not _checks.is_floating(array.dtype):
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    array = array.astype(np.float64).ravel()
    infinite = np.flatnonzero(np.isinf(array))
    if infinite.size:
        raise ValueError(
            f"{name} must be finite, or NaN for users without a pair; "
            f"{name}[{infinite[0]}] is {array[infinite[0]]}"
        )
    return array[~np.isnan(array)]


@public("accuracy, and this function on its result")
def bootstrap_interval(
    values: Any | Sequence[Any],
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Interval:
    """Macro mean with a percentile bootstrap interval over users, and over splits.

    Args:
      values: float[U], or a list of float[U_s], one per split: then splits are
        resampled, users within each, and splits count equally. NaN is left out. The
        splits' held-out pairs should be drawn independently: splits that share them
        make the interval too narrow.
      level: of the interval.
      num_resamples: bootstrap samples.
      seed: of the resampling.
      mesh: as in `fit`: values are those of this process's users, the interval is that
        of the users of all processes, and the same on each of them.

    Returns:
      `Interval`.

    Raises:
      ValueError: nobody has a value, or `level` is not in (0, 1).
    """

    def check():
        if not 0 < level < 1:
            raise ValueError(f"level must be in (0, 1), got {level}")
        _checks.check_count(num_resamples, "num_resamples")
        splits = list(values) if isinstance(values, list | tuple) else [values]
        return [_values(x, "values") for x in splits]

    if _processes.spans(mesh):
        arrays = _processes.together(check)
        settings = len(arrays), level, num_resamples, seed
        _processes.agree(splits_and_settings=settings)
        held = {str(s): x for s, x in enumerate(arrays)}
        parts = _processes.gather_arrays(held)
        # In an order that does not depend on who holds whom.
        arrays = [np.sort(np.concatenate([x[s] for x in parts])) for s in held]
    else:
        arrays = check()
    if not arrays or not all(x.size for x in arrays):
        raise ValueError("values must hold at least one number in every split")
    rng = np.random.default_rng(seed)
    means = np.empty((num_resamples, len(arrays)))
    for s, x in enumerate(arrays):
        # Resampled users as multinomial counts, a block of resamples at a time.
        for start in range(0, num_resamples, 256):
            size = min(256, num_resamples - start)
            picks = rng.multinomial(x.size, np.full(x.size, 1 / x.size), size)
            means[start : start + size, s] = picks @ x / x.size
    chosen = rng.integers(len(arrays), size=(num_resamples, len(arrays)))
    resampled = means[np.arange(num_resamples)[:, None], chosen].mean(1)
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(
        float(np.mean([x.mean() for x in arrays])),
        float(low),
        float(high),
        sum(x.size for x in arrays),
    )


@public("accuracy, and this function on its result")
def paired_difference(first: Any, second: Any, **settings) -> Interval:
    """`bootstrap_interval` of first − second, user by user, split by split.

    Raises:
      ValueError: the two do not hold the same users.
    """
    several = isinstance(first, list | tuple)
    pairs = list(zip(first, second, strict=True)) if several else [(first, second)]
    for a, b in pairs:
        if np.shape(a) != np.shape(b):
            raise ValueError(
                "first and second must hold the same users, got shapes "
                f"{np.shape(a)} and {np.shape(b)}"
            )
    differences = [np.asarray(a, np.float64) - np.asarray(b) for a, b in pairs]
    return bootstrap_interval(differences, **settings)


@public("log_loss")
def calibration(
    probability: Any, label: Any = None, *, num_bins: int = 10
) -> Calibration:
    """Log-loss, Brier score and expected calibration error of choice probabilities.

    Args:
      probability: float[N], predicted P(chosen is preferred).
      label: float[N] in [0, 1]; None means that every first response was chosen.
      num_bins: equal bins of the confidence in [0.5, 1].

    Raises:
      ValueError: a probability is outside [0, 1] or lengths disagree.
    """
    p = _checks.host_array(probability, "probability")
    if p.dtype.kind not in "iufb" and not _checks.is_floating(p.dtype):
        raise TypeError(f"probability must hold real numbers, got dtype {p.dtype}")
    p = p.astype(np.float64)
    if p.ndim != 1 or not p.size or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probability must be float[N] in [0, 1] with N of at least 1")
    _checks.check_count(num_bins, "num_bins")
    y = _checks.host_floats(label, len(p), "label", 0.0, 1.0)
    y = np.ones_like(p) if y is None else y.astype(np.float64)
    tiny = np.finfo(np.float64).tiny
    loss = -(
        y * np.log(np.maximum(p, tiny)) + (1 - y) * np.log(np.maximum(1 - p, tiny))
    )
    confidence = np.maximum(p, 1 - p)
    hit = np.where(p > 0.5, y, np.where(p < 0.5, 1 - y, 0.5))  # undecided: half right
    bins = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_confidence = np.bincount(bins, confidence, num_bins) / count
        frequency = np.bincount(bins, hit, num_bins) / count
    error = np.nansum(count * np.abs(mean_confidence - frequency)) / len(p)
    return Calibration(
        float(loss.mean()),
        float(np.mean((p - y) ** 2)),
        float(error),
        mean_confidence,
        frequency,
        count,
    )


@public()
def four_way(
    model: RewardModel, seen_weights: Any, unseen_weights: Any, data: FourWay
) -> dict[str, jax.Array]:
    """Accuracy of seen and unseen users on training and held-out pairs.

    Args:
      model: the reward model.
      seen_weights: what `fit` returned, or an array, as in `accuracy`.
      unseen_weights: what `adapt` returned, or an array.
      data: pairs of seen and unseen users.

    Returns:
      float[U] under "seen_training", "seen_heldout", "unseen_training" (the pairs
      that adaptation saw) and "unseen_heldout".

    Raises:
      ValueError: shapes disagree or weights are not on the simplex.

    Example:
      >>> split = lore.data.load_bowling_green().split(seed=0)
      >>> model = lore.RewardModel(np.ones((384, 1), np.float32))
      >>> people = lore.adapt(model, split.seen), lore.adapt(model, split.unseen)
      >>> sorted(lore.evaluation.four_way(model, *people, split))[:2]
      ['seen_heldout', 'seen_training']
    """
    return {
        "seen_training": _accuracy(model, seen_weights, data.seen),
        "seen_heldout": _accuracy(model, seen_weights, data.seen_heldout),
        "unseen_training": _accuracy(model, unseen_weights, data.unseen),
        "unseen_heldout": _accuracy(model, unseen_weights, data.unseen_heldout),
    }
