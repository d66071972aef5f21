"""Starts of the default recipe: random, or the directions that users differ in most."""

from typing import Any

import jax
import numpy as np

from lore_jax import _processes
from lore_jax._backend import to_array
from lore_jax._pairs.blocks import back_project_rows, project_rows
from lore_jax._pairs.distributed import DistributedTable
from lore_jax._pairs.pack import pack
from lore_jax._train.coordinates import Coordinates, basis_of, slope_of
from lore_jax.preferences import Preferences

_START_STD = 0.3  # standard deviation of a typical pair's margin

_ROUNDS = 6


def make_start(
    key: jax.Array,
    kind: str,
    prefs: Preferences,
    coordinates: Coordinates,
    rank: int,
) -> jax.Array:
    """θ, float[R, K].

    "random": normal with standard deviation 0.3. "svd": column k is the population's
    direction plus a vertex of a regular simplex in the directions that users' mean
    differences vary in most, scaled alike; random where fewer than K features or users
    with pairs leave no simplex.

    Args:
      key: consumed.
      kind: "random" or "svd".
      prefs: the training pairs; read by "svd" only, 13 times.
      coordinates: how V follows from θ.
      rank: K.
    """
    size, dtype = coordinates.size, coordinates.gains.dtype
    shape = coordinates.directions.shape[0], rank
    normal = np.asarray(jax.random.normal(key, shape, dtype))
    if coordinates.tail is None:  # The sign and the order of a direction are chance.
        normal = np.asarray(coordinates.directions).T @ normal
    num_users = (np.asarray(prefs.counts) > 0).sum()
    if kind == "random" or min(size, num_users) < rank:
        return to_array(_START_STD * normal, dtype)
    directions = singular_directions(normal, prefs, coordinates)
    corners = np.eye(rank) - 1 / rank
    if rank > 1:  # In the K − 1 dimensions that the simplex spans.
        corners = corners / np.linalg.norm(corners[0])
        corners = corners @ np.linalg.svd(corners)[2].T
    mixing = np.concatenate([np.ones((rank, 1)), corners[:, : rank - 1]], axis=1)
    return to_array(_START_STD * size**0.5 * directions @ mixing.T, dtype)


def singular_directions(
    start: np.ndarray, prefs: Preferences, coordinates: Coordinates
) -> np.ndarray:
    """Top right singular directions of users' mean differences: float[R, K].

    By subspace iteration on S = Z W, Z the mean difference of each user, float[U, D],
    and V = W θ. S is never built: a round is one projection and one back-projection.
    The first direction points where people choose.

    Args:
      start: NumPy float[R, K], any independent columns.
      prefs: the pairs.
      coordinates: W.
    """
    dtype, everyone = coordinates.gains.dtype, prefs
    table: Any = prefs.features
    distributed = isinstance(table, DistributedTable)
    if distributed:
        prefs = table.own(prefs)
    pairs = pack(prefs)
    chosen, rejected, user = pairs.chosen, pairs.rejected, pairs.user
    share = pairs.coefficients("users")
    if pairs.label is not None:
        share = share * (2 * np.asarray(pairs.label, np.float64) - 1)
    share = share[:, None]

    def means_of(directions):
        basis = basis_of(to_array(directions, dtype), coordinates)
        proj = np.asarray(project_rows(prefs.features, basis), np.float64)
        z = proj[chosen] if rejected is None else proj[chosen] - proj[rejected]
        means = np.zeros((prefs.num_users, z.shape[1]))
        np.add.at(means, user, share * z)
        return means

    directions = np.linalg.qr(np.asarray(start, np.float64))[0]
    for _ in range(_ROUNDS):
        pushed = share * means_of(directions)[user]
        slopes = np.zeros((prefs.features.shape[0], pushed.shape[1]))
        np.add.at(slopes, chosen, pushed)
        if rejected is not None:
            np.add.at(slopes, rejected, -pushed)
        back = back_project_rows(prefs.features, slopes.astype(dtype))
        if distributed:
            back = to_array(_processes.add(back), dtype)
        directions = np.linalg.qr(np.asarray(slope_of(back, coordinates), np.float64))[
            0
        ]
    means = means_of(directions)
    if distributed:
        means = table.gather_users(everyone, means.T).T
    turned = np.linalg.svd(means, full_matrices=False)[2].T
    turned[:, 0] *= np.sign((means @ turned[:, 0]).sum()) or 1.0
    return directions @ turned
