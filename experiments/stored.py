"""Files of the experiments: written whole or not at all, checked when they are read.

A header's sizes are compared with the file's before anything is allocated, and nothing
that is read can run code.
"""

import ast
import contextlib
import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lore_jax.io import files

MAX_HEADER = 1 << 20  # bytes of the header of an array


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


def write_array(path, values: np.ndarray) -> None:
    """Write ``.npy``, all at once."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values, allow_pickle=False)


def load_array(path, mmap_mode=None) -> np.ndarray:
    """An array from ``.npy``.

    Raises:
        ValueError: naming the file, if it is damaged, or longer or shorter than its
            header says.
    """
    path = Path(path)
    with open(path, "rb") as file:
        size = path.stat().st_size
        try:
            _check_header(file, size)
        except (ValueError, TypeError, EOFError, SyntaxError, RecursionError) as error:
            raise ValueError(f"{path} is no whole .npy file: {error}") from error
    return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)


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
                    _check_header(file, member.file_size)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except (
        *(ValueError, TypeError, EOFError, KeyError, RuntimeError),
        *(zipfile.BadZipFile, zlib.error, OSError, SyntaxError, RecursionError),
    ) as error:
        raise ValueError(f"{path} is no whole .npz file: {error}") from error


def _check_header(file, size: int) -> None:
    """Raises `ValueError` unless a ``.npy`` file of so many bytes is as it says."""
    magic = file.read(8)
    wide = {(1, 0): 2, (2, 0): 4, (3, 0): 4}
    if magic[:6] != b"\x93NUMPY" or tuple(magic[6:]) not in wide:
        raise ValueError("it does not begin like one")
    count = wide[tuple(magic[6:])]
    length = int.from_bytes(file.read(count), "little")
    if length > min(MAX_HEADER, size):
        raise ValueError(f"its header has {length} bytes, the file {size}")
    header = ast.literal_eval(file.read(length).decode("utf-8"))
    if not isinstance(header, dict) or set(header) != {
        *("descr", "fortran_order", "shape")
    }:
        raise ValueError("its header has other fields")
    shape, kind = header["shape"], header["descr"]
    if not isinstance(shape, tuple) or not all(
        type(n) is int and n >= 0 for n in shape
    ):
        raise ValueError(f"its shape is {shape!r}")
    if not isinstance(kind, str) or (dtype := np.dtype(kind)).hasobject:
        raise ValueError(f"its values are {kind!r}")
    expected = 8 + count + length + math.prod(shape) * dtype.itemsize
    if expected != size:
        raise ValueError(f"it has {size} bytes, {shape} of {dtype} makes {expected}")


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
