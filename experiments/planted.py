"""Planted problems as splits of the protocol, and how far their truth is recovered."""

import dataclasses
import functools
import json

import jax
import numpy as np

import lore_jax as lore
from experiments.parts import PARTS, Split
from experiments.prepared import digest

FACTS = ("users", "new_users", "features", "true_rank", "alpha", "label_noise")
ANGLES = ("largest", "mean", "matched")


@dataclasses.dataclass(frozen=True)
class Planted:
    """A planted problem, with as many pairs of every user; a source of ``Run``.

    Attributes:
        seed: of truth and choices; problems of one seed have nested pairs.
        pairs: of every user, seen and new alike.
        most: pairs that are drawn, of which ``pairs`` are taken.
        facts: values of ``FACTS``.
    """

    seed: int
    pairs: int
    most: int
    facts: tuple

    @property
    def name(self) -> str:
        """What files call it."""
        return f"{self.pairs}_pairs_{self.seed}"

    def fingerprint(self, known: dict | None = None) -> str:
        """Identifies the problem; ``known`` is not needed."""
        return digest(json.dumps(dataclasses.astuple(self)))[:16]

    def people(self) -> dict[str, np.ndarray]:
        """Ids of seen and new users; those of another seed are other people."""
        facts = dict(zip(FACTS, self.facts))
        ids = np.array([f"{self.seed}/{u}" for u in range(sum(self.facts[:2]))])
        return dict(zip(("seen", "unseen"), np.split(ids, [facts["users"]])))

    def truth(self) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """The true basis float[D, K], and weights of seen and of new users."""
        problem = _draw(self.seed, self.most, self.facts)
        weights = np.asarray(problem.weights)
        return np.asarray(problem.basis), tuple(np.split(weights, [self.facts[0]]))

    def load(self) -> Split:
        """The four parts; the base reward head is the planted mean direction."""
        problem = _draw(self.seed, self.most, self.facts)
        shown = lore.take_shots(problem.prefs, self.pairs, seed=self.seed)
        sides = np.split(np.arange(shown.num_users), [self.facts[0]])
        parts = [
            compact(lore.take_users(prefs, users))
            for users in sides
            for prefs in (shown, problem.heldout)
        ]
        counts = {
            part: {
                **{"users": prefs.num_users, "pairs": prefs.num_pairs},
                **dict.fromkeys(("units", "judgements", "user_rows"), prefs.num_pairs),
            }
            for part, prefs in zip(PARTS, parts)
        }
        head = np.asarray(problem.basis).mean(1)  # the Dirichlet is symmetric
        data = lore.data.FourWay(*parts)
        return Split(self.name, data, head, "pairs", np.zeros(0, int), None, counts)


@functools.lru_cache(maxsize=1)
def _draw(seed: int, most: int, facts: tuple) -> lore.data.Planted:
    asked = dict(zip(FACTS, facts))
    return lore.data.planted(
        jax.random.key(seed),
        num_users=asked["users"] + asked["new_users"],
        pairs_per_user=most,
        num_features=asked["features"],
        rank=asked["true_rank"],
        alpha=asked["alpha"],
        label_noise=asked["label_noise"],
    )


def compact(prefs: lore.Preferences) -> lore.Preferences:
    """Only the rows in use: differences that nobody is shown are left out."""
    rows = np.asarray(prefs.chosen)
    return prefs.replace(
        features=np.asarray(prefs.features)[rows],
        chosen=np.arange(len(rows), dtype=np.int32),
    )


def recovery(basis, truth) -> dict[str, float]:
    """How far learned directions are the true ones.

    Args:
        basis: float[D, K].
        truth: float[D, J].

    Returns:
        ``largest`` and ``mean`` principal angle between the spans, in degrees (0 is
        recovered, random directions of D ≫ K are near 90); ``matched``, the mean angle
        between each true direction and its learned one, best matching.
    """
    from scipy.linalg import subspace_angles
    from scipy.optimize import linear_sum_assignment

    basis, truth = (np.asarray(x, np.float64) for x in (basis, truth))
    angles = np.degrees(subspace_angles(basis, truth))
    unit = [x / np.maximum(np.linalg.norm(x, axis=0), 1e-30) for x in (basis, truth)]
    cosines = unit[0].T @ unit[1]
    matched = np.arccos(np.clip(cosines[linear_sum_assignment(-cosines)], -1, 1))
    values = (angles.max(), angles.mean(), np.degrees(matched).mean())
    return dict(zip(ANGLES, map(float, values)))
