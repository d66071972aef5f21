"""The search of the default recipe: losses of candidates, one setting after another."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from lore_jax._backend import to_array
from lore_jax._train.resume import Run
from lore_jax._train.trainer import Candidate, CandidateTrainer, Training
from lore_jax._train.validation import (
    BASIS_GIVES,
    Validation,
    better,
    keeps_judgements,
    mean_losses,
    relative,
)
from lore_jax.config import Search


class Losses:
    """Losses of candidates on the hold-outs, each trained once; fills `run`."""

    def __init__(
        self, train: CandidateTrainer, holdouts: dict[str, Validation], run: Run
    ):
        """Takes losses that a record brings; nothing is trained yet."""
        self.train, self.holdouts, self.run = train, holdouts, run
        self.scales = np.ones(len(holdouts))
        self.line: Candidate | None = None
        self.known = {_key(row): x for row, x in zip(run.rows, run.losses)}
        self.num_known = len(run.rows)
        self.trails: dict[tuple, tuple] = {}
        self.ahead: dict[tuple, tuple] = {}  # trails of candidates not compared yet
        for row, i in run.kept():
            self.trails[_key(row)] = run.best[2 * i], run.best[2 * i + 1]

    def of(self, candidates: Sequence[Candidate]) -> list[np.ndarray]:
        """Users' losses float[H, U] of every candidate; several are trained at once."""
        wanted = [(name, x) for x in candidates for name in self.holdouts]
        new = [pair for pair in wanted if pair not in self.known]
        meanwhile = None
        if new and not self.known:
            # A second training would wait while the first compiles the steps of both.
            meanwhile = functools.partial(self._compile, *new[0])
        for pair, trail in zip(new, self._trails(new, meanwhile), strict=True):
            self._learn(*pair, trail)
        return [
            np.stack([self.known[name, x] for name in self.holdouts])
            for x in candidates
        ]

    def prepare(self, candidates: Sequence[Candidate]) -> None:
        """Trains likely next candidates, as many as share a read of the table.

        Global models come first, because `scales_of` needs them. A loss enters the
        record only when its candidate is compared, so that choices do not change.
        """
        for some in (self._lines(candidates), candidates):
            new = [
                (name, x)
                for x in dict.fromkeys(some)
                for name in self.holdouts
                if (name, x) not in self.known and (name, x) not in self.ahead
            ]
            most = self.train.most_at_once(some[0].rank) if new else 1
            if most > 1:
                self.ahead |= zip(new[:most], self._trails(new[:most]))

    def scales_of(self, candidate: Candidate) -> np.ndarray:
        """float[H], the log-loss of the global model on each hold-out.

        On items that is the tuned one. On judgements it has the ε and λ of the
        candidate: what both lose there alike is what the items are tuned for.
        """
        scales = self.scales.copy()
        for line in self._lines([candidate]):
            scales[0] = mean_losses(self.of([line])[0])[0]
        return np.where(scales > 0, scales, 1.0)

    def score(self, candidate: Candidate) -> float:
        """Mean over hold-outs of its loss over that of the global model."""
        return relative(self.of([candidate])[0], self.scales_of(candidate))

    def ratios(self, candidate: Candidate) -> np.ndarray:
        """Users' losses over those of the global model, float[H, U]."""
        return self.of([candidate])[0] / self.scales_of(candidate)[:, None]

    def better(self, candidate: Candidate, than: Candidate) -> bool:
        """Whether it is better by two standard errors."""
        return better(self.ratios(candidate), self.ratios(than))

    def keeps_judgements(self, candidate: Candidate) -> bool:
        """Whether judgements of known items lose little beside the first settings."""
        first = self.train.first(candidate.rank)
        self.of([candidate, first])
        ratios = self.ratios(candidate), self.ratios(first)
        return keeps_judgements(*ratios, BASIS_GIVES)

    def curves(self, candidate: Candidate) -> list[np.ndarray]:
        """Users' losses float[S, U] on each hold-out after each tenth of the steps."""
        for name in self.holdouts:  # `results` asks for them again.
            self.trails[name, candidate] = self._trail(name, candidate)
        self._record()
        return [
            self._curve(name, candidate, self._trail(name, candidate))
            for name in self.holdouts
        ]

    def results(self, candidate: Candidate, stop: int) -> list[tuple]:
        """(features · V, prior) of its training for each hold-out, at a snapshot."""
        out = []
        for name, split in self.holdouts.items():
            trail = self._trail(name, candidate)
            basis, prior = self._result(name, trail[0][stop], trail[1][stop], candidate)
            out.append((split.project(basis), prior))
        return out

    def report(self, losses: Sequence[np.ndarray]) -> list[dict]:
        """Losses float[U] on each hold-out beside the best of the global models."""
        rows = []
        for name, own in zip(self.holdouts, losses, strict=True):
            lines = [
                loss
                for (of, x), loss in self.known.items()
                if (of, x.rank) == (name, 1)
            ]
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

    def keep(self, candidate: Candidate) -> None:
        """Forgets the snapshots of all other candidates.

        When resuming, the decisions of the record are made again first; what it kept is
        needed by later ones.
        """
        if len(self.run.rows) == self.num_known:
            return
        keys = {(name, candidate) for name in self.holdouts}
        self.trails = {key: x for key, x in self.trails.items() if key in keys}
        self._record()

    def _trail(self, name: str, candidate: Candidate) -> tuple:
        trail = self.trails.get((name, candidate))
        return next(self._trails([(name, candidate)])) if trail is None else trail

    def _trails(self, pairs: Sequence[tuple], meanwhile=None) -> Iterator[tuple]:
        """Snapshots of every (hold-out, candidate), those trained ahead or new ones."""
        new = [
            Training(name, self.holdouts[name].training, x)
            for name, x in pairs
            if (name, x) not in self.ahead
        ]
        trained = self.train(new, snapshots=True, meanwhile=meanwhile)
        for pair in pairs:
            yield self.ahead.pop(pair, None) or next(trained).trail

    def _learn(self, name: str, candidate: Candidate, trail: tuple) -> None:
        """Adds the losses of a candidate on a hold-out to the record."""
        (loss,) = self._curve(name, candidate, [array[-1:] for array in trail])
        self.known[name, candidate] = loss
        self.trails[name, candidate] = trail
        self.run.rows.append({"holdout": name, **candidate._asdict(), **_loss(loss)})
        self.run.losses.append(loss)
        self._record()

    def _lines(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Global models with the ε and λ of the candidates, for `scales_of`."""
        if self.line is None or len(self.scales) == 1:
            return []
        settings = ({"smoothing": x.smoothing, "ridge": x.ridge} for x in candidates)
        return [self.line._replace(**x) for x in settings]

    def _curve(self, name: str, candidate: Candidate, trail) -> np.ndarray:
        pairs = zip(*trail, strict=True)
        results = [self._result(name, v, pi, candidate) for v, pi in pairs]
        return self.holdouts[name].curve(*zip(*results, strict=True))

    def _result(self, name: str, theta, log_weights, candidate: Candidate) -> tuple:
        pairs = self.holdouts[name].training
        return self.train.result(name, pairs, theta, log_weights, candidate)

    def _compile(self, name: str, candidate: Candidate) -> None:
        split = self.holdouts[name]
        shape = split.training.num_features, candidate.rank
        proj = split.project(to_array(np.zeros(shape), self.train.dtype))
        split.loss(proj, [self.train.prior(0.0, candidate)])

    def _record(self) -> None:
        keys = [_key(row) for row in self.run.rows]
        kept = [key for key in keys if key in self.trails]
        for row, key in zip(self.run.rows, keys):
            row["kept"] = key in self.trails
        self.run.best = tuple(x for key in kept for x in self.trails[key])


def _key(row: dict) -> tuple[str, Candidate]:
    return row["holdout"], Candidate(*(row[name] for name in Candidate._fields))


def _loss(losses: np.ndarray) -> dict:
    return {"log_loss": float(mean_losses(losses[None])[0]), "chosen": False}


def walk(
    losses: Losses, start: Candidate, name: str, grid: Sequence, guarded: bool
) -> Candidate:
    """The best value of one setting; `start`'s, unless by two standard errors.

    From `start`'s value in the sorted grid, goes on in a direction while the loss falls
    and, where that is `guarded`, judgements of known items lose little: first towards
    the second value of the grid, and the other way where nothing was better there.
    """
    values = sorted(set(grid))
    at, best = values.index(getattr(start, name)), start
    first = 1 if len(grid) < 2 or grid[1] > grid[0] else -1
    there = values[at::first]
    back = values[:at][::-1] if first > 0 else values[at + 1 :]
    losses.prepare([start._replace(**{name: x}) for x in (*there, *back)])
    for step in (first, -first):
        place = at + step
        while 0 <= place < len(values):
            candidate = start._replace(**{name: values[place]})
            falls = losses.score(candidate) < losses.score(best)
            if not falls or (guarded and not losses.keeps_judgements(candidate)):
                break
            best, place = candidate, place + step
        if best is not start:
            break
    best = best if best is start or losses.better(best, start) else start
    losses.keep(best)
    return best


def tune(
    losses: Losses, start: Candidate, grids: Search, guarded: bool = True
) -> Candidate:
    """The best of the candidates of one rank, one setting after another."""
    best = walk(losses, start, "ridge", grids.ridges, guarded)
    best = walk(losses, best, "smoothing", grids.smoothings, guarded)
    if start.rank > 1:  # With one atom γ only scales the likelihood.
        best = walk(losses, best, "tempering", grids.temperings, guarded)
    return best


def select(losses: Losses, ranks: tuple[int, ...], grids: Search) -> Candidate:
    """The candidate to train; sets the global model that losses are divided by.

    The global Bradley–Terry model is tuned first. As a candidate it must not lose much
    on judgements of known items; as a yardstick it may. Then the ranks are compared at
    the first of all settings, the settings are tuned at the best of them, and the ranks
    are compared once more. Of ranks the least loss is taken.
    """
    first = losses.train.first(1)
    lines = [tune(losses, first, grids)] if 1 in ranks else []
    losses.line = tune(losses, first, grids, guarded=False)
    losses.scales = mean_losses(losses.of([losses.line])[0])
    others = [first._replace(rank=x) for x in dict.fromkeys(ranks) if x > 1]
    if not others:
        return lines[0]
    losses.of(others)
    best = tune(losses, min(others, key=losses.score), grids)
    others = [best._replace(rank=x.rank) for x in others]
    losses.of(others)
    return min([best, *others, *lines], key=losses.score)
