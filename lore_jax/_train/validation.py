"""Hold-outs that settings are chosen on, and how losses on them are compared.

Judgements are held out because users return to known items; items are held out because
most responses that a reward model ranks are new (`splits.hold_out`). Losses of several
hold-outs are averaged after each is divided by that of a global Bradley–Terry model.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax import _checks, _equations
from lore_jax._backend import on_threads
from lore_jax._pairs.blocks import project_rows
from lore_jax._pairs.distributed import DistributedTable
from lore_jax._pairs.pack import Pairs, pack
from lore_jax._pairs.projected import Projected
from lore_jax.adaptation import adapt_projected
from lore_jax.data.splits import canonical_rows, hold_out, items_of, shares_items
from lore_jax.prediction import variance_losses
from lore_jax.preferences import Preferences, take_shots, take_users
from lore_jax.prior import Prior

SHOTS = (1, 3, 10, None)  # pairs that users show, None for all; they count alike
# Relative log-loss on judgements of known items that may be given up for new items: by
# the basis (about one point of accuracy) and by each later choice.
BASIS_GIVES = 0.015
_GIVES = 0.003
_SOME = 1000  # users that ρ and s are compared on, at most


class Validation:
    """A grouped split of training pairs, laid out once.

    Attributes:
      training: what candidates learn from.
      heldout: what they are compared on.
      temperature: T.
    """

    def __init__(self, training: Preferences, heldout: Preferences, temperature: float):
        """Nothing is laid out yet."""
        self.training, self.heldout = training, heldout
        self.temperature = temperature
        features = training.features
        self.table = features if isinstance(features, DistributedTable) else None
        self.held = pack(self.own(heldout))
        self._shown: dict[tuple, Pairs] = {}

    def project(self, basis) -> np.ndarray | jax.Array:
        """Features · V: one read of the table."""
        table = self.training.features if self.table is None else self.table.table
        return project_rows(table, basis)

    def loss(
        self, proj, priors: Iterable[Prior], shots: Sequence[int | None] = (None,)
    ) -> np.ndarray:
        """Log-loss of every user on held-out pairs, float[C, U], one row per prior.

        Users show `shots` of their pairs, None for all; several numbers count alike.
        """
        shown = [self._pairs(n) for n in shots]

        def mean_loss(prior):
            return np.mean([self._losses(proj, x, prior) for x in shown], axis=0)

        return self._of_all(np.stack(on_threads(mean_loss, priors)))

    def variance_losses(self, proj, prior: Prior, candidates) -> np.ndarray:
        """Users' log-loss of predictions for each candidate (ρ, s), float[C, U].

        Of many users, a random thousand.
        """
        total, users = self.training.num_users, None
        if total > _SOME:
            users = np.random.default_rng(0).choice(total, _SOME, replace=False)
            users = np.sort(users)
        held, some = self.held, self.heldout
        if users is not None:
            some = take_users(self.heldout, users)
            held = pack(self.own(some))
        if not held.num_users:  # None of these users is of this process.
            return self._of_all(np.zeros((len(candidates), 0), proj.dtype), some)
        losses = [
            variance_losses(
                Projected(proj, self._pairs(n, users)),
                held,
                prior,
                self.temperature,
                candidates,
            )
            for n in SHOTS
        ]
        return self._of_all(np.mean(losses, axis=0), some)

    def curve(self, bases: Sequence[jax.Array], priors: Sequence[Prior]) -> np.ndarray:
        """Log-loss of every user, float[S, U], of S bases with a prior each.

        The table is read once.
        """
        joined = self.project(jnp.concatenate(bases, axis=1))
        ends = np.cumsum([basis.shape[1] for basis in bases])[:-1]
        parts = zip(np.split(np.asarray(joined), ends, axis=1), priors, strict=True)
        pairs = self._pairs(None)
        losses = on_threads(lambda x: self._losses(x[0], pairs, x[1]), parts)
        return self._of_all(np.stack(losses))

    def own(self, prefs: Preferences) -> Preferences:
        """The pairs of this process, over its table."""
        return prefs if self.table is None else self.table.own(prefs)

    def _of_all(self, losses: np.ndarray, some: Preferences | None = None):
        """Losses of the users of all processes, of those of this one."""
        if self.table is None:
            return losses
        return self.table.gather_users(self.heldout if some is None else some, losses)

    def _pairs(self, shots: int | None, users: np.ndarray | None = None) -> Pairs:
        key = shots, users is None
        if key not in self._shown:
            some = self.training if users is None else take_users(self.training, users)
            self._shown[key] = pack(self.own(take_shots(some, shots)))
        return self._shown[key]

    def _losses(self, proj, shown: Pairs, prior: Prior) -> np.ndarray:
        found = Projected(proj, shown)
        if found.rank == 1:  # There is one point on the simplex.
            weights = np.ones((shown.num_users, 1), proj.dtype)
        else:
            weights = adapt_projected(found, prior, self.temperature).weights
        return np.asarray(user_losses(proj, weights, self.held, self.temperature))


def user_losses(proj, weights, pairs: Pairs, temperature: float) -> jax.Array:
    """Mean Bradley–Terry loss of each user's pairs, float[U]; NaN without any."""
    bare = pairs._replace(offsets=None)
    return _user_losses(proj, weights, bare, temperature, num_users=pairs.num_users)


@functools.partial(jax.jit, static_argnames="num_users")
def _user_losses(proj, weights, pairs, temperature, *, num_users):
    z = _equations.pair_rewards(proj, pairs.chosen, pairs.rejected)
    m = _equations.pair_margins(z, weights, pairs.user) / temperature
    loss = _equations.pair_loss(m, pairs.label)
    weight = pairs.sample_weight
    return _equations.user_means(loss, weight, pairs.user, num_users)


def make_holdouts(
    prefs: Preferences,
    key: jax.Array,
    share: float,
    holdout: Literal["judgements", "items", "both"],
    temperature: float,
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
      temperature: T.
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
            found[unit] = Validation(held.training, held.heldout, temperature)
    if not found:
        (learn, left), *_ = tried.values()
        _checks.warn(
            f"too few pairs to validate on: {learn} to learn from and {left} held out "
            f"of {prefs.num_pairs}; the first candidate is used unselected"
        )
    return found


def _pairwise(prefs: Preferences, unit: str) -> bool:
    """Whether the two sides of a pair are drawn one by one."""
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


def candidate_rows(
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
