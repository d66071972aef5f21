"""A feature table that is written row by row into a folder, and can be continued.

`features.npy` holds the rows, bfloat16 as uint16. `features.json`, replaced atomically,
says what the table is of and how many rows are done, in the order given.
"""

import hashlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lore_jax.io import files

SAVE_SECONDS = 30.0  # least time between two markers
_BLOCK = 4096  # rows read at a time


class ResumableTable:
    """Rows of a table, finished in a fixed order.

    Attributes:
      folder: where it lies.
      done: how many rows are finished.
      values: [M, D], float32 or bfloat16, memory-mapped.
      notes: what the next marker says besides.
    """

    def __init__(
        self,
        folder: Any,
        identity: Mapping[str, Any],
        order: np.ndarray,
        num_features: int,
        dtype: str,
        *,
        save_seconds: float | None = None,
    ):
        """Opens a new table, or the one that an earlier run began.

        Args:
          folder: made where it is missing.
          identity: what decides the numbers; another one is refused.
          order: int[M], in which order rows are finished.
          num_features: D.
          dtype: "float32" or "bfloat16".
          save_seconds: least time between two markers; None is `SAVE_SECONDS`.

        Raises:
          ValueError: the folder holds a table of something else, or one whose finished
            rows have changed.
        """
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes = {"dtype": dtype, "rows": len(order), "features": num_features}
        self._marker = {**identity, **sizes}
        self._order = order
        self._seconds = SAVE_SECONDS if save_seconds is None else save_seconds
        self._saved = time.monotonic()
        self.notes: dict[str, Any] = {}
        bits = np.uint16 if dtype == "bfloat16" else np.float32
        self.done, self._digest = self._resume(bits)
        path = self.folder / "features.npy"
        if self.done:
            self._stored = np.lib.format.open_memmap(path, "r+")
        else:  # The marker goes first: it would call rows of the new table finished.
            (self.folder / "features.json").unlink(missing_ok=True)
            shape = (len(order), num_features)
            self._stored = np.lib.format.open_memmap(
                path, "w+", dtype=bits, shape=shape
            )
        self.values = as_numbers(self._stored)

    def write(self, values: np.ndarray) -> None:
        """The next rows in order; the marker is replaced now and then, and at the end.

        Args:
          values: float[n, D].
        """
        rows = self._order[self.done : self.done + len(values)]
        self.values[rows] = values
        self._digest.update(self._stored[rows].tobytes())
        self.done += len(rows)
        late = time.monotonic() - self._saved >= self._seconds
        if self.done == len(self._order) or late:
            self._stored.flush()  # The rows first, then the claim that they are there.
            found = {"done": self.done, "rows_digest": self._digest.hexdigest()}
            write_json(
                self.folder / "features.json", {**self._marker, **self.notes, **found}
            )
            self._saved = time.monotonic()

    def _resume(self, bits: Any) -> tuple[int, Any]:
        """(finished rows of the very same table, digest of their bytes in order)."""
        marker, total = self.folder / "features.json", hashlib.blake2b(digest_size=16)
        path = self.folder / "features.npy"
        if not marker.exists() or not path.exists():
            return 0, total
        found = files.parse_json(marker.read_text(encoding="utf-8"), str(marker))
        if not isinstance(found, dict):
            raise ValueError(f"{marker} must hold an object, got {type(found)}")
        wanted = self._marker
        if changed := sorted(k for k in wanted if found.get(k) != wanted[k]):
            raise ValueError(
                f"{self.folder} holds a feature table of something else: "
                + ", ".join(f"{k} {found.get(k)!r} → {wanted[k]!r}" for k in changed)
                + "; use another folder, or delete this one's features.json"
            )
        done: Any = found.get("done")
        shape, stored = (wanted["rows"], wanted["features"]), open_array(path)
        good = type(done) is int and 0 <= done <= shape[0] and stored.dtype == bits
        if good and stored.shape == shape:
            for start in range(0, done, _BLOCK):
                rows = self._order[start : min(start + _BLOCK, done)]
                total.update(stored[rows].tobytes())
        if total.hexdigest() != found.get("rows_digest") or stored.shape != shape:
            raise ValueError(
                f"{self.folder}: features.npy is not the table whose {done} rows "
                "features.json calls done; delete features.json to begin again"
            )
        return done, total


def batches(
    lengths: np.ndarray, start: int, batch_tokens: int, batch_size: int
) -> Iterator[np.ndarray]:
    """Yields rows of similar length, longest first, from place `start` on.

    Memory then runs out in the first batch or never.

    Args:
      lengths: int[M], tokens of each text.
      start: how many rows of the order are done.
      batch_tokens: most tokens of a batch, padding included; one text may have more.
      batch_size: most texts in a batch.
    """
    order = longest_first(lengths)
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        rows = order[start : start + min(size, batch_size)]
        yield rows
        start += len(rows)


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """int[M], rows by falling length, equal ones as they come."""
    return np.lexsort((np.arange(len(lengths)), -np.asarray(lengths)))


def as_numbers(stored: np.ndarray) -> np.ndarray:
    """Stored bits as numbers: bfloat16 lies in `.npy` files as uint16."""
    return stored.view(jnp.bfloat16) if stored.dtype == np.uint16 else stored


def open_array(path: pathlib.Path) -> np.ndarray:
    """A memory-mapped `.npy` file.

    Raises:
      ValueError: naming the file, if it is damaged.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, TypeError, SyntaxError) as error:
        raise ValueError(f"{path} is no whole .npy file: {error}") from error


def write_array(path: pathlib.Path, values: np.ndarray) -> None:
    """Writes `.npy`, all at once."""
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values, allow_pickle=False)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON; a reader sees the old file or the new one."""
    with files.replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
