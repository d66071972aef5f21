"""Files of users' weights: what `lore adapt` writes, and what other commands read."""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from lore_jax import _checks
from lore_jax.cli.table_files import DELIMITERS
from lore_jax.cli.tables import read_table
from lore_jax.io import files
from lore_jax.io.tree import decode_names, encode_names
from lore_jax.model import RewardModel
from lore_jax.results import Adapted
from lore_jax.streaming import basis_fingerprint

ENDINGS = ".safetensors", ".csv", ".tsv", ".parquet"
_FORMAT, _VERSION = "lore_jax.weights", 1


class UserWeights(NamedTuple):
    """Weights by name; what every function takes as weights.

    Attributes:
      weights: float[U, K] on the simplex.
      user_ids: str[U] or int[U].
    """

    weights: np.ndarray
    user_ids: np.ndarray


def write_users(
    path: pathlib.Path, adapted: Adapted, num_pairs: np.ndarray, model: RewardModel
) -> None:
    """Writes weights by name: a record, or a table with a row per user.

    A table has the columns `user`, `num_pairs`, `loss`, `weight_0` … `weight_{K−1}`.
    """
    weights = np.asarray(adapted.weights)
    if path.suffix == ".safetensors":
        arrays = {"weights": weights, "users": encode_names(adapted.user_ids)}
        metadata = {"format": _FORMAT, "version": str(_VERSION)}
        metadata["basis"] = basis_fingerprint(model.basis)
        files.write_record(path, arrays, metadata)
        return
    columns: dict[str, Any] = {
        "user": np.asarray(adapted.user_ids),
        "num_pairs": np.asarray(num_pairs),
        "loss": np.asarray(adapted.loss),
    }
    columns |= {f"weight_{k}": x for k, x in enumerate(weights.T)}
    write_table(path, columns)


def write_table(path: pathlib.Path, columns: dict[str, Any]) -> None:
    """Writes columns as CSV, TSV or Parquet, all at once."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    table = pyarrow.table({name: pyarrow.array(x) for name, x in columns.items()})
    with files.replacing(path) as temporary:
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, temporary)
        else:
            delimiter = DELIMITERS[path.suffix][0]
            options = pyarrow.csv.WriteOptions(delimiter=delimiter)
            pyarrow.csv.write_csv(table, temporary, options)


def read_users(path: pathlib.Path, model: RewardModel) -> UserWeights:
    """Weights that `write_users` wrote for this model.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or belongs to another model.
    """
    if path.suffix != ".safetensors":
        return _from_table(path, model)
    arrays, metadata = files.read_record(path, _FORMAT, _VERSION, "table of weights")
    with files.damage(path):
        found = UserWeights(
            arrays["weights"], decode_names(arrays["users"], "the names of users")
        )
    if metadata.get("basis") != basis_fingerprint(model.basis):
        raise ValueError(f"{path} belongs to another model: its basis is not the same")
    return _checked(path, found, model)


def _from_table(path: pathlib.Path, model: RewardModel) -> UserWeights:
    names = [f"weight_{k}" for k in range(model.rank)]
    columns = read_table(path, needed=("user", *names), optional=())
    try:
        weights = np.array([columns[name] for name in names], np.float32).T
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: a weight is no number: {error}") from error
    user = np.array(columns["user"])
    if len(np.unique(user)) < len(user):
        raise ValueError(f"{path}: a user stands in two rows")
    return _checked(path, UserWeights(weights, user), model)


def _checked(path: pathlib.Path, found: UserWeights, model: RewardModel) -> UserWeights:
    with files.damage(path):
        _checks.check_weights(found.weights, len(found.user_ids), model.rank)
        _checks.check_simplex(found.weights)
    return found
