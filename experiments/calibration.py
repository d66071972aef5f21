"""How good the probabilities for new people are: log-loss, Brier score, calibration.

    python -m experiments.calibration                 # bowling_green, K = 2 and 5
    python -m experiments.calibration --planted 0.3 --ranks 5

Three predictions of held-out pairs from the same basis: integrated over the posterior
(`predict_proba`), the posterior's weights plugged in, and maximum likelihood. Log-loss
and Brier score are means over people; differences in log-loss are paired, with 95 %
intervals over people and splits.
"""

import types

import jax
import numpy as np

import lore_jax as lore
from experiments.few_shot import fits, label, parser, show
from experiments.stored import write_json
from lore_jax.cli.intervals import bootstrap, paired

SHOTS = (1, 3, 5, 10, 20, None)
METHODS = ("integrated", "plugged in", "likelihood")


def planted(rank: int, splits: int, alpha: float):
    """Yields (split, fitted) of populations whose choices the model itself draws."""
    for seed in range(splits):
        keys = jax.random.split(jax.random.key(seed))
        truth = lore.data.planted(
            keys[0],
            num_users=600,
            pairs_per_user=40,
            num_features=4 * rank,
            rank=rank,
            alpha=alpha,
        )
        seen, unseen = np.arange(400), np.arange(400, 600)
        split = types.SimpleNamespace(
            unseen=lore.take_users(truth.prefs, unseen),
            unseen_heldout=lore.take_users(truth.heldout, unseen),
        )
        known = lore.take_users(truth.prefs, seen)
        yield split, lore.fit(known, rank=rank, key=keys[1])


def flags(doc: str | None):
    """The command line of studies that run on votes or on planted users."""
    made = parser(doc, [2, 5])
    made.add_argument("--planted", type=float, metavar="ALPHA", help="Dirichlet users")
    return made.parse_args()


def problems(args, rank: int):
    """Yields (split, fitted) of what the command line asks for."""
    if args.planted is None:
        return fits(rank, args.splits, args.out, args.holdout)
    return planted(rank, args.splits, args.planted)


def main() -> None:
    """Prints a table per rank and writes all numbers as JSON."""
    args = flags(__doc__)
    results = {}
    for rank in args.ranks:
        found: dict = {}
        for seed, (split, fitted) in enumerate(problems(args, rank)):
            rho = float(fitted.model.prior.variance_scale)
            print(
                f"K = {rank}, split {seed}: learned variance scale {rho:g}", flush=True
            )
            predict_all(split, fitted, seed, found)
        results[str(rank)] = report(rank, found)
    args.out.mkdir(parents=True, exist_ok=True)
    what = "" if args.planted is None else f"-planted{args.planted:g}"
    path = args.out / f"calibration{what}.json"
    write_json(path, results)
    print(f"\nwrote {path}")


def predict_all(split, fitted: lore.Fitted, seed: int, found: dict) -> None:
    """Adds one split's numbers to `found[method, shots, quantity]`."""
    heldout = split.unseen_heldout
    model = fitted.model
    likelihood = lore.MaximumLikelihood()
    for shots in SHOTS:
        few = lore.take_shots(split.unseen, shots, seed=seed)
        chances = {"integrated": lore.predict_proba(model, few, heldout)}
        for name, adapted in (
            ("plugged in", lore.adapt(model, few)),
            ("likelihood", lore.adapt(model, few, method=likelihood)),
        ):
            m = lore.margins(model, adapted, heldout)
            chances[name] = jax.nn.sigmoid(m)
        for name, chance in chances.items():
            p = np.clip(np.asarray(chance, np.float64), 1e-9, 1)
            parts = {"log-loss": -np.log(p), "Brier": (1 - p) ** 2}
            for quantity, values in parts.items():
                stored = values[np.asarray(heldout.order)].astype(np.float32)
                mean = lore.evaluation.per_user_mean(stored, heldout)
                found.setdefault((name, shots, quantity), []).append(np.asarray(mean))
            error = lore.evaluation.calibration(p).expected_error
            found.setdefault((name, shots, "ECE"), []).append(error)
        ids = heldout.ids
        users = np.arange(heldout.num_users) if ids is None else ids.users
        # Planted users of different splits are different people.
        users = users if ids is not None else users + seed * len(users)
        found.setdefault(("users", shots), []).append(users)


def report(rank: int, found: dict) -> dict:
    """Prints the tables of one rank and returns their numbers."""
    numbers: dict = {}
    columns = [label(n) for n in SHOTS]
    for quantity, form in (
        ("log-loss", "{:.4f}"),
        ("Brier", "{:.4f}"),
        ("ECE", "{:.3f}"),
    ):
        rows = {}
        for name in METHODS:
            means = []
            for n in SHOTS:
                values = found[name, n, quantity]
                users = found["users", n]
                several = quantity != "ECE"
                means.append(
                    bootstrap(values, users).mean if several else np.mean(values)
                )
            rows[name] = [form.format(x) for x in means]
            numbers[f"{name} {quantity}"] = dict(zip(columns, map(float, means)))
        for other in METHODS[1:] if quantity == "log-loss" else ():
            gains = [
                paired(
                    found["integrated", n, quantity],
                    found[other, n, quantity],
                    found["users", n],
                )
                for n in SHOTS
            ]
            name = f"integrated − {other}"
            rows[name] = [f"{x.mean:+.4f} [{x.low:+.4f}, {x.high:+.4f}]" for x in gains]
            numbers[name] = {c: x._asdict() for c, x in zip(columns, gains)}
        show(f"K = {rank}: {quantity} of held-out pairs, by pairs shown", columns, rows)
    return numbers


if __name__ == "__main__":
    main()
