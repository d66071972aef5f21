"""Trains candidates of the default recipe on one set of pairs after another."""

import functools
import itertools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lore_jax import _processes
from lore_jax._backend import on_threads, to_array, tuning
from lore_jax._mesh import MeshSource, Partition
from lore_jax._pairs.distributed import DistributedTable
from lore_jax._pairs.pack import pack
from lore_jax._pairs.row_sums import count_sides
from lore_jax._train import coordinates, marginal
from lore_jax._train.coordinates import Coordinates, Spectrum
from lore_jax._train.resume import Run, stride
from lore_jax._train.starts import make_start
from lore_jax._train.steps import side_by_side
from lore_jax.config import Marginal
from lore_jax.model import RewardParams
from lore_jax.preferences import FeatureSource, Preferences
from lore_jax.prior import Prior, make_atoms, make_prior
from lore_jax.results import Metrics


class Candidate(NamedTuple):
    """Settings of one training.

    Attributes:
      rank: K.
      smoothing: ε of the coordinates.
      ridge: λ.
      tempering: γ.
    """

    rank: int
    smoothing: float
    ridge: float
    tempering: float


class Training(NamedTuple):
    """What to train.

    Attributes:
      name: of the pairs.
      prefs: the pairs.
      candidate: the settings.
      start: 0 is `recipe.start`; all others are random.
    """

    name: str
    prefs: Preferences
    candidate: Candidate
    start: int = 0


class Trained(NamedTuple):
    """What came of it.

    Attributes:
      state: after the last step.
      metrics: float[steps] each.
      trail: snapshots of (θ, log π), or ().
    """

    state: marginal.MarginalState
    metrics: Metrics
    trail: tuple


class CandidateTrainer:
    """Trains candidates, from a table in memory or a source."""

    def __init__(
        self,
        prefs: Preferences,
        keys: tuple[jax.Array, jax.Array],
        recipe: Marginal,
        init: RewardParams | None,
        run: Run,
        mesh: Mesh | None = None,
    ):
        """Takes all pairs, which say what shapes every part of them has.

        Args:
          prefs: all pairs.
          keys: of the atoms and of the starts.
          recipe: the recipe.
          init: where to start instead.
          run: the record.
          mesh: whose devices train, or None.
        """
        self.mesh = mesh
        self.key_atoms, self.key_start = keys
        dtype = jnp.promote_types(prefs.features.dtype, jnp.float32)
        self.dtype = jax.dtypes.canonicalize_dtype(dtype)
        self.capacity = np.asarray(prefs.counts)
        sides = prefs.chosen, prefs.rejected
        self.side_counts = count_sides(*sides, prefs.features.shape[0])
        self.features: Any = prefs.features
        self.source: Any = None
        if isinstance(prefs.features, FeatureSource):
            self.source = prefs.features
        # A record holds one training at a time, memory one block of a source; and two
        # programs of a mesh at once would wait for each other.
        self.at_once = not (run.recorded or self.source is not None or mesh is not None)
        if mesh is not None:
            table = prefs.features
            process = table.process if isinstance(table, DistributedTable) else None
            self.partition = Partition(mesh, pack(prefs), table.shape[0], process)
            self.table = self.partition.table(table)
            self.source = self.table if isinstance(self.table, MeshSource) else None
        self.recipe, self.init, self.run = recipe, init, run
        self.optimiser = marginal.make_optimiser(recipe.learning_rate, recipe.num_steps)
        self.steps = marginal.make_steps(self.optimiser)
        self.spectra: dict[str, Spectrum | None] = {"all": coordinates.measure(prefs)}
        self.coordinates: dict[tuple[str, float], Coordinates] = {}
        self.packed: dict[str, Any] = {}
        self.problems: dict = {}
        self.starts: dict = {}
        self.preparing = threading.Lock()

    def first(self, rank: int) -> Candidate:
        """The first value of every grid."""
        search = self.recipe.search
        first = search.smoothings[0], search.ridges[0], search.temperings[0]
        return Candidate(rank, *first)

    def __call__(
        self,
        trainings: Sequence[Training],
        *,
        num_steps: int | None = None,
        snapshots: bool = False,
        meanwhile: Callable[[], None] | None = None,
    ) -> Iterator[Trained]:
        """Trains all, those of one rank side by side; what came of each, in order.

        Args:
          trainings: what to train.
          num_steps: fewer than the recipe's.
          snapshots: whether to keep (θ, log π) after each tenth of the steps.
          meanwhile: run on a second thread while the first batch compiles.
        """
        tasks: list[Callable] = [
            functools.partial(self._train, some, num_steps, snapshots)
            for some in self._batches(trainings)
        ]
        if meanwhile is not None and self.at_once and len(tasks) > 1:
            tasks.insert(1, meanwhile)
        each = on_threads if self.at_once else map
        for found in each(operator.call, tasks):
            yield from found or ()

    def most_at_once(self, rank: int) -> int:
        """How many trainings of one rank share the reads of the table.

        1 in a recorded fit: a record holds one training.
        """
        if self.run.recorded:
            return 1
        return max(1, tuning(self.features).columns_at_once // rank)

    def _batches(self, trainings: Sequence[Training]) -> Iterator[Sequence[Training]]:
        """Neighbours of one rank, at most `most_at_once` of them."""
        for rank, found in itertools.groupby(trainings, lambda x: x.candidate.rank):
            some, most = list(found), self.most_at_once(rank)
            yield from (some[i : i + most] for i in range(0, len(some), most))

    def _train(
        self, some: Sequence[Training], num_steps: int | None, snapshots: bool
    ) -> list[Trained]:
        """Trains one batch side by side."""
        made = [self._prepared(x) for x in some]
        steps, count, one = self.recipe.num_steps, len(some), some[0]
        state, inputs = made[0]
        one_step = self.steps
        if count > 1:
            # Powers of two, so that few programs serve all numbers.
            made += made[-1:] * ((1 << (count - 1).bit_length()) - count)
            states, problems = zip(*made)
            state = jax.tree.map(lambda *x: jnp.stack(x), *states)
            inputs = marginal.stack(problems, self.mesh is not None)
            one_step = side_by_side(self.steps, len(made))
        found: Any = self.run.train(
            f"{one.name} {one.candidate._asdict()} {one.start}",
            state,
            inputs,
            steps=one_step,
            num_steps=steps if num_steps is None else num_steps,
            source=self.source,
            mesh=self.mesh,
            keep=_snapshot if snapshots else None,
            pace=stride(steps),
            trainings=count,
        )
        if self.mesh is not None:
            found = jax.tree.map(np.asarray, found)
        if count == 1:
            return [Trained(*found)]
        return [_one_of(found, i) for i in range(count)]

    def _prepared(
        self, training: Training
    ) -> tuple[marginal.MarginalState, marginal.MarginalInputs]:
        """The state before the first step, and what the steps read."""
        recipe, (name, prefs, candidate, start) = self.recipe, training
        rank = candidate.rank
        with self.preparing:  # What candidates share is made once.
            if (name, rank) not in self.problems:
                self.problems[name, rank] = self.problem(name, prefs, rank)
            made = self.coordinates_of(name, prefs, candidate.smoothing)
            problem = self.problems[name, rank].replace(coordinates=made)
            place = (name, rank, candidate.smoothing, start)
            if place not in self.starts:
                theta = self.start(prefs, made, rank, start)
                theta = coordinates.in_span(theta, self.spectra[name])
                theta = np.asarray(theta)
                if isinstance(prefs.features, DistributedTable):
                    theta = _processes.of_first({"theta": theta})["theta"]
                self.starts[place] = theta
        theta = to_array(self.starts[place].copy())  # The state is donated.
        numbers = candidate.ridge, candidate.tempering, recipe.temperature
        numbers = (*numbers, 1.0, recipe.num_steps / 2)
        settings = marginal.Settings(*(to_array(x, self.dtype) for x in numbers))
        state = marginal.init_from(theta, problem, self.optimiser)
        return state, marginal.MarginalInputs(problem, settings)

    def coordinates_of(self, name: str, prefs, smoothing: float) -> Coordinates:
        """Those of one part of the pairs, in the shape of those of all pairs."""
        if (name, smoothing) not in self.coordinates:
            if name not in self.spectra:
                self.spectra[name] = coordinates.measure(prefs)
            made = coordinates.make_coordinates(
                self.spectra[name],
                smoothing,
                self.dtype,
                prefs.num_features,
                self.recipe.temperature,
            )
            whole = self.spectra["all"]
            if made.tail is None and whole is not None and whole.tail is None:
                made = coordinates.padded(made, whole.directions.shape[1])
            self.coordinates[name, smoothing] = made
        return self.coordinates[name, smoothing]

    def problem(self, name: str, prefs, rank: int) -> marginal.MarginalProblem:
        """What the steps of every candidate of this rank read."""
        if name not in self.packed:
            self.packed[name] = pack(prefs)
        atoms = make_atoms(
            self.key_atoms, rank, self.recipe.search.num_atoms, self.dtype
        )
        base = np.full(len(atoms), 1 / len(atoms), self.dtype)
        made = self.coordinates_of(name, prefs, self.recipe.search.smoothings[0])
        arrays = self.packed[name], atoms, base, made
        if self.mesh is not None:
            return marginal.make_mesh_problem(self.table, *arrays, self.partition)
        arrays = prefs.features, *arrays
        return marginal.make_problem(*arrays, self.capacity, self.side_counts)

    def start(
        self, prefs: Preferences, made: Coordinates, rank: int, number: int
    ) -> jax.Array:
        """θ before the first step; starts have numbers, and all but 0 are random."""
        if self.init is not None and self.init.basis.shape[1] == rank:
            return coordinates.theta_of(to_array(self.init.basis, self.dtype), made)
        kind = "random" if number else self.recipe.start
        key = self.key_start
        key = jax.random.fold_in(key, np.uint32(number)) if number else key
        return make_start(key, kind, prefs, made, rank)

    def result(
        self, name: str, prefs: Preferences, theta, log_weights, candidate: Candidate
    ) -> tuple[jax.Array, Prior]:
        """(V, the prior with the first κ and δ) of a trained candidate.

        What a record brings was trained by another process, so that its coordinates
        may still have to be measured.
        """
        made = self.coordinates_of(name, prefs, candidate.smoothing)
        basis = coordinates.basis_of(to_array(theta), made)
        basis = coordinates.in_span(basis, self.spectra[name])
        return basis, self.prior(log_weights, candidate)

    def prior(self, log_weights, candidate: Candidate) -> Prior:
        """What `result` says of users; `log_weights` may be one for all atoms."""
        search = self.recipe.search
        atoms = make_atoms(self.key_atoms, candidate.rank, search.num_atoms, self.dtype)
        log_weights = np.broadcast_to(np.asarray(log_weights), len(atoms))
        kappa, decay = search.concentrations[0], search.decays[0]
        return make_prior(atoms, log_weights, candidate.tempering, kappa, decay)


def _one_of(found: tuple, i: int) -> Trained:
    """One of those that were trained side by side."""
    state, metrics, trail = found
    metrics, trail = jax.tree.map(lambda x: x[:, i], (metrics, trail))
    return Trained(jax.tree.map(lambda x: x[i], state), metrics, trail)


def _snapshot(state: marginal.MarginalState) -> tuple:
    return state.theta, state.log_weights
