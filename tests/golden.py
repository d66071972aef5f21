"""Golden results: everything that the library computes, compared with a recording.

    PYTHONPATH=. python tests/golden.py            # compares, exit code 1 if it differs
    PYTHONPATH=. python tests/golden.py --record   # after a change that is meant

The recording was made before modules and records were rearranged in version 0.2; the
rearranged library reproduced all arrays bit for bit on the machine of the recording.
Since NumPy multiplies NumPy tables on a CPU, what follows from such a product is equal
to rounding. Other machines and versions of XLA round differently: an array passes where
no entry is off by more than 2 % of its largest. Arrays are thinned to 400 entries.
"""

import argparse
import pathlib
import sys

import jax
import numpy as np

import lore_jax as lore

PATH = pathlib.Path(__file__).parent / "fixtures" / "golden.npz"
ENTRIES = 400
NUMBERS = "concentration tempering variance_scale decay margin_scale".split()
SMALL = lore.Marginal(
    num_steps=20,
    num_starts=1,
    search=lore.Search(ridges=(0.1, 0.3), smoothings=(1.0,), temperings=(0.4,)),
)
METHODS = {
    "posterior": lore.PosteriorMean(),
    "ml": lore.MaximumLikelihood(),
    "map": lore.MAP(2.0),
    "published": lore.PublishedAdam(num_steps=100),
}


def thinned(array) -> np.ndarray:
    """At most `ENTRIES` entries, evenly spaced."""
    flat = np.asarray(array).ravel()
    return flat[:: max(1, -(-flat.size // ENTRIES))]


def of_fit(fitted) -> dict:
    """What a fit consists of."""
    prior, held = fitted.model.prior, fitted.history.heldout
    rows = [[row["log_loss"], row["global_log_loss"]] for row in held]
    return {
        "basis": fitted.model.basis,
        "logits": fitted.logits,
        "weights": fitted.weights,
        "loss": fitted.history.loss,
        "atoms": prior.atoms,
        "log_weights": prior.log_weights,
        "numbers": np.array([float(getattr(prior, name)) for name in NUMBERS]),
        "heldout": np.array(rows),
    }


def results():
    """Yields (name, {array name: array})."""
    split = lore.data.load_bowling_green().split(seed=0)
    seen, unseen, test = split.seen, split.unseen, split.unseen_heldout
    key, fits = jax.random.key(0), {}
    for rank in (1, 2, 5, 10, "auto"):
        fits[rank] = lore.fit(seen, rank=rank, key=key)
        yield f"votes.{rank}", of_fit(fits[rank])
    for seed in (0, 1):
        users = lore.data.planted(
            jax.random.key(seed),
            num_users=60,
            pairs_per_user=20,
            num_features=16,
            rank=3,
            margin_scale=4.0,
        )
        fitted = lore.fit(users.prefs, rank=3, key=jax.random.key(seed))
        yield f"planted.{seed}", of_fit(fitted)
    anchor = np.linspace(-1, 1, 384).astype(np.float32)
    for name, recipe in (
        ("joint", lore.PublishedJoint(num_steps=50, alpha=0.1)),
        (
            "alternating",
            lore.PublishedAlternating(num_steps=50, prune=True, alpha=0.1),
        ),
    ):
        fitted = lore.fit(seen, rank=3, key=key, recipe=recipe, anchor=anchor)
        yield f"published.{name}", of_fit(fitted)
    model = fits[5].model
    for name, method in METHODS.items():
        found = lore.adapt(model, unseen, method=method)._asdict()
        fields = ("weights", "loss", "gap", "converged", "num_steps")
        yield f"adapt.{name}", {n: found[n] for n in fields}
    few = lore.take_shots(unseen, 3)
    post = lore.posterior(model, few, covariance=True)
    fields = ("weights", "mean", "covariance")
    known = {name: getattr(post, name) for name in fields}
    yield "posterior", {**known, "deviation": post.std}
    new = lore.adapt(model, few, return_std=True)
    yield "adapt.std", {"weights": new.weights, "deviation": new.std}
    certain = lore.predict_proba(model, few, test, variance_scale=0.0)
    yield "predict", {"p": lore.predict_proba(model, few, test), "p0": certain}
    yield (
        "evaluate",
        {
            "accuracy": lore.accuracy(model, new, test),
            "log_loss": lore.log_loss(model, new, test),
            "margins": lore.margins(model, new, test),
        },
    )
    start = lore.streaming.init(model, user_ids=unseen.user_ids)
    one, two = (lore.streaming.update(model, start, x) for x in (few, unseen))
    both = lore.streaming.merge(one, two)
    sums = ("table", "linear", "quadratic", "num_pairs")
    sums = {name: getattr(both, name) for name in sums}
    weights = {
        f"weights{i}": lore.streaming.weights(x) for i, x in (("", both), (1, one))
    }
    yield "streaming", {**sums, **weights}
    yield (
        "acquisition",
        {
            method: lore.score_pairs(model, few, test, method=method)
            for method in ("information", "margin")
        },
    )
    top = lore.top_k(model, new, seen.features, user=list(unseen.user_ids[:5]), k=3)
    yield "score", {"score": lore.score(model, new, seen.features[:50]), "top": top[1]}
    source = lore.ArraySource(np.asarray(seen.features), 100)
    fitted = lore.fit(seen.replace(features=source), rank=2, key=key, recipe=SMALL)
    yield "source", of_fit(fitted)
    records: list = []
    lore.fit(seen, rank=2, key=key, recipe=SMALL, on_progress=records.append)
    half = records[len(records) // 2]
    fitted = lore.fit(seen, rank=2, key=key, recipe=SMALL, resume=half)
    yield "resumed", of_fit(fitted)
    yield "frozen", of_fit(lore.fit_prior(model.basis, seen, key=key))


def main(argv=None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args(argv)
    found = {}
    for name, arrays in results():
        found |= {f"{name}.{key}": thinned(x) for key, x in arrays.items()}
        print(name, flush=True)
    if args.record:
        np.savez_compressed(PATH, **found)
        return 0
    with np.load(PATH) as file:
        known = dict(file)
    bad = sorted(set(known) ^ set(found))
    equal = 0
    for name in sorted(set(known) & set(found)):
        old, new = known[name].astype(float), found[name].astype(float)
        size = np.nanmax(np.abs(old), initial=1e-6)
        same = old.shape == new.shape
        if same and np.array_equal(old, new, equal_nan=True):
            equal += 1
        elif not same or not np.allclose(
            old, new, rtol=0, atol=0.02 * size, equal_nan=True
        ):
            bad.append(name)
    print(f"{equal} of {len(known)} arrays are equal, {len(bad)} differ: {bad}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
