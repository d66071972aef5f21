"""Which pair to ask a new person next: information, margin and random, compared.

    python -m experiments.ask_next                    # bowling_green, K = 2 and 5
    python -m experiments.ask_next --planted 0.3 --ranks 5

Every new person is asked one of their own training pairs at a time, chosen by
`score_pairs`; after each answer they are adapted and judged on held-out pairs. The
differences are paired, person by person, with 95 % intervals over people and splits.
"""

import jax
import numpy as np

import lore_jax as lore
from experiments.calibration import flags, problems
from experiments.few_shot import show
from experiments.stored import write_json
from lore_jax.cli.intervals import bootstrap, paired

METHODS = ("information", "margin", "random")
SHOWN = (1, 2, 3, 5, 10, 15, 20)


def main() -> None:
    """Prints a table per rank and writes all numbers as JSON."""
    args = flags(__doc__)
    results = {}
    for rank in args.ranks:
        found: dict = {}
        for seed, (split, fitted) in enumerate(problems(args, rank)):
            for method in METHODS:
                curve = ask(split, fitted, method, max(SHOWN), seed)
                for asked in SHOWN:
                    found.setdefault((method, asked), []).append(curve[asked - 1])
            ids = split.unseen.ids
            number = np.arange(split.unseen.num_users)
            # Planted people of different splits are different people.
            users = number + seed * len(number) if ids is None else ids.users
            found.setdefault("users", []).append(users)
        results[str(rank)] = report(rank, found)
    args.out.mkdir(parents=True, exist_ok=True)
    what = "" if args.planted is None else f"-planted{args.planted:g}"
    path = args.out / f"ask_next{what}.json"
    write_json(path, results)
    print(f"\nwrote {path}")


def ask(split, fitted: lore.Fitted, method: str, rounds: int, seed: int) -> list:
    """float[U] accuracies after 1 … `rounds` answers; who has no pair left waits."""
    pool, model = split.unseen, fitted.model
    keys = jax.random.split(jax.random.key(seed), rounds)
    asked = np.zeros(pool.num_pairs, bool)
    out = []
    for key in keys:
        shown, left = (lore.take_pairs(pool, x) for x in (asked, ~asked))
        drawn = key if method == "random" else None
        scores = lore.score_pairs(model, shown, left, method=method, key=drawn)
        best = lore.best_pairs(scores, left)[:, 0]
        stored = np.argsort(np.asarray(left.order))[best[best >= 0]]
        asked[np.flatnonzero(~asked)[stored]] = True
        shown = lore.take_pairs(pool, asked)
        weights = lore.adapt(model, shown).weights
        accuracy = lore.accuracy(model, weights, split.unseen_heldout)
        out.append(100 * np.asarray(accuracy, np.float64))
    return out


def report(rank: int, found: dict) -> dict:
    """Prints the table of one rank and returns its numbers."""
    rows: dict = {}
    numbers: dict = {}

    def add(name: str, form: str, intervals: list) -> None:
        rows[name] = [form.format(x) for x in intervals]
        numbers[name] = {str(n): x._asdict() for n, x in zip(SHOWN, intervals)}

    users = found["users"]
    for name in METHODS:
        add(name, "{0.mean:.1f}", [bootstrap(found[name, n], users) for n in SHOWN])
    for name in METHODS[1:]:
        gains = [paired(found["information", n], found[name, n], users) for n in SHOWN]
        form = "{0.mean:+.1f} [{0.low:+.1f}, {0.high:+.1f}]"
        add(f"information − {name}", form, gains)
    title = f"K = {rank}: macro accuracy of new people in %, by pairs asked"
    show(title, [str(n) for n in SHOWN], rows)
    return numbers


if __name__ == "__main__":
    main()
