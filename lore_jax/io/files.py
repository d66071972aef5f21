"""Files: written whole or not at all, and checked byte for byte when read.

A record is a safetensors file with a BLAKE2b digest of its tensors and metadata.
Nothing in it is executed, and no size in its header is believed before it was compared
with the size of the file.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

try:
    import fcntl
except ImportError:  # Windows has no file locks of this kind.
    fcntl = None


_DTYPES = {
    **{"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "|b1", "U8": "|u1"},
    **{"I8": "|i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"},
    **{"U16": "<u2", "U32": "<u4", "U64": "<u8"},
}

_PREFIX = 8  # bytes before the header that say how long it is

_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format

_PREFIX_OF_PARTS, _END_OF_PARTS = ".lore_jax-", ".part"
_LIST = ".lore_jax-replacing.json"

_DAMAGE = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(OverflowError, RecursionError),
)


@contextlib.contextmanager
def damage(path: str | os.PathLike) -> Iterator[None]:
    """Whatever a damaged file makes the body raise is a `ValueError` with its name."""
    try:
        yield
    except _DAMAGE as error:
        message = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged: {message}") from error


def read_record(
    path: str | os.PathLike, kind: str, version: int, what: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of a file that `write_record` wrote.

    Args:
      path: the file.
      kind: the format that its metadata must name.
      version: of the format.
      what: what the format is called in an error.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, foreign, of another version, or one of its
        bytes has changed.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            entries, metadata = _parse_header(_read_header(file, size))
            _check_extents(entries, size - file.tell())
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is truncated or not a safetensors file: {error}"
            ) from error
        if metadata.get("format") != kind:
            raise ValueError(
                f"{path} is a safetensors file but not a lore_jax {what}: its "
                f"format is {metadata.get('format')!r}, expected {kind!r}"
            )
        if metadata.get("version") != str(version):
            raise ValueError(
                f"{path} has format version {metadata.get('version')!r}; this "
                f"lore_jax reads version {version}"
            )
        arrays = {}
        for name, (dtype, shape, _) in entries.items():
            content = file.read(math.prod(shape) * dtype.itemsize)
            with damage(path):
                arrays[name] = np.frombuffer(content, dtype).reshape(shape).copy()
    found = metadata.pop("digest", None)
    if found != (expected := digest(arrays, metadata)):
        raise ValueError(
            f"{path} is damaged: the digest of its content is {expected}, but the "
            f"file says {found}"
        )
    return arrays, metadata


def write_record(
    path: str | os.PathLike, arrays: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Writes arrays and metadata with their digest, all at once.

    Raises:
      OSError: the file cannot be written; the error names it.
    """
    held = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    metadata = {**metadata, "digest": digest(held, metadata)}
    content = safetensors.numpy.save(held, metadata)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def digest(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """BLAKE2b of names, dtypes, shapes and bytes of arrays, and of the metadata."""
    total = hashlib.blake2b(digest_size=32)
    total.update(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(
            json.dumps([name, array.dtype.str, np.shape(arrays[name])]).encode()
        )
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def parse_json(text: str | bytes, name: str) -> Any:
    """JSON of a file; text that is none, or nested too deeply, is a `ValueError`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary path beside `path` that takes its place when the body succeeds.

    A reader sees the old file or the new one. The new one has the mode of the old one,
    or what the umask leaves of 0666. Where `path` is a symbolic link, the file that it
    points to is replaced. A killed process leaves a file `.lore_jax-….part`; the next
    write of the same path removes it.

    Raises:
      OSError: naming `path`.
    """
    with replacing_all([path]) as (temporary,):
        yield temporary


@contextlib.contextmanager
def replacing_all(paths: Sequence[str | os.PathLike]) -> Iterator[list[pathlib.Path]]:
    """`replacing` for several files: in one folder all of them are new, or none.

    Once all are on disk, a list of them is written, then each is renamed. What a killed
    process left is ended by the next writer, or by a reader's `finish_replacing`.
    """
    with contextlib.ExitStack() as stack:
        for folder in {pathlib.Path(path).parent for path in paths}:
            finish_replacing(folder)
        parts = [stack.enter_context(_naming(path)) for path in paths]
        yield [part.temporary for part in parts]
        for part in parts:
            part.finish()
        folders = {part.target.parent for part in parts}  # Links may lead elsewhere.
        folder = parts[0].target.parent
        if several := len(parts) > 1 and len(folders) == 1:
            names = [(part.temporary.name, part.target.name) for part in parts]
            with replacing(folder / _LIST) as temporary:
                temporary.write_text(json.dumps(names), encoding="utf-8")
        for part in parts:
            # A reader may have been faster.
            known = (FileNotFoundError,) if several else ()
            with contextlib.suppress(*known):
                part.rename()
        for each in folders:
            _sync_folder(each)
        if several:
            (folder / _LIST).unlink(missing_ok=True)


def finish_replacing(folder: str | os.PathLike) -> None:
    """Ends a `replacing_all` whose process was killed after all files were written.

    Raises:
      ValueError: the list of the files is damaged.
    """
    path = pathlib.Path(folder) / _LIST
    try:
        names = parse_json(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return
    for temporary, target in names:
        if not _is_part(temporary) or os.path.basename(target) != target:
            raise ValueError(f"{path} names no files of its folder: {names}")
        with contextlib.suppress(FileNotFoundError):
            os.replace(path.parent / temporary, path.parent / target)
    _sync_folder(path.parent)
    path.unlink(missing_ok=True)


class _Part:
    """A temporary file, open and locked while its process lives.

    Attributes:
      temporary: its path.
      target: the file that it replaces.
    """

    def __init__(self, path: str | os.PathLike):
        self.target = pathlib.Path(os.path.realpath(path))
        if self.target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        mark = hashlib.blake2b(os.fsencode(self.target.name), digest_size=8).hexdigest()
        prefix = f"{_PREFIX_OF_PARTS}{mark}-"
        _remove_leftovers(self.target.parent, prefix)
        while True:
            name = f"{prefix}{os.urandom(8).hex()}{_END_OF_PARTS}"
            self.temporary = self.target.parent / name
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
            self.handle = os.open(self.temporary, flags, 0o666)
            if _lock(self.handle, self.temporary):
                return
            os.close(self.handle)  # Another process took it for a leftover.

    def finish(self) -> None:
        """Gives the file its mode, and waits until it is on disk."""
        with contextlib.suppress(FileNotFoundError):
            mode = stat.S_IMODE(os.stat(self.target).st_mode) & 0o777
            if mode != stat.S_IMODE(os.fstat(self.handle).st_mode):
                os.chmod(self.temporary, mode)
        os.fsync(self.handle)

    def rename(self) -> None:
        """Takes the target's place."""
        if fcntl is None:
            self.close()  # Windows renames no open file.
        os.replace(self.temporary, self.target)

    def close(self) -> None:
        """Unlocks."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Iterator[_Part]:
    """A `_Part` of `path`, removed at the end; operating system errors name `path`."""
    try:
        part = _Part(path)
        try:
            yield part
        finally:
            part.temporary.unlink(missing_ok=True)
            part.close()
    except OSError as error:
        name = None if error.filename is None else os.fspath(error.filename)
        if error.errno is None or (name is not None and not _is_part(name)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _is_part(name: str | bytes) -> bool:
    """Whether a path is that of a temporary file."""
    base = os.path.basename(os.fsdecode(name))
    return base.startswith(_PREFIX_OF_PARTS) and base.endswith(_END_OF_PARTS)


def _remove_leftovers(folder: pathlib.Path, prefix: str) -> None:
    """Removes parts of one target whose process is gone: nobody holds their lock."""
    if fcntl is None:
        return
    for leftover in folder.glob(f"{prefix}*{_END_OF_PARTS}"):
        with contextlib.suppress(OSError):
            handle = os.open(leftover, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
            finally:
                os.close(handle)


def _lock(handle: int, path: pathlib.Path) -> bool:
    """Locks an open file; False where `path` is no longer that file."""
    if fcntl is None:
        return True
    with contextlib.suppress(OSError):  # A file system without locks.
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _sync_folder(folder: pathlib.Path) -> None:
    """Waits until the names in a folder are on disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # The file itself is written: this folder cannot be opened.
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def _read_header(file, size: int) -> bytes:
    """The JSON header of an open safetensors file of `size` bytes."""
    length = int.from_bytes(file.read(_PREFIX), "little")
    if size < _PREFIX or length > min(size - _PREFIX, _MAX_HEADER):
        raise ValueError(f"its header has {length} bytes, the file {size}")
    return file.read(length)


def _parse_header(text: bytes) -> tuple[dict[str, tuple], dict[str, str]]:
    """({name: (dtype, shape, [start, stop])} in the order of the data, metadata)."""
    header = json.loads(text.decode(), object_pairs_hook=_distinct)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("its metadata must be an object of strings")
    entries = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {
            *("dtype", "shape", "data_offsets")
        }:
            raise ValueError(f"{name!r} must have dtype, shape and data_offsets")
        kind, shape, place = (entry[k] for k in ("dtype", "shape", "data_offsets"))
        if not isinstance(kind, str) or kind not in _DTYPES:
            raise ValueError(f"{name!r} has dtype {kind!r}, expected {list(_DTYPES)}")
        for numbers in (shape, place):
            if not isinstance(numbers, list) or not all(
                type(n) is int and 0 <= n < 2**63 for n in numbers
            ):
                raise ValueError(f"{name!r} has shape {shape} at {place}")
        if len(place) != 2 or len(shape) > 32:
            raise ValueError(f"{name!r} has shape {shape} at {place}")
        entries[name] = np.dtype(_DTYPES[kind]), tuple(shape), place
    order = sorted(entries.items(), key=lambda item: item[1][2])
    return dict(order), metadata


def _check_extents(entries: Mapping[str, tuple], size: int) -> None:
    """Raises `ValueError` unless the tensors fill `size` bytes without a gap."""
    end = 0
    for name, (dtype, shape, (start, stop)) in entries.items():
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{name!r} has shape {shape} and bytes {start} to {stop}, expected "
                f"them from {end} on"
            )
        end = stop
    if end != size:
        raise ValueError(f"its tensors have {end} bytes, the file holds {size}")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; `ValueError` where a name stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name stands twice among {sorted(n for n, _ in pairs)}")
    return found
