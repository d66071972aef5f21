"""`fit` and `fit_prior`: the shared basis, and the prior over users."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lore_jax import _checks, _processes, _tables
from lore_jax._backend import to_array
from lore_jax._entry import public
from lore_jax._mesh import check_mesh
from lore_jax._pairs.blocks import visit_rows
from lore_jax._pairs.distributed import DistributedTable, gather_pairs
from lore_jax._pairs.pack import pack
from lore_jax._pairs.projected import project_pairs
from lore_jax._pairs.used_rows import aligned_rows
from lore_jax._train import published
from lore_jax._train.bar import Bar, expected_trainings
from lore_jax._train.recipe import fit_marginal
from lore_jax._train.refinement import learn_prior
from lore_jax._train.resume import Run, check_progress, fingerprint
from lore_jax.adaptation import adapt_projected
from lore_jax.config import (
    Marginal,
    PriorSearch,
    PublishedAlternating,
    PublishedJoint,
    Recipe,
)
from lore_jax.model import RewardModel, RewardParams, init_params
from lore_jax.preferences import FeatureSource, Preferences
from lore_jax.prior import make_prior
from lore_jax.results import Fitted, History, Progress

_RECIPES = Marginal, PublishedJoint, PublishedAlternating


@public("losses.bradley_terry_loss and an optimiser", over_mesh=True)
def fit(
    prefs: Preferences,
    *,
    rank: int | Literal["auto"],
    key: jax.Array,
    recipe: Recipe | None = None,
    init: RewardParams | None = None,
    anchor: jax.Array | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    every: int | None = None,
    resume: Progress | None = None,
    progress: bool = False,
    mesh: Mesh | None = None,
) -> Fitted:
    """Learns V, the users' weights and the prior over users from pairwise choices.

    A table in memory is trained on by one compiled program a candidate. A
    `FeatureSource` takes the same steps with each block read twice a step, one block
    in memory at a time; a block that is not finite is refused before the first step.

    Args:
      prefs: N pairs of U users.
      rank: K. 0 is the anchor alone, untrained; 1 is one direction for all users;
        personalisation starts at 2. "auto" chooses among `Search.ranks`.
      key: consumed; the result is deterministic for a key on a given backend.
      recipe: `Marginal()` (default), `PublishedJoint()` or `PublishedAlternating()`.
      init: where to start, instead of at the recipe's start.
      anchor: float[D], the reference direction v_ref; required at rank 0 and where
        a published recipe has α > 0, refused elsewhere.
      on_progress: called with a `Progress` every `every` steps and at the end of each
        training, `save_progress` for example. An exception that it raises ends the
        fit. Rank 0 takes no step. Without it and `resume`, several candidates are
        trained at the same time, which is faster.
      every: default a tenth of the steps.
      resume: a `Progress` of the same fit: what it had done is not done again.
      mesh: devices that train together, `jax.make_mesh((n,), ("users",))`. Users are
        partitioned over them, with the rows of their pairs. Rank 1 or more only.
        Where it has the devices of several processes, each of them passes its own
        users, by name, and either its own table or source, or one array that is
        sharded over all of them by rows. Every process gets the same model, and the
        weights of its own users in the order of their names.
      progress: shows a bar with the stage and an estimate of the time, of several
        processes on the first; needs tqdm.

    Returns:
      `Fitted`. Its basis applies to raw features.

    Raises:
      ValueError: shapes disagree, there is no pair, the anchor is missing or would be
        ignored, arguments exclude one another, or `resume` belongs to another fit.
      TypeError: an argument is of another type.

    References:
      Bose et al., 2025 (https://arxiv.org/abs/2504.14439), algorithm 1.

    Example:
      >>> users = lore.data.planted(
      ...     jax.random.key(0), num_users=20, pairs_per_user=8, num_features=4, rank=2
      ... )
      >>> recipe = lore.PublishedJoint(num_steps=5, prior=None)
      >>> lore.fit(users.prefs, rank=2, key=jax.random.key(1), recipe=recipe)
      Fitted(20 users, recipe=PublishedJoint, 5 steps,
        model=RewardModel(D=4, K=2, temperature=100,
          prior=Dirichlet(1)))
    """
    recipe = Marginal() if recipe is None else recipe
    settings = rank, recipe, init, anchor

    def check() -> list:
        _check_arguments(prefs, *settings, mesh)
        _check_reports(on_progress, every, resume)
        return np.asarray(_key_data(key)).tolist()

    if _processes.spans(mesh):
        given: dict[str, Any] = {"key": _processes.together(check), "recipe": recipe}
        given |= {"rank": rank if isinstance(rank, str) else int(rank)}
        given |= {"reports": (on_progress is not None, every, progress)}
        given |= {"resume": None if resume is None else resume.digest}
        prefs, init = _of_all_processes(prefs, init, anchor, mesh, given)
        settings = rank, recipe, init, anchor
    else:
        check()
    if mesh is not None:
        mesh = check_mesh(mesh)
    shown = not _processes.spans(mesh) or _processes.here() == 0
    bar = _make_bar(recipe, shown) if progress and rank != 0 else None
    run = _make_run(prefs, key, settings, on_progress, every, resume, bar)
    if rank == 0:
        return _anchor_alone(prefs, anchor, recipe)
    with contextlib.ExitStack() as stack:
        if bar is not None:
            stack.callback(bar.close)
        if isinstance(recipe, Marginal):
            ranks = recipe.search.ranks if rank == "auto" else (int(rank),)
            return fit_marginal(prefs, ranks, key, recipe, init, run, mesh)
        return _fit_published(prefs, rank, key, recipe, init, anchor, run, mesh)


@public("adapt_users", over_mesh=True)
def fit_prior(
    basis: jax.Array,
    prefs: Preferences,
    *,
    key: jax.Array,
    temperature: float = 1.0,
    search: PriorSearch | None = None,
    mesh: Mesh | None = None,
) -> Fitted:
    """Learns the prior over users and their weights for a basis that is given.

    Args:
      basis: V, float[D, K], kept as it is; `eye(K)` where the features are scores of K
        reward models.
      prefs: N pairs of U users.
      key: consumed.
      temperature: T.
      search: how the prior is chosen; default `PriorSearch()`.
      mesh: as in `fit`. Only users of other processes make a difference: there is
        nothing to train.

    Returns:
      `Fitted`, with an empty training curve.

    Raises:
      ValueError: shapes disagree, there is no pair, or a number is not finite.
      TypeError: an argument is of another type.

    Example:
      >>> users = lore.data.planted(
      ...     jax.random.key(0), num_users=20, pairs_per_user=8, num_features=4, rank=2
      ... )
      >>> fitted = lore.fit_prior(users.basis, users.prefs, key=jax.random.key(1))
      >>> fitted.weights.shape
      (20, 2)
    """
    search = PriorSearch() if search is None else search

    def check():
        _checks.check_type(prefs, Preferences, "prefs")
        if type(search) is not PriorSearch:
            raise TypeError(f"search must be a PriorSearch, got {search!r}")
        _checks.check_basis(basis, prefs.num_features)
        _checks.check_positive(temperature, "temperature")
        _check_weights(prefs)
        if mesh is not None:
            check_mesh(mesh)
            _check_mesh_fit(prefs, rank=1)
        _check_data(prefs)
        return np.asarray(_key_data(key)).tolist()

    if several := _processes.spans(mesh):
        numbers = _processes.together(check)
        settings: Any = dict(search=search, temperature=float(temperature))
        settings |= _of_devices(mesh)  # pyright: ignore[reportArgumentType]
        _processes.agree(key=numbers, basis=_said(basis), **settings)
        prefs = gather_pairs(prefs)
    else:
        check()
    table: Any = prefs.features
    own = table.own(prefs) if several else prefs
    basis = jnp.asarray(basis, jnp.result_type(float))
    found = project_pairs(own.features, basis, pack(own))

    def check_projected():
        _tables.check_projected(found.proj, own.features, temperature)

    _processes.together(check_projected) if several else check_projected()
    kinds: Any = dict(key=key, temperature=temperature, grids=search)
    prior, selection = learn_prior(found, prefs, **kinds)
    adapted = adapt_projected(found, prior, temperature)
    empty = jnp.zeros(0, basis.dtype)
    return Fitted(
        model=RewardModel(basis, prior, float(temperature)),
        weights=to_array(adapted.weights),
        logits=to_array(adapted.logits),
        history=History(empty, empty, empty, selection),
        recipe=search,
        ids=own.names,
    )


def _of_all_processes(
    prefs: Preferences, init: RewardParams | None, anchor, mesh: Any, given: dict
) -> tuple[Preferences, RewardParams | None]:
    """The pairs of all processes, and `init` of all users, where all agree."""
    arrays = {"anchor": anchor}
    if init is not None:
        arrays |= {"init.basis": init.basis}
        given |= {"the dtype of init.logits": np.asarray(init.logits).dtype}
    given |= {name: x if x is None else _said(x) for name, x in arrays.items()}
    _processes.agree(init=init is not None)
    _processes.agree(**_of_devices(mesh), **given)
    everyone = gather_pairs(prefs)
    if init is not None:
        names: Any = prefs.user_ids
        logits = np.asarray(init.logits)[np.argsort(names)]
        logits = everyone.features.gather_users(everyone, logits.T).T
        init = RewardParams(basis=init.basis, logits=logits)
    return everyone, init


def _of_devices(mesh: Mesh) -> dict[str, Any]:
    """What of the devices must be alike on all processes."""
    return {
        "the devices of mesh": [device.id for device in mesh.devices.flat],
        "jax_enable_x64": jax.config.jax_enable_x64,  # pyright: ignore[reportAttributeAccessIssue]
    }


def _said(array) -> tuple:
    """An array for a comparison by repr."""
    array = np.asarray(array)
    return array.dtype, array.shape, array.tobytes()


def _check_arguments(prefs, rank, recipe, init, anchor, mesh) -> None:
    """What can be said before any process waits for another."""
    _checks.check_type(prefs, Preferences, "prefs")
    if not isinstance(recipe, _RECIPES):
        names = ", ".join(kind.__name__ for kind in _RECIPES)
        raise TypeError(f"recipe must be one of {names}, got {recipe!r}")
    _check_rank(rank, recipe, init)
    _check_anchor(anchor, prefs, rank, recipe)
    if init is not None:
        _check_init(init, prefs, rank)
    _check_weights(prefs)
    if mesh is not None:
        check_mesh(mesh)
        _check_mesh_fit(prefs, rank)
    if rank != 0:
        _check_data(prefs)


def _key_data(key):
    _checks.check_key(key)
    is_key = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(key) if is_key else key


def _check_mesh_fit(prefs: Preferences, rank) -> None:
    if rank == 0:
        raise ValueError("mesh trains at rank 1 or more; rank 0 trains nothing")


def _make_bar(recipe: Recipe, shown: bool) -> Bar:
    trainings = 1
    if isinstance(recipe, Marginal):
        both = 2 if recipe.search.holdout == "both" else 1
        trainings = expected_trainings(both, recipe.num_starts)
    return Bar(recipe.num_steps, trainings, shown)


def _check_rank(rank, recipe: Recipe, init) -> None:
    """`rank`, and what else can be given with it."""
    if rank == "auto":
        other = None
        if init is not None:
            other = "init"
        elif not isinstance(recipe, Marginal):
            other = f"recipe={type(recipe).__name__}"
        if other is not None:
            raise ValueError(f"rank='auto' and {other} exclude one another")
        return
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
        raise TypeError(f"rank must be an integer or 'auto', got {rank!r}")
    if rank < 0:
        raise ValueError(f"rank must be at least 0, got {rank}")


def _check_anchor(anchor, prefs: Preferences, rank, recipe: Recipe) -> None:
    needed = rank == 0 or getattr(recipe, "alpha", 0) > 0
    if anchor is None:
        if needed:
            raise ValueError("anchor is required at rank 0 and where recipe.alpha > 0")
        return
    if not needed:
        raise ValueError(
            "anchor is used at rank 0 and by a published recipe with alpha > 0 only; "
            f"got rank={rank!r} and {recipe!r}"
        )
    if np.shape(anchor) != (prefs.num_features,):
        raise ValueError(
            f"anchor must be float[D] with D={prefs.num_features}, got shape "
            f"{np.shape(anchor)}"
        )
    _checks.check_finite(anchor, "anchor")


def _check_weights(prefs: Preferences) -> None:
    weight = prefs.sample_weight
    if prefs.num_pairs and weight is not None and not np.any(weight):
        raise ValueError(
            "prefs.sample_weight is 0 for every pair: there is nothing to learn"
        )


def _check_data(prefs: Preferences) -> None:
    if not prefs.num_pairs:
        raise ValueError("prefs holds no pair to learn from")
    # `from_pairs` checks arrays, but not those that took their place since.
    features = prefs.features
    if isinstance(features, jax.Array) and not features.is_fully_addressable:
        for shard in features.addressable_shards:
            if len(shard.data) and shard.data.shape[1:] != features.shape[1:]:
                raise ValueError("features may be sharded over its rows only")
            _check_block(shard.index[0].start or 0, np.asarray(shard.data))
        return
    visit_rows(features, _check_block)


def _check_block(first: int, block: np.ndarray) -> None:
    what = f"the block of features at row {first}" if first else "features"
    _checks.host_float_table(block, what)


def _check_reports(on_progress, every, resume) -> None:
    if every is not None:
        if isinstance(every, bool) or not isinstance(every, int | np.integer):
            raise TypeError(f"every must be an integer, got {every!r}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if on_progress is None:
            raise ValueError(
                "every is the number of steps between calls of on_progress"
            )
    if resume is not None:
        _checks.check_type(resume, Progress, "resume")
        check_progress(resume, "resume.")


def _make_run(prefs, key, settings, on_progress, every, resume, bar) -> Run:
    if on_progress is None and resume is None:
        return Run(bar=bar)
    rank, recipe, init, anchor = settings
    arrays = () if init is None else (init.basis, init.logits)
    mark = fingerprint(prefs, key, rank, recipe, anchor, *arrays)
    every = None if every is None else int(every)
    return Run(on_progress, every, resume, mark, bar)


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


def _anchor_alone(prefs: Preferences, anchor, recipe: Recipe) -> Fitted:
    """Rank 0: the base reward head, for everybody."""
    basis = jnp.asarray(anchor)[:, None]
    basis = basis.astype(jnp.promote_types(basis.dtype, jnp.float32))
    ones = jnp.ones((prefs.num_users, 1), basis.dtype)
    empty = jnp.zeros(0, basis.dtype)
    prior = make_prior(jnp.ones((1, 1), basis.dtype), np.zeros(1), 0, np.inf)
    return Fitted(
        model=RewardModel(basis, prior, recipe.temperature),
        weights=ones,
        logits=jnp.zeros_like(ones),
        history=History(empty, empty, empty),
        recipe=recipe,
        ids=prefs.names,
    )


def _fit_published(prefs, rank, key, recipe, init, anchor, run, mesh) -> Fitted:
    """A published form, then its prior, V frozen, at its temperature."""
    key_init, key_prior = jax.random.split(key)
    if init is None:
        shape = dict(num_users=prefs.num_users, num_features=prefs.num_features)
        init = init_params(key_init, rank=rank, **shape)
    if anchor is None:
        anchor = np.zeros(prefs.num_features)
    init = jax.tree.map(jnp.asarray, init)
    anchor = jnp.asarray(anchor, init.basis.dtype)
    bare_recipe = dataclasses.replace(recipe, prior=None)  # The steps know no prior.
    trainer = published.make_trainer(bare_recipe)
    source = on_mesh = None
    if mesh is not None:
        problem, on_mesh = published.make_mesh_problem(
            prefs, anchor, mesh, isinstance(recipe, PublishedJoint)
        )
        source = on_mesh.source
    else:
        bare = prefs.replace(ids=None, group=None, order=None, offsets=None)
        if isinstance(prefs.features, FeatureSource):
            source, bare = prefs.features, bare.replace(features=None)
        else:
            bare = bare.replace(features=aligned_rows(prefs.features))
        rows: Any = bare.features if source is None else source
        problem = published.make_problem(bare, rows, anchor)
    state, metrics, _ = run.train(
        type(recipe).__name__,
        trainer.init(init),
        problem,
        steps=trainer.steps,
        num_steps=recipe.num_steps,
        source=source,
        mesh=mesh,
        on_mesh=on_mesh,
    )
    params, unpruned, kept = state.params, None, None
    if getattr(recipe, "prune", False):
        unpruned = params
        kept, params = published.prune(params)
    params = jax.tree.map(jnp.asarray, params)
    own, prior, selection = prefs, None, ()
    table: Any = prefs.features
    if distributed := isinstance(table, DistributedTable):
        own = table.own(prefs)
    if recipe.prior is not None:
        found = project_pairs(own.features, params.basis, pack(own))
        kinds: Any = dict(key=key_prior, temperature=recipe.temperature)
        prior, selection = learn_prior(found, prefs, **kinds, grids=recipe.prior)
    if distributed:  # The weights of this process's users.
        users = np.flatnonzero(table.mine(prefs))
        params = _of_users(params, users)
        unpruned = None if unpruned is None else _of_users(unpruned, users)
    return Fitted(
        model=RewardModel(params.basis, prior, recipe.temperature),
        weights=jax.nn.softmax(params.logits, axis=-1),
        logits=params.logits,
        history=History(*metrics, selection=selection),
        unpruned=unpruned,
        kept=kept,
        recipe=recipe,
        ids=own.names,
    )


def _of_users(params: RewardParams, users: np.ndarray) -> RewardParams:
    return RewardParams(basis=params.basis, logits=params.logits[users])
