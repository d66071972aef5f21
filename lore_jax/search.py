"""The default recipe: every setting on held-out judgements, then all pairs."""

import functools
import threading
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax import marginal
from lore_jax.adapt import adapt
from lore_jax.backend import on_threads
from lore_jax.buckets import count_users
from lore_jax.config import TrainConfig
from lore_jax.evaluate import macro_mean
from lore_jax.progress import Run, stride
from lore_jax.results import Fitted, History, Metrics
from lore_jax.selection import (
    Validation,
    choose_refinement,
    choose_stop,
    make_atoms,
    make_prior,
    make_validation,
    refined_like,
    rows_of,
    surely_better,
)
from lore_jax.starts import make_start
from lore_jax.types import FeatureSource, Preferences, Prior, RewardParams
from lore_jax.whitening import basis_of, theta_of, whiten


class Trainer:
    """Trains candidates on one set of pairs, from a table in memory or a source."""

    def __init__(self, prefs: Preferences, keys, config: TrainConfig, init, run: Run):
        """Measures the coordinates; `prefs` are all pairs, `keys` two of them."""
        self.key_atoms, self.key_start = keys
        dtype = jnp.promote_types(prefs.features.dtype, jnp.float32)
        self.dtype = jax.dtypes.canonicalize_dtype(dtype)
        self.whitening = whiten(prefs, self.dtype)
        self.room = np.asarray(prefs.counts)
        self.from_source = isinstance(prefs.features, FeatureSource)
        # A record holds one training at a time, memory one block of a source.
        self.at_once = not (run.recorded or self.from_source)
        self.config, self.init, self.run = config, init, run
        self.optimiser = marginal.make_optimiser(config.learning_rate, config.num_steps)
        self.recipe = marginal.make_recipe(self.optimiser)
        self.problems: dict = {}
        self.starts: dict = {}
        self.preparing = threading.Lock()

    def __call__(
        self,
        name: str,
        prefs: Preferences,
        candidate: dict,
        *,
        start: int = 0,
        num_steps: int | None = None,
        snapshots=False,
    ) -> tuple[marginal.TrainState, Metrics, tuple]:
        """(state, metrics, snapshots of (θ, log π)); `name` says which pairs."""
        config, rank = self.config, candidate["rank"]
        with self.preparing:  # What candidates share is made once.
            problem = self.problems.get((name, rank))
            if problem is None:
                problem = self.problem(prefs, rank)
                self.problems[name, rank] = problem
            if (place := (name, rank, start)) not in self.starts:
                self.starts[place] = np.asarray(self.start(prefs, rank, start))
        theta = jnp.array(self.starts[place])  # A copy: the state is donated.
        steps = config.num_steps
        numbers = *(candidate[n] for n in ("ridge", "tempering")), config.temperature
        numbers = (jnp.asarray(x, self.dtype) for x in (*numbers, 1.0, steps / 2))
        source = prefs.features if self.from_source else None
        return self.run.train(
            f"{name} {candidate} {start}",
            marginal.init_from(theta, problem, self.optimiser),
            marginal.Data(problem, marginal.Settings(*numbers)),
            recipe=self.recipe,
            num_steps=steps if num_steps is None else num_steps,
            source=source,
            keep=_snapshot if snapshots else None,
            pace=stride(steps),
        )

    def each(self, function: Callable, items: Iterable) -> Iterable:
        """`function` of every item, in order; several at once where that may be."""
        return on_threads(function, items) if self.at_once else map(function, items)

    def problem(self, prefs: Preferences, rank: int) -> marginal.Problem:
        """What the steps of every candidate of this rank read."""
        atoms = make_atoms(self.key_atoms, rank, self.config.num_atoms, self.dtype)
        base = jnp.full(len(atoms), 1 / len(atoms), self.dtype)
        return marginal.make_problem(prefs, atoms, base, self.whitening, self.room)

    def start(self, prefs: Preferences, rank: int, number: int) -> jax.Array:
        """θ before the first step; starts have numbers, and all but 0 are random."""
        if self.init is not None:
            return theta_of(jnp.asarray(self.init.basis, self.dtype), self.whitening)
        kind = "random" if number else self.config.start
        key = self.key_start
        key = jax.random.fold_in(key, number) if number else key
        return make_start(key, kind, prefs, self.whitening, rank)

    def result(self, theta, log_weights, candidate: dict) -> tuple[jax.Array, Prior]:
        """(V, the prior with the first κ and δ) of a trained candidate."""
        prior = self.prior(log_weights, candidate)
        return basis_of(jnp.asarray(theta), self.whitening), prior

    def prior(self, log_weights, candidate: dict) -> Prior:
        """What `result` says of users; `log_weights` may be one for all atoms."""
        config, rank = self.config, candidate["rank"]
        atoms = make_atoms(self.key_atoms, rank, config.num_atoms, self.dtype)
        log_weights = jnp.broadcast_to(jnp.asarray(log_weights), len(atoms))
        tempering, temperature = candidate["tempering"], config.temperature
        kappa, decay = config.concentrations[0], config.decays[0]
        return make_prior(atoms, log_weights, tempering, kappa, temperature, decay)


def _snapshot(state: marginal.TrainState) -> tuple:
    return state.theta, state.log_weights


def select(try_out, ranks: tuple[int, ...], config: TrainConfig) -> dict:
    """The candidate to train, found one setting at a time.

    All ranks at the first λ and γ, all γ at the best of them, all λ at the best of
    those, and the ranks again there.

    Args:
      try_out: (candidates {"rank", "ridge", "tempering"}, whether they must be surely
        better than the first of them) → the best of all until then.
      ranks: candidate K.
      config: its grids are used.
    """
    grids = dict(rank=ranks, ridge=config.ridges, tempering=config.temperings)
    grids = {name: list(dict.fromkeys(values)) for name, values in grids.items()}
    best = {name: values[0] for name, values in grids.items()}
    for name in ("rank", "tempering", "ridge", "rank"):
        if name == "tempering" and best["rank"] == 1:
            continue  # One atom: γ would only scale the likelihood.
        if len(grids[name]) > 1:
            candidates = [{**best, name: value} for value in grids[name]]
            best = try_out(candidates, name != "rank")
    return try_out([best], True)  # Where no grid has two values, nothing was tried yet.


def fit_marginal(
    prefs: Preferences,
    ranks: tuple[int, ...],
    key: jax.Array,
    config: TrainConfig,
    init: RewardParams | None,
    run: Run,
) -> Fitted:
    """`fit` by the default recipe; a rank, or the best of several."""
    key_atoms, key_start, key_split = jax.random.split(key, 3)
    if not isinstance(prefs.features, FeatureSource):  # One copy for all candidates.
        prefs = prefs.replace(features=jnp.asarray(prefs.features))
    train = Trainer(prefs, (key_atoms, key_start), config, init, run)
    validation = make_validation(prefs, key_split, config.validation_share)
    best = dict(rank=ranks[0], ridge=config.ridges[0], tempering=config.temperings[0])
    chosen, more, curve = None, [], []
    num_steps = config.num_steps
    if validation.training.num_pairs and validation.heldout.num_pairs:
        best, (thetas, log_weights) = _search(train, validation, ranks, config, run)
        results = [train.result(*x, best) for x in zip(thetas, log_weights)]
        losses = validation.curve(*zip(*results, strict=True))
        counts = (stride(num_steps) * np.arange(1, len(losses) + 1)).clip(max=num_steps)
        curve, at = [macro_mean(x) for x in losses], choose_stop(losses)
        stops = rows_of([{"num_steps": int(n)} for n in counts], curve)
        stops[at]["chosen"] = True
        num_steps = stops[at]["num_steps"]
        chosen, rows = choose_refinement(validation, *results[at], config)
        more = [*stops, *rows]
    theta, log_weights, metrics = _train_on_all(train, prefs, best, num_steps, run)
    basis, prior = train.result(theta, log_weights, best)
    rows_chosen = [{**x, "chosen": best.items() <= x.items()} for x in run.rows]
    if chosen is None:
        chosen, _ = choose_refinement(None, basis, prior, config)
    prior = refined_like(prior, chosen)
    adapted = adapt(basis, prefs, prior=prior)
    return Fitted(
        params=RewardParams(basis=basis, logits=jnp.asarray(adapted.logits)),
        weights=jnp.asarray(adapted.weights),
        prior=prior,
        history=History(
            metrics.loss,
            metrics.weights_norm,
            metrics.basis_norm,
            (*rows_chosen, *more),
            np.array(curve, np.float32),
            np.array([row["num_steps"] for row in more[: len(curve)]], np.int32),
        ),
        temperature=config.temperature,
        config=config,
        ids=prefs.ids,
    )


def _train_on_all(
    train: Trainer, prefs: Preferences, best: dict, num_steps: int, run: Run
) -> tuple[jax.Array, jax.Array, Metrics]:
    """(θ, log π, metrics) of the start with the least objective.

    From some starts two true directions end in one column; the objective says so.
    """
    first = len(run.finished[0]) if run.finished else 0
    starts = range(first, 1 if train.init is not None else train.config.num_starts)

    def from_start(number):
        return train("all", prefs, best, start=number, num_steps=num_steps)

    for state, metrics, _ in train.each(from_start, starts):
        users = count_users(prefs)
        penalty = best["ridge"] / 2 * float(jnp.sum(state.theta**2))
        value = users * float(np.sum(metrics.loss[-1:])) + penalty
        value = np.nan_to_num(value, nan=np.inf)
        before, kept = np.zeros(0), (state.theta, state.log_weights, *metrics)
        if run.finished:
            before = run.finished[0]
            kept = kept if value < before.min() else run.finished[1:]
        run.finished = (np.append(before, value), *map(np.asarray, kept))
    return run.finished[1], run.finished[2], Metrics._make(run.finished[3:])


def _search(
    train: Trainer, validation: Validation, ranks, config, run: Run
) -> tuple[dict, tuple]:
    """(the chosen candidate, snapshots of its training); fills `run`."""
    known: dict = {}  # (snapshots, losses of users) of what this process trained

    def train_one(candidate):
        return train("search", validation.training, candidate, snapshots=True)[2]

    def keep(candidate, trail):
        basis, prior = train.result(trail[0][-1], trail[1][-1], candidate)
        losses = validation.curve([basis], [prior])[0]
        known[tuple(candidate.values())] = trail, losses
        return losses

    def known_of(candidate):
        key = tuple(candidate.values())
        if key not in known:  # A record holds no more than the best.
            keep(candidate, train_one(candidate))
        return known[key]

    def compile_losses(candidate):
        shape = validation.training.num_features, candidate["rank"]
        prior = train.prior(0.0, candidate)
        validation.loss(jnp.zeros(shape, train.dtype), [prior])

    def best_of(rows):
        row = [row for row in rows if row["chosen"]][-1]
        return {name: row[name] for name in ("rank", "ridge", "tempering")}

    def tried(candidate):
        rows = enumerate(run.rows)
        return next((i for i, row in rows if candidate.items() <= row.items()), -1)

    def try_out(candidates, surely):
        new = [candidate for candidate in candidates if tried(candidate) < 0]
        tasks: list[Callable] = [functools.partial(train_one, x) for x in new]
        if new and train.at_once and not run.rows:
            # A second training would wait while the first compiles the steps of both.
            tasks.insert(1, functools.partial(compile_losses, new[0]))
        least, start = np.inf, np.zeros(0)
        if new and run.rows:
            least = run.rows[tried(best_of(run.rows))]["log_loss"]
            start = known_of(candidates[0])[1] if surely else start
        trails = (x for x in train.each(lambda task: task(), tasks) if x is not None)
        for candidate, trail in zip(new, trails):
            losses = keep(candidate, trail)
            loss = macro_mean(losses)
            better = not run.rows or loss < np.nan_to_num(least, nan=np.inf)
            if better and surely and run.rows:
                better = surely_better(losses, start)
            start = start if start.size else losses
            if better:
                run.best, least = trail, loss
            run.rows.append({**candidate, "log_loss": loss, "chosen": bool(better)})
        # Of a record that goes on, the rows behind these are not to be seen here.
        return best_of(run.rows[: 1 + max(map(tried, candidates))])

    if run.rows:
        keep(best_of(run.rows), run.best)
    best = select(try_out, ranks, config)
    for rank in sorted(set(ranks)):
        simpler = {**best, "rank": min(rank, best["rank"])}
        if not surely_better(known_of(best)[1], known_of(simpler)[1]):
            best = simpler
            break
    train.problems.clear()
    return best, known_of(best)[0]
