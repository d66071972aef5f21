"""Reads a table of preferences, and refuses what cannot be meant.

Every complaint names the file, the row (counted from 0, without the header and without
empty lines) and the column.
"""

import gzip
import math
import operator
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lore_jax import _ids
from lore_jax.cli.arrays import load_array
from lore_jax.cli.table_files import (
    DELIMITERS,
    NEEDED,
    OPTIONAL,
    arrow,
    as_list,
    coded,
    first_true,
    read_csv,
    read_json,
    read_parquet,
    refuse_missing,
    to_utf_8,
)
from lore_jax.hf.table import as_numbers
from lore_jax.io.files import parse_json

NAMES = ("user", "prompt", "group")  # columns that hold names: texts or integers
ENDINGS = (".parquet", ".csv", ".tsv", ".jsonl", ".json")


def read_columns(
    path: Path,
    names: Mapping[str, str] | None = None,
    encoding: str = "utf-8",
    *,
    needed: Sequence[str] = NEEDED,
    optional: Sequence[str] = OPTIONAL,
) -> dict[str, Any]:
    """Columns of a Parquet, CSV, TSV, JSONL or JSON file, also gzipped.

    A column of texts alone is Arrow's, which is checked without a Python object a
    cell; any other is a list. `read_table` gives lists.

    A column that no row fills counts as missing; one that some rows fill must be
    filled in all. None, NaN and "" are no value. A CSV file's delimiter is the comma,
    or the semicolon or tab where only that finds the columns.

    Args:
      path: the file.
      names: {column: what the file calls it} of those with another name there.
      encoding: of a text file; UTF-8 may begin with a byte order mark.
      needed: columns that must be there.
      optional: columns that are read where they are there.

    Raises:
      ValueError: naming the columns that are missing and those found, the row and
          column without a value, the row that is broken, or an unknown ending.
    """
    path, names = Path(path), dict(names or {})
    columns = [*needed, *optional]
    if wrong := sorted(set(names) - set(columns)):
        raise ValueError(f"names must be of {columns}, got {wrong}")
    called = {name: names.get(name, name) for name in columns}
    ending, packed = _ending(path)
    if ending not in ENDINGS:
        raise ValueError(f"{path} must end in {', '.join(ENDINGS)} (or that and .gz)")
    data = path.read_bytes()
    if packed:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file: {error}") from error
    if ending == ".parquet":
        found, given = read_parquet(path, data, called)
    elif ending in DELIMITERS:
        text = to_utf_8(path, data, encoding, records=True)
        found, given = read_csv(path, text, called, DELIMITERS[ending], needed)
    else:
        text = to_utf_8(path, data, encoding, records=False)
        found, given = read_json(path, text, called, needed)
    filled = {
        name: given[other]
        for name, other in called.items()
        if other in given and not _all_empty(given[other])
    }
    wanted = [*needed, *(name for name in optional if name in names)]
    refuse_missing(path, called, [n for n in wanted if n not in filled], found)
    for name, values in filled.items():
        _check_column(path, name, values)
    return filled


def read_table(*args, **kwargs) -> dict[str, list]:
    """`read_columns`, each column a list."""
    return {n: as_list(x) for n, x in read_columns(*args, **kwargs).items()}


def names(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """(a column of names, the distinct ones in order)."""
    if isinstance(column, list):
        array = _ids.column(column, "a column of names")
        return array, np.unique(array)
    distinct, place = coded(column)
    values = np.array(distinct)
    return values[place], np.sort(values)


def is_table(path: Path) -> bool:
    """Whether `read_table` reads a file of this name."""
    return _ending(path)[0] in ENDINGS


def _ending(path: Path) -> tuple[str, bool]:
    """(what a file's name ends in, whether .gz follows)."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    return "".join(suffixes[-2:-1] if packed else suffixes[-1:]), packed


def _check_column(path: Path, name: str, values: Any) -> None:
    """Raises `ValueError` at the first row without a value, or with no valid one."""
    if not isinstance(values, list):
        blank = arrow("equal", values, "")
        if name in ("user", "group"):
            blank = arrow("or", blank, arrow("utf8_is_space", values))
        if (number := first_true(blank)) >= 0:
            raise ValueError(f"{path}, row {number}: no {name}, which other rows have")
        return
    for number, value in enumerate(values):
        if isinstance(value, float) and name in ("label", "weight"):
            continue  # `check_columns` judges numbers, NaN too.
        if _empty(value) or (name in NAMES and str(value).isspace()):
            raise ValueError(f"{path}, row {number}: no {name}, which other rows have")
        if name not in NAMES or (name == "prompt" and isinstance(value, list)):
            continue
        whole = isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not (whole or isinstance(value, int | str)):
            raise ValueError(
                f"{path}, row {number}: {name} must be a text or an integer, got "
                f"{value!r}"
            )
        if isinstance(value, str) != isinstance(values[0], str):
            raise ValueError(
                f"{path}, row {number}: {name} is {value!r}, but in row 0 "
                f"{values[0]!r}: a text and a number are never the same name"
            )
    if name in NAMES:
        values[:] = [int(x) if isinstance(x, float) else x for x in values]


def check_columns(columns: dict[str, Any], path, num_rows: int | None) -> dict:
    """Labels, weights and row numbers as numbers.

    Args:
      columns: as of `read_columns` or `read_table`.
      path: what to call the file in an error.
      num_rows: rows of the embeddings, whose numbers chosen and rejected are; None
          where they are texts.

    Returns:
      The columns, with numbers in place of text.

    Raises:
      ValueError: naming row and column of a label that is not from 0 to 1, a weight
          that is negative or infinite, a row number that is no integer or not among
          the embeddings, or a pair of two equal sides.
    """
    out = dict(columns)
    limits = {"label": (1.0, "from 0 to 1"), "weight": (math.inf, "finite and >= 0")}
    for name, (most, what) in limits.items():
        if name in columns:
            out[name] = [_number(v) for v in as_list(columns[name])]
            for number, value in enumerate(out[name]):
                if not (math.isfinite(value) and 0 <= value <= most):
                    given = as_list(columns[name])[number]
                    raise ValueError(
                        f"{path}, row {number}: {name} must be a number {what}, "
                        f"got {given!r}"
                    )
    if "weight" in out and not any(out["weight"]):
        raise ValueError(f"{path}: every weight is 0")
    if num_rows is not None:
        for name in ("chosen", "rejected"):
            out[name] = [
                row_number(value, num_rows, f"{path}, row {number}: {name}")
                for number, value in enumerate(as_list(columns[name]))
            ]
    if (number := _first_equal(out["chosen"], out["rejected"])) >= 0:
        raise ValueError(f"{path}, row {number}: chosen and rejected are the same")
    return out


def _first_equal(first: Any, second: Any) -> int:
    """The first row in which two columns are the same, or −1."""
    if isinstance(first, list) or isinstance(second, list):
        same = map(operator.eq, as_list(first), as_list(second))
        return next((number for number, equal in enumerate(same) if equal), -1)
    return first_true(arrow("equal", first, second))


def read_embeddings(path: Path, name: str | None = None) -> np.ndarray:
    """float[M, D] from `.npy` or one tensor of a safetensors file.

    Sizes in a header are compared with the file's before anything is read.

    Raises:
      ValueError: if the file is of another kind or damaged, holds several tensors
          and none was named, no such tensor, or anything but a table of floats.
    """
    ending = path.suffix.lower()
    if ending not in (".npy", ".safetensors"):
        raise ValueError(
            f"{path} must end in .npy or .safetensors; other files (.pt, .bin, .pkl) "
            "can run code when they are read: save the tensor with "
            "safetensors.torch.save_file"
        )
    try:
        if ending == ".npy":
            found = _as_marked(path, load_array(path, mmap_mode="r"))
        else:
            found = _read_tensor(path, name)
    except FileNotFoundError:
        raise
    except (ValueError, TypeError, EOFError, OSError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if found.ndim != 2 or not all(found.shape):
        raise ValueError(
            f"{path} must be a table of a row per text, [M, D]; its shape is "
            f"{found.shape}"
        )
    if found.dtype.kind != "f" and "float" not in found.dtype.name:
        raise ValueError(f"{path} must hold floating numbers, it holds {found.dtype}")
    return found


def _as_marked(path: Path, stored: np.ndarray) -> np.ndarray:
    """Numbers of a table that `hf.embed` wrote: its bfloat16 lies there as uint16.

    Raises:
      ValueError: some of its rows are not embedded yet.
    """
    marker = path.with_suffix(".json")
    if path.name != "features.npy" or not marker.exists():
        return stored
    found = parse_json(marker.read_text(encoding="utf-8"), str(marker))
    if not isinstance(found, dict) or found.get("done") != found.get("rows"):
        raise ValueError("not all of its rows are embedded: run lore embed again")
    return as_numbers(stored) if found.get("dtype") == "bfloat16" else stored


def _read_tensor(path: Path, name: str | None) -> np.ndarray:
    """One tensor of a safetensors file."""
    import ml_dtypes  # noqa: F401 (NumPy knows bfloat16 by it)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if name not in names and (name is not None or len(names) != 1):
                raise ValueError(f"it holds {names}; name one with --tensor")
            return file.get_tensor(name or names[0])
    except SafetensorError as error:
        raise ValueError(f"it is no whole safetensors file: {error}") from error


def read_head(path: Path, features: np.ndarray, source: Path) -> np.ndarray:
    """float32[D], the reference direction for some embeddings.

    Raises:
      ValueError: if its length is not theirs, or it is not finite.
    """
    head = load_array(path)
    if head.size != features.shape[1] or max(head.shape, default=0) != head.size:
        raise ValueError(
            f"{path} has shape {head.shape}, but the rows of {source} have length "
            f"{features.shape[1]}"
        )
    head = head.astype(np.float32).reshape(-1)
    if not np.isfinite(head).all():
        raise ValueError(f"{path} is not finite")
    return head


def _all_empty(column: Any) -> bool:
    """Whether no row fills a column."""
    if isinstance(column, list):
        return all(map(_empty, column))
    return first_true(arrow("not_equal", column, "")) < 0


def _empty(value) -> bool:
    """Whether a cell holds nothing: None, NaN, or the empty text."""
    return value is None or value == "" or (isinstance(value, float) and value != value)


def _number(value) -> float:
    """A number, or NaN for what is none."""
    if isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def row_number(value, num_rows: int, where: str) -> int:
    """An integer from 0 to `num_rows` − 1."""
    if not (number := _number(value)).is_integer():
        raise ValueError(f"{where} must be a row number, an integer, got {value!r}")
    if not 0 <= number < num_rows:
        raise ValueError(
            f"{where} is row {number:.0f}, but there are {num_rows} embeddings, "
            "counted from 0"
        )
    return int(number)
