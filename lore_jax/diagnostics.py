"""What a fit learned: rank in use, collapse, shares, convergence; and one plot."""

from typing import Any

import numpy as np

from lore_jax.results import Fitted

_COLLAPSED = 0.02


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
      - "spread": mean over users of ½ Σ_k |p_uk − mean_k|, the total variation from
        the population's mean; 0 … 1.
      - "collapsed": spread below 0.02 at rank 2 or more: the same weights for all.
      - "loss": float[S], training curve.
      - "last_change": relative change of the loss over the last tenth of the steps;
        NaN without steps.
      - "last_slope": norm of the slope in V at the end over its largest one so far;
        NaN without steps.
      - "validation": float[C], macro log-loss on held-out judgements of the chosen
        candidate, trained without them; empty where nothing was held out.
      - "validation_steps": int[C], after how many steps.
      - "best_step": of these, the one with the least loss, where the fit stopped; None
        without any.
      - "over_fitted": by how much the last validation loss is above the least; NaN
        without any.
      - "selection": the candidates that validation compared.
    """
    basis = np.asarray(fitted.basis, np.float64)
    weights = np.asarray(fitted.weights, np.float64)
    norms = np.linalg.norm(basis, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (basis.T @ basis) / np.outer(norms, norms)
    # Singular values of [U, D] directions from [K, K] products: D and U stay apart.
    root = np.linalg.cholesky(basis.T @ basis + 1e-12 * np.eye(len(norms)))
    variance = np.linalg.svd(weights @ root, compute_uv=False) ** 2
    share = variance / variance.sum() if variance.sum() > 0 else variance
    share = share[share > 0]
    spread = 0.5 * np.abs(weights - weights.mean(0)).sum(1).mean()
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
        "spread": float(spread),
        "collapsed": bool(len(norms) > 1 and spread < _COLLAPSED),
        "loss": loss,
        "last_change": float(change),
        "last_slope": float(last_slope),
        "validation": curve,
        "validation_steps": steps,
        "best_step": int(steps[curve.argmin()]) if curve.size else None,
        "over_fitted": float(curve[-1] - curve.min()) if curve.size else np.nan,
        "selection": fitted.history.selection,
    }


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
