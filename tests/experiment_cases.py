"""A prepared folder, quick settings, and the marks of the experiments."""

import importlib.util

import numpy as np
import pytest

from experiments import prepared as prepared_data

MARKS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::experiments.leaks.LeakWarning"),
    pytest.mark.filterwarnings("ignore:too few pairs to validate on:UserWarning"),
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("matplotlib", "tqdm"))),
        reason="needs the extra 'quickstart'",
    ),
]
QUICK = ["--quick", "--ranks", "0", "2", "--shots", "2"]


def write_prepared(folder, *, users=8, pairs=12, width=6, seed=0, **config):
    """A prepared folder with random features and a head; two thirds are seen."""
    rng = np.random.default_rng(seed)
    total = users * pairs
    features = rng.normal(size=(2 * total, width)).astype(np.float32)
    user = np.repeat(np.arange(users), pairs)
    unit = np.array([f"u{u}_{n // 2}" for u in range(users) for n in range(pairs)])
    table = prepared_data.PairTable.from_columns(
        user=[f"user{u}" for u in user], unit=unit, group=unit,
        chosen=np.arange(total), rejected=np.arange(total) + total,
        seen=user < users * 2 // 3, heldout=np.tile(np.arange(pairs), users) % 6 < 2,
    )  # fmt: skip
    prepared_data.write_features(folder, features, head=features[0])
    table.save(folder / "pairs.npz")
    facts = {"shots": "pairs", "shot_counts": [0, 2], "ranks": [0, 1, 2]}
    prepared_data.write_json(
        folder / "config.json", {"variants": [None], **facts, **config}
    )
    return table


def pictures(folder):
    return {path.stem for path in (folder / "figures").glob("*.png")}
