"""The whole suite: `python -m benchmarks --quick` (about 2 minutes on 2 cores).

Prints one JSON line a case and writes `runs/benchmarks/<device>.json` and `.md`, the
table of the README. Without `--quick` it takes most of an hour on 2 cores.
"""

import argparse
import json
import pathlib
import re
import time

from benchmarks import bench_adapt, bench_train, measure

_RATIOS = {
    "ratio_to_reads": "{:.2f}× its two reads of the features",
    "ratio_to_read": "{:.2f}× one read of the features",
    "ratio_over_adam": "{:.1f}× as fast as 500 Adam steps",
    "ratio_to_even": "{:.2f}× an even population",
    "temp_over_features": "temporaries {:.3f}× the features",
    "program_over_features": "{:.2f}× the features in all",
    "peak_over_features": "peak {:.2f}× the features",
    "peak_over_input": "peak {:.2f}× the input",
    "roofline": "{:.0%} of the copy bandwidth",
    "programs_1_to_10000": "{} programs for batches of 1 to 10,000",
}


def table(rows: list[dict]) -> str:
    """Markdown, one line a case that stands beside something.

    What the ratios are taken over is in the JSON alone.
    """
    first = rows[0]
    lines = [
        f"Measured on {first['device']} ({first['machine']}), jax {first['jax']}, "
        f"float32 at matmul precision {first['matmul_precision']}; medians.",
        "",
        "| case | shape | time | users/s | beside |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "median_s" not in row or not _RATIOS.keys() & row.keys():
            continue
        shape = " ".join(f"{key}={row[key]:,}" for key in "MNUPDK" if row.get(key))
        rate = row.get("users_per_s")
        beside = [
            text.format(row[key])
            for key, text in _RATIOS.items()
            if row.get(key) is not None
        ]
        lines.append(
            f"| {row['case']} | {shape} | {1e3 * row['median_s']:.3g} ms | "
            f"{'' if rate is None else f'{rate:,.0f}'} | {'; '.join(beside)} |"
        )
    return "\n".join(lines) + "\n"


def main(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--compare", metavar="OLD_JSON")
    parser.add_argument("--size", choices=["tiny"], help=argparse.SUPPRESS)
    parser.add_argument("--out", default="runs/benchmarks", type=pathlib.Path)
    args = parser.parse_args(argv)
    size = args.size or ("quick" if args.quick else "full")
    start = time.perf_counter()
    rows = [
        measure.emit(row)
        for bench in (bench_train, bench_adapt)
        for row in bench.cases(size, args.torch)
    ]
    changes = measure.compare(rows, args.compare) if args.compare else []
    args.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", rows[0]["device"].lower()).strip("-")
    lines = ",\n ".join(map(json.dumps, rows))
    (args.out / f"{name}.json").write_text(f"[{lines}]\n", encoding="utf-8")
    (args.out / f"{name}.md").write_text(table(rows), encoding="utf-8")
    for row in changes:
        measure.emit(row)
    print(f"{args.out / name}.md, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
