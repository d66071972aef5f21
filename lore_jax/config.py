"""Frozen settings, validated once; they never enter a compiled program as data."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How `fit` learns the basis.

    The default, `method="marginal"`, is the recipe we defend. `reference_joint` and
    `reference_alternating` are the two published forms, kept for comparison.

    Attributes:
      method: "marginal", "joint" or "alternating".
      num_steps: optimiser steps; "marginal" stops sooner, at a tenth of them, where
        held-out judgements say that it is better by two standard errors.
      learning_rate: Adam's; for "marginal" in units of the scaled problem.
      temperature: T.
      num_atoms: atoms of the prior beside the K vertices, at least.
      holdout: what settings are chosen on ("marginal"): "judgements" (a vote of one
        user on one item), "items" (whole items with all their pairs), or "both": the
        mean of the two log-losses, each divided by that of a global Bradley–Terry
        model. What suits known items best is not best for new ones where the table
        has about as many rows as features: choose "items" where every response to be
        ranked is new.
      ridges: candidate λ; 1 / √λ is the prior deviation of a pair's margin
        ("marginal"). Of λ, ε and γ, in this order, the search goes from the first value
        towards the second while the loss falls, or else the other way. The first value
        stays unless another is better by two standard errors over users. With "both",
        they may cost at most 1.5 % of log-loss on judgements of known items, relative
        to a global model of the same ε and λ, and each later choice 0.3 %.
      smoothings: candidate ε of the coordinates (`coordinates`): from ∞, the embedding
        alone, to 0, item ids alone where M ≤ D; likewise.
      temperings: candidate γ of the prior; likewise. Where V is given or of a published
        form, the least γ stays unless another is better by two standard errors.
      concentrations: candidate κ of the prior; "marginal" compares ε, λ, γ and K at the
        first. With a basis that is given or of a published form, γ is compared at ∞.
      decays: candidate δ of the prior, at the chosen κ.
      spreads: candidate ρ of the prior; the least loss of ρ and s is taken where it
        is better than that of the first by two standard errors.
      margin_scales: candidate s of the prior, each with every ρ.
      ranks: candidate K of `rank="auto"`, which takes the one with the least loss.
      start: "svd", directions that users' mean differences vary in most, or "random".
      num_starts: trainings on all pairs, the first from `start`, the others from random
        ones; the one that reaches the least objective is kept.
      validation_share: share held out of the pairs that the selection uses, twice that
        where V is given; pairs with one row held out and one not are not used.
      alpha: strength of the published anchor ("joint": L2, "alternating": cosine).
      prune: drop directions that no user weights above 1e-2 ("alternating").
    """

    method: Literal["marginal", "joint", "alternating"] = "marginal"
    num_steps: int = 150
    learning_rate: float = 0.3
    temperature: float = 1.0
    num_atoms: int = 64
    holdout: Literal["judgements", "items", "both"] = "both"
    smoothings: tuple[float, ...] = (1.0, 4.0, math.inf, 0.1, 0.01)
    ridges: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 0.03)
    temperings: tuple[float, ...] = (0.4, 0.3, 0.5, 0.2, 0.0)
    concentrations: tuple[float, ...] = (3.0, 0.3, 1.0, 10.0, 30.0, 100.0)
    decays: tuple[float, ...] = (0.0, 0.5, -0.5, 1.0, -1.0)
    spreads: tuple[float, ...] = (0.1, 0.0, 0.05, 0.2, 0.5, 1.0, 2.0)
    margin_scales: tuple[float, ...] = (1.0, 0.5, 0.65, 0.8, 0.9, 1.1, 1.2)
    ranks: tuple[int, ...] = (1, 2, 5, 10)
    start: Literal["random", "svd"] = "svd"
    num_starts: int = 2
    validation_share: float = 0.15
    alpha: float = 0.0
    prune: bool = False

    def __post_init__(self):
        """Refuses impossible settings, naming the field."""
        _choice(self, "method", ("marginal", "joint", "alternating"))
        _integer(self, "num_steps", 0)
        _integer(self, "num_atoms", 0)
        _integer(self, "num_starts", 1)
        _number(self, "learning_rate", 0.0, strict=True)
        _number(self, "temperature", 0.0, strict=True)
        _number(self, "alpha", 0.0)
        _number(self, "validation_share", 0.0, below=1.0, strict=True)
        _choice(self, "holdout", ("judgements", "items", "both"))
        _grid(self, "smoothings", lambda x: x >= 0)
        _grid(self, "ridges", lambda x: x >= 0 and math.isfinite(x))
        _grid(self, "temperings", lambda x: 0 <= x <= 1)
        _grid(self, "concentrations", lambda x: x >= 0)
        _grid(self, "decays", math.isfinite)
        _grid(self, "spreads", lambda x: x >= 0 and math.isfinite(x))
        _grid(self, "margin_scales", lambda x: x > 0 and math.isfinite(x))
        _choice(self, "start", ("random", "svd"))
        _grid(self, "ranks", lambda x: isinstance(x, int) and x >= 1)
        if self.prune and self.method != "alternating":
            raise ValueError(
                f"prune belongs to method='alternating', got method={self.method!r}"
            )

    @classmethod
    def reference_joint(
        cls,
        num_steps: int = 1000,
        learning_rate: float = 0.5,
        alpha: float = 0.0,
        temperature: float = 100.0,
    ) -> "TrainConfig":
        """Published form 1: one Adam over (W, V) on Σ_u mean loss, L2 anchor."""
        return cls(
            method="joint",
            num_steps=num_steps,
            learning_rate=learning_rate,
            alpha=alpha,
            temperature=temperature,
        )

    @classmethod
    def reference_alternating(
        cls,
        num_steps: int = 20000,
        learning_rate: float = 0.5,
        alpha: float = 0.0,
        prune: bool = False,
        temperature: float = 100.0,
    ) -> "TrainConfig":
        """Published form 2: Adam on W, then on V, mean loss over pairs."""
        return cls(
            method="alternating",
            num_steps=num_steps,
            learning_rate=learning_rate,
            alpha=alpha,
            prune=prune,
            temperature=temperature,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """How `adapt` finds the weights of new users against a frozen basis.

    Attributes:
      method: "posterior" (the prior's posterior mean, refined), "maximum_likelihood",
        "maximum_a_posteriori" (Dirichlet) or "reference" (Adam on logits).
      temperature: T; None takes the prior's, or 1 without a prior.
      alpha: Dirichlet α > 0, one number or one per direction, for
        "maximum_a_posteriori".
      num_steps: Adam steps of "reference".
      learning_rate: Adam's step of "reference".
      seed: random start of "reference" when `adapt` gets no `init`.
    """

    method: Literal[
        "posterior", "maximum_likelihood", "maximum_a_posteriori", "reference"
    ] = "posterior"
    temperature: float | None = None
    alpha: float | tuple[float, ...] | None = None
    num_steps: int = 500
    learning_rate: float = 0.5
    seed: int = 0

    def __post_init__(self):
        """Refuses impossible settings, naming the field."""
        methods = (
            "posterior",
            "maximum_likelihood",
            "maximum_a_posteriori",
            "reference",
        )
        _choice(self, "method", methods)
        if self.temperature is not None:
            _number(self, "temperature", 0.0, strict=True)
        _integer(self, "num_steps", 0)
        _number(self, "learning_rate", 0.0, strict=True)
        if (self.alpha is None) == (self.method == "maximum_a_posteriori"):
            raise ValueError(
                "alpha belongs to method='maximum_a_posteriori' and to no other; got "
                f"method={self.method!r}, alpha={self.alpha!r}"
            )
        if isinstance(self.alpha, tuple):
            _grid(self, "alpha", lambda x: x > 0 and math.isfinite(x))
        elif self.alpha is not None:
            _number(self, "alpha", 0.0, strict=True)

    @classmethod
    def maximum_likelihood(cls, temperature: float | None = None) -> "AdaptConfig":
        """Certified maximum likelihood on the simplex; ignores the prior's atoms."""
        return cls(method="maximum_likelihood", temperature=temperature)

    @classmethod
    def maximum_a_posteriori(
        cls, alpha: float | tuple[float, ...], temperature: float | None = None
    ) -> "AdaptConfig":
        """Certified MAP under Dirichlet(α) in softmax coordinates, any α > 0."""
        return cls(method="maximum_a_posteriori", alpha=alpha, temperature=temperature)

    @classmethod
    def reference(
        cls,
        num_steps: int = 500,
        learning_rate: float = 0.5,
        temperature: float = 100.0,
        seed: int = 0,
    ) -> "AdaptConfig":
        """The published adaptation: Adam on logits from a random start, T=100."""
        return cls(
            method="reference",
            num_steps=num_steps,
            learning_rate=learning_rate,
            temperature=temperature,
            seed=seed,
        )


def _choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _integer(config: Any, name: str, least: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _number(
    config: Any, name: str, least: float, below: float = math.inf, strict: bool = False
) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (least <= value < below) or (strict and value == least):
        bound = f"above {least:g}" if strict else f"at least {least:g}"
        limit = f" and below {below:g}" if below < math.inf else " and finite"
        raise ValueError(f"{name} must be {bound}{limit}, got {value!r}")


def _grid(config: Any, name: str, legal: Callable[[float], bool]) -> None:
    values = getattr(config, name)
    if not isinstance(values, tuple) or not values:
        raise TypeError(f"{name} must be a non-empty tuple, got {values!r}")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}[{i}] must be a number, got {value!r}")
        if not legal(value):
            raise ValueError(f"{name}[{i}] is out of range: {value!r}")
