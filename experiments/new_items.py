"""Items that no training pair has: the default against a global Bradley–Terry model.

    python -m experiments.new_items                    # bowling_green, 4 splits
    python -m experiments.new_items --planted          # a known truth, 4 seeds

bowling_green: statements are held out with all their votes, from all 607 statements and
from random subsets. Planted: features with a power-law spectrum (exponent 1), margins
of standard deviation 2, Dirichlet(0.3) users, K = 5, 10 % of the labels flipped.
Differences are paired, person by person, with 95 % intervals over people and splits.
"""

import argparse
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

import lore_jax as lore
from experiments.few_shot import label, show
from experiments.stored import write_json
from lore_jax.cli.intervals import bootstrap, paired
from lore_jax.cli.quickstart import published_scale

SHOTS = (0, 1, 3, 10, None)
SIZES = {  # rows of training, features, users, pairs of each
    "M=100 D=384": (100, 384, 300, 20),
    "M=150 D=384": (150, 384, 300, 20),
    "M=400 D=384": (400, 384, 300, 20),
    "M=4000 D=4096": (4000, 4096, 300, 20),
}


def statements(size: int | None, seed: int) -> lore.data.FourWay:
    """A split of the votes on `size` random statements, None for all of them."""
    votes = lore.data.load_bowling_green()
    rows = np.arange(len(votes.features))
    if size is not None:
        rows = np.sort(np.random.default_rng(seed).choice(rows, size, replace=False))
    place = np.full(len(votes.features), -1)
    place[rows] = np.arange(len(rows))
    kept = place[votes.item] >= 0
    return lore.data.split_votes(
        votes.features[rows],
        votes.user[kept],
        place[votes.item[kept]],
        votes.vote[kept],
        num_users=len(votes.user_ids),
        user_ids=votes.user_ids,
        holdout="items",
        seed=seed,
    )


def planted(size: str, seed: int) -> lore.data.FourWay:
    """Users of a known basis; training pairs and held-out pairs share no row."""
    num_rows, num_features, num_users, per_user = SIZES[size]
    rank, new_rows = 5, max(100, num_rows // 4)
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, num_features + 1.0) ** -0.5
    x = (rng.normal(size=(num_rows + new_rows, num_features)) * spectrum).astype("f4")
    weights = rng.dirichlet(np.full(rank, 0.3), 2 * num_users)
    basis = rng.normal(size=(num_features, rank))
    first, second = rng.integers(num_rows, size=(2, 2000))
    basis *= 2 / np.std((x[first] - x[second]) @ basis)
    scores = x @ basis

    def draw(users, low, high, count, noise):
        user = np.repeat(users, count)
        one = rng.integers(low, high, size=len(user))
        other = low + (one - low + rng.integers(1, high - low, size=len(user))) % (
            high - low
        )
        margin = ((scores[one] - scores[other]) * weights[user]).sum(1)
        won = rng.random(len(user)) < 1 / (1 + np.exp(-margin))
        won ^= rng.random(len(user)) < noise
        chosen, rejected = np.where(won, (one, other), (other, one))
        return lore.Preferences.from_pairs(
            x, chosen, rejected, user - users[0], len(users)
        )

    seen, unseen = np.split(np.arange(2 * num_users), 2)
    new = num_rows, len(x), 50, 0.0
    old = 0, num_rows, per_user, 0.1
    parts = [(seen, *old), (seen, *new), (unseen, *old), (unseen, *new)]
    return lore.data.FourWay(*(draw(*part) for part in parts))


def fits(split, rank: int, seed: int, published: bool) -> Iterator:
    """Yields (name, fit, how it adapts, preparation of its pairs)."""
    key = jax.random.key(seed)
    for name, k, config in (
        ("global", 1, lore.Marginal(search=lore.Search(holdout="items"))),
        ("global, default", 1, None),
        ("default", rank, None),
        ("items", rank, lore.Marginal(search=lore.Search(holdout="items"))),
    ):
        fitted = lore.fit(split.seen, rank=k, key=key, recipe=config)
        yield name, fitted, None, lambda prefs: prefs
    if published:
        scale = published_scale(split.seen)
        config = lore.PublishedJoint()
        fitted = lore.fit(scale(split.seen), rank=rank, key=key, recipe=config)
        few = lore.PublishedAdam(learning_rate=0.1, key=jax.random.key(seed))
        yield "published joint", fitted, few, scale


def measure(split, rank: int, seed: int, found: dict, published: bool) -> None:
    """Adds one split's float[U] accuracies and its calibration errors to `found`."""
    for side, part in (("seen", split.seen_heldout), ("unseen", split.unseen_heldout)):
        names = np.arange(part.num_users) + seed * 1_000_000
        names = names if part.ids is None else part.ids.users
        found.setdefault(("people", side), []).append(names)
    for name, fitted, how, scale in fits(split, rank, seed, published):
        test = split.seen_heldout
        accuracy = lore.accuracy(fitted.model, fitted, test)
        add(found, name, "seen", accuracy)
        for shots in SHOTS:
            few = scale(lore.take_shots(split.unseen, shots, seed=seed))
            new = lore.adapt(fitted.model, few, method=how)
            accuracy = lore.accuracy(fitted.model, new, split.unseen_heldout)
            add(found, name, label(shots), accuracy)
        if how is None:
            chance = lore.predict_proba(fitted.model, split.seen, test)
            error = lore.evaluation.calibration(chance, np.ones(len(chance)))
            found.setdefault((name, "calibration"), []).append(error.expected_error)
            found.setdefault((name, "log-loss"), []).append(error.log_loss)


def add(found: dict, name: str, column: str, accuracy) -> None:
    """Keeps accuracies in %."""
    found.setdefault((name, column), []).append(100 * np.asarray(accuracy))


def report(title: str, found: dict) -> dict:
    """Prints the table of one problem; returns its numbers."""
    columns = ["seen", *map(label, SHOTS)]
    names = list(dict.fromkeys(name for name, _ in found if name != "people"))
    people = {c: found["people", "seen" if c == "seen" else "unseen"] for c in columns}
    rows, numbers = {}, {}
    for name in names:
        means = [bootstrap(found[name, column], people[column]) for column in columns]
        extra = [found.get((name, x), [np.nan]) for x in ("log-loss", "calibration")]
        cells = [f"{m.mean:.1f}" for m in means]
        rows[name] = [*cells, *(f"{np.mean(x):.3f}" for x in extra)]
        numbers[name] = dict(zip(columns, (m._asdict() for m in means)))
    for name in names:
        if not name.startswith("global"):
            gains = [
                paired(found[name, c], found["global", c], people[c]) for c in columns
            ]
            cells = [f"{g.mean:+.1f} [{g.low:+.1f}, {g.high:+.1f}]" for g in gains]
            rows[f"{name} − global"] = [*cells, "", ""]
            numbers[f"{name} - global"] = dict(
                zip(columns, (g._asdict() for g in gains))
            )
    show(title, [*columns, "log-loss", "calibration error"], rows)
    return numbers


def main() -> None:
    """Prints a table per problem and rank, and writes all numbers as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--planted", action="store_true", help="a known truth instead")
    parser.add_argument("--sizes", nargs="+", help="of statements, or planted sizes")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 5, 10])
    parser.add_argument("--splits", type=int, default=4, help="splits, or seeds")
    parser.add_argument("--out", type=pathlib.Path, default="runs/new_items")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    sizes = args.sizes or (SIZES if args.planted else ["150", "350", "607"])
    for size in sizes:
        for rank in [5] if args.planted else args.ranks:
            found: dict = {}
            for seed in range(args.splits):
                if args.planted:
                    split = planted(size, seed)
                else:
                    split = statements(None if size == "607" else int(size), seed)
                measure(split, rank, seed, found, published=args.planted)
            title = size if args.planted else f"{size} statements, K = {rank}"
            results[title] = report(title, found)
    path = args.out / ("planted.json" if args.planted else "bowling_green.json")
    write_json(path, results)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
