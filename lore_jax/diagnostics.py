"""What a fit learned: rank in use, collapse, shares, convergence; and one plot."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lore_jax.results import Fitted

_COLLAPSED = 0.02

_COMPARED = 500  # responses and users that starts are compared on, at most

_ENUMERATED = 6


def report(fitted: Fitted) -> dict[str, Any]:
    """Diagnoses a fit.

    Args:
      fitted: what `fit` returned.

    Returns:
      A dict of

      - "effective_rank": exp of the entropy of the shares of variance of the users'
        reward directions V p_u; 1 where everybody has the same direction.
      - "cosines": float[K, K] between the columns of V; NaN for a zero column.
      - "directions": float[K], mean weight of each direction over users.
      - "leading": float[K], share of users whose largest weight it is.
      - "variation": mean over users of ½ Σ_k |p_uk − mean_k|, the total variation from
        the population's mean; 0 … 1.
      - "collapsed": variation below 0.02 at rank 2 or more: the same weights for all.
      - "loss": float[S], training curve.
      - "last_change": relative change of the loss over the last tenth of the steps;
        NaN without steps.
      - "last_slope": norm of the slope in V at the end over its largest one so far;
        NaN without steps.
      - "validation": float[C], mean over hold-outs of the macro log-loss of the chosen
        candidate, trained without them; empty where nothing was held out.
      - "validation_steps": int[C], after how many steps.
      - "best_step": of these, the one with the least loss; None without any.
      - "num_steps": where the fit stopped: the last step, unless the best one is better
        by two standard errors.
      - "over_fitted": by how much the last validation loss is above the least; NaN
        without any.
      - "selection": the candidates that validation compared.
      - "heldout": a dict per hold-out, see `History`.
      - "agreement": how much trainings from different starts agree with the one that
        was kept, of at most 1: "rewards", the mean over users of the correlation of
        their rewards over responses; "weights", the correlation of users' weights;
        "basis", the mean cosine of columns that are matched one to one. NaN with one
        start. Rewards usually agree better than weights: interpret directions only
        where "basis" and "weights" are close to 1.
    """
    basis = np.asarray(fitted.model.basis, np.float64)
    weights = np.asarray(fitted.weights, np.float64)
    norms = np.linalg.norm(basis, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (basis.T @ basis) / np.outer(norms, norms)
    # Singular values of [U, D] directions from [K, K] products: D and U stay apart.
    root = np.linalg.cholesky(basis.T @ basis + 1e-12 * np.eye(len(norms)))
    variance = np.linalg.svd(weights @ root, compute_uv=False) ** 2
    share = variance / variance.sum() if variance.sum() > 0 else variance
    share = share[share > 0]
    variation = 0.5 * np.abs(weights - weights.mean(0)).sum(1).mean()
    loss = np.asarray(fitted.history.loss, np.float64)
    slope = np.asarray(fitted.history.basis_norm, np.float64)
    change = last_slope = np.nan
    if loss.size:
        last_slope = slope[-1] / max(slope.max(), np.finfo(float).tiny)
        before = loss[-max(1, loss.size // 10) - 1 :][0]
        change = (before - loss[-1]) / max(abs(loss[-1]), np.finfo(float).tiny)
    curve = np.asarray(fitted.history.validation, np.float64)
    steps = np.asarray(fitted.history.validation_steps)
    return {
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
        "cosines": cosines,
        "directions": weights.mean(0),
        "leading": np.bincount(weights.argmax(1), minlength=len(norms)) / len(weights),
        "variation": float(variation),
        "collapsed": bool(len(norms) > 1 and variation < _COLLAPSED),
        "loss": loss,
        "last_change": float(change),
        "last_slope": float(last_slope),
        "validation": curve,
        "validation_steps": steps,
        "num_steps": int(loss.size),
        "best_step": int(steps[curve.argmin()]) if curve.size else None,
        "over_fitted": float(curve[-1] - curve.min()) if curve.size else np.nan,
        "selection": fitted.history.selection,
        "heldout": fitted.history.heldout,
        "agreement": fitted.history.starts
        or dict.fromkeys(("rewards", "weights", "basis"), np.nan),
    }


def compare_starts(
    bases: Sequence, projections: Sequence, weights: Sequence, at: int
) -> dict[str, float] | None:
    """Agreement of start `at` with the others, as in `report`; None with one start.

    Args:
      bases: V of each start, float[D, K].
      projections: features · V of each, float[M, K].
      weights: of users, float[U, K].
      at: the start that was kept.
    """
    others = [i for i in range(len(bases)) if i != at]
    if not others:
        return None
    rank = bases[at].shape[1]
    some = slice(None, None, compared_stride(len(projections[at])))
    proj = [np.asarray(x[some], np.float64) for x in projections]
    proj = [x - x.mean(0) for x in proj]
    users = slice(None, None, compared_stride(len(weights[at])))
    rewards = [z @ np.asarray(w, np.float64)[users].T for z, w in zip(proj, weights)]
    found = []
    for i in others:
        cosines = column_cosines(bases[at], bases[i])
        match = match_columns(cosines)
        first, second = np.asarray(weights[at]), np.asarray(weights[i])[:, match]
        found.append(
            (
                _correlation(rewards[at], rewards[i]),
                _correlation(*((w - w.mean(0)).reshape(-1, 1) for w in (first, second)))
                if rank > 1
                else np.nan,
                cosines[np.arange(rank), match].mean(),
            )
        )
    values = np.mean(found, axis=0)
    return dict(zip(("rewards", "weights", "basis"), map(float, values), strict=True))


def compared_stride(size: int) -> int:
    """Every how many rows, or users, `compare_starts` looks at one."""
    return max(1, -(-size // _COMPARED))


def match_columns(similarity: np.ndarray) -> np.ndarray:
    """int[K], a column for each row of float[K, K], one to one.

    The greatest sum up to K = 6, above that the greatest entry first.
    """
    rank = len(similarity)
    if rank <= _ENUMERATED:
        orders = np.array(list(itertools.permutations(range(rank))))
        return orders[similarity[np.arange(rank), orders].sum(1).argmax()]
    left, match = similarity.copy(), np.zeros(rank, int)
    for _ in range(rank):
        row, column = np.unravel_index(left.argmax(), left.shape)
        match[row] = column
        left[row], left[:, column] = -np.inf, -np.inf
    return match


def column_cosines(first, second) -> np.ndarray:
    """float[K, K'] of the columns of two matrices; 0 for a zero column."""
    first, second = (np.asarray(x, np.float64) for x in (first, second))
    norms = np.outer(*(np.linalg.norm(x, axis=0) for x in (first, second)))
    return first.T @ second / np.where(norms > 0, norms, 1)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over columns of the correlation of centred columns."""
    norms = np.linalg.norm(first, axis=0) * np.linalg.norm(second, axis=0)
    return float(((first * second).sum(0) / np.where(norms > 0, norms, np.nan)).mean())


def plot(fitted: Fitted) -> Any:
    """One figure of `report`: curves, directions in use, and their cosines.

    Needs matplotlib (the extra `quickstart`).

    Args:
      fitted: what `fit` returned.

    Returns:
      A `matplotlib.figure.Figure`; `.savefig(path)` writes it.
    """
    # Optional, and slow to import.
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    found = report(fitted)
    figure = Figure(figsize=(10, 3), layout="constrained")
    curves, shares, angles = figure.subplots(1, 3)
    curves.plot(found["loss"], color="black", label="training")
    curves.set(xlabel="step", ylabel="training loss of a user")
    if found["validation"].size:
        right = curves.twinx()
        steps, losses = found["validation_steps"], found["validation"]
        right.plot(steps, losses, "o--", color="#0072B2", label="validation")
        right.set_ylabel("validation log-loss of a pair", color="#0072B2")
    place = np.arange(len(found["directions"]))
    shares.bar(place - 0.2, found["directions"], 0.4, color="black", label="weight")
    shares.bar(place + 0.2, found["leading"], 0.4, color="0.7", label="leads for")
    shares.set(xlabel="direction", ylabel="share of users", xticks=place)
    shares.set_title(f"effective rank {found['effective_rank']:.2f}")
    shares.legend()
    image = angles.imshow(found["cosines"], vmin=-1, vmax=1, cmap="RdBu_r")
    angles.set(title="cosines of directions", xticks=place, yticks=place)
    figure.colorbar(image, ax=angles)
    return figure
