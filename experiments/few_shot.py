"""New people from few pairs, against the population's weights and maximum likelihood.

    python -m experiments.few_shot                    # K = 2, 5, 10 on four splits
    python -m experiments.few_shot --ranks 2 --splits 1

Held-out votes of unseen people on bowling_green, on known statements or, with
`--holdout items`, on new ones; every method uses the same basis. The
differences are paired, person by person, with 95 % intervals over people and splits.
"""

import argparse
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

import lore_jax as lore
from experiments.stored import write_json
from lore_jax.cli.intervals import bootstrap, paired

SHOTS = (0, 1, 3, 5, 10, 20, None)


def parser(doc: str | None, ranks: list[int]) -> argparse.ArgumentParser:
    """The flags of the scripts that study new people on bowling_green."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--ranks", type=int, nargs="+", default=ranks, help="K ≥ 2")
    made.add_argument(
        "--holdout",
        choices=("judgements", "items"),
        default="judgements",
        help="what tests: votes on known statements, or new statements",
    )
    made.add_argument("--splits", type=int, default=4, help="how many splits")
    made.add_argument("--out", type=pathlib.Path, default="runs/new_people")
    return made


def fits(rank: int, splits: int, out: pathlib.Path, holdout: str) -> Iterator:
    """Yields (split, fitted); fits are kept under `out` and read again from there."""
    out.mkdir(parents=True, exist_ok=True)
    votes = lore.data.load_bowling_green()
    for seed in range(splits):
        split = votes.split(seed=seed, holdout=holdout)
        name = f"lore_jax-{lore.__version__}-{holdout}-k{rank}-split{seed}"
        path = out / f"{name}.safetensors"
        if not path.is_file():
            key = jax.random.key(seed)
            lore.save(path, lore.fit(split.seen, rank=rank, key=key))
        yield split, lore.load(path)


def label(shots: int | None) -> str:
    """How a number of pairs is written in tables."""
    return "all" if shots is None else str(shots)


def show(title: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    """Prints a Markdown table."""
    print(f"\n{title}\n\n| |{'|'.join(columns)}|\n|---|{'---|' * len(columns)}")
    for name, cells in rows.items():
        print(f"|{name}|{'|'.join(cells)}|", flush=True)


def main() -> None:
    """Prints a table per rank and writes all numbers as JSON."""
    args = parser(__doc__, [2, 5, 10]).parse_args()
    results = {}
    for rank in args.ranks:
        found: dict = {}
        for seed, (split, fitted) in enumerate(
            fits(rank, args.splits, args.out, args.holdout)
        ):
            adapt_all(split, fitted, seed, found)
        results[str(rank)] = report(rank, found)
    path = args.out / f"few_shot_{args.holdout}.json"
    write_json(path, results)
    print(f"\nwrote {path}")


def adapt_all(split, fitted: lore.Fitted, seed: int, found: dict) -> None:
    """Adds one split's float[U] accuracies to `found[what, shots]`."""
    likelihood = lore.MaximumLikelihood()
    mean = np.asarray(fitted.model.prior.mean)[None]
    for shots in SHOTS:
        few = lore.take_shots(split.unseen, shots, seed=seed)
        weights = {
            "default": lore.adapt(fitted.model, few).weights,
            "population": np.repeat(mean, few.num_users, axis=0),
            "likelihood": lore.adapt(fitted.model, few, method=likelihood).weights,
        }
        for name, p in weights.items():
            accuracy = lore.accuracy(
                fitted.model, p, split.unseen_heldout, user_ids=few.user_ids
            )
            values = 100 * np.asarray(accuracy, np.float64)
            found.setdefault((name, shots), []).append(values)
        votes = lore.data.count_judgements(few).astype(np.float64)
        found.setdefault(("votes", shots), []).append(votes)
        found.setdefault(("users", shots), []).append(few.ids.users)


def report(rank: int, found: dict) -> dict:
    """Prints the table of one rank and returns its numbers."""
    rows: dict = {}
    numbers: dict = {}

    def add(name: str, form: str, intervals: list) -> None:
        rows[name] = [form.format(x) for x in intervals]
        numbers[name] = {label(n): x._asdict() for n, x in zip(SHOTS, intervals)}

    users = {n: found["users", n] for n in SHOTS}
    for name in ("default", "population", "likelihood", "votes"):
        values = [bootstrap(found[name, n], users[n]) for n in SHOTS]
        add(name, "{0.mean:.1f}", values)
    for name in ("population", "likelihood"):
        gains = [paired(found["default", n], found[name, n], users[n]) for n in SHOTS]
        add(f"default − {name}", "{0.mean:+.1f} [{0.low:+.1f}, {0.high:+.1f}]", gains)
    title = f"K = {rank}: macro accuracy of new people in %, by pairs shown"
    show(title, [label(n) for n in SHOTS], rows)
    return numbers


if __name__ == "__main__":
    main()
