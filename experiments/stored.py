"""Files of the experiments: written whole or not at all, checked when they are read.

A header's sizes are compared with the file's before anything is allocated, and nothing
that is read can run code.
"""

import contextlib
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lore_jax.cli.arrays import check_header
from lore_jax.cli.arrays import load_array as load_array
from lore_jax.io import files


@contextlib.contextmanager
def replacing(path) -> Iterator[Path]:
    """`lore_jax.files.replacing`, in a folder that is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        yield temporary


def write_json(path, value) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(value))


def to_json(value) -> str:
    """Indented JSON with sorted names."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def read_json(path) -> dict:
    """An object from a JSON file.

    Raises:
        ValueError: naming the file, if it is none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object, got {type(found).__name__}")
    return found


def append_record(path, record) -> None:
    """Append JSON to a log; it is on disk when this returns.

    A record starts with its line break: half of one, left by a crash, spoils no other.
    """
    with open(path, "ab") as file:
        file.write(b"\n" + json.dumps(record).encode())
        file.flush()
        os.fsync(file.fileno())


def write_records(path, records) -> None:
    """Write a log of these records, all at once."""
    with replacing(path) as temporary:
        temporary.write_text("".join("\n" + json.dumps(x) for x in records))


def read_records(path) -> list:
    """The whole records of a log, [] where there is none; half records are left out."""
    found = []
    for line in Path(path).read_text().split("\n") if Path(path).exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # Half a record, which nobody was told is there.
            continue
    return found


def write_array(path, values: np.ndarray) -> None:
    """Write ``.npy``, all at once."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values, allow_pickle=False)


def write_arrays(path, **arrays) -> None:
    """Write ``.npz``, all at once."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def load_arrays(path) -> dict[str, np.ndarray]:
    """The arrays of a ``.npz`` file, by name.

    Raises:
        ValueError: naming the file, if it or an array in it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as file:
                    check_header(file, member.file_size)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except (
        *(ValueError, TypeError, EOFError, KeyError, RuntimeError),
        *(zipfile.BadZipFile, zlib.error, OSError, SyntaxError, RecursionError),
    ) as error:
        raise ValueError(f"{path} is no whole .npz file: {error}") from error


def array_digest(values: np.ndarray) -> str:
    """BLAKE2b of an array's bytes."""
    content = np.ascontiguousarray(values).tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def load_features(folder) -> np.ndarray:
    """The feature table [M, D] of a folder, memory-mapped, as float32 or bfloat16.

    Raises:
        ValueError: if it is not complete, or not what its marker says.
    """
    folder = Path(folder)
    files.finish_replacing(folder)
    marker = read_json(folder / "features.json")
    try:
        done, shape = marker["done"], (marker["rows"], marker["features"])
    except KeyError as error:
        raise ValueError(f"{folder / 'features.json'} lacks {error}") from error
    if done != shape[0]:
        raise ValueError(
            f"{folder}: {done} of {shape[0]} feature rows are done; run prepare "
            "again, it continues where it stopped"
        )
    stored = load_array(folder / "features.npy", mmap_mode="r")
    if stored.dtype not in (np.float32, np.uint16) or stored.ndim != 2:
        raise ValueError(f"{folder}: features.npy is {stored.dtype}{stored.shape}")
    # A table that took the old one's place just before its marker did is whole, too.
    half = stored.dtype == np.uint16
    return view_table(stored, "bfloat16" if half else "float32")


def write_features(folder, features: np.ndarray, head=None) -> None:
    """Write a ready feature table, for data that come with their embeddings.

    All is written before the first file takes an old one's place, so a process that is
    killed leaves the old table or the new one.

    Args:
        folder: the prepared folder.
        features: float[M, D]; bfloat16 stays, everything else becomes float32.
        head: float[D] reference direction, if there is one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    half = str(features.dtype) == "bfloat16"
    stored = features.view(np.uint16) if half else features.astype(np.float32)
    content = {}
    marker = dict(zip(("rows", "features"), features.shape), done=len(features))
    marker |= {"dtype": "bfloat16" if half else "float32", "model": None, "head": None}
    if head is not None:
        head = np.asarray(head, np.float32).reshape(-1)
        content["head.npy"] = head
        marker["head"] = array_digest(head)
    content["features.npy"] = stored
    paths = [folder / name for name in (*content, "features.json")]
    with files.replacing_all(paths) as temporary:
        for path, values in zip(temporary, content.values()):
            with open(path, "wb") as file:
                np.save(file, values, allow_pickle=False)
        temporary[-1].write_text(to_json(marker))
    if head is None:
        (folder / "head.npy").unlink(missing_ok=True)


def view_table(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Stored bits as numbers: bfloat16 lies in ``.npy`` files as uint16."""
    if dtype != "bfloat16":
        return stored
    import ml_dtypes

    return stored.view(ml_dtypes.bfloat16)
