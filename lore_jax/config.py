"""Recipes of `fit` and methods of `adapt`: frozen settings, validated once.

A recipe or a method has the options that it uses, and no others.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np


def _is_rank(value: Any) -> bool:
    return isinstance(value, int | np.integer) and bool(value >= 1)


def _type(config: Any, name: str, expected: type) -> None:
    value = getattr(config, name)
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be a {expected.__name__}, got {value!r}")


def _choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _integer(config: Any, name: str, least: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    object.__setattr__(config, name, int(value))


def _number(
    config: Any, name: str, least: float, below: float = math.inf, strict: bool = False
) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (least <= value < below) or (strict and value == least):
        bound = f"above {least:g}" if strict else f"at least {least:g}"
        limit = f" and below {below:g}" if below < math.inf else " and finite"
        raise ValueError(f"{name} must be {bound}{limit}, got {value!r}")
    object.__setattr__(config, name, float(value))


def _grid(config: Any, name: str, legal: Callable[[Any], bool]) -> None:
    values = getattr(config, name)
    if not isinstance(values, tuple) or not values:
        raise TypeError(f"{name} must be a non-empty tuple, got {values!r}")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"{name}[{i}] must be a number, got {value!r}")
        if not legal(value):
            raise ValueError(f"{name}[{i}] is out of range: {value!r}")
    plain = (x.item() if isinstance(x, np.number) else x for x in values)
    object.__setattr__(config, name, tuple(plain))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorSearch:
    """How the prior over users is chosen where V is given.

    π is learned by EM. Then γ, κ, δ and ρ with s are chosen one after another on
    held-out pairs, by the macro log-loss of users. Of κ and δ the least loss is taken.
    The least γ, and the first ρ and s, stay unless others are better by two standard
    errors over users.

    Attributes:
      num_atoms: atoms beside the K vertices, at least.
      holdout: "judgements" (votes of one user on one item) or "items" (whole items).
      validation_share: share of the pairs held out.
      temperings: candidates for γ.
      concentrations: candidates for κ.
      decays: candidates for δ, at the chosen κ.
      variance_scales: candidates for ρ.
      margin_scales: candidates for s, each with every ρ.

    Example:
      >>> lore.PriorSearch(temperings=(0.0, 0.3)).num_atoms
      64
    """

    num_atoms: int = 64
    holdout: Literal["judgements", "items", "both"] = "judgements"
    validation_share: float = 0.3
    temperings: tuple[float, ...] = (0.4, 0.3, 0.5, 0.2, 0.0)
    concentrations: tuple[float, ...] = (3.0, 0.3, 1.0, 10.0, 30.0, 100.0)
    decays: tuple[float, ...] = (0.0, 0.5, -0.5, 1.0, -1.0)
    variance_scales: tuple[float, ...] = (0.1, 0.0, 0.05, 0.2, 0.5, 1.0, 2.0)
    margin_scales: tuple[float, ...] = (1.0, 0.5, 0.65, 0.8, 0.9, 1.1, 1.2)

    def __post_init__(self):
        """Refuses impossible settings, naming the field."""
        _integer(self, "num_atoms", 0)
        _choice(self, "holdout", self._holdouts())
        _number(self, "validation_share", 0.0, below=1.0, strict=True)
        _grid(self, "temperings", lambda x: 0 <= x <= 1)
        _grid(self, "concentrations", lambda x: x >= 0)
        _grid(self, "decays", math.isfinite)
        _grid(self, "variance_scales", lambda x: x >= 0 and math.isfinite(x))
        _grid(self, "margin_scales", lambda x: x > 0 and math.isfinite(x))

    @staticmethod
    def _holdouts() -> tuple[str, ...]:
        return "judgements", "items"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search(PriorSearch):
    """How `Marginal` chooses its settings on held-out pairs.

    Candidates are compared by macro log-loss of users on one or two hold-outs. With
    two, each log-loss is divided by that of a global Bradley–Terry model and the two
    are averaged. λ, ε and γ are tuned in this order: from the first value of the grid
    towards the second while the loss falls, or else the other way. The first value
    stays unless another is better by two standard errors over users. With two
    hold-outs, λ, ε and γ may cost at most 1.5 % of log-loss on judgements of known
    items, and each later choice 0.3 %. The ranks of `rank="auto"` are compared before
    and after tuning; the least loss wins. Then follow the number of steps, κ, δ, and ρ
    with s.

    Attributes:
      num_atoms: atoms of the prior beside the K vertices, at least.
      holdout: "judgements" (votes of one user on one item), "items" (whole items with
        all their pairs) or "both". Known and new items need different settings where
        the table has about as many rows as features: choose "items" where every
        response to be ranked is new.
      validation_share: share held out of the pairs that the selection uses. Pairs with
        one row held out and one not are not used.
      ranks: candidates for K of `rank="auto"`.
      ridges: candidates for λ; 1 / √λ is the prior deviation of a pair's margin.
      smoothings: candidates for ε of the coordinates of V: ∞ shrinks all directions of
        the embedding alike, 0 whitens them.
      temperings: candidates for γ.
      concentrations: candidates for κ; ε, λ, γ and K are compared at the first.
      decays: candidates for δ, at the chosen κ.
      variance_scales: candidates for ρ.
      margin_scales: candidates for s, each with every ρ.

    Example:
      >>> lore.Search(holdout="items").ranks
      (1, 2, 5, 10)
    """

    holdout: Literal["judgements", "items", "both"] = "both"
    validation_share: float = 0.15
    ranks: tuple[int, ...] = (1, 2, 5, 10)
    ridges: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 0.03)
    smoothings: tuple[float, ...] = (1.0, 4.0, math.inf, 0.1, 0.01)

    def __post_init__(self):
        """Refuses impossible settings, naming the field."""
        super().__post_init__()
        _grid(self, "ranks", _is_rank)
        _grid(self, "ridges", lambda x: x >= 0 and math.isfinite(x))
        _grid(self, "smoothings", lambda x: x >= 0)

    @staticmethod
    def _holdouts() -> tuple[str, ...]:
        return "judgements", "items", "both"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marginal:
    """The default recipe: V on the marginal likelihood over a learned discrete prior.

    Attributes:
      num_steps: optimiser steps at most. Training stops sooner, at a tenth of them,
        where held-out pairs say that this is better by two standard errors.
      learning_rate: Adam's, in units of the scaled problem.
      temperature: T. V grows with it; margins, and what λ means, do not depend on it.
      start: "svd", the directions that users' mean differences vary in most, or
        "random".
      num_starts: trainings on all pairs. The first begins at `start`, the others at
        random; the one with the least objective is kept.
      search: how all other settings are chosen.

    Example:
      >>> lore.Marginal(search=lore.Search(holdout="items")).num_steps
      150
    """

    num_steps: int = 150
    learning_rate: float = 0.3
    temperature: float = 1.0
    start: Literal["random", "svd"] = "svd"
    num_starts: int = 2
    search: Search = Search()

    def __post_init__(self):
        """Refuses impossible settings, naming the field."""
        _integer(self, "num_steps", 0)
        _number(self, "learning_rate", 0.0, strict=True)
        _number(self, "temperature", 0.0, strict=True)
        _choice(self, "start", ("random", "svd"))
        _integer(self, "num_starts", 1)
        _type(self, "search", Search)


def _published(config: Any) -> None:
    _integer(config, "num_steps", 0)
    _number(config, "learning_rate", 0.0, strict=True)
    _number(config, "alpha", 0.0)
    _number(config, "temperature", 0.0, strict=True)
    if config.prior is not None:
        _type(config, "prior", PriorSearch)
        if isinstance(config.prior, Search):
            raise TypeError("prior must be a PriorSearch, got a Search: V is given")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedJoint:
    """Published form 1: one Adam over (W, V) on Σ_u mean loss.

    Attributes:
      num_steps: Adam steps.
      learning_rate: Adam's.
      alpha: α ≥ 0, strength of the L2 anchor Σ_k ‖V_k − v_ref‖²; above 0 `fit` needs
        `anchor`.
      temperature: T.
      prior: how the prior is learned afterwards, V frozen; None leaves Dirichlet(1).

    References:
      Bose et al., 2025 (https://arxiv.org/abs/2504.14439), algorithm 1.

    Example:
      >>> lore.PublishedJoint().temperature
      100.0
    """

    num_steps: int = 1000
    learning_rate: float = 0.5
    alpha: float = 0.0
    temperature: float = 100.0
    prior: PriorSearch | None = PriorSearch()

    def __post_init__(self):
        """Refuses impossible settings, naming the field."""
        _published(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedAlternating:
    """Published form 2: Adam on W, then on V, mean loss over pairs.

    Attributes:
      num_steps: Adam steps.
      learning_rate: Adam's.
      alpha: α ≥ 0, strength of the cosine anchor, which warms up from 20 % to 80 % of
        the steps; above 0 `fit` needs `anchor`.
      prune: drop directions that no user weights above 1e-2.
      temperature: T.
      prior: how the prior is learned afterwards, V frozen; None leaves Dirichlet(1).

    References:
      Bose et al., 2025 (https://arxiv.org/abs/2504.14439), algorithm 1.

    Example:
      >>> lore.PublishedAlternating(prune=True).num_steps
      20000
    """

    num_steps: int = 20000
    learning_rate: float = 0.5
    alpha: float = 0.0
    prune: bool = False
    temperature: float = 100.0
    prior: PriorSearch | None = PriorSearch()

    def __post_init__(self):
        """Refuses impossible settings, naming the field."""
        _published(self)
        _type(self, "prune", bool)


Recipe = Marginal | PublishedJoint | PublishedAlternating


@dataclasses.dataclass(frozen=True)
class PosteriorMean:
    """The prior's posterior mean over atoms, refined by a convex problem; the default.

    With f_u(p) = Σ_n ℓ(z_n · p / T, y_n), p̄ the posterior mean over atoms,
    η_u = n_u^−γ and κ_u = κ (n_u / 10)^−δ, the weights are

        argmin_p  η_u f_u(p) − κ_u Σ_k p̄_k log p_k   on the simplex.

    Example:
      >>> lore.PosteriorMean()
      PosteriorMean()
    """


@dataclasses.dataclass(frozen=True)
class MaximumLikelihood:
    """Certified maximum likelihood on the simplex: argmin_p f_u(p).

    Example:
      >>> lore.MaximumLikelihood()
      MaximumLikelihood()
    """


@dataclasses.dataclass(frozen=True)
class MAP:
    """Certified MAP under Dirichlet(α) in softmax coordinates.

        argmin_p  f_u(p) − Σ_k α_k log p_k   on the simplex

    Attributes:
      alpha: α > 0, one number or one per direction.

    Example:
      >>> lore.MAP(0.5).alpha
      0.5
    """

    alpha: float | tuple[float, ...]

    def __post_init__(self):
        """Refuses impossible settings, naming the field."""
        if isinstance(self.alpha, tuple):
            _grid(self, "alpha", lambda x: x > 0 and math.isfinite(x))
        else:
            _number(self, "alpha", 0.0, strict=True)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PublishedAdam:
    """The published adaptation: Adam on logits.

    Attributes:
      num_steps: Adam steps.
      learning_rate: Adam's.
      init: float[U, K], starting logits; None draws them from `key`.
      key: of the random start, by the user's place; None is `jax.random.key(0)`.

    References:
      Bose et al., 2025 (https://arxiv.org/abs/2504.14439), section 3.3.

    Example:
      >>> lore.PublishedAdam().num_steps
      500
    """

    num_steps: int = 500
    learning_rate: float = 0.5
    init: Any = None
    key: Any = None

    def __post_init__(self):
        """Refuses impossible settings, naming the field."""
        _integer(self, "num_steps", 0)
        _number(self, "learning_rate", 0.0, strict=True)
        if self.init is not None and self.key is not None:
            raise ValueError("init and key exclude one another: both are the start")


Method = PosteriorMean | MaximumLikelihood | MAP | PublishedAdam
