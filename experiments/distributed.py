"""Fit on several processes of this machine, and compare with one device.

    python -m experiments.distributed --processes 2 --devices 2

Starts processes on loopback with some CPU devices each. They fit the shipped votes (a
table that is sharded over all of them) and a planted problem (rows of their own), each
process with its own users. Prints the largest difference from a fit on one device, and
the bytes of a step as benchmarks/mesh_cost.py predicts them. On a cluster every process
runs the same `lore.fit`; see docs/devices.md.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lore_jax as lore
from benchmarks.mesh_cost import step_cost

RANK = 3
SEARCH = lore.Search(ridges=(0.1, 0.2), smoothings=(1.0,), temperings=(0.4,))
RECIPE = lore.Marginal(num_steps=100, search=SEARCH)


def names(number: int) -> np.ndarray:
    """Names of users, in order."""
    return np.char.zfill(np.arange(number).astype(str), 6)


def votes(shared: Mesh | None = None) -> lore.Preferences:
    """Pairs of the shipped votes; on a mesh over a table that all devices share."""
    found = lore.data.load_bowling_green()
    split = lore.data.split_votes(
        found.features, found.user, found.item, found.vote,
        num_users=len(found.user_ids), user_ids=names(len(found.user_ids)),
    ).seen  # fmt: skip
    if shared is None:
        return split
    table = np.pad(split.features, ((0, -len(split.features) % shared.size), (0, 0)))
    sharding = NamedSharding(shared, PartitionSpec("users"))
    whole = jax.make_array_from_callback(table.shape, sharding, table.__getitem__)
    return split.replace(features=whole)


def planted() -> lore.Preferences:
    """Pairs of planted users, every row of one user alone."""
    users = lore.data.planted(
        jax.random.key(5), num_users=120, pairs_per_user=20, num_features=32, rank=RANK
    )
    prefs = users.prefs
    return prefs.replace(ids=lore.preferences.Ids(names(prefs.num_users), None))


PROBLEMS = {"votes": votes, "planted": planted}


def mine(prefs: lore.Preferences) -> lore.Preferences:
    """The users of this process: every n-th."""
    users = np.arange(jax.process_index(), prefs.num_users, jax.process_count())
    return lore.take_users(prefs, users)


def fit(name: str, prefs: lore.Preferences, mesh: Mesh | None, out: Path) -> None:
    """Fits one problem and keeps what is compared."""
    key = jax.random.key(0)
    fitted = lore.fit(prefs, rank=RANK, key=key, recipe=RECIPE, mesh=mesh)
    np.savez(out / f"{name}.npz", basis=fitted.model.basis, weights=fitted.weights,
             users=fitted.user_ids, atoms=fitted.model.prior.atoms)  # fmt: skip


def work(port: int, processes: int, process: int, devices: int, out: Path) -> None:
    """One process of several, or the one that fits on one device."""
    jax.config.update("jax_num_cpu_devices", devices)
    if processes == 1:
        for name, make in PROBLEMS.items():
            fit(name, make(), None, out)
        return
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    mesh = Mesh(np.array(jax.devices()), ("users",))
    fit("votes", mine(votes(mesh)), mesh, out)
    fit("planted", mine(planted()), mesh, out)


def start(processes: int, devices: int, folder: Path) -> list[Path]:
    """Runs the processes to their end; the folders they wrote."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    outs = [folder / f"{processes}-{process}" for process in range(processes)]
    running = []
    for process, out in enumerate(outs):
        out.mkdir()
        numbers = map(str, (port, processes, process, devices))
        command = [sys.executable, "-m", "experiments.distributed", "--work", *numbers]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        running.append(subprocess.Popen([*command, str(out)], env=environment))
    try:
        failed = [process.wait() for process in running]
    finally:
        for process in running:
            process.kill()
    if any(failed):
        raise SystemExit(f"a process failed: {failed}")
    return outs


def compare(name: str, one: Path, several: list[Path]) -> tuple[float, float, int]:
    """(largest difference of the basis, relative, and of weights; atoms)."""
    want = np.load(one / f"{name}.npz")
    basis, weights = [], []
    for folder in several:
        got = np.load(folder / f"{name}.npz")
        scale = np.abs(want["basis"]).max()
        basis.append(np.abs(got["basis"] - want["basis"]).max() / scale)
        place = {user: i for i, user in enumerate(want["users"].tolist())}
        at = [place[user] for user in got["users"].tolist()]
        weights.append(np.abs(got["weights"] - want["weights"][at]).max())
    return max(basis), max(weights), len(want["atoms"])


def main(argv=None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.distributed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=2, help="default 2")
    parser.add_argument("--devices", type=int, default=2, help="of each, default 2")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        *numbers, out = args.work
        work(*map(int, numbers), Path(out))
        return
    if args.processes < 2 or args.devices < 1:
        parser.error("--processes must be at least 2, --devices at least 1")
    with tempfile.TemporaryDirectory() as folder:
        several = start(args.processes, args.devices, Path(folder))
        (one,) = start(1, 1, Path(folder))
        print(f"{args.processes} processes × {args.devices} devices, beside one device")
        print("| problem | basis, relative | weights | all-reduce | all-to-all |")
        print("|---|---|---|---|---|")
        for name, make in PROBLEMS.items():
            basis, weights, atoms = compare(name, one, several)
            prefs = make()
            cost = step_cost(
                rows=prefs.features.shape[0], width=prefs.num_features, rank=RANK,
                pairs=prefs.num_pairs, devices=args.processes * args.devices,
                atoms=atoms,
            )  # fmt: skip
            # Rows of one user each are not exchanged.
            exchanged = cost.exchanged if name == "votes" else 0
            bytes_ = f"{cost.reduced:,} bytes | {exchanged:,} bytes"
            print(f"| {name} | {basis:.1e} | {weights:.1e} | {bytes_} |")


if __name__ == "__main__":
    main()
