"""The whole suite: `python -m benchmarks --quick` (about 2 minutes on 2 cores).

Prints one JSON line a case and writes `runs/benchmarks/<device>.json` and `.md`, the
table of docs/performance.md. Without `--quick` it takes most of an hour on 2 cores.
"""

import argparse
import json
import pathlib
import re
import time

from benchmarks import bench_adapt, bench_train, measure

_RATIOS = {
    "ratio_to_reads": "{:.2f}× its two reads of the features",
    "ratio_to_reads_at_once": "{:.2f}× with one on every core",
    "ratio_to_read": "{:.2f}× one read of the features",
    "ratio_to_adapt": "{:.2f}× adapt",
    "ratio_to_kernel": "{:.2f}× its kernel",
    "ratio_over_adam": "{:.1f}× as fast as 500 Adam steps",
    "ratio_to_even": "{:.2f}× an even population",
    "ratio_to_small": "{:.2f}× the small store",
    "temp_over_features": "temporaries {:.3f}× the features",
    "program_over_features": "{:.2f}× the features in all",
    "peak_over_features": "peak {:.2f}× the features",
    "peak_over_input": "peak {:.2f}× the input",
    "ratio_over_torch": "{:.2f}× the compiled PyTorch step",
    "ratio_to_search": "{:.2f}× the reads of its search",
    "reads_of_search": "{:,} single reads",
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


def shape_of(letters: str):
    """A parser of "M=48000,N=…" into {letter: number}, for these letters."""

    def parse(text: str) -> dict[str, int]:
        try:
            found = {
                name: int(x) for name, x in (s.split("=") for s in text.split(","))
            }
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no shape: {error}"
            ) from error
        if sorted(found) != sorted(letters) or min(found.values()) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r} must give each of {', '.join(letters)} once, at least 1"
            )
        return found

    return parse


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--quick", action="store_true", help="few shapes, about 2 minutes on 2 cores")
    add(
        "--step",
        action="append",
        type=shape_of("MNDKU"),
        metavar="M=…,N=…,D=…,K=…,U=…",
        help="only a training step of this shape (may be repeated): M rows, N pairs, D "
        "features, rank K, U users",
    )
    add(
        "--adapt",
        action="append",
        type=shape_of("UPDK"),
        metavar="U=…,P=…,D=…,K=…",
        help="only the adaptation of U users with P pairs each, D features, rank K",
    )
    add(
        "--dtype",
        action="append",
        choices=["float32", "bfloat16"],
        help="of the table of --step (may be repeated)",
    )
    add(
        "--fit",
        action="append",
        type=shape_of("MNDKU"),
        metavar="M=…,N=…,D=…,K=…,U=…",
        help="only a whole default fit of this shape, over the reads that its search "
        "needs",
    )
    add(
        "--torch",
        action="store_true",
        help="also PyTorch on the same device, at full size: an alternating step that "
        "reads the features twice (torch.compile), and the published loops (eager)",
    )
    add("--compare", metavar="OLD.json", help="an earlier file: ratios of equal cases")
    add(
        "--out",
        default="runs/benchmarks",
        type=pathlib.Path,
        help="folder of DEVICE.json and DEVICE.md; the former is written after every "
        "case, so that an interrupted run keeps what it measured",
    )
    add("--size", choices=["tiny"], help=argparse.SUPPRESS)
    return made


def cases(args):
    """The rows that the flags ask for."""
    if args.step or args.adapt or args.fit:
        bandwidth = measure.copy_bandwidth(256)
        yield dict(case="copy", bytes_per_s=bandwidth)
        for shape in args.step or ():
            for dtype in args.dtype or ["float32"]:
                kinds = dict(bandwidth=bandwidth, fusions=(), dtype=dtype)
                yield from bench_train.against_reads(**shape, seconds=6.0, **kinds)
            if args.torch:
                yield from bench_train.beside_torch(**shape, seconds=6.0)
        for shape in args.fit or ():
            yield from bench_train.whole_fit(**shape)
        for shape in args.adapt or ():
            users, pairs, width, rank = (shape[name] for name in "UPDK")
            yield from bench_adapt.raw(users, pairs, width, rank, 3.0)
            yield from bench_adapt.projected(users, pairs, rank, 3.0)
        return
    size = args.size or ("quick" if args.quick else "full")
    for bench in (bench_train, bench_adapt):
        yield from bench.cases(size, args.torch)


def write_rows(path: pathlib.Path, rows: list[dict]) -> None:
    """Replaces the file whole, one row a line."""
    lines = ",\n ".join(map(json.dumps, rows))
    part = path.with_suffix(".part")
    part.write_text(f"[{lines}]\n", encoding="utf-8")
    part.replace(path)


def main(argv=None):
    """Command line."""
    args = parser().parse_args(argv)
    start, rows = time.perf_counter(), []
    old = measure.read_rows(args.compare) if args.compare else None
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out
    for row in cases(args):
        rows.append(measure.emit(row))
        name = re.sub(r"[^a-z0-9]+", "-", rows[0]["device"].lower()).strip("-")
        path = args.out / f"{name}.json"
        write_rows(path, rows)
    path.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    for row in measure.compare(rows, old) if old else []:
        measure.emit(row)
    print(f"{path.with_suffix('.md')}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
