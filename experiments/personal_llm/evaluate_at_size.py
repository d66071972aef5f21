"""Evaluate at PersonalLLM's size on random features, and measure the memory.

1,000 users × 1,000 test prompts on one shared table of 9,400 prompts × 8 responses with
4,096 features each. What counts is the memory beyond the table: dense differences of
these pairs alone would take 16 GB in float32.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

import lore_jax as lore
from experiments.prepared import versions, write_json
from lore_jax.data import dirichlet_users, simulated_preferences

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def make_table(rows: int, features: int, dtype, seed: int) -> np.ndarray:
    """[M, D] random features, made in blocks so that nothing else is ever in memory."""
    generator = np.random.default_rng(seed)
    table = np.empty((rows, features), dtype)
    for begin in range(0, rows, 1024):
        block = generator.standard_normal(
            (min(1024, rows - begin), features), "float32"
        )
        table[begin : begin + len(block)] = block.astype(dtype)
    return table


def peak_gb() -> float:
    """Largest resident memory of this process so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main(argv=None) -> dict:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--users", type=int, default=1000)
    add("--prompts", type=int, default=9400)
    add("--test-prompts", type=int, default=1000)
    add("--features", type=int, default=4096)
    add("--rank", type=int, default=10)
    add("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of the table")
    add("--seed", type=int, default=0)
    add("--limit-gb", type=float, default=4.0, help="fail above, beyond the table")
    add("--out", type=Path, help="folder for evaluate_at_size.json")
    args = parser.parse_args(argv)
    rows = args.prompts * 8
    jax.random.key(args.seed).block_until_ready()  # the runtime is not the evaluation
    table = make_table(rows, args.features, DTYPES[args.dtype], args.seed)
    before = peak_gb()
    start = time.monotonic()
    keys = jax.random.split(jax.random.key(args.seed), 4)
    rewards = jax.random.normal(keys[0], (args.prompts, 8, 10))
    mixtures = dirichlet_users(keys[1], args.users, 0.1, 10)
    generator = np.random.default_rng(args.seed)
    test = generator.choice(args.prompts, args.test_prompts, replace=False)
    prompts = np.tile(test, (args.users, 1))
    prefs = simulated_preferences(table, rewards, mixtures, prompts)
    made = time.monotonic() - start
    basis = jax.random.normal(keys[2], (args.features, args.rank)) / args.features**0.5
    weights = dirichlet_users(keys[3], args.users, 1.0, args.rank)
    results = {}
    sources = {"table": prefs}
    blocks = lore.data.ArraySource(table)
    sources["blocks"] = prefs.replace(features=blocks)
    for name in ("blocks", "table"):
        start = time.monotonic()
        accuracy = np.asarray(
            lore.accuracy(lore.RewardModel(basis), weights, sources[name])
        )
        results[name] = {
            "seconds": time.monotonic() - start,
            "peak_gb_beyond_table": peak_gb() - before,
            "mean_accuracy": float(accuracy.mean()),
        }
    beyond = results["table"]["peak_gb_beyond_table"]
    report = {
        **{"users": args.users, "pairs": prefs.num_pairs, "rows": rows},
        **{"features": args.features, "dtype": args.dtype, "rank": args.rank},
        "table_gb": table.nbytes / 1e9,
        "seconds_to_simulate": made,
        "peak_gb_with_table": peak_gb(),
        "evaluation": results,
        "versions": versions(),
    }
    if args.out is not None:
        write_json(args.out / "evaluate_at_size.json", report)
    print(
        f"{args.users} users × {args.test_prompts} prompts on a table of "
        f"{report['table_gb']:.2f} GB: {beyond:.2f} GB beyond it, "
        + ", ".join(f"{n} {r['seconds']:.1f} s" for n, r in results.items())
    )
    if beyond > args.limit_gb:
        raise SystemExit(f"{beyond:.2f} GB beyond the table, allowed {args.limit_gb}")
    return report


if __name__ == "__main__":
    main()
