"""Hold-outs that settings are chosen on, and how losses on them are compared.

Judgements are held out because users return to known items; items are held out because
most responses that a reward model ranks are new (`splits.hold_out`). Losses of several
hold-outs are averaged after each is divided by that of a global Bradley–Terry model.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax._backend import on_threads
from lore_jax._pairs.blocks import project_rows
from lore_jax.adaptation import adapt
from lore_jax.data.splits import canonical_rows, hold_out, items_of, shares_items
from lore_jax.evaluation import log_loss
from lore_jax.preferences import Preferences, take_shots
from lore_jax.prior import Prior

# Relative log-loss on judgements of known items that may be given up for new items: by
# the basis (about one point of accuracy) and by each later choice.
BASIS_GIVES = 0.015

_GIVES = 0.003


class Validation(NamedTuple):
    """A grouped split of training pairs.

    Attributes:
      training: what candidates learn from.
      heldout: what they are compared on.
    """

    training: Preferences
    heldout: Preferences

    def loss(
        self,
        basis: jax.Array,
        priors: Iterable[Prior],
        shots: tuple[int | None, ...] = (None,),
    ) -> np.ndarray:
        """Log-loss of every user on held-out pairs, float[C, U], one row per prior.

        Users show `shots` of their pairs, None for all; several numbers count alike.
        The table is read once.
        """
        proj = project_rows(self.training.features, basis)
        shown = [self._replace(training=take_shots(self.training, n)) for n in shots]

        def mean_loss(prior):
            return np.mean([x._losses(proj, prior) for x in shown], axis=0)

        return np.stack(on_threads(mean_loss, priors))

    def curve(self, bases: Sequence[jax.Array], priors: Sequence[Prior]) -> np.ndarray:
        """Log-loss of every user, float[S, U], of S bases with a prior each.

        The table is read once.
        """
        joined = project_rows(self.training.features, jnp.concatenate(bases, axis=1))
        ends = np.cumsum([basis.shape[1] for basis in bases])[:-1]
        parts = zip(np.split(np.asarray(joined), ends, axis=1), priors, strict=True)
        return np.stack(on_threads(lambda part: self._losses(*part), parts))

    def _losses(self, proj, prior: Prior) -> np.ndarray:
        eye = jnp.eye(proj.shape[1], dtype=proj.dtype)
        weights = adapt(eye, self.training.replace(features=proj), prior=prior).weights
        heldout = self.heldout.replace(features=proj)
        return np.asarray(log_loss(eye, weights, heldout, prior.temperature))


def make_holdouts(
    prefs: Preferences,
    key: jax.Array,
    share: float,
    holdout: Literal["judgements", "items", "both"],
) -> dict[str, Validation]:
    """{"judgements" and/or "items": a split}, from a key.

    Warns where too few pairs remain to compare on. Where no two users judge the same
    row, a judgement held out is an item held out, and only "items" is made of "both".

    Args:
      prefs: the pairs.
      key: consumed.
      share: of the pairs that a split uses, how many are held out. Where both rows of a
        pair must fall on one side, such a share s of the judgements or items is held
        out that s² / (s² + (1 − s)²) = `share`.
      holdout: "judgements", "items" or "both".
    """
    units: tuple[Literal["judgements", "items"], ...] = ("judgements", "items")
    if holdout != "both":
        units = (holdout,)
    elif prefs.group is None and not shares_items(prefs):
        units = ("items",)
    pairwise = share**0.5 / (share**0.5 + (1 - share) ** 0.5)
    found, tried = {}, {}
    for unit, one in zip(units, jax.random.split(key, len(units))):
        seed = int(jax.random.randint(one, (), 0, np.iinfo(np.int32).max))
        part = pairwise if _pairwise(prefs, unit) else share
        held = hold_out(prefs, share=part, seed=seed, unit=unit)
        tried[unit] = held.training.num_pairs, held.heldout.num_pairs
        if all(tried[unit]):
            found[unit] = Validation(held.training, held.heldout)
    if not found:
        (learn, left), *_ = tried.values()
        warnings.warn(
            f"too few pairs to validate on: {learn} to learn from and {left} held out "
            f"of {prefs.num_pairs}; the first candidate is used unselected",
            stacklevel=5,
        )
    return found


def _pairwise(prefs: Preferences, unit: str) -> bool:
    """Whether the two sides of a pair are drawn apart."""
    if prefs.rejected is None:
        return False
    if unit == "judgements":
        return prefs.group is None
    group = None if prefs.group is None else np.asarray(prefs.group)
    item = items_of(canonical_rows(prefs), group)
    return bool((item[0] != item[1]).any())


def mean_losses(losses: np.ndarray) -> np.ndarray:
    """Macro log-loss of each hold-out, float[H], of users' losses float[H, U]."""
    parts = [x[~np.isnan(x)] for x in np.asarray(losses)]  # A diverged one is inf.
    return np.array([x.mean() if x.size else np.nan for x in parts])


def relative(losses: np.ndarray, scales: np.ndarray) -> float:
    """Mean over hold-outs of macro log-loss, each over that of a global model."""
    return float(
        np.nan_to_num(np.mean(mean_losses(losses) / scales), nan=np.inf, posinf=np.inf)
    )


def better(losses: np.ndarray, than: np.ndarray) -> bool:
    """Whether float[H, U] is less by two standard errors of the difference.

    Both are losses over those of a global model.

    The least of several losses on few held-out pairs is often the worse choice on
    pairs held out once more. Users are paired. NaN is no pair.
    """
    gains, variances = [], []
    for new, old in zip(losses, than, strict=True):
        gain = old - new
        gain = gain[np.isfinite(gain)]
        if not np.isfinite(old).any() and np.isfinite(new).any():
            return True
        if gain.size < 2:
            return False
        gains.append(gain.mean())
        variances.append(gain.var(ddof=1) / gain.size)
    return bool(sum(gains) > 2 * sum(variances) ** 0.5)


def keeps_judgements(
    losses: np.ndarray, than: np.ndarray, gives: float = _GIVES
) -> bool:
    """Whether judgements, the first of two hold-outs, lose no more than a share."""
    new, old = mean_losses(np.stack([losses[0], than[0]]))
    return len(losses) < 2 or not new > old * (1 + gives)


def choose_stop(curves: Sequence[np.ndarray], scales: np.ndarray) -> int:
    """The row of losses float[S, U] of each hold-out to stop at.

    That is the last finite one, or the best where it is better by two standard errors:
    otherwise the dips of a noisy curve would end training.
    """
    rows = np.stack(curves, axis=1)
    finite = np.flatnonzero(np.isfinite(rows).any(-1).all(-1))
    if not finite.size:
        return len(rows) - 1
    best = min(finite, key=lambda s: relative(rows[s], scales))
    both = rows[best] / scales[:, None], rows[finite[-1]] / scales[:, None]
    return int(best if better(*both) and keeps_judgements(*both) else finite[-1])


def rows_of(
    candidates: Sequence[dict], losses: np.ndarray, scales: np.ndarray
) -> list[dict]:
    """What `History.selection` holds of candidates with losses float[C, H, U]."""
    return [
        {
            **candidate,
            "log_loss": float(mean_losses(x).mean()),
            "relative": relative(x, scales),
            "chosen": False,
        }
        for candidate, x in zip(candidates, losses, strict=True)
    ]


def choose(rows: list[dict], losses: np.ndarray) -> int:
    """Marks the row with the least relative loss, the first of equals: its place.

    Of losses float[C, H, U] on two hold-outs, those on judgements must be close to the
    least: see `keeps_judgements`.
    """
    first = [np.nan_to_num(mean_losses(x)[0], nan=np.inf) for x in losses]
    least = losses[int(np.argmin(first))]
    kept = np.array([keeps_judgements(x, least) for x in losses])
    best = int(np.where(kept | ~kept.any(), losses_of(rows), np.inf).argmin())
    rows[best]["chosen"] = True
    return best


def losses_of(rows: list[dict]) -> np.ndarray:
    """The relative loss of every row."""
    return np.array([row["relative"] for row in rows])
