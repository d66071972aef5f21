"""Command lines that the data sets share: train bases, and vary the shots.

``train_basis`` fits every method at every rank on every split and writes the four-way
table; ``vary_fewshot`` adapts unseen users from few pairs with the same fits, and makes
those that are missing. Both continue where they stopped, and both run the leak checks
first.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from experiments import figures, result_tables
from experiments.baselines import (
    ALONE,
    CHOSEN,
    GLOBAL,
    HEAD,
    LORE,
    METHODS,
    OWN,
    POPULATION,
    Recipe,
)
from experiments.parts import check_leaks, list_splits, read_config
from experiments.prepare import positive
from experiments.prepared import versions, write_json
from experiments.protocol import Run, Store

NO_CURVE = (HEAD, GLOBAL, POPULATION)
PARTS_SHOWN = {"seen_heldout": "seen users", "unseen_heldout": "unseen users"}


def make_parser(dataset: str, description: str) -> argparse.ArgumentParser:
    """The flags of ``train_basis`` and ``vary_fewshot``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, nargs="+", default=[Path("prepared") / dataset],
        help="prepared folders; each is a split of its own")  # fmt: skip
    add("--out", type=Path, default=Path("runs") / dataset, help="results folder")
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What to run, with the published settings as defaults."""
    add = parser.add_argument
    add("--config", type=Path, help="JSON file with flags; the command line wins")
    add("--variants", nargs="+", help="populations or splits of a folder; default all")
    add(
        "--splits",
        type=positive,
        default=1,
        help="as prepared, then redraws of the seen",
    )
    add("--seeds", type=int, nargs="+", default=[0], help="of training and adaptation")
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    add("--ranks", type=int, nargs="+", help="default: the published ones of the data")
    add("--published-ranks", type=int, nargs="+", help="default: --ranks from 2 on")
    add("--shots", type=int, nargs="+", help="default: the published ones of the data")
    add("--trials", type=positive, default=5, help="draws of the shots")
    add("--default-steps", type=int, help="of the library default")
    add("--joint-steps", type=int, default=1000)
    add("--alternating-steps", type=int, default=20000)
    add("--learning-rate", type=float, default=0.5, help="of the published recipes")
    add("--alphas", type=float, nargs="+", default=[0.0], help="published anchor")
    add("--fewshot-steps", type=int, default=500, help="published adaptation")
    add("--fewshot-learning-rate", type=float, default=0.1)
    add("--leak-threshold", type=float, default=0.95, metavar="ACCURACY",
        help="stop if formatting alone tells chosen from rejected better than this",
    )  # fmt: skip
    add("--quick", action="store_true", help="few steps: does it run at all?")


def parse(parser: argparse.ArgumentParser, argv) -> argparse.Namespace:
    """Flags from the command line over those of ``--config``.

    Raises:
        SystemExit: if the file names a flag that does not exist.
    """
    path = parser.parse_args(argv).config
    if path is not None:
        found = json.loads(path.read_text())
        known = {action.dest: action for action in parser._actions}
        if wrong := sorted(set(found) - set(known)):
            parser.error(f"{path}: unknown flags {wrong}")
        for name, value in found.items():
            if known[name].type is Path:
                some = isinstance(value, list)
                found[name] = list(map(Path, value)) if some else Path(value)
        parser.set_defaults(**found)
    return parser.parse_args(argv)


def recipes(args: argparse.Namespace, ranks, *, head: bool) -> list[Recipe]:
    """The methods to run at each rank."""
    default = {} if args.default_steps is None else {"num_steps": args.default_steps}
    steps = {"joint": args.joint_steps, "alternating": args.alternating_steps}
    fewshot = args.fewshot_steps
    if args.quick:
        default = {"num_steps": 10, "num_atoms": 8, "ridges": (0.1, 0.4)}
        default |= {"temperings": (0.3,), "concentrations": (10.0,)}
        steps, fewshot = dict.fromkeys(steps, 10), 10
    adapt = {"num_steps": fewshot, "learning_rate": args.fewshot_learning_rate}
    published = [rank for rank in ranks if rank > 1]
    if args.published_ranks is not None:
        published = args.published_ranks
    out = []
    for method in args.methods:
        if method == "head" and head and 0 in ranks:
            out.append(Recipe("head", 0))
        elif method == "global":
            out.append(Recipe("global", 1, default))
        elif method == "lore":
            out += [Recipe("lore", rank, default) for rank in ranks if rank > 1]
        elif method == "auto":
            candidates = tuple(sorted({1, *ranks} - {0}))
            out.append(Recipe("auto", OWN, {**default, "ranks": candidates}))
        elif method == "alone":
            out.append(Recipe("alone", OWN))
        elif method in steps:
            rate = args.learning_rate
            for alpha in args.alphas if head else [0.0]:
                train = {"num_steps": steps[method], "learning_rate": rate}
                train["alpha"] = alpha
                out += [Recipe(method, rank, train, adapt) for rank in published]
    return out


class Experiment:
    """One population of a data set: its splits, recipes and results folder."""

    def __init__(self, args: argparse.Namespace, variant: str | None, out: Path):
        """List the splits, check them for leaks, write ``config.json``."""
        config = read_config(args.data[0])
        self.args, self.out = args, out
        sources = list_splits(args.data, variant=variant, splits=args.splits)
        if args.variants and variant is None:
            sources = [s for s in sources if s.variant in args.variants]
        if not sources:
            raise ValueError(f"no split is left of {args.variants}")
        self.leaks = {
            source.name: check_leaks(source.read(), threshold=args.leak_threshold)
            for source in sources
        }
        head = all((folder / "head.npy").exists() for folder in args.data)
        ranks = config.get("ranks") if args.ranks is None else args.ranks
        self.recipes = recipes(args, ranks, head=head)
        if not self.recipes:
            raise ValueError(
                f"no method is left of {args.methods} at ranks {ranks}: the reference "
                "head needs head.npy and rank 0, LoRe ranks from 2 on"
            )
        self.shots = config.get("shot_counts") if args.shots is None else args.shots
        self.per = config.get("shots", "pairs")
        self.run = Run(Store(out), sources)
        asked = {k: v for k, v in vars(args).items() if k != "config"}
        asked = json.loads(json.dumps(asked, default=str))
        facts = {"splits": self.run.marks, "leaks": self.leaks, "prepared": config}
        write_json(out / "config.json", {**facts, **asked, "versions": versions()})

    def cells(self, recipes, what: str):
        """Every (source, seed, recipe), with progress."""
        from tqdm import tqdm

        todo = [
            (source, seed, recipe)
            for source in self.run.sources
            for seed in self.args.seeds
            for recipe in recipes
        ]
        with tqdm(todo, desc=what, unit="cell", disable=None) as progress:
            for source, seed, recipe in progress:
                progress.set_postfix_str(f"{source.name} {recipe.label} {recipe.rank}")
                yield source, seed, recipe

    def four_way(self) -> tuple[result_tables.Rows, dict, dict]:
        """Rows of the four-way table, the ranks validation chose, and the counts."""
        rows, chosen, counts = result_tables.Rows(self.run.people), {}, {}
        for source, seed, recipe in self.cells(self.recipes, "train"):
            cell = self.run.four_way(source, seed, recipe)
            rows.add(source.name, recipe.rank, cell)
            counts[source.name] = cell.facts["counts"]
            if recipe.method == "auto":
                chosen[f"{source.name}, seed {seed}"] = cell.facts["rank"]
        return rows, chosen, counts


def populations(args: argparse.Namespace) -> list[Experiment]:
    """One experiment per population, or a single one over the folder's splits."""
    config = read_config(args.data[0])
    variants = args.variants or config["variants"]
    if len(variants) == 1 or config.get("variants_are") == "splits":
        name = variants[0] if len(variants) == 1 else None
        return [Experiment(args, name, args.out)]
    return [Experiment(args, name, args.out / name) for name in variants]


def train_main(dataset: str, description: str, argv=None) -> list[dict]:
    """``train_basis``: the four-way table of every method and rank."""
    return train(parse(make_parser(dataset, description), argv))


def train(args: argparse.Namespace) -> list[dict]:
    """Run ``train_basis`` on parsed flags; returns the results of each population."""
    return [train_one(experiment) for experiment in populations(args)]


def train_one(experiment: Experiment) -> dict:
    """Fit, tabulate and draw one population."""
    rows, chosen, counts = experiment.four_way()
    table, out = rows.table(), experiment.out
    results = {"table": table, "chosen_rank": chosen}
    results |= {"counts": counts, "leaks": experiment.leaks}
    parts = [result_tables.markdown(table), result_tables.quality_markdown(table)]
    text = "\n".join([*parts, result_tables.counts_markdown(counts)])
    result_tables.write_results(out, "four_way", results, text)
    panels = {title: rank_curves(table, q) for q, title in PARTS_SHOWN.items()}
    if any(curves or flat for curves, flat in panels.values()):
        figures.rank_figure(out / "figures" / "accuracy_by_rank", panels)
    draw_basis(experiment, chosen)
    print(text)
    return results


def rank_curves(table, quantity: str) -> tuple[dict, dict]:
    """Curves over ranks, and the methods without one as horizontal lines."""
    curves: dict = {}
    flat = {}
    for row in table:
        if found := row[quantity]:
            values = (found["mean"], found["low"], found["high"])
            if row["method"] in (HEAD, GLOBAL, ALONE, CHOSEN):
                flat[row["method"]] = values
            else:
                curves.setdefault(row["method"], []).append((row["rank"], *values))
    return curves, flat


def draw_basis(experiment: Experiment, chosen: dict) -> None:
    """Weights and cosines of the first split's fit, at the rank chosen most often."""
    ranks = [recipe.rank for recipe in experiment.recipes if recipe.method == "lore"]
    if not ranks:
        return
    picked = [rank for rank in chosen.values() if rank in ranks]
    rank = max(set(picked), key=picked.count) if picked else ranks[0]
    recipe = next(r for r in experiment.recipes if (r.method, r.rank) == ("lore", rank))
    run, seed = experiment.run, experiment.args.seeds[0]
    fitted = run.fit(run.sources[0], seed, recipe)
    folder, head = experiment.out / "figures", experiment.args.data[0] / "head.npy"
    title = f"{LORE}, K = {rank}"
    mean = np.asarray(fitted.model.prior.mean)
    figures.weights_figure(folder / "weights", fitted.weights, mean, title=title)
    head = np.load(head) if head.exists() else None
    figures.cosines_figure(folder / "cosines", fitted.model.basis, head, title=title)


def fewshot_main(dataset: str, description: str, argv=None) -> list[dict]:
    """``vary_fewshot``: accuracy of unseen users against the number of shots."""
    return fewshot(parse(make_parser(dataset, description), argv))


def fewshot(args: argparse.Namespace) -> list[dict]:
    """Run ``vary_fewshot`` on parsed flags; returns the results of each population."""
    return [fewshot_one(experiment) for experiment in populations(args)]


def fewshot_one(experiment: Experiment) -> dict:
    """Sweep the shots of one population, tabulate and draw."""
    flat = [r for r in experiment.recipes if r.method in ("head", "global")]
    curved = [r for r in experiment.recipes if r.method not in ("head", "global")]
    shots = [*experiment.shots, None]
    tables = {s: result_tables.Rows(experiment.run.people) for s in shots}
    counts: dict = {}
    for source, seed, recipe in experiment.cells(flat, "flat"):
        cell = experiment.run.four_way(source, seed, recipe)
        counts[source.name] = cell.facts["counts"]
        for rows in tables.values():
            rows.add(source.name, recipe.rank, cell)
    shown: dict = {}
    for source, seed, recipe in experiment.cells(curved, "shots"):
        for s in shots:
            trials = 1 if experiment.args.quick else experiment.args.trials
            cell = experiment.run.sweep(source, seed, recipe, s, trials)
            tables[s].add(source.name, recipe.rank, cell)
            counts[source.name] = cell.facts["counts"]
            name, facts = "all" if s is None else str(s), cell.facts
            found = {n: facts[n] for n in ("pairs", "judgements", "user_rows")}
            shown.setdefault(name, {}).setdefault((source.name, seed), found)
    shown = {
        name: result_tables.mean_counts(found.values()) for name, found in shown.items()
    }
    unseen = [q for q in result_tables.QUANTITIES if q.startswith("unseen_heldout")]
    table = [
        {"shots": "all" if s is None else s, **row}
        for s, rows in tables.items()
        for row in rows.table(unseen)
    ]
    results = {"table": table, "shown": shown, "counts": counts}
    results["leaks"] = experiment.leaks
    parts = [
        result_tables.shots_markdown(table, shown),
        result_tables.shots_quality_markdown(table),
    ]
    text = "\n".join([*parts, result_tables.counts_markdown(counts)])
    result_tables.write_results(experiment.out, "fewshot", results, text)
    what = "pairs" if experiment.per == "pairs" else "dialogues"
    label = f"{what} shown by a new user"
    for rank in sorted({r.rank for r in curved if r.rank > 1}) or [None] * bool(curved):
        curves, lines = shot_curves(table, rank)
        name = "accuracy_by_shots" + (f"_rank_{rank}" if rank else "")
        figures.shots_figure(
            experiment.out / "figures" / name, curves, flat=lines, xlabel=label,
            title=f"K = {rank}" if rank else "",
        )  # fmt: skip
    print(text)
    return results


def shot_curves(table, rank: int) -> tuple[dict, dict]:
    """The curves of one rank over shots, and the horizontal lines."""
    curves: dict = {}
    flat = {}
    for row in table:
        if (found := row["unseen_heldout"]) and row["rank"] in (rank, 0, 1, None):
            values = (found["mean"], found["low"], found["high"])
            if row["method"] in NO_CURVE:
                flat[row["method"]] = values
            else:
                curves.setdefault(row["method"], []).append((row["shots"], *values))
    return curves, flat
