"""The main job in one command: real votes, five methods, two honest tables.

    python -m experiments.quickstart            # 4 splits, some minutes
    python -m experiments.quickstart --splits 1

Learns a basis from the seen people of the bowling_green votes, adapts the unseen people
from 0 … all of their pairs, and reports macro accuracy over people with 95 % intervals.
One table is about held-out votes on statements of the training pairs, the other about
new statements, which are held out with all their votes. Every setting is chosen on
training votes alone. The last row and global Bradley–Terry choose theirs on hold-outs
of the kind that the table tests, the default on both kinds.
"""

import argparse
import json
import pathlib
import platform
import time

import jax
import numpy as np
from tqdm import tqdm

import lore_jax as lore
from experiments import intervals
from experiments.figures import shots_figure

SHOTS = (0, 1, 3, 5, 10, 20, None)
SETTINGS = {
    "judgements": "held-out votes on known statements",
    "items": "new statements",
}
FLAT = ("global", "population")  # the same whatever a new person has shown
METHODS = {
    "global": "global Bradley–Terry",
    "population": "population mean weights",
    "published": "published joint recipe",
    "likelihood": "maximum likelihood",
    "default": "lore_jax default",
    "chosen": "lore_jax, holdout as here",
}


def main() -> None:
    """Runs all splits, prints the tables, writes JSON and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--splits", type=int, default=4, help="how many splits")
    parser.add_argument("--rank", type=int, default=2, help="shared directions K ≥ 2")
    parser.add_argument("--out", type=pathlib.Path, default="runs/quickstart")
    args = parser.parse_args()
    if args.splits < 1 or args.rank < 2:
        parser.error("--splits must be at least 1 and --rank at least 2")
    start = time.perf_counter()
    votes = lore.data.load_bowling_green()
    people = len(votes.user_ids)
    print(
        f"bowling_green: {people} people, {len(votes.features)} statements, "
        f"{len(votes.vote)} votes; rank {args.rank}, {args.splits} split(s)"
    )
    bar = tqdm(total=2 * args.splits * len(METHODS), desc="split 1")
    results = {holdout: one_setting(votes, holdout, args, bar) for holdout in SETTINGS}
    bar.close()
    seconds = time.perf_counter() - start
    args.out.mkdir(parents=True, exist_ok=True)
    for holdout, result in results.items():
        print_table(SETTINGS[holdout], result["accuracy"], result["distinct_votes"])
    result = {
        "rank": args.rank,
        "splits": args.splits,
        "seconds": seconds,
        **results,
        "versions": {
            "lore_jax": lore.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
        },
    }
    (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{seconds:.0f} s; wrote {args.out / 'results.json'}")
    for holdout, result in results.items():
        path = args.out / f"accuracy_{holdout}.png"
        draw(path, result["accuracy"], SETTINGS[holdout], args)
        print(f"wrote {path}")


def one_setting(votes, holdout: str, args, bar) -> dict:
    """All splits of one setting: intervals of every method, and paired differences."""
    cells: dict = {}
    judgements: dict = {}
    people: dict = {}
    for seed in range(args.splits):
        bar.set_description(f"{SETTINGS[holdout]}, split {seed + 1}/{args.splits}")
        split = votes.split(seed=seed, holdout=holdout)
        sides = {"seen": split.seen_heldout, "unseen": split.unseen_heldout}
        for side, prefs in sides.items():
            people.setdefault(side, []).append(prefs.ids.users)
        one_split(split, args.rank, seed, holdout, cells, judgements, bar)
    table = {
        name: {
            column: intervals.bootstrap(values, people[column.split()[0]])._asdict()
            for column, values in columns.items()
        }
        for name, columns in cells.items()
    }
    differences = {
        f"default_minus_{name}": {
            column: intervals.paired(
                values, cells[name][column], people[column.split()[0]]
            )._asdict()
            for column, values in cells["default"].items()
        }
        for name in FLAT
    }
    counted = {k: float(np.mean(v)) for k, v in judgements.items()}
    return {"accuracy": table, **differences, "distinct_votes": counted}


def draw(path: pathlib.Path, table: dict, setting: str, args) -> None:
    """The figure of one setting."""
    curves = {
        METHODS[name]: [
            ("all" if shot is None else shot, *share(columns[f"unseen {label(shot)}"]))
            for shot in SHOTS
        ]
        for name, columns in table.items()
        if name not in FLAT
    }
    flat = {METHODS[name]: share(table[name]["unseen 0"]) for name in FLAT}
    title = f"{setting}\n"  # Longer lines would run into the legend.
    title += f"unseen people, K = {args.rank}, {args.splits} split(s), 95 % intervals"
    shots_figure(path, curves, flat=flat, title=title)


def share(interval: dict) -> tuple[float, ...]:
    """(mean, low, high) as shares of 1, for figures."""
    return tuple(interval[part] / 100 for part in ("mean", "low", "high"))


def one_split(split, rank: int, seed: int, holdout, cells, judgements, bar) -> None:
    """Adds one split's float[U] accuracies to `cells[method][column]`."""
    shots = {label(n): lore.take_shots(split.unseen, n, seed=seed) for n in SHOTS}
    for name, prefs in shots.items():
        counted = lore.data.count_judgements(prefs)
        judgements.setdefault(f"unseen {name}", []).append(counted.mean())
    counted = lore.data.count_judgements(split.seen)
    judgements.setdefault("seen", []).append(counted.mean())

    def add(name: str, basis, seen_weights, adapt) -> None:
        accuracy = lore.accuracy(basis, seen_weights, split.seen_heldout)
        columns = cells.setdefault(name, {})
        columns.setdefault("seen", []).append(np.asarray(accuracy) * 100)
        for shot, prefs in shots.items():
            accuracy = lore.accuracy(basis, adapt(prefs), split.unseen_heldout)
            columns.setdefault(f"unseen {shot}", []).append(np.asarray(accuracy) * 100)
        bar.update()

    def everyone(weights):
        return lambda prefs: np.tile(weights, (prefs.num_users, 1))

    key = jax.random.key(seed)
    chosen = lore.TrainConfig(holdout=holdout)
    line = lore.fit(split.seen, rank=1, key=key, config=chosen)
    add("global", line.basis, line.weights, everyone(np.ones(1, np.float32)))

    fitted = lore.fit(split.seen, rank=rank, key=key)
    mean = np.asarray(fitted.prior.mean)
    seen = everyone(mean)(split.seen)
    add("population", fitted.basis, seen, everyone(mean))

    scale = published_scale(split.seen)
    config = lore.TrainConfig.reference_joint()
    joint = lore.fit(scale(split.seen), rank=rank, key=key, config=config)
    few = lore.AdaptConfig.reference(learning_rate=0.1, seed=seed)
    basis = joint.basis
    add(
        "published",
        basis,
        joint.weights,
        lambda prefs: lore.adapt(basis, scale(prefs), config=few).weights,
    )

    likelihood = lore.AdaptConfig.maximum_likelihood()

    def certified(prefs):
        return lore.adapt(fitted.basis, prefs, config=likelihood).weights

    add("likelihood", fitted.basis, certified(split.seen), certified)
    fits = {
        "default": fitted,
        "chosen": lore.fit(split.seen, rank=rank, key=key, config=chosen),
    }
    for name, fit in fits.items():
        add(
            name,
            fit.basis,
            fit.weights,
            lambda prefs, fit=fit: (
                lore.adapt(fit.basis, prefs, prior=fit.prior).weights
            ),
        )


def published_scale(prefs: lore.Preferences):
    """The published preparation: centred features of mean norm 100, for T = 100."""
    features = np.asarray(prefs.features)
    centre = features.mean(0)
    norm = np.linalg.norm(features - centre, axis=1).mean()
    table = (features - centre) * np.float32(100 / norm)
    return lambda prefs: prefs.replace(features=table)


def label(shots: int | None) -> str:
    """How a number of pairs is written in tables."""
    return "all" if shots is None else str(shots)


def print_table(setting: str, table: dict, judgements: dict) -> None:
    """One row per method, one column per number of pairs."""
    columns = list(next(iter(table.values())))
    wide = max(len(name) for name in METHODS.values())
    print(f"\nMacro accuracy over people on {setting}, %")
    print("[95 % interval over people and splits]\n")
    print(" " * wide, *(f"{c:>17}" for c in columns), sep="  ")
    for name, cells in table.items():
        row = (
            f"{c['mean']:5.1f} [{c['low']:4.1f}, {c['high']:4.1f}]"
            for c in cells.values()
        )
        print(f"{METHODS[name]:<{wide}}", *(f"{x:>17}" for x in row), sep="  ")
    votes = (f"{judgements[c]:.1f}" for c in columns)
    print(f"{'distinct votes used':<{wide}}", *(f"{x:>17}" for x in votes), sep="  ")


if __name__ == "__main__":
    main()
