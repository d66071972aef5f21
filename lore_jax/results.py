"""What `fit` and `adapt` give back, and what a training step reports."""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

from lore_jax.model import RewardParams
from lore_jax.preferences import Ids
from lore_jax.prior import Prior


class Metrics(NamedTuple):
    """Scalars of one training step; `fit` stacks them to float[num_steps].

    Attributes:
      loss: the data term of the objective, at the start of the step.
      weights_norm: norm of the W gradient (of the change of log π by default).
      basis_norm: norm of the V gradient.
    """

    loss: jax.Array
    weights_norm: jax.Array
    basis_norm: jax.Array


class Fitted(struct.PyTreeNode):
    """What `fit` learned; everything that using it needs.

    Attributes:
      params: basis float[D, K] on raw features, and logits float[U, K].
      weights: float[U, K] on the simplex.
      prior: what `adapt` believes of a new user.
      temperature: T at which the weights mean what they mean.
      history: losses and the selection's table, see `History`.
      config: the `TrainConfig` that was used.
      unpruned: the published columns before pruning, or None.
      kept: int[K], which of them were kept, or None.
      ids: names of the users, or None.
    """

    params: RewardParams
    weights: jax.Array
    prior: Prior
    history: Any
    unpruned: RewardParams | None = None
    kept: Any = None
    temperature: float = struct.field(pytree_node=False, default=1.0)
    config: Any = struct.field(pytree_node=False, default=None)
    ids: Ids | None = struct.field(pytree_node=False, default=None)

    @property
    def user_ids(self):
        """str[U], or None where users are numbers."""
        return None if self.ids is None else self.ids.users

    @property
    def basis(self) -> jax.Array:
        """V, float[D, K], on raw features."""
        return self.params.basis


class History(NamedTuple):
    """How a fit went.

    Attributes:
      loss: float[S], data term before each step.
      weights_norm: float[S].
      basis_norm: float[S].
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
        `diagnostics.report`; empty with one start.
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
      fingerprint: of data, rank, key, config, init and anchor.
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


class Adapted(NamedTuple):
    """Weights of new users, and what a caller needs in order to trust them.

    Attributes:
      weights: float[U, K] on the simplex.
      logits: float[U, K], log(max(weights, tiny)).
      loss: float[U], mean Bradley–Terry loss over the user's pairs; NaN without any.
      gap: float[U], certified bound on the distance to the optimum of what the
        config minimises.
      converged: bool[U], gap within the tolerance that `AdaptConfig` documents.
      num_steps: int32[U].
      user_ids: str[U] or None.
      deviation: float[U, K], posterior standard deviation of each weight, or None
        where `adapt` was not asked for the spread.
    """

    weights: Any
    logits: Any
    loss: Any
    gap: Any
    converged: Any
    num_steps: Any
    user_ids: Any = None
    deviation: Any = None
