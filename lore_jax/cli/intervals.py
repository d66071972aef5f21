"""Intervals over users whom several splits share.

A user stands in several splits: as a seen user in most of them, and where only the
people are redrawn even with the same held-out pairs. Values of one user are therefore
no independent observations, and the user is what is resampled.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

import lore_jax as lore

RESAMPLES = 2000
ENOUGH = 3  # splits from which their own variation can be told


def bootstrap(
    values: Sequence[Any],
    users: Sequence[Any],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> lore.evaluation.Interval:
    """Macro mean, splits counting equally, with a cluster bootstrap over users.

    Distinct users are drawn with replacement and take their values of all splits along.
    What splits differ by beyond the users in them (the fit, the drawn pairs) is

        σ² = max(0, Σ_s (m_s − m̄)² − E Σ_s (d*_s − d̄*)²) / (S − 1),

    m_s the split means and d* their change in a bootstrap sample; from three splits on,
    every sample is moved by σ / √S times a draw of Student's t with S − 1 degrees. With
    two splits the interval is for these two.

    Args:
      values: float[U_s] of every split; NaN is left out.
      users: [U_s] ids likewise.
      level: of the interval.
      resamples: bootstrap samples.
      seed: of the resampling.

    Returns:
      `Interval`; `num_users` counts distinct users.

    Raises:
      ValueError: if ids and values do not match, or nobody has a value in a split.
    """
    values = [np.asarray(x, np.float64) for x in values]
    users = [np.asarray(x) for x in users]
    if [x.shape for x in values] != [x.shape for x in users]:
        raise ValueError(
            "values and users must have equal shapes in every split, got "
            f"{[x.shape for x in values]} and {[x.shape for x in users]}"
        )
    there = [~np.isnan(x) for x in values]
    if not values or not all(x.any() for x in there):
        raise ValueError("values must hold at least one number in every split")
    ids, place = np.unique(
        np.concatenate([u[t] for u, t in zip(users, there)]), return_inverse=True
    )
    split = np.repeat(np.arange(len(values)), [t.sum() for t in there])
    total, count = np.zeros((2, len(ids), len(values)))
    np.add.at(total, (place, split), np.concatenate([x[~np.isnan(x)] for x in values]))
    np.add.at(count, (place, split), 1.0)
    drawn = _draws(len(ids), resamples, seed)
    point = total.sum(0) / count.sum(0)
    with np.errstate(invalid="ignore"):
        means = (drawn @ total) / (drawn @ count)
    means = np.where(np.isnan(means), point, means)  # nobody of a split was drawn
    samples = means.mean(1)
    if (splits := len(values)) >= ENOUGH:
        change = means - point
        change -= change.mean(1, keepdims=True)
        between = np.sum((point - point.mean()) ** 2) - np.mean(np.sum(change**2, 1))
        size = np.sqrt(max(0.0, between) / (splits - 1) / splits)
        rng = np.random.default_rng([seed, splits])
        samples = samples + size * rng.standard_t(splits - 1, resamples)
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return lore.evaluation.Interval(
        float(point.mean()), float(low), float(high), len(ids)
    )


def paired(
    first: Sequence[Any], second: Sequence[Any], users: Sequence[Any], **settings
) -> lore.evaluation.Interval:
    """`bootstrap` of first − second, user by user, split by split."""
    pairs = zip(first, second, strict=True)
    return bootstrap([np.subtract(a, b) for a, b in pairs], users, **settings)


@functools.lru_cache(maxsize=4)
def _draws(num_users: int, resamples: int, seed: int) -> np.ndarray:
    """float64[resamples, U]: how often each user is drawn."""
    rng = np.random.default_rng(seed)
    even = np.full(num_users, 1 / num_users)
    return rng.multinomial(num_users, even, resamples).astype(np.float64)
