"""The prior over users: a finite mixture on the simplex, and its equations.

With atoms a on the simplex and prior weights π, a user with pairs z_n has posterior
weights ∝ π_a · (Π_n σ(z_n · a / T))^η with η = (number of pairs)^−γ.
`adapt` refines their mean with a pull κ_n = κ (n / 10)^−δ.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from lore_jax import _checks
from lore_jax._backend import EXACT, to_array


class Prior(struct.PyTreeNode):
    """What is believed of a user before any pair: a finite mixture on the simplex.

    Attributes:
      atoms: float[A, K], points of the simplex.
      log_weights: float[A], log π, normalised.
      concentration: κ, float[]. Strength of the refinement's pull towards the
        posterior mean of a user with ten pairs, in pairs; infinity keeps the posterior
        mean itself.
      tempering: γ ≥ 0, float[]. The likelihood of a user with n pairs counts with power
        η = n^−γ: pairs of one user share responses and are not independent, so n of
        them are worth n^(1−γ).
      variance_scale: ρ ≥ 0, float[], the share of the posterior's variance of a margin
        that `predict_proba` integrates over. `fit` learns it.
      decay: δ, float[]. With n pairs the pull is κ_n = κ (n / 10)^−δ: above 0 where
        the atoms lie too far apart for users with many pairs.
      margin_scale: s > 0, float[]. `predict_proba` takes margins s-fold: above 1 where
        a regularised basis is less sure than it should be; `fit` learns it with ρ.

    Example:
      >>> lore.uniform_prior(2).mean.round(2).tolist()
      [0.5, 0.5]
    """

    atoms: jax.Array
    log_weights: jax.Array
    concentration: jax.Array
    tempering: jax.Array
    variance_scale: Any = np.float32(0.1)
    decay: Any = np.float32(0.0)
    margin_scale: Any = np.float32(1.0)

    def __repr__(self) -> str:
        """Sizes and numbers, on three lines."""
        atoms, rank = np.shape(self.atoms)
        return (
            f"Prior({atoms} atoms over K={rank} directions,\n"
            f"  concentration={say(self.concentration)}, "
            f"tempering={say(self.tempering)}, decay={say(self.decay)},\n"
            f"  variance_scale={say(self.variance_scale)}, "
            f"margin_scale={say(self.margin_scale)})"
        )

    @property
    def mean(self) -> jax.Array:
        """float[K], Σ_a π_a atom_a: the weights of a user without pairs."""
        return mixture_mean(jax.nn.softmax(self.log_weights), self.atoms)


def say(number: Any) -> str:
    """A number for a `repr`; the type of what has no value while tracing."""
    try:
        return f"{float(number):.4g}"
    except Exception:
        return type(number).__name__


def mixture_mean(probabilities: jax.Array, atoms: jax.Array) -> jax.Array:
    """Σ_a probabilities[..., a] · atoms[a, K] at full precision."""
    return jnp.matmul(probabilities, atoms, precision=EXACT)


def draw_atoms(key: jax.Array, rank: int, num_atoms: int, dtype=None) -> jax.Array:
    """Dirichlet(1) draws and their cyclic shifts: float[A, K], A ≥ `num_atoms`.

    The shifts put the mean of the atoms at the centre of the simplex.
    """
    draws = jax.random.exponential(key, (-(-num_atoms // rank), rank))
    draws = draws / jnp.sum(draws, axis=1, keepdims=True)
    shifts = [jnp.roll(draws, k, axis=1) for k in range(rank)]
    atoms = jnp.stack(shifts, 1).reshape(-1, rank)
    return atoms.astype(dtype or jnp.result_type(float))


def uniform_prior(rank: int, num_atoms: int = 512) -> Prior:
    """Dirichlet(1) as atoms: the prior of a `RewardModel` that has none.

    Example:
      >>> lore.uniform_prior(3, num_atoms=6).atoms.shape
      (6, 3)
    """
    atoms = draw_atoms(jax.random.key(0), rank, num_atoms)
    return Prior(
        atoms=atoms,
        log_weights=jnp.full(len(atoms), -math.log(len(atoms)), atoms.dtype),
        concentration=jnp.asarray(float(rank), atoms.dtype),
        tempering=jnp.zeros((), atoms.dtype),
    )


def check_prior(prior: Prior, rank: int) -> None:
    """Raises unless the prior's arrays fit together and to rank K.

    Raises:
      TypeError: `prior` is no `Prior`.
      ValueError: a shape, or a number, is wrong; the message names it.
    """
    if not isinstance(prior, Prior):
        raise TypeError(f"prior must be a Prior, got {type(prior)}")
    shape = np.shape(prior.atoms)
    if len(shape) != 2 or shape[1] != rank or not shape[0]:
        raise ValueError(f"prior.atoms must be float[A, K] with K={rank}, got {shape}")
    if np.shape(prior.log_weights) != shape[:1]:
        raise ValueError(
            f"prior.log_weights must be float[A] with A={shape[0]}, got shape "
            f"{np.shape(prior.log_weights)}"
        )
    _checks.check_simplex(prior.atoms, "prior.atoms")
    _checks.check_finite(prior.log_weights, "prior.log_weights")
    for name in (
        "concentration",
        "tempering",
        "variance_scale",
        "decay",
        "margin_scale",
    ):
        value = getattr(prior, name)
        if np.shape(value) != ():
            raise ValueError(
                f"prior.{name} must be one number, got shape {np.shape(value)}"
            )
        if _checks.is_traced(value):
            continue
        if np.asarray(value).dtype.kind not in "fiu" and not _checks.is_floating(
            np.asarray(value).dtype
        ):
            raise TypeError(f"prior.{name} must be one number, got {value!r}")
        number = float(value)
        if name == "decay" and not math.isfinite(number):
            raise ValueError(f"prior.decay must be finite, got {number:g}")
        if name != "decay" and not number >= 0:
            raise ValueError(f"prior.{name} must be at least 0, got {number:g}")
        if name != "concentration" and number == math.inf:
            raise ValueError(f"prior.{name} must be finite, got inf")
        if name == "margin_scale" and number == 0:
            raise ValueError("prior.margin_scale must be above 0, got 0")


def likelihood_power(num_pairs: jax.Array, tempering: jax.Array) -> jax.Array:
    """η = n^−γ, the power of the likelihood of a user with n (weighted) pairs."""
    return jnp.maximum(num_pairs, 1) ** -tempering


def pull_towards_mean(num_pairs: jax.Array, prior: Prior) -> jax.Array:
    """κ_n = κ (n / 10)^−δ of users with n (weighted) pairs; 1 where κ = ∞."""
    finite = jnp.isfinite(prior.concentration)
    pull = jnp.where(finite, prior.concentration, 1)
    return pull * (jnp.maximum(num_pairs, 1) / 10) ** -prior.decay


@functools.partial(jax.jit, static_argnames="num_steps")
def learn_log_weights(
    log_likelihood: jax.Array,
    *,
    pseudo_count: float = 1.0,
    num_steps: int = 100,
) -> jax.Array:
    """EM for log π on fixed atoms: maximises Σ_u log Σ_a π_a L_ua.

    Args:
      log_likelihood: log L, float[U, A], already tempered.
      pseudo_count: users that are shared evenly by the atoms beforehand.
      num_steps: EM steps.

    Returns:
      float[A], normalised.
    """
    size = log_likelihood.shape[1]
    start = jnp.full(size, -math.log(size), log_likelihood.dtype)

    def step(log_weights, _):
        joint = log_likelihood + log_weights[None]
        share = jax.nn.softmax(joint, axis=-1).sum(0) + pseudo_count / size
        return jnp.log(share / share.sum()), None

    return lax.scan(step, start, length=num_steps)[0]


@functools.partial(jax.jit, static_argnames=("rank", "num_atoms", "dtype"))
def make_atoms(key: jax.Array, rank: int, num_atoms: int, dtype=None) -> jax.Array:
    """The K vertices and at least `num_atoms` points drawn over the simplex.

    At rank 2 the points are evenly spaced.
    """
    vertices = jnp.eye(rank, dtype=dtype or jnp.result_type(float))
    if rank == 1 or num_atoms == 0:
        return vertices
    if rank == 2:
        first = jnp.arange(1, num_atoms + 1, dtype=vertices.dtype) / (num_atoms + 1)
        return jnp.concatenate([vertices, jnp.stack([first, 1 - first], 1)])
    drawn = draw_atoms(key, rank, num_atoms, vertices.dtype)
    return jnp.concatenate([vertices, drawn])


def make_prior(atoms, log_weights, tempering, concentration, decay=0.0) -> Prior:
    """A `Prior` from plain numbers, in the dtype of `atoms`."""
    return Prior(
        atoms=atoms,
        log_weights=to_array(log_weights, atoms.dtype),
        concentration=to_array(concentration, atoms.dtype),
        tempering=to_array(tempering, atoms.dtype),
        decay=to_array(decay, atoms.dtype),
    )


def with_settings(prior: Prior, settings: dict) -> Prior:
    """The prior with other numbers, in its own dtype."""
    dtype = prior.atoms.dtype
    return prior.replace(**{name: to_array(x, dtype) for name, x in settings.items()})
