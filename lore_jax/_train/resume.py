"""A fit's line to its caller: calls back while it trains, and goes on from a record.

Nothing random is kept: keys are consumed at the start, so a record and the arguments
of the fit say everything about the rest of it.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lore_jax import _processes
from lore_jax._pairs.blocks import visit_rows
from lore_jax._pairs.distributed import DistributedTable, row_digests
from lore_jax._pairs.used_rows import without_unused_rows
from lore_jax._train.steps import Steps, train
from lore_jax.io.files import digest
from lore_jax.preferences import FeatureSource, Preferences
from lore_jax.results import Metrics, Progress

_SNAPSHOTS = 10

_ROWS = 1024


class Run:
    """What one fit has done so far.

    Attributes:
      rows: one dict per candidate and hold-out that was trained on, in order.
      losses: float[U] for each of them.
      best: snapshots of those that are kept, as in `Progress`.
      choice: what the search chose, as in `Progress`.
      finished: what came of the trainings on all pairs, as in `Progress`.
      recorded: True with `on_progress` or `resume`.
    """

    def __init__(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        every: int | None = None,
        resume: Progress | None = None,
        fingerprint: str = "",
        bar: Any = None,
    ):
        """Starts, or goes on from `resume`.

        Raises:
          ValueError: `resume`, of `check_progress`, belongs to another fit.
        """
        if resume is not None and resume.fingerprint != fingerprint:
            raise ValueError(
                "resume is the progress of another fit: the data, rank, key, recipe, "
                f"init and anchor must be those it was made with; its fingerprint is "
                f"{resume.fingerprint}, that of these arguments {fingerprint}"
            )
        self.rows: list[dict] = [] if resume is None else [dict(r) for r in resume.rows]
        self.losses: list = [] if resume is None else [*resume.losses]
        self.best: tuple = () if resume is None else resume.best
        self.choice: dict = {} if resume is None else resume.choice
        self.finished: tuple = () if resume is None else resume.finished
        self._resume, self._fingerprint = resume, fingerprint
        self._on_progress, self._every = on_progress, every
        self._bar = bar
        self.recorded = on_progress is not None or resume is not None

    def kept(self) -> list[tuple[dict, int]]:
        """(row, its place among those whose snapshots are in `best`)."""
        rows = [row for row in self.rows if row.get("kept")]
        return [(row, i) for i, row in enumerate(rows)]

    def train(
        self,
        name: str,
        state,
        problem,
        *,
        steps: Steps,
        num_steps: int,
        source: FeatureSource | None = None,
        mesh: Mesh | None = None,
        on_mesh: Any = None,
        keep: Callable[[Any], tuple] | None = None,
        pace: int | None = None,
        trainings: int = 1,
    ) -> tuple[Any, Metrics, tuple]:
        """`train` from the start, or from where the record `name` stopped.

        Args:
          name: of this training, unique in the fit.
          state: the start; consumed (donated).
          problem: what a step reads.
          steps: what a step is.
          num_steps: at least 0.
          source: the table where it is no array.
          mesh: where `problem` is in parts, one per device.
          on_mesh: its `part` of a state, which may be in parts too, is what is trained;
            its `whole` is what a record holds and what is returned.
          keep: arrays of a state to keep after every `pace` steps and at the end.
          pace: steps of one compiled program; None makes it one of all steps.
          trainings: how many are trained side by side.

        Returns:
          (state, metrics, arrays of `keep` stacked over the snapshots).
        """
        metrics, trail = None, ()
        if self._resume is not None and self._resume.name == name:
            state = _restored(state, self._resume.state)
            metrics, trail = self._resume.metrics, self._resume.trail
            self._resume = None
        whole = (lambda state: state) if on_mesh is None else on_mesh.whole
        state = state if on_mesh is None else on_mesh.part(state)
        strides = [] if pace is None else [pace]
        if self._bar is not None and not strides:
            strides.append(stride(num_steps))
        if self._on_progress is not None:
            strides.append(self._every or pace or stride(num_steps))

        reported = 0

        def after(state, metrics):
            nonlocal trail, reported
            done = len(metrics.loss)
            if self._bar is not None:
                self._bar(name, trainings * (done - reported))
                reported = done
            due = [done % s == 0 or done == num_steps for s in strides]
            if keep is not None and due[0]:
                new = [np.array(x)[None] for x in keep(state)]
                trail = tuple(
                    np.concatenate([*old, x])
                    for *old, x in (zip(trail, new) if trail else zip(new))
                )
            if self._on_progress is not None and due[-1]:
                progress = Progress(
                    state=tuple(np.array(x) for x in jax.tree.leaves(whole(state))),
                    metrics=jax.tree.map(np.array, metrics),
                    trail=trail,
                    best=self.best,
                    losses=tuple(self.losses),
                    choice=self.choice,
                    finished=self.finished,
                    name=name,
                    rows=tuple(dict(row) for row in self.rows),
                    fingerprint=self._fingerprint,
                )
                call = functools.partial(self._on_progress, seal(progress))
                if _processes.spans(mesh):
                    _processes.end_together(call)
                else:
                    call()

        state, metrics = train(
            state,
            problem,
            steps=steps,
            num_steps=num_steps,
            source=source,
            mesh=mesh,
            metrics=metrics,
            every=math.gcd(*strides) if strides else None,
            after=after if strides else None,
        )
        return whole(state), metrics, trail


def stride(num_steps: int) -> int:
    """Steps between snapshots: a tenth of all, rounded up, at least 1."""
    return max(1, -(-num_steps // _SNAPSHOTS))


def _restored(template, leaves: tuple):
    """`leaves` in the structure of `template`, whose shapes they must have."""
    wanted, structure = jax.tree.flatten(template)
    shapes = [(np.shape(x), np.asarray(x).dtype) for x in wanted]
    if [(np.shape(x), np.asarray(x).dtype) for x in leaves] != shapes:
        raise ValueError(
            f"resume.state must hold arrays of the shapes and dtypes {shapes}"
        )
    return structure.unflatten([jnp.array(x, copy=True) for x in leaves])


def fingerprint(prefs: Preferences, key, *settings) -> str:
    """What a fit depends on, in 32 characters; the table is read once.

    A table in memory, a `FeatureSource` and the parts of several processes have the
    same one where the rows that pairs use are the same. Rows that none uses, and the
    order of rows that have names, do not count.

    Args:
      prefs: all of it counts except the names.
      key: of the fit.
      *settings: dataclasses, arrays, None, or anything with a faithful repr.
    """
    if not isinstance(prefs.features, DistributedTable):
        prefs = without_unused_rows(prefs)
    digest = hashlib.blake2b(digest_size=16)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    fields = ("chosen", "rejected", "user", "label", "sample_weight", "group")
    arrays = (getattr(prefs, name) for name in fields)
    shape = tuple(map(int, prefs.features.shape))
    dtype = np.dtype(prefs.features.dtype).name
    for value in (prefs.num_users, shape, dtype, key, *arrays, *settings):
        if hasattr(value, "shape"):
            array = np.asarray(value)
            digest.update(f"{array.dtype.name}{array.shape}".encode())
            digest.update(array.tobytes())
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            digest.update(repr(sorted(vars(value).items())).encode())
        else:
            digest.update(repr(value).encode())

    total = 0

    def visit(first, block):
        nonlocal total
        for start in range(0, len(block), _ROWS):  # No copy of the table at once.
            rows = np.asarray(block[start : start + _ROWS])
            total += row_digests(first + start + np.arange(len(rows)), rows)

    if isinstance(prefs.features, DistributedTable):
        total = prefs.features.digest()
    else:
        visit_rows(prefs.features, visit)
    digest.update((total % (1 << 128)).to_bytes(16, "little"))
    return digest.hexdigest()


_FIELDS = ("state", "trail", "best", "losses", "finished", "metrics")


def _parts(progress: Progress) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, texts) that make up a record, without its digest."""
    arrays = {
        f"{field}.{i}": np.asarray(x, order="C")
        for field in _FIELDS
        for i, x in enumerate(getattr(progress, field))
    }
    return arrays, {
        "name": progress.name,
        "rows": json.dumps(progress.rows),
        "choice": json.dumps(progress.choice),
        "fingerprint": progress.fingerprint,
    }


def seal(progress: Progress) -> Progress:
    """The record with the digest of what it holds."""
    return progress.replace(digest=digest(*_parts(progress)))


def check_progress(progress: Progress, prefix: str = "") -> None:
    """Raises `ValueError` unless a record is consistent, and as `fit` made it.

    A state that is not finite belongs to a training whose losses are not either.

    Args:
      progress: the record.
      prefix: of its fields' names in an error.
    """
    metrics, count = tuple(map(np.asarray, progress.metrics)), len(Metrics._fields)
    if {x.shape for x in metrics} != {(len(metrics[0]),)} or any(
        x.dtype.kind != "f" for x in metrics
    ):
        raise ValueError(f"{prefix}metrics must be {count} arrays float[n]")
    state = tuple(map(np.asarray, progress.state))
    steps = [int(x) for x in state if x.dtype.kind in "iu" and x.ndim == 0]
    if not steps or set(steps) != {len(metrics[0])}:
        raise ValueError(
            f"{prefix}metrics are those of {len(metrics[0])} steps, but the state is "
            f"that after {steps[-1] if steps else 'an unknown number of'} steps"
        )
    trail = progress.trail
    if len(trail) not in (0, 2) or len({len(np.atleast_1d(x)) for x in trail}) > 1:
        raise ValueError(f"{prefix}trail must be two arrays, one entry per snapshot")
    if len(progress.finished) not in (0, 3 + count):
        raise ValueError(f"{prefix}finished must be {3 + count} arrays")
    rows = progress.rows
    if not isinstance(rows, tuple) or not isinstance(progress.name, str):
        raise ValueError(f"{prefix}rows must be a tuple, and name a text")
    losses = [row.get("log_loss") for row in rows if isinstance(row, dict)]
    if len(losses) < len(rows) or not all(isinstance(x, float) for x in losses):
        raise ValueError(f"{prefix}rows must be objects with a log_loss each")
    if any(isinstance(x, float) and x < 0 for x in losses):
        raise ValueError(f"{prefix}rows must have a log_loss of at least 0")
    if len(rows) != len(progress.losses):
        raise ValueError(f"{prefix}losses must be {len(rows)} arrays, one for each row")
    kept = sum(row.get("kept") is True for row in rows)
    if len(progress.best) != 2 * kept:
        raise ValueError(
            f"{prefix}best must be {2 * kept} arrays, two for each kept row"
        )
    if not isinstance(progress.choice, dict):
        raise ValueError(f"{prefix}choice must be an object")
    if all(np.isfinite(x[-1:]).all() for x in metrics):
        for i, leaf in enumerate(state):
            if leaf.dtype.kind == "f" and np.isnan(leaf).any():
                raise ValueError(f"{prefix}state[{i}] must be finite, it holds NaN")
    if progress.digest != digest(*_parts(progress)):
        raise ValueError(
            f"{prefix}digest is not that of the record: something in it was changed"
        )
