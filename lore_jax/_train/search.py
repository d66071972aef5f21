"""The search of the default recipe: losses of candidates, one setting after another."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from lore_jax._train.resume import Run
from lore_jax._train.trainer import Trainer
from lore_jax._train.validation import (
    BASIS_GIVES,
    Validation,
    better,
    keeps_judgements,
    mean_losses,
    relative,
)
from lore_jax.config import TrainConfig

SETTINGS = ("rank", "smoothing", "ridge", "tempering")


class Search:
    """Losses of candidates on the hold-outs, each trained once; fills `run`."""

    def __init__(self, train: Trainer, holdouts: dict[str, Validation], run: Run):
        """Takes losses that a record brings; nothing is trained yet."""
        self.train, self.holdouts, self.run = train, holdouts, run
        self.scales = np.ones(len(holdouts))
        self.line: dict = {}
        self.first = train.first
        self.known = {_key(row): x for row, x in zip(run.rows, run.losses)}
        self.num_known = len(run.rows)
        self.trails: dict[tuple, tuple] = {}
        for row, i in run.kept():
            self.trails[_key(row)] = run.best[2 * i], run.best[2 * i + 1]

    def losses(self, candidates: Sequence[dict]) -> list[np.ndarray]:
        """Users' losses float[H, U] of every candidate; several are trained at once."""
        wanted = [(name, x) for x in candidates for name in self.holdouts]
        new = [(n, x) for n, x in wanted if (n, *x.values()) not in self.known]
        tasks: list[Callable] = [functools.partial(self._trail, *x) for x in new]
        if len(new) > 1 and self.train.at_once and not self.known:
            # A second training would wait while the first compiles the steps of both.
            tasks.insert(1, functools.partial(self._compile, *new[0]))
        trails = self.train.each(lambda task: task(), tasks)
        for (name, x), trail in zip(new, (t for t in trails if t is not None)):
            last = [array[-1:] for array in trail]
            (loss,) = self._curve(name, x, last)
            self.known[name, *x.values()] = loss
            self.trails[name, *x.values()] = trail
            self.run.rows.append({"holdout": name, **x, **_loss(loss)})
            self.run.losses.append(loss)
            self._record()
        return [
            np.stack([self.known[name, *x.values()] for name in self.holdouts])
            for x in candidates
        ]

    def scales_of(self, candidate: dict) -> np.ndarray:
        """float[H], the log-loss of the global model on each hold-out.

        On items that is the tuned one. On judgements it has the ε and λ of the
        candidate: what both lose there alike is what the items are tuned for.
        """
        scales = self.scales.copy()
        if self.line and len(scales) > 1:
            line = {**self.line, "smoothing": candidate["smoothing"]}
            line["ridge"] = candidate["ridge"]
            scales[0] = mean_losses(self.losses([line])[0])[0]
        return np.where(scales > 0, scales, 1.0)

    def score(self, candidate: dict) -> float:
        """Mean over hold-outs of its loss over that of the global model."""
        return relative(self.losses([candidate])[0], self.scales_of(candidate))

    def ratios(self, candidate: dict) -> np.ndarray:
        """Users' losses over those of the global model, float[H, U]."""
        return self.losses([candidate])[0] / self.scales_of(candidate)[:, None]

    def better(self, candidate: dict, than: dict) -> bool:
        """Whether it is better by two standard errors."""
        return better(self.ratios(candidate), self.ratios(than))

    def keeps_judgements(self, candidate: dict) -> bool:
        """Whether judgements of known items lose little beside the first settings."""
        first = {**candidate, **self.first}
        self.losses([candidate, first])
        ratios = self.ratios(candidate), self.ratios(first)
        return keeps_judgements(*ratios, BASIS_GIVES)

    def curves(self, candidate: dict) -> list[np.ndarray]:
        """Users' losses float[S, U] on each hold-out after each tenth of the steps."""
        for name in self.holdouts:  # `results` asks for them again.
            self.trails[name, *candidate.values()] = self._trail(name, candidate)
        self._record()
        return [
            self._curve(name, candidate, self._trail(name, candidate))
            for name in self.holdouts
        ]

    def results(self, candidate: dict, stop: int) -> list[tuple]:
        """(V, prior) of its training for each hold-out, at a snapshot."""
        return [
            self._result(name, trail[0][stop], trail[1][stop], candidate)
            for name in self.holdouts
            for trail in [self._trail(name, candidate)]
        ]

    def report(self, losses: Sequence[np.ndarray]) -> list[dict]:
        """Losses float[U] on each hold-out beside the best of the global models."""
        rows = []
        for name, own in zip(self.holdouts, losses, strict=True):
            lines = [x for key, x in self.known.items() if key[:2] == (name, 1)]
            other = min(lines, key=lambda x: mean_losses(x[None])[0])
            gain = (other - own)[np.isfinite(other - own)]
            error = gain.std(ddof=1) / gain.size**0.5 if gain.size > 1 else np.inf
            loss, reference = mean_losses(np.stack([own, other]))
            rows.append(
                {
                    "holdout": name,
                    "log_loss": float(loss),
                    "global_log_loss": float(reference),
                    "gain": float(gain.mean()) if gain.size else 0.0,
                    "standard_error": float(error),
                }
            )
        return rows

    def keep(self, *candidates: dict) -> None:
        """Forgets the snapshots of all other candidates.

        When resuming, the steps before the record are gone through again; what it
        kept is needed by later ones.
        """
        if len(self.run.rows) == self.num_known:
            return
        keys = {(name, *x.values()) for x in candidates for name in self.holdouts}
        self.trails = {key: x for key, x in self.trails.items() if key in keys}
        self._record()

    def _trail(self, name: str, candidate: dict) -> tuple:
        trail = self.trails.get((name, *candidate.values()))
        if trail is None:
            pairs = self.holdouts[name].training
            trail = self.train(name, pairs, candidate, snapshots=True)[2]
        return trail

    def _curve(self, name: str, candidate: dict, trail) -> np.ndarray:
        pairs = zip(*trail, strict=True)
        results = [self._result(name, v, pi, candidate) for v, pi in pairs]
        return self.holdouts[name].curve(*zip(*results, strict=True))

    def _result(self, name: str, theta, log_weights, candidate: dict) -> tuple:
        pairs = self.holdouts[name].training
        return self.train.result(name, pairs, theta, log_weights, candidate)

    def _compile(self, name: str, candidate: dict) -> None:
        split = self.holdouts[name]
        basis = jnp.zeros((split.training.num_features, candidate["rank"]))
        split.loss(basis.astype(self.train.dtype), [self.train.prior(0.0, candidate)])

    def _record(self) -> None:
        keys = [_key(row) for row in self.run.rows]
        kept = [key for key in keys if key in self.trails]
        for row, key in zip(self.run.rows, keys):
            row["kept"] = key in self.trails
        self.run.best = tuple(x for key in kept for x in self.trails[key])


def _key(row: dict) -> tuple:
    return row["holdout"], *(row[name] for name in SETTINGS)


def _loss(losses: np.ndarray) -> dict:
    return {"log_loss": float(mean_losses(losses[None])[0]), "chosen": False}


def walk(search: Search, start: dict, name: str, grid: Sequence, guarded: bool) -> dict:
    """The best value of one setting; `start`'s, unless by two standard errors.

    From `start`'s value in the sorted grid, goes on in a direction while the loss falls
    and, where that is `guarded`, judgements of known items lose little: first towards
    the second value of the grid, and the other way where nothing was better there.
    """
    values = sorted(set(grid))
    at, best = values.index(start[name]), start
    first = 1 if len(grid) < 2 or grid[1] > grid[0] else -1
    for step in (first, -first):
        place = at + step
        while 0 <= place < len(values):
            candidate = {**start, name: values[place]}
            falls = search.score(candidate) < search.score(best)
            if not falls or (guarded and not search.keeps_judgements(candidate)):
                break
            best, place = candidate, place + step
        if best is not start:
            break
    best = best if best is start or search.better(best, start) else start
    search.keep(best)
    return best


def tune(
    search: Search, start: dict, config: TrainConfig, guarded: bool = True
) -> dict:
    """The best of the candidates of one rank, one setting after another."""
    best = start
    grids = {"ridge": config.ridges, "smoothing": config.smoothings}
    if start["rank"] > 1:  # With one atom γ only scales the likelihood.
        grids["tempering"] = config.temperings
    for name, grid in grids.items():
        best = walk(search, best, name, grid, guarded)
    return best


def select(search: Search, ranks: tuple[int, ...], config: TrainConfig) -> dict:
    """The candidate to train, and the global model that losses are divided by.

    The global Bradley–Terry model is tuned first. As a candidate it must not lose much
    on judgements of known items; as a yardstick it may. Then the ranks are compared at
    the first of all settings, the settings are tuned at the best of them, and the ranks
    are compared once more. Of ranks the least loss is taken.
    """
    first = {"rank": 1, **search.first}
    lines = [tune(search, first, config)] if 1 in ranks else []
    search.line = tune(search, first, config, guarded=False)
    search.scales = mean_losses(search.losses([search.line])[0])
    others = [{**first, "rank": rank} for rank in dict.fromkeys(ranks) if rank > 1]
    if not others:
        return lines[0]
    search.losses(others)
    best = tune(search, min(others, key=search.score), config)
    others = [{**best, "rank": x["rank"]} for x in others]
    search.losses(others)
    return min([best, *others, *lines], key=search.score)
