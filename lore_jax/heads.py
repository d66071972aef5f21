"""A reward head for any Flax backbone: hidden states and users to rewards."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from lore_jax import _checks, _equations, _ids
from lore_jax._entry import public
from lore_jax.model import RewardModel, check_model, prior_of
from lore_jax.prior import Prior, check_prior

_BASIS_INIT = nnx.initializers.lecun_normal()

_LOGITS_INIT = nnx.initializers.zeros_init()  # Every user starts at uniform weights.


class RewardHead(nnx.Module):
    """The reward r_u(x) = x · V · softmax(w_u) / T as a layer.

    x is one hidden state of a backbone for each response, for example that of the last
    token. V and the logits w are parameters. The gradient flows through x into the
    backbone.

    All of `lore.losses` takes part in a training step: the anchors and the ridge of
    `head.basis[...]`, and `marginal_loss` of differences of `head.project`, which
    integrates users out under a prior and needs no logits.

    Attributes:
      basis: V, `nnx.Param` of float[D, K].
      logits: w, `nnx.Param` of float[U, K], or None where the head has no users.
      temperature: T.

    Example:
      >>> from flax import nnx
      >>> head = lore.heads.RewardHead(8, 2, num_users=3, rngs=nnx.Rngs(0))
      >>> hidden = jax.random.normal(jax.random.key(1), (5, 8))
      >>> head(hidden, np.array([0, 1, 2, 2, 0])).shape
      (5,)
      >>> head(hidden, weights=np.array([0.9, 0.1])).shape
      (5,)
      >>> head.to_model().basis.shape
      (8, 2)
    """

    def __init__(
        self,
        num_features: int,
        rank: int,
        num_users: int | None = None,
        *,
        temperature: float = 1.0,
        basis_init: Callable[..., Any] = _BASIS_INIT,
        logits_init: Callable[..., Any] = _LOGITS_INIT,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws V and the logits.

        Args:
          num_features: D, the width of the hidden states.
          rank: K.
          num_users: U; None is a head without users, which is called with `weights` or
            `logits`.
          temperature: T > 0.
          basis_init: of V, (key, shape, dtype) → array; `nnx.with_partitioning` adds a
            sharding.
          logits_init: of the logits.
          param_dtype: of both. Products are exact in float32.
          rngs: its stream `params` is used.

        Raises:
          ValueError: a size is below 1, or T is not positive.
          TypeError: a size is no integer.
        """
        _checks.check_count(num_features, "num_features")
        _checks.check_count(rank, "rank")
        _checks.check_positive(temperature, "temperature")
        shape = num_features, rank
        self.basis = nnx.Param(basis_init(rngs.params(), shape, param_dtype))
        self.logits: Any = nnx.data(None)
        if num_users is not None:
            _checks.check_count(num_users, "num_users")
            shape = num_users, rank
            self.logits = nnx.Param(logits_init(rngs.params(), shape, param_dtype))
        self.temperature = float(temperature)

    @classmethod
    def from_model(
        cls, model: RewardModel, weights: Any = None, *, num_users: int | None = None
    ) -> "RewardHead":
        """The head of a fitted model, to train it further with a backbone.

        Args:
          model: its basis and temperature become the head's.
          weights: where the users start: what `fit` or `adapt` returned, or float[U, K]
            on the simplex. Users are their rows.
          num_users: U users that start at the prior's mean, instead of `weights`. With
            neither, the head has no users.

        Returns:
          `RewardHead`.

        Raises:
          ValueError: shapes disagree, weights are not on the simplex, or both `weights`
            and `num_users` are given.
          TypeError: `model` is something else.

        Example:
          >>> model = lore.RewardModel(np.eye(3, 2, dtype=np.float32), temperature=2.0)
          >>> head = lore.heads.RewardHead.from_model(model, num_users=4)
          >>> np.asarray(head.weights).round(2)[0].tolist()
          [0.5, 0.5]
        """
        check_model(model)
        if weights is not None and num_users is not None:
            raise ValueError(
                "weights and num_users exclude one another: both are users"
            )
        if num_users is not None:
            _checks.check_count(num_users, "num_users")
            weights = np.tile(np.asarray(prior_of(model).mean), (num_users, 1))
        if weights is not None:
            weights, _, _ = _ids.of_weights(weights)
            users = np.shape(weights)[0] if np.ndim(weights) else 0
            _checks.check_weights(weights, users, model.rank)
            _checks.check_simplex(weights)
            dtype = jnp.result_type(weights)
            weights = jnp.asarray(weights, jnp.promote_types(dtype, jnp.float32))
        size = None if weights is None else len(weights)
        return cls(
            model.num_features,
            model.rank,
            size,
            temperature=model.temperature,
            basis_init=lambda *_: jnp.asarray(model.basis),
            logits_init=lambda *_: _log(weights),
            rngs=nnx.Rngs(0),  # Nothing is drawn.
        )

    @property
    def num_features(self) -> int:
        """D."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """K."""
        return self.basis.shape[1]

    @property
    def weights(self) -> jax.Array:
        """float[U, K], softmax(logits): what `lore.score` and `lore.accuracy` take.

        Raises:
          ValueError: the head has no users.
        """
        return jax.nn.softmax(self._own_logits(), axis=-1)

    @public()
    def __call__(
        self, hidden: Any, user: Any = None, *, weights: Any = None, logits: Any = None
    ) -> jax.Array:
        """Rewards of responses for users.

        Exactly one of `user`, `weights` and `logits` says whose rewards they are. Its
        leading axes broadcast against those of `hidden`: with hidden float[B, 2, D]
        and one user per row, pass `user[:, None]`.

        Args:
          hidden: float[..., D].
          user: int[...], rows of the head's logits.
          weights: float[..., K] on the simplex, for users that the head does not have.
          logits: float[..., K].

        Returns:
          float[...]. A traced `user` that is out of range has the reward NaN.

        Raises:
          ValueError: shapes disagree, a user is out of range, or weights are not on the
            simplex.
          TypeError: `hidden` holds no floating numbers, or `user` no integers.
        """
        mine = self._mixture(user, weights, logits)
        return self._mix(self._project(hidden, "hidden"), mine)

    @public()
    def project(self, hidden: Any) -> jax.Array:
        """Rewards of every direction, x · V / T: float[..., K] from float[..., D].

        Raises:
          ValueError: the last axis of `hidden` is not D.
          TypeError: `hidden` holds no floating numbers.
        """
        return self._project(hidden, "hidden")

    @public()
    def pair_loss(
        self,
        chosen: Any,
        rejected: Any,
        user: Any = None,
        *,
        weights: Any = None,
        logits: Any = None,
        label: Any = None,
        sample_weight: Any = None,
    ) -> jax.Array:
        """Weighted mean Bradley–Terry loss of pairs of hidden states.

            Σ_n s_n ℓ(r_u(chosen_n) − r_u(rejected_n), y_n) / Σ_n s_n

        with ℓ of `lore.losses.pair_loss`.

        Args:
          chosen: float[..., D].
          rejected: float[..., D].
          user: int[...], as in a call of the head, like the next two.
          weights: float[..., K].
          logits: float[..., K].
          label: y, float[...], P(chosen is preferred); None means 1.
          sample_weight: s ≥ 0, float[...]; None means 1. Where all are 0, or
            there is no pair, the loss is 0.

        Returns:
          float[].

        Raises:
          ValueError: shapes disagree, or as in a call of the head.
          TypeError: as in a call of the head.
        """
        mine = self._mixture(user, weights, logits)
        z = self._project(chosen, "chosen") - self._project(rejected, "rejected")
        margin = self._mix(z, mine)
        for values, name, most in (
            (label, "label", 1.0),
            (sample_weight, "sample_weight", np.inf),
        ):
            if values is None:
                continue
            _checks.check_within(values, name, 0.0, most)
            if np.shape(values) != margin.shape:
                raise ValueError(
                    f"{name} must have one entry per pair, shape {margin.shape}, got "
                    f"{np.shape(values)}"
                )
        label = None if label is None else jnp.asarray(label, margin.dtype)
        loss = _equations.pair_loss(margin, label)
        if sample_weight is None:
            return jnp.sum(loss) / max(loss.size, 1)
        weight = jnp.asarray(sample_weight, loss.dtype)
        total = jnp.sum(weight)
        return jnp.sum(weight * loss) / jnp.where(total > 0, total, 1)

    def to_model(self, prior: Prior | None = None) -> RewardModel:
        """The `RewardModel` that every verb takes, for a backbone that stays frozen.

        `lore.fit_prior(head.to_model().basis, prefs, …)` learns a prior from users'
        pairs of hidden states.

        Args:
          prior: over users; None is Dirichlet(1).

        Returns:
          `RewardModel`; the users' weights are `head.weights`.

        Raises:
          ValueError: the prior's shapes do not fit.
          TypeError: `prior` is no `Prior`.
        """
        if prior is not None:
            check_prior(prior, self.rank)
        return RewardModel(self.basis[...], prior, self.temperature)

    def _own_logits(self) -> jax.Array:
        if self.logits is None:
            raise ValueError(
                "this head has no users: build it with num_users, or pass weights or "
                "logits"
            )
        return self.logits[...]

    def _mixture(self, user, weights, logits) -> jax.Array:
        """Weights float[..., K] of whoever a call is about."""
        given = [x is not None for x in (user, weights, logits)]
        if sum(given) != 1:
            raise ValueError(
                "exactly one of user, weights and logits says whose rewards are asked "
                f"for, got {sum(given)} of them"
            )
        if weights is not None:
            self._check_last(weights, "weights")
            _checks.check_simplex(weights)
            return jnp.asarray(weights)
        if user is not None:
            logits = self._rows(user)
        else:
            self._check_last(logits, "logits")
        return jax.nn.softmax(jnp.asarray(logits), axis=-1)

    def _rows(self, user) -> jax.Array:
        own = self._own_logits()
        if not _checks.is_traced(user):
            user = _checks.host_array(user, "user")
            size = len(own)
            flat = _checks.host_indices(user.ravel(), size, "user", f"U is {size}")
            user = flat.reshape(user.shape)
        elif user.dtype.kind not in "iu":
            raise TypeError(f"user must hold integers, got dtype {user.dtype}")
        # A negative row would count from the end: it is moved out of range too.
        place = jnp.where(user < 0, len(own), user)
        kinds: Any = dict(mode="fill", fill_value=jnp.nan)
        placed = jax.typeof(place).sharding
        if AxisType.Explicit in placed.mesh.axis_types:  # Lies as `user` does.
            kinds["out_sharding"] = NamedSharding(placed.mesh, Spec(*placed.spec, None))
        return own.at[place].get(**kinds)

    @staticmethod
    def _mix(proj: jax.Array, mine: jax.Array) -> jax.Array:
        first, second = proj.shape[:-1], mine.shape[:-1]
        try:
            np.broadcast_shapes(first, second)
        except ValueError as error:
            raise ValueError(
                f"users must broadcast against hidden states: users have shape "
                f"{second}, hidden states {first} without D. One user per row of "
                "[B, n, D] is user[:, None]"
            ) from error
        return _equations.mix(proj, mine)

    def _check_last(self, values, name: str) -> None:
        if not np.ndim(values) or np.shape(values)[-1] != self.rank:
            raise ValueError(
                f"{name} must end in K={self.rank}, got shape {np.shape(values)}"
            )

    def _project(self, hidden, name: str) -> jax.Array:
        if not np.ndim(hidden) or np.shape(hidden)[-1] != self.num_features:
            raise ValueError(
                f"{name} must be float[..., D] with D={self.num_features}, got shape "
                f"{np.shape(hidden)}"
            )
        hidden = jnp.asarray(hidden)
        if not _checks.is_floating(hidden.dtype):
            raise TypeError(f"{name} must be floating point, got dtype {hidden.dtype}")
        proj = _equations.product(hidden, self.basis[...])
        return jnp.divide(proj, self.temperature)


def _log(weights: Any) -> jax.Array:
    return jnp.log(jnp.maximum(weights, jnp.finfo(weights.dtype).tiny))
