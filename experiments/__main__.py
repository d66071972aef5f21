"""The published experiments on a prepared data set, in one command.

    python -m experiments train_basis DATASET     # the four-way table of every method
    python -m experiments vary_fewshot DATASET    # unseen users against shots

DATASET is bowling_green, personal_llm, prism, reddit_tldr, or the name of a folder in
prepared/. `--help` after it lists the flags.
"""

import sys

from experiments.cli import fewshot_main, train_main

COMMANDS = {"train_basis": train_main, "vary_fewshot": fewshot_main}
ABOUT = {
    "train_basis": "Fit every method at every rank: the four-way table.",
    "vary_fewshot": "Adapt unseen users from few pairs: accuracy against shots.",
}


def main(argv=None) -> list[dict]:
    """Command line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if len(argv) < 2 or argv[0] not in COMMANDS or argv[1].startswith("-"):
        print(__doc__.strip())
        raise SystemExit(0 if argv in (["-h"], ["--help"]) else 2)
    command, dataset, *flags = argv
    return COMMANDS[command](dataset, ABOUT[command], flags)


if __name__ == "__main__":
    main()
