"""What a step of `fit(..., mesh=mesh)` costs on n devices, from sizes and bandwidths.

    python -m benchmarks.mesh_cost --rows 100_000_000 --width 4096 --pairs 50_000_000

The numbers are a prediction, not a measurement: bytes over bandwidths. A test compares
the bytes with those of the compiled program and of the partition.
"""

import argparse
import math
from typing import NamedTuple


class Cost(NamedTuple):
    """One step.

    Attributes:
      rows: of the table on each device.
      read: bytes of the table that a device reads, twice.
      pairs: bytes that a device moves for its pairs: gathers and sums.
      reduced: bytes of the one all-reduce.
      exchanged: bytes that a device receives in each of the two all-to-alls.
      seconds: the sum of what each of them takes.
    """

    rows: int
    read: int
    pairs: int
    reduced: int
    exchanged: int
    seconds: float


def step_cost(
    *,
    rows: int,
    width: int,
    rank: int,
    pairs: int,
    devices: int,
    atoms: int = 69,
    bytes_per_feature: int = 4,
    memory: float = 2.8e12,
    network: float = 5e10,
) -> Cost:
    """The cost of a step where pairs draw their rows evenly from a shared table.

    Pairs use M (1 − e^(−2N / M)) of M rows, 1 / n of which lie on each device. The
    pairs of a device use M (1 − e^(−2N / (nM))): the rewards of the others, K numbers a
    row, are received, and their slopes sent back. A step reads its rows twice, gathers
    2 K numbers a pair and sums as many slopes up, and reduces the slope in V, the
    atoms' shares and the log marginal: 4 (D K + A + 1) bytes, of which a ring sends
    2 (n − 1) / n.

    Args:
      rows: M.
      width: D.
      rank: K.
      pairs: N.
      devices: n.
      atoms: A.
      bytes_per_feature: 4 for float32, 2 for bfloat16.
      memory: bytes per second of one device.
      network: bytes per second between two devices.
    """

    def used(number):
        return rows * -math.expm1(-2 * number / rows)

    held = math.ceil(used(pairs) / devices)
    exchanged = math.ceil(4 * rank * max(0.0, used(pairs / devices) - held))
    read = 2 * held * width * bytes_per_feature
    moved = 4 * 4 * rank * math.ceil(pairs / devices)
    reduced = 4 * (width * rank + atoms + 1)
    sent = 2 * (devices - 1) / devices * reduced + 2 * exchanged
    seconds = (read + moved) / memory + sent / network
    return Cost(held, read, moved, reduced, exchanged, seconds)


def main(argv=None) -> None:
    """Command line: one line per number of devices."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mesh_cost", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    whole = dict(type=lambda text: int(float(text.replace("_", ""))))
    parser.add_argument("--rows", **whole, default=100_000_000, help="M")
    parser.add_argument("--width", **whole, default=4096, help="D")
    parser.add_argument("--rank", **whole, default=5, help="K")
    parser.add_argument("--pairs", **whole, default=50_000_000, help="N")
    parser.add_argument("--bytes", **whole, default=2, help="of a feature, default 2")
    parser.add_argument("--memory", type=float, default=2.8e12, help="bytes a second")
    parser.add_argument("--network", type=float, default=5e10, help="bytes a second")
    args = parser.parse_args(argv)
    print("| devices | rows | table, GB | all-reduce, kB | all-to-all, MB | step, ms |")
    print("|---|---|---|---|---|---|")
    for devices in (8, 16, 32, 64, 128, 256):
        cost = step_cost(
            rows=args.rows, width=args.width, rank=args.rank, pairs=args.pairs,
            devices=devices, bytes_per_feature=args.bytes, memory=args.memory,
            network=args.network,
        )  # fmt: skip
        print(
            f"| {devices} | {cost.rows:,} | {cost.read / 2e9:,.1f} | "
            f"{cost.reduced / 1e3:,.0f} | {cost.exchanged / 1e6:,.1f} | "
            f"{1e3 * cost.seconds:,.1f} |"
        )


if __name__ == "__main__":
    main()
