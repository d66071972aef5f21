"""The main job in one command: real votes, five methods, two honest tables.

    python -m experiments.quickstart            # 4 splits, some minutes
    python -m experiments.quickstart --splits 1

The same as `lore quickstart`; the code is in `lore_jax/cli/quickstart.py`.
"""

import argparse
import pathlib

from lore_jax.cli import quickstart


def main(argv=None) -> None:
    """Runs all splits, prints the tables, writes JSON and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--splits", type=int, default=4, help="how many splits")
    parser.add_argument("--rank", type=int, default=2, help="shared directions K ≥ 2")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/quickstart")
    )
    args = parser.parse_args(argv)
    if args.splits < 1 or args.rank < 2:
        parser.error("--splits must be at least 1 and --rank at least 2")
    quickstart.run(args.splits, args.rank, args.out, print)


if __name__ == "__main__":
    main()
