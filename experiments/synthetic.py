"""Planted populations: is the truth recovered, and how many pairs does a user need?

Users with known mixtures of known directions choose between random responses, and a
share of their choices is flipped. Against the number of pairs of every user this shows
how far the learned directions are the true ones (principal angles), and the accuracy of
every method beside the oracle's, which knows basis and weights; against the number of
shots it shows the accuracy of new users. Held-out choices follow Bradley-Terry without
flips, so even the oracle is not always right.

Without flags: D = 256, K = 5, 200 users, 10 % label noise, 10 to 200 pairs per user.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import lore_jax as lore
from experiments import baselines, cli, figures, result_tables
from experiments.planted import ANGLES, FACTS, Planted, recovery
from experiments.prepare import drop_flag, positive
from experiments.prepared import versions, write_json
from experiments.protocol import (
    HELDOUT,
    Cell,
    Run,
    Store,
    collect,
    judge,
    stored_margins,
)

ORACLE = "true basis and weights"
TRUE = "true basis, adapted"
CONSTANT = (*cli.NO_CURVE, ORACLE)  # the same whatever a new user has shown


def known_truth(run: Run, source: Planted, shots: int | None, trials: int) -> Cell:
    """What the truth reaches: the oracle, and the true basis after so many shots."""
    name = "all" if shots is None else shots
    trials = 1 if shots in (None, 0) else trials
    key = {"split": source.name, "data": source.fingerprint(), "method": "truth"}
    key |= {"shots": name, "trials": trials}
    if (found := run.store.get(key)) is not None:
        return found
    split, (basis, weights) = run.split(source), source.truth()
    parts = [baselines.projected_table(part, basis) for part in split.data]
    eye = np.eye(basis.shape[1], dtype=np.float32)
    config = lore.MAP(dict(zip(FACTS, source.facts))["alpha"])
    values: dict = {}
    errors: dict = {}
    for p, (shown, prefs), part in zip(weights, (parts[:2], parts[2:]), HELDOUT):
        rows = {ORACLE: judge(stored_margins(p, prefs, 1.0), prefs)}
        collect(values, errors, part, rows)
        found: list = []
        for trial in range(trials):
            few = lore.take_shots(shown, shots, seed=1000 * source.seed + trial)
            p = lore.adapt(lore.RewardModel(eye), few, method=config).weights
            found.append(judge(stored_margins(p, prefs, 1.0), prefs))
        mean = {n: sum(users[n] for users, _ in found) / trials for n in found[0][0]}
        error = sum(error for _, error in found) / trials
        collect(values, errors, part, {TRUE: (mean, error)})
    facts = {"expected_error": errors, "counts": split.counts}
    return run.store.put(key, Cell(values, facts))


def make_parser() -> argparse.ArgumentParser:
    """The flags: the planted problem, and those of every experiment."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/synthetic"), help="results folder")
    cli.add_flags(parser)
    for name in ("variants", "splits", "leak_threshold"):  # nothing is prepared here
        drop_flag(parser, name)
    add("--pairs", type=positive, nargs="+", default=[10, 25, 50, 100, 200],
        help="of every user")  # fmt: skip
    add("--shots-at", type=positive, default=50, help="--pairs that shots are shown at")
    add("--users", type=positive, default=200, help="seen")
    add("--new-users", type=positive, default=200)
    add("--features", type=positive, default=256)
    add("--true-rank", type=positive, default=5)
    add("--alpha", type=float, default=0.3, help="Dirichlet of the users")
    add("--label-noise", type=float, default=0.1, help="share of choices flipped")
    parser.set_defaults(
        seeds=[0, 1, 2], ranks=[0, 1, 5], shots=[0, 1, 3, 5, 10, 20],
        alternating_steps=1000, trials=3,
    )  # fmt: skip
    return parser


def main(argv=None) -> dict:
    """Command line."""
    parser = make_parser()
    args = cli.parse(parser, argv)
    if args.shots_at not in args.pairs:
        parser.error(f"--shots-at {args.shots_at} is none of --pairs {args.pairs}")
    if args.quick:
        args.trials = 1
    facts = tuple(getattr(args, name) for name in FACTS)
    most = max(args.pairs)
    sources = [
        Planted(seed, n, most, facts) for seed in args.seeds for n in sorted(args.pairs)
    ]
    recipes = cli.recipes(args, args.ranks, head=True)
    run = Run(Store(args.out), sources)
    asked = {k: v for k, v in vars(args).items() if k != "config"}
    asked = json.loads(json.dumps(asked, default=str))
    write_json(args.out / "config.json", {**asked, "versions": versions()})
    by_pairs, found, counts = compare(run, recipes, args)
    by_shots, shown = vary_shots(run, recipes, args)
    learned = tabulate_recovery(found)
    texts = [result_tables.shots_markdown(by_pairs, quantity=q, what="pairs")
             for q in ("seen_heldout", "unseen_heldout")]  # fmt: skip
    text = "\n".join([*texts, recovery_markdown(learned)])
    results = {"table": by_pairs, "recovery": learned, "counts": counts}
    result_tables.write_results(args.out, "by_pairs", results, text)
    shots = result_tables.shots_markdown(by_shots, shown)
    shots += "\n" + result_tables.shots_quality_markdown(by_shots)
    results |= {"shots": {"table": by_shots, "shown": shown}}
    result_tables.write_results(args.out, "by_shots", results["shots"], shots)
    draw(args, by_pairs, by_shots, learned)
    print(text + "\n" + shots)
    return results


def todo(run: Run, recipes, what: str, pairs: int | None = None):
    """Every (source, recipe), with progress."""
    from tqdm import tqdm

    sources = [s for s in run.sources if pairs in (None, s.pairs)]
    both = [(source, recipe) for source in sources for recipe in recipes]
    with tqdm(both, desc=what, unit="cell", disable=None) as progress:
        for source, recipe in progress:
            progress.set_postfix_str(f"{source.name} {recipe.label} {recipe.rank}")
            yield source, recipe


def compare(run: Run, recipes, args) -> tuple[list[dict], dict, dict]:
    """The four-way table at every number of pairs; angles and counts of all fits."""
    rows = {pairs: result_tables.Rows(run.people) for pairs in sorted(args.pairs)}
    found: dict = {}
    counts: dict = {}
    for source in run.sources:
        cell = known_truth(run, source, None, 1)
        rows[source.pairs].add(source.name, args.true_rank, cell)
    for source, recipe in todo(run, recipes, "fits"):
        cell = run.four_way(source, source.seed, recipe)
        rows[source.pairs].add(source.name, recipe.rank, cell)
        counts[source.name] = cell.facts["counts"]
        if recipe.rank > 1:
            basis = run.fit(source, source.seed, recipe).model.basis
            angles = recovery(basis, source.truth()[0])
            key = (recipe.label, recipe.rank, source.pairs)
            found.setdefault(key, []).append(angles)
    table = [{"shots": n, **row} for n, some in rows.items() for row in some.table()]
    return table, found, counts


def vary_shots(run: Run, recipes, args) -> tuple[list[dict], dict]:
    """New users after few pairs, with the fits at ``--shots-at`` pairs."""
    shots = [*args.shots, None]
    rows = {s: result_tables.Rows(run.people) for s in shots}
    shown: dict = {}
    for source, recipe in todo(run, recipes, "shots", args.shots_at):
        for s in shots:
            if recipe.method in ("head", "global"):
                cell = run.four_way(source, source.seed, recipe)
            else:
                cell = run.sweep(source, source.seed, recipe, s, args.trials)
                counted = {n: cell.facts[n] for n in ("pairs", "judgements")}
                shown.setdefault("all" if s is None else str(s), []).append(counted)
            rows[s].add(source.name, recipe.rank, cell)
    for source in run.sources:
        for s in shots if source.pairs == args.shots_at else ():
            cell = known_truth(run, source, s, args.trials)
            rows[s].add(source.name, args.true_rank, cell)
    unseen = [q for q in result_tables.QUANTITIES if q.startswith("unseen_heldout")]
    table = [
        {"shots": "all" if s is None else s, **row}
        for s, some in rows.items()
        for row in some.table(unseen)
    ]
    return table, {s: result_tables.mean_counts(some) for s, some in shown.items()}


def tabulate_recovery(found: dict) -> list[dict]:
    """Mean, least and greatest angle over the seeds, by method, rank and pairs."""
    return [
        {
            **{"method": method, "rank": rank, "pairs": pairs},
            **{
                name: [float(f([a[name] for a in some])) for f in (np.mean, min, max)]
                for name in ANGLES
            },
        }
        for (method, rank, pairs), some in found.items()
    ]


def recovery_markdown(table: list[dict]) -> str:
    """Angles in degrees, mean [least, greatest] over the seeds."""
    columns = list(dict.fromkeys(row["pairs"] for row in table))
    found = {(r["method"], r["rank"], r["pairs"]): r for r in table}
    lines = [["angle to the truth", "K", "", *(f"{n} pairs" for n in columns)]]
    lines.append(["---"] * (len(columns) + 3))
    for method, rank in dict.fromkeys(key[:2] for key in found):
        for name in ANGLES:
            rows = [found[method, rank, n][name] for n in columns]
            cells = [f"{m:.0f}° [{low:.0f}, {high:.0f}]" for m, low, high in rows]
            lines.append([method, str(rank), name, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(args, by_pairs: list[dict], by_shots: list[dict], learned: list[dict]) -> None:
    """Accuracy against pairs and shots, and the angles against pairs."""
    folder = args.out / "figures"
    ranks = sorted({r for r in args.ranks if r > 1} | {args.true_rank})
    for name, table, label, constant in (
        ("accuracy_by_pairs", by_pairs, "pairs of every user", ()),
        ("accuracy_by_shots", by_shots, "pairs shown by a new user", CONSTANT),
    ):
        for rank in ranks:
            curves: dict = {}
            flat = {}
            for row in table:
                if (v := row["unseen_heldout"]) and row["rank"] in (rank, 0, 1, None):
                    values = [v[n] for n in ("mean", "low", "high")]
                    if row["method"] in constant:
                        flat[row["method"]] = values
                        continue
                    point = (row["shots"], *values)
                    curves.setdefault(row["method"], []).append(point)
            path = folder / (name + (f"_rank_{rank}" if len(ranks) > 1 else ""))
            title = f"K = {rank}"
            figures.shots_figure(path, curves, flat=flat, xlabel=label, title=title)
    curves = {}
    for row in learned:
        label = f"{row['method']}, K = {row['rank']}"
        values = [value / 100 for value in row["mean"]]  # the figure shows hundredths
        curves.setdefault(label, []).append((row["pairs"], *values))
    if curves:
        figures.shots_figure(
            folder / "angles_by_pairs", curves, xlabel="pairs of every user",
            ylabel="mean principal angle to the truth, degrees",
        )  # fmt: skip


if __name__ == "__main__":
    main()
