"""What `fit`, `adapt` and `posterior` return, and what a training step reports."""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

from lore_jax._ids import Ids
from lore_jax.model import RewardModel, RewardParams


class Metrics(NamedTuple):
    """Scalars of one training step; `fit` stacks them to float[num_steps].

    Attributes:
      loss: the data term of the objective, at the start of the step.
      weights_norm: of a published recipe, norm of the slope in W; of `Marginal`, norm
        of the change of the atoms' weights π.
      basis_norm: norm of the slope in what V follows from.
    """

    loss: jax.Array
    weights_norm: jax.Array
    basis_norm: jax.Array


class Fitted(struct.PyTreeNode):
    """What `fit` learned.

    Attributes:
      model: basis, prior and temperature: the first argument of every verb.
      weights: float[U, K] on the simplex, of the users of the fit.
      logits: float[U, K], log weights; of a published recipe its own parameters.
      history: losses and the selection's table, see `History`.
      unpruned: the published columns before pruning, or None.
      kept: int[K], which of them were kept, or None.
      recipe: the recipe that was used; a `PriorSearch` after `fit_prior`.
      ids: names of users and items, or None.
    """

    model: RewardModel
    weights: jax.Array
    logits: jax.Array
    history: Any
    unpruned: RewardParams | None = None
    kept: Any = None
    recipe: Any = struct.field(pytree_node=False, default=None)
    ids: Ids | None = struct.field(pytree_node=False, default=None)

    @property
    def user_ids(self):
        """str[U] or int[U], or None where users are numbers."""
        return None if self.ids is None else self.ids.users

    @property
    def params(self) -> RewardParams:
        """Basis float[D, K] and logits float[U, K]."""
        return RewardParams(basis=self.model.basis, logits=self.logits)

    def __repr__(self) -> str:
        """The model, sizes and the recipe's name."""
        names = "" if self.user_ids is None else ", named"
        model = repr(self.model).replace("\n", "\n  ")
        return (
            f"Fitted({np.shape(self.weights)[0]} users{names}, "
            f"recipe={type(self.recipe).__name__}, "
            f"{np.size(self.history.loss)} steps,\n  model={model})"
        )


class History(NamedTuple):
    """How a fit went.

    Attributes:
      loss: float[S], data term before each step.
      weights_norm: float[S], see `Metrics`.
      basis_norm: float[S], see `Metrics`.
      selection: one dict per candidate that validation compared, the chosen one
        marked; empty where nothing was selected.
      validation: float[C], mean over hold-outs of the macro log-loss of the chosen
        candidate, trained without them, at the first κ and δ of the grids; empty where
        nothing was held out.
      validation_steps: int[C], after how many steps.
      heldout: one dict per hold-out: "holdout" ("judgements" or "items"), "log_loss" of
        the chosen candidate, "global_log_loss" of the best global Bradley–Terry model
        for that hold-out, "gain", their difference, and its "standard_error".
      starts: how much trainings from different starts agree, a dict as in
        `diagnostics.report`; None with one start.
    """

    loss: Any
    weights_norm: Any
    basis_norm: Any
    selection: tuple = ()
    validation: Any = np.zeros(0, np.float32)
    validation_steps: Any = np.zeros(0, np.int32)
    heldout: tuple = ()
    starts: Any = None


class Progress(struct.PyTreeNode):
    """How far a fit is: all that `fit(..., resume=progress)` needs to go on.

    Arrays are NumPy copies. Keys and data are not in it; `fingerprint` says which.

    Attributes:
      state: leaves of the running training's state, in `jax.tree.leaves` order.
      metrics: of its steps so far, float[n] each.
      trail: (θ float[S, R, K], log π float[S, A]) of the running candidate after each
        tenth of its steps; () where nothing is compared.
      best: the same of those `rows` that are marked as kept, one after another.
      losses: users' held-out log-loss float[U] of each of the `rows`.
      finished: (objective float[i], θ, log π, *metrics) of i trainings on all pairs,
        each stacked; () before.
      name: which training is running.
      rows: one dict per candidate and hold-out that was trained on.
      choice: what the search chose, once it has; {} before.
      fingerprint: of data, rank, key, recipe, init and anchor.
      digest: of everything else here; a record that was changed is refused.
    """

    state: tuple
    metrics: Metrics
    trail: tuple = ()
    best: tuple = ()
    losses: tuple = ()
    finished: tuple = ()
    name: str = struct.field(pytree_node=False, default="")
    rows: tuple = struct.field(pytree_node=False, default=())
    choice: dict = struct.field(pytree_node=False, default_factory=dict)
    fingerprint: str = struct.field(pytree_node=False, default="")
    digest: str = struct.field(pytree_node=False, default="")

    @property
    def num_steps(self) -> int:
        """Steps that the running training took."""
        return len(self.metrics.loss)

    def __repr__(self) -> str:
        """Which training is running, and how far it is."""
        return (
            f"Progress({self.name!r}, {self.num_steps} steps, "
            f"{len(self.rows)} candidates compared)"
        )


class Adapted(NamedTuple):
    """Weights of new users, with the certificate of each.

    Attributes:
      weights: float[U, K] on the simplex.
      logits: float[U, K], log(max(weights, tiny)).
      loss: float[U], mean Bradley–Terry loss over the user's pairs; NaN without any.
      gap: float[U], certified bound on the distance to the optimum of what the
        method minimises.
      converged: bool[U], gap within the tolerance. With R = max |z| over the user's
        pairs, divided by T, and Σ barrier of what the method minimises (0 for maximum
        likelihood, whose weights sum to 1), it is 1e-5 (R Σ weight + Σ barrier) where
        R ≤ 84, and max(9e-4 (f + Σ barrier), 1e-6 Σ weight) above, f the data term
        Σ weight · loss. Users whom float32 cannot certify are solved in float64 on the
        CPU. At R = 1e7 float32 weights may be too coarse for the optimum.
      num_steps: int32[U].
      user_ids: str[U] or int[U], or None.
      std: float[U, K], posterior standard deviation of each weight, or None where
        `adapt` was not asked for it.
    """

    weights: Any
    logits: Any
    loss: Any
    gap: Any
    converged: Any
    num_steps: Any
    user_ids: Any = None
    std: Any = None

    def __repr__(self) -> str:
        """How many users, and how many of them converged."""
        users, rank = np.shape(self.weights)
        names = "" if self.user_ids is None else ", named"
        std = "" if self.std is None else ", with std"
        return (
            f"Adapted({users} users{names}, K={rank}, "
            f"{_count(self.converged)} converged{std})"
        )


class Posterior(NamedTuple):
    """Weights of users, and how sure their pairs make us of them.

    Attributes:
      weights: p, float[U, K] on the simplex, what `adapt` returns: the mean of the
        density in `posterior`.
      mean: p̄, float[U, K], tempered posterior mean over the prior's atoms, from which
        `weights` are refined.
      std: float[U, K], posterior standard deviation of each weight, at most 1/2.
      covariance: Σ, float[U, K, K], or None where it was not asked for.
      user_ids: str[U] or int[U], or None.
    """

    weights: Any
    mean: Any
    std: Any
    covariance: Any = None
    user_ids: Any = None

    def __repr__(self) -> str:
        """How many users."""
        users, rank = np.shape(self.weights)
        names = "" if self.user_ids is None else ", named"
        covariance = "" if self.covariance is None else ", with covariance"
        return f"Posterior({users} users{names}, K={rank}{covariance})"


def _count(values: Any) -> Any:
    try:
        return int(np.sum(np.asarray(values)))
    except Exception:  # While tracing there is nothing to count.
        return type(values).__name__
