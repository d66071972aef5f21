"""`fit`: learns the shared basis, and what to believe of a new user."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax import _checks
from lore_jax._entry import public
from lore_jax._pairs.blocks import visit_rows
from lore_jax._train import published
from lore_jax._train.recipe import fit_marginal
from lore_jax._train.refinement import learn_prior
from lore_jax._train.resume import Run, fingerprint
from lore_jax.adaptation import adapt
from lore_jax.config import TrainConfig
from lore_jax.model import RewardParams, init_params, mixture_weights
from lore_jax.preferences import FeatureSource, Preferences
from lore_jax.prior import Prior
from lore_jax.results import Fitted, History, Progress


@public("losses.bradley_terry_loss and an optimiser")
def fit(
    prefs: Preferences,
    *,
    rank: int | Literal["auto"],
    key: jax.Array,
    config: TrainConfig | None = None,
    init: RewardParams | None = None,
    anchor: jax.Array | None = None,
    basis: jax.Array | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    every: int | None = None,
    resume: Progress | None = None,
) -> Fitted:
    """Learns V, the users' weights and the prior over users from pairwise choices.

    A table in memory is trained on by one compiled program a candidate. A
    `FeatureSource` takes the same steps with each block read twice a step, one block
    in memory at a time; a block that is not finite is refused before the first step.

    Args:
      prefs: N pairs of U users.
      rank: K. 0 is the anchor alone, untrained; 1 is one direction for all users;
        personalisation starts at 2. "auto" chooses among `config.ranks` on the
        hold-outs.
      key: consumed; the result is deterministic for a key on a given backend.
      config: default `TrainConfig()`.
      init: where to start.
      anchor: float[D], the reference direction v_ref; required at rank 0 and where
        a reference config has α > 0.
      basis: float[D, K] to keep as it is; only the weights and the prior are learned.
        `eye(K)` where the features are scores of K reward models.
      on_progress: called with a `Progress` every `every` steps and at the end of each
        training, `lore_jax.checkpoint.save_progress` for example. An exception that it
        raises ends the fit. Rank 0 and a frozen basis take no step. Without it and
        `resume`, several candidates are trained at the same time, which is faster.
      every: default a tenth of the steps.
      resume: a `Progress` of the same fit: what it had done is not done again.

    Returns:
      `Fitted`. Its basis applies to raw features.

    Raises:
      ValueError: shapes disagree, there is no pair, the anchor is missing, arguments
        exclude one another, or `resume` belongs to another fit.
      TypeError: an argument is of another type.

    References:
      Bose et al., 2025 (https://arxiv.org/abs/2504.14439), algorithm 1.
    """
    _checks.check_type(prefs, Preferences, "prefs")
    config = TrainConfig() if config is None else config
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig, got {type(config)}")
    _check_rank(rank, config, init, basis)
    if anchor is not None and np.shape(anchor) != (prefs.num_features,):
        raise ValueError(
            f"anchor must be float[D] with D={prefs.num_features}, got shape "
            f"{np.shape(anchor)}"
        )
    if anchor is not None:
        _checks.check_finite(anchor, "anchor")
    if anchor is None and (rank == 0 or config.alpha > 0):
        raise ValueError("anchor is required at rank 0 and where config.alpha > 0")
    if init is not None:
        _check_init(init, prefs, rank)
    if prefs.num_pairs and prefs.weight is not None and not np.any(prefs.weight):
        raise ValueError("prefs.weight is 0 for every pair: there is nothing to learn")
    run = _make_run(
        prefs, key, (rank, config, init, anchor), on_progress, every, resume
    )
    if rank == 0:
        return _anchor_alone(prefs, anchor, config)
    if not prefs.num_pairs:
        raise ValueError("prefs holds no pair to learn from")
    # `from_pairs` checks arrays, but not those that took their place since.
    visit_rows(prefs.features, _check_block)
    if basis is not None:
        return _fit_frozen(prefs, basis, rank, key, config)
    if config.method == "marginal":
        ranks = config.ranks if rank == "auto" else (int(rank),)
        return fit_marginal(prefs, ranks, key, config, init, run)
    return _fit_reference(prefs, rank, key, config, init, anchor, run)


def _check_rank(rank, config: TrainConfig, init, basis) -> None:
    """`rank`, and what else can be given with it."""
    if rank == "auto":
        fixed = [
            name
            for name, given in (
                ("init", init is not None),
                ("basis", basis is not None),
                (f"method={config.method!r}", config.method != "marginal"),
            )
            if given
        ]
        if fixed:
            raise ValueError(f"rank='auto' and {fixed[0]} exclude one another")
        return
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
        raise TypeError(f"rank must be an integer or 'auto', got {rank!r}")
    if rank < 0:
        raise ValueError(f"rank must be at least 0, got {rank}")
    if basis is not None and rank == 0:
        raise ValueError("basis needs one column per direction; rank 0 is the anchor")
    if basis is not None and (init is not None or config.method != "marginal"):
        other = "init" if init is not None else f"method={config.method!r}"
        raise ValueError(
            f"basis, which is kept as it is, and {other} exclude one another"
        )


def _check_block(first: int, block: np.ndarray) -> None:
    what = f"the block of features at row {first}" if first else "features"
    _checks.host_float_table(block, what)


def _make_run(prefs, key, settings, on_progress, every, resume) -> Run:
    if every is not None:
        if isinstance(every, bool) or not isinstance(every, int | np.integer):
            raise TypeError(f"every must be an integer, got {every!r}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if on_progress is None:
            raise ValueError(
                "every is the number of steps between calls of on_progress"
            )
    if on_progress is None and resume is None:
        return Run()
    if resume is not None:
        _checks.check_type(resume, Progress, "resume")
    rank, config, init, anchor = settings
    arrays = () if init is None else (init.basis, init.logits)
    mark = fingerprint(prefs, key, rank, config, anchor, *arrays)
    every = None if every is None else int(every)
    return Run(on_progress, every, resume, mark)


def _fit_frozen(prefs: Preferences, basis, rank, key, config: TrainConfig) -> Fitted:
    """V is given: the prior by EM and grouped validation, then the weights."""
    _checks.check_basis(basis, prefs.num_features)
    if np.shape(basis)[1] != rank:
        raise ValueError(
            f"basis must have K={rank} columns like rank, got shape {np.shape(basis)}"
        )
    basis = jnp.asarray(basis, jnp.result_type(float))
    prior, selection = learn_prior(
        basis, prefs, key=key, temperature=config.temperature, config=config
    )
    adapted = adapt(basis, prefs, prior=prior)
    empty = jnp.zeros(0, basis.dtype)
    return Fitted(
        params=RewardParams(basis=basis, logits=jnp.asarray(adapted.logits)),
        weights=jnp.asarray(adapted.weights),
        prior=prior,
        history=History(empty, empty, empty, selection),
        temperature=config.temperature,
        config=config,
        ids=prefs.ids,
    )


def _check_init(init, prefs: Preferences, rank) -> None:
    if not isinstance(init, RewardParams):
        raise TypeError(f"init must be RewardParams, got {type(init)}")
    _checks.check_basis(init.basis, prefs.num_features, "init.basis")
    if np.shape(init.basis)[1] != rank:
        raise ValueError(
            f"init.basis must have K={rank} columns like rank, got shape "
            f"{np.shape(init.basis)}"
        )
    _checks.check_weights(init.logits, prefs.num_users, rank, "init.logits")
    _checks.check_finite(init.logits, "init.logits")


def _anchor_alone(prefs: Preferences, anchor, config: TrainConfig) -> Fitted:
    """Rank 0: the reference reward head, for everybody."""
    basis = jnp.asarray(anchor)[:, None]
    ones = jnp.ones((prefs.num_users, 1), basis.dtype)
    empty = jnp.zeros(0, basis.dtype)
    return Fitted(
        params=RewardParams(basis=basis, logits=jnp.zeros_like(ones)),
        weights=ones,
        prior=Prior(
            atoms=jnp.ones((1, 1), basis.dtype),
            log_weights=jnp.zeros(1, basis.dtype),
            concentration=jnp.asarray(np.inf, basis.dtype),
            tempering=jnp.zeros((), basis.dtype),
            temperature=config.temperature,
        ),
        history=History(empty, empty, empty),
        temperature=config.temperature,
        config=config,
        ids=prefs.ids,
    )


def _fit_reference(prefs, rank, key, config, init, anchor, run: Run) -> Fitted:
    """A published form, then its prior, V frozen, at its temperature."""
    key_init, key_prior = jax.random.split(key)
    if init is None:
        shape = dict(num_users=prefs.num_users, num_features=prefs.num_features)
        init = init_params(key_init, rank=rank, **shape)
    bare = prefs.replace(ids=None, group=None, order=None, offsets=None)
    source = prefs.features if isinstance(prefs.features, FeatureSource) else None
    if source is not None:
        bare = bare.replace(features=None)
    if anchor is None:
        anchor = np.zeros(prefs.num_features)
    init = jax.tree.map(jnp.asarray, init)
    anchor = jnp.asarray(anchor, init.basis.dtype)
    trainer = published.make_trainer(config)
    state, metrics, _ = run.train(
        config.method,
        trainer.init(init),
        published.Problem(bare, anchor),
        recipe=trainer.recipe,
        num_steps=config.num_steps,
        source=source,
    )
    params, unpruned, kept = state.params, None, None
    if config.prune:
        unpruned = params
        kept, params = published.prune(params)
    prior, selection = learn_prior(
        params.basis,
        prefs,
        key=key_prior,
        temperature=config.temperature,
        config=config,
    )
    return Fitted(
        params=params,
        weights=mixture_weights(params.logits),
        prior=prior,
        history=History(*metrics, selection),
        unpruned=unpruned,
        kept=kept,
        temperature=config.temperature,
        config=config,
        ids=prefs.ids,
    )
