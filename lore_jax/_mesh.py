"""Training on the devices of a mesh: users, their pairs and rows, one part a device.

Users are partitioned over the axis "users", balanced by their pairs, and never move.
Each row that pairs use lies on one device, one of those whose users use it, which
multiplies V by it. Rewards of rows that others use too are exchanged by an all-to-all,
and so are their slopes. Apart from that a step costs one all-reduce of the slope in V
and the sums of the recipe: the atoms' shares and the log marginal, or the loss and the
slope's norm in W.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lore_jax import _processes
from lore_jax._backend import tuning
from lore_jax._pairs.blocks import back_project_rows, project_rows
from lore_jax._pairs.distributed import DistributedTable
from lore_jax._pairs.pack import Pairs
from lore_jax._pairs.row_sums import (
    RowIndex,
    SideCounts,
    count_sides,
    make_row_index,
    sum_rows,
)
from lore_jax._pairs.used_rows import used_rows
from lore_jax.preferences import FeatureSource, positions_of

AXIS = "users"


def check_mesh(mesh: Any) -> Mesh:
    """A mesh with the axis "users" and Auto axis types over the same devices.

    Raises:
      TypeError: it is no mesh.
      ValueError: it has other axes.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh)}")
    if tuple(mesh.axis_names) != (AXIS,):
        raise ValueError(
            f"mesh must have the one axis {AXIS!r}, got {tuple(mesh.axis_names)}"
        )
    return Mesh(mesh.devices, (AXIS,), axis_types=(AxisType.Auto,))


class Part(NamedTuple):
    """What one device holds.

    Attributes:
      users: int[n], its users.
      rows: int[m], the rows of the table that lie on it, ascending.
      used: int[r], the rows that its users' pairs use, ascending.
      place: int[r], where their rewards stand: behind its own come those received.
    """

    users: np.ndarray
    rows: np.ndarray
    used: np.ndarray
    place: np.ndarray


class Exchange(struct.PyTreeNode):
    """What one device sends, inside of `shard_map`.

    Attributes:
      send: int32[n, s], which of its m rows each of n devices gets, padded with 0.
      back: which of the n · s slopes that come back each row sums up; None where they
        are scattered.
    """

    send: jax.Array
    back: RowIndex | None

    def gather(self, proj: jax.Array) -> jax.Array:
        """float[m, K] → [m + n · s, K]: behind its own rows those that it receives."""
        sent = proj.at[self.send.reshape(-1)].get(mode="promise_in_bounds")
        received = jax.lax.all_to_all(sent, AXIS, 0, 0, tiled=True)
        return jnp.concatenate([proj, received])

    def sum(self, slopes: jax.Array) -> jax.Array:
        """The transpose of `gather`."""
        own = slopes[: len(slopes) - self.send.size]
        back = jax.lax.all_to_all(slopes[len(own) :], AXIS, 0, 0, tiled=True)
        if self.back is not None:
            return own + sum_rows(back.T, self.back).T
        return own.at[self.send.reshape(-1)].add(back, mode="promise_in_bounds")


class Partition:
    """Users and rows of a data set on the devices of a mesh.

    Every part is padded to the same shapes, and so is every split of the data, so that
    all of them share one program.
    """

    def __init__(
        self,
        mesh: Mesh,
        pairs: Pairs,
        num_rows: int,
        process: np.ndarray | None = None,
    ):
        """Partitions all pairs; splits of them follow.

        Args:
          mesh: of `check_mesh`.
          pairs: all pairs.
          num_rows: M.
          process: int[U], whose devices each user's pairs are on; None for all.
        """
        self.mesh, self.num_rows = mesh, num_rows
        size = mesh.devices.size
        owner = np.array([device.process_index for device in mesh.devices.flat])
        self.here = np.flatnonzero(owner == jax.process_index())
        counts = pairs.counts
        device = np.zeros(pairs.num_users, int)
        groups = [(np.arange(pairs.num_users), np.arange(size))]
        if process is not None:
            groups = [
                (np.flatnonzero(process == number), np.flatnonzero(owner == number))
                for number in np.unique(owner)
            ]
        for users, devices in groups:
            device[users] = devices[_balanced(counts[users], len(devices))]
        users = [np.flatnonzero(device == d) for d in range(size)]
        mine = [_of_users(pairs, some) for some in users]
        used = [used_rows(x.chosen, x.rejected) for x in mine]
        rows, needed = _owned(used)
        most, multiple = max([len(x) for x in rows] + [1]), tuning().row_multiple
        self.num_rows_each = -(-most // multiple) * multiple  # See `aligned_rows`.
        self.num_sent = max(len(x) for of in needed for x in of)
        self._needed, self.parts = needed, []
        for d in range(size):
            places = np.zeros(num_rows, np.int64)
            places[rows[d]] = np.arange(len(rows[d]))
            for owner_of, wanted in enumerate(needed[d]):
                first = self.num_rows_each + owner_of * self.num_sent
                places[wanted] = first + np.arange(len(wanted))
            self.parts.append(Part(users[d], rows[d], used[d], places[used[d]]))
        self.num_users = max(map(len, users))
        self.capacities = _alike([x.counts for x in mine], self.num_users)
        num_local = self.num_rows_each + size * self.num_sent
        local = [self._renumbered(*both) for both in zip(mine, self.parts)]
        sides = [count_sides(x.chosen, x.rejected, num_local) for x in local]
        chosen = _alike([side.chosen for side in sides], num_local)
        rejected: list = [None] * size
        if pairs.rejected is not None:
            each = [side.rejected for side in sides]
            rejected = _alike(each, num_local)  # pyright: ignore[reportArgumentType]
        self.sides = [SideCounts(*both) for both in zip(chosen, rejected)]

    def exchanges(self) -> list[Exchange | None]:
        """What each device of this process sends; None where no row is shared."""
        if not self.num_sent:
            return [None] * len(self.here)
        sends, terms = [], []
        for d, part in enumerate(self.parts):
            send = np.zeros((len(self.parts), self.num_sent), np.int32)
            entries = []
            for to, wanted in enumerate(of[d] for of in self._needed):
                send[to, : len(wanted)] = np.searchsorted(part.rows, wanted)
                entries.append(to * self.num_sent + np.arange(len(wanted)))
            entry = np.concatenate(entries)
            sends.append(send)
            terms.append((send.ravel()[entry], entry))
        counts = [np.bincount(row, minlength=self.num_rows_each) for row, _ in terms]
        capacities = _alike(counts, self.num_rows_each)
        out = []
        for at in self.here:
            back = None
            if not tuning().scatters:
                (row, entry), size = terms[at], sends[at].size
                back = make_row_index(row, entry, size, capacities[at])
            out.append(Exchange(send=jnp.asarray(sends[at]), back=back))
        return out

    def table(self, features) -> "jax.Array | MeshSource":
        """float[devices, m, D], the rows of every device, on that device."""
        distributed = isinstance(features, DistributedTable)
        source = features.table if distributed else features
        if isinstance(source, FeatureSource):
            rows = [self.parts[at].rows for at in self.here]
            places = map(features.places, rows) if distributed else rows
            return MeshSource(self, source, dict(zip(self.here.tolist(), places)))
        shards = []
        for at in self.here:
            used = self.parts[at].rows
            rows = np.zeros((1, self.num_rows_each, features.shape[1]), features.dtype)
            rows[0, : len(used)] = (
                features.take(used) if distributed else np.asarray(features[used])
            )
            shards.append(jax.device_put(rows, self.mesh.devices.flat[at]))
            del rows  # One part at a time is on the host.
        return self._joined(shards)

    def pairs(self, pairs: Pairs) -> list[Pairs]:
        """The pairs of each device of this process, padded with users without any."""
        out = []
        for part in (self.parts[at] for at in self.here):
            mine = self._renumbered(_of_users(pairs, part.users), part)
            missing = self.num_users - len(part.users)
            offsets = np.concatenate(
                [mine.offsets, np.repeat(mine.offsets[-1], missing)]
            )
            out.append(mine._replace(offsets=offsets.astype(np.int32)))
        return out

    def _renumbered(self, pairs: Pairs, part: Part) -> Pairs:
        """The pairs of a device over the rewards that it has."""
        place = np.zeros(self.num_rows, np.int32)
        place[part.used] = part.place
        rejected = None if pairs.rejected is None else place[pairs.rejected]
        return pairs._replace(chosen=place[pairs.chosen], rejected=rejected)

    def places(self, pairs: Pairs) -> list[np.ndarray]:
        """Which of all pairs each device of this process has, in its order."""
        return [positions_of(pairs.offsets, self.parts[at].users) for at in self.here]

    def user_parts(self, values: np.ndarray) -> jax.Array:
        """Values [U, …] of all users as [devices, n, …], padded with zeros."""
        users = [self.parts[at].users for at in self.here]
        return self.padded_parts(values, users, self.num_users)

    def padded_parts(self, values: np.ndarray, places, size: int) -> jax.Array:
        """Values at the places of each device of this process: [devices, size, …]."""
        parts = []
        for place in places:
            part = np.zeros((size, *values.shape[1:]), values.dtype)
            part[: len(place)] = values[place]
            parts.append(part)
        return self.on_devices(parts)

    def join_users(self, values: jax.Array) -> np.ndarray:
        """The reverse of `user_parts`, on every process."""
        size = sum(len(part.users) for part in self.parts)
        out = np.empty((size, *values.shape[2:]), values.dtype)
        held = {}
        for shard in values.addressable_shards:
            held[str(shard.index[0].start or 0)] = np.asarray(shard.data)[0]
        several = _processes.spans(self.mesh)
        for found in _processes.gather_arrays(held) if several else [held]:
            for at, rows in found.items():
                users = self.parts[int(at)].users
                out[users] = rows[: len(users)]
        return out

    def shapes(self) -> list[tuple[np.ndarray, SideCounts]]:
        """(capacity, side counts) of each device of this process."""
        return [(self.capacities[at], self.sides[at]) for at in self.here]

    def stack(self, trees: list) -> Any:
        """A tree per device of this process as arrays with an axis of all devices."""
        return jax.tree.map(lambda *leaves: self.on_devices(leaves), *trees)

    def on_devices(self, arrays) -> jax.Array:
        """An array of each device of this process, with an axis of all devices."""
        shards = [
            jax.device_put(np.asarray(array)[None], self.mesh.devices.flat[at])
            for at, array in zip(self.here, arrays, strict=True)
        ]
        return self._joined(shards)

    def _joined(self, shards: list) -> jax.Array:
        shape = (self.mesh.devices.size, *shards[0].shape[1:])
        sharding = NamedSharding(self.mesh, P(AXIS))
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)


class MeshSource:
    """A `FeatureSource` of each process, whose rows are trained on by its devices.

    Attributes:
      shape: (devices, m, D).
      dtype: of the features.
    """

    def __init__(self, partition: Partition, source: Any, places: dict):
        """Rows of `source` at `places` int[m] of each device of this process."""
        self._partition, self._source, self._places = partition, source, places
        devices = partition.mesh.devices.size
        self.shape = (devices, partition.num_rows_each, source.shape[1])
        self.dtype = source.dtype

    def project(self, basis: jax.Array) -> jax.Array:
        """Features · V, float[devices, m, K]: one read of each source."""
        proj = np.asarray(project_rows(self._source, np.asarray(basis)))
        places = [self._places[at] for at in self._partition.here.tolist()]
        return self._partition.padded_parts(proj, places, self.shape[1])

    def back_project(self, slopes: jax.Array) -> np.ndarray:
        """Featuresᵀ · G of the rows of all processes, float[D, K]: one read of each."""
        rows = np.zeros((self._source.shape[0], slopes.shape[2]), slopes.dtype)
        for shard in slopes.addressable_shards:
            place = self._places[shard.index[0].start or 0]
            rows[place] = np.asarray(shard.data)[0, : len(place)]
        back = np.asarray(back_project_rows(self._source, rows))
        if _processes.spans(self._partition.mesh):
            return _processes.add(back).astype(back.dtype)
        return back


def _balanced(counts: np.ndarray, size: int) -> np.ndarray:
    """int[U], a bin of `size` for each user, the largest first."""
    bins, load = np.zeros(len(counts), int), np.zeros(size, np.int64)
    for user in np.argsort(-counts, kind="stable"):
        bins[user] = int(load.argmin())
        load[bins[user]] += counts[user]
    return bins


def replicated(tree: Any, mesh: Mesh) -> Any:
    """Arrays that all processes have, on all devices of a mesh that spans them."""
    if not _processes.spans(mesh):
        return tree
    sharding = NamedSharding(mesh, P())

    def place(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    return jax.tree.map(place, tree)


def _of_users(pairs: Pairs, users: np.ndarray) -> Pairs:
    """The pairs of some users, renumbered in the order given."""
    counts, keep = pairs.counts[users], positions_of(pairs.offsets, users)

    def take(values):
        return None if values is None else values[keep]

    return Pairs(
        chosen=pairs.chosen[keep],
        rejected=take(pairs.rejected),
        user=np.repeat(np.arange(len(users)), counts).astype(np.int32),
        sample_weight=take(pairs.sample_weight),
        label=take(pairs.label),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
    )


def _owned(used: list[np.ndarray]) -> tuple[list, list[list[np.ndarray]]]:
    """(rows that lie on each device, for each device those it needs of each other).

    A row lies on one of the devices that use it, by turns.
    """
    size = len(used)
    rows = np.concatenate(used)
    device = np.repeat(np.arange(size), [len(x) for x in used])
    order = np.lexsort((device, rows))
    found, first, count = np.unique(rows[order], return_index=True, return_counts=True)
    owner = device[order][first + np.arange(len(found)) % count]
    owned = [found[owner == d] for d in range(size)]
    needed = []
    for d in range(size):
        of = owner[np.searchsorted(found, used[d])]
        none = used[d][:0]
        needed.append([none if d == o else used[d][of == o] for o in range(size)])
    return owned, needed


def _alike(arrays: list[np.ndarray], size: int) -> list[np.ndarray]:
    """Capacities at least those given, which are the same numbers on every device."""
    padded = [np.pad(x, (0, size - len(x))) for x in arrays]
    most = np.max([np.sort(x) for x in padded], axis=0)
    out = []
    for values in padded:
        capacity = np.empty_like(most)
        capacity[np.argsort(values, kind="stable")] = most
        out.append(capacity)
    return out


def sum_over_devices(tree: Any) -> Any:
    """The sums over devices of a tree of arrays, by one all-reduce."""
    leaves, structure = jax.tree.flatten(tree)
    joined = jax.lax.psum(jnp.concatenate([x.ravel() for x in leaves]), AXIS)
    ends = np.cumsum([x.size for x in leaves])[:-1]
    parts = jnp.split(joined, ends)
    return structure.unflatten(
        [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]
    )


def on_devices(function, mesh: Mesh, specs: tuple, out_specs: Any):
    """`function` on every device's part of the arguments whose spec is the axis."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False
    )


first = functools.partial(jax.tree.map, lambda x: x[0])
