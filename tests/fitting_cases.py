"""What the tests of `fit` share."""

import jax
import numpy as np

import lore_jax as lore

KEY = jax.random.key(0)
# Few steps are enough for properties that hold at every step.
QUICK = lore.Marginal(num_steps=20)


def margins(fitted, prefs):
    return np.asarray(lore.margins(fitted.model, fitted, prefs))


LOSSES = {"log_loss", "relative", "judgements", "items", "chosen"}


def chosen_rows(fitted):
    """The chosen row of each stage of the selection, without its loss."""
    return [
        {name: x for name, x in row.items() if name not in LOSSES}
        for row in fitted.history.selection
        if row["chosen"]
    ]
