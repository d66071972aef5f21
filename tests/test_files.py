"""Writing: modes, links, leftovers, long names, and errors that name the file."""

import errno
import os
import stat
import subprocess
import sys

import numpy as np
import pytest

from lore_jax.io import files

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="modes, links and locks of POSIX"
)


def write(path, content=b"new"):
    with files.replacing(path) as temporary:
        temporary.write_bytes(content)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture
def umask():
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


@pytest.mark.parametrize(("mask", "want"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path, umask, mask, want):
    umask(mask)
    write(tmp_path / "x")
    assert mode(tmp_path / "x") == want


@pytest.mark.parametrize("old", [0o600, 0o640, 0o666])
def test_a_replaced_file_keeps_its_mode(tmp_path, umask, old):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(old)
    write(path)
    assert path.read_bytes() == b"new"
    assert mode(path) == old


@pytest.mark.parametrize("exists", [True, False])
def test_the_target_of_a_link_is_replaced_not_the_link(tmp_path, exists):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    if exists:
        target.write_bytes(b"old")
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["folder", "link"]
    assert os.listdir(tmp_path / "folder") == ["target"]


def test_a_loop_of_links_is_an_error_that_names_it(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.symlink_to(second)
    second.symlink_to(first)
    with pytest.raises(OSError, match="a'") as caught:
        write(first)
    assert caught.value.errno == errno.ELOOP


def test_names_up_to_the_limit_of_the_file_system(tmp_path):
    limit = os.pathconf(tmp_path, "PC_NAME_MAX")
    write(tmp_path / ("x" * limit))
    assert os.listdir(tmp_path) == ["x" * limit]
    with pytest.raises(OSError, match="x" * 20) as caught:
        write(tmp_path / ("x" * (limit + 1)))
    assert caught.value.errno == errno.ENAMETOOLONG
    assert caught.value.filename == str(tmp_path / ("x" * (limit + 1)))
    assert len(os.listdir(tmp_path)) == 1


class Stop(Exception):
    """Ends the body of a write."""


def stop(path, content=b"half"):
    """A write that ends half-way, by an exception."""
    with files.replacing(path) as part:
        part.write_bytes(content)
        raise Stop


def test_leftovers_of_a_killed_process_are_removed_by_the_next_write(tmp_path):
    """`test_kills` kills real processes; here the part that one leaves is made up."""
    path = tmp_path / "x"
    write(path, b"old")
    with files.replacing(path) as part:
        part.write_bytes(b"old")
        left = part.with_name(part.name.replace(part.name[-21:-5], "0" * 16))
        left.write_bytes(b"half")
    assert left.name.startswith(".lore_jax-")
    assert sorted(os.listdir(tmp_path)) == [left.name, "x"]
    write(tmp_path / "y")  # Of another file: not its to remove.
    assert left.exists()
    write(path)
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_two_writers_of_one_file_do_not_touch_each_others_part(tmp_path):
    path = tmp_path / "x"
    with files.replacing(path) as first:
        first.write_bytes(b"first")
        with files.replacing(path) as second:
            second.write_bytes(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["x"]


def test_a_body_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(Stop):
        stop(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def fail(number):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_errors_of_the_system_name_the_file(tmp_path, monkeypatch, number, step):
    path = tmp_path / "x"
    write(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail(number))
        with pytest.raises(OSError, match=f"{path}'$") as caught:
            write(path)
    assert caught.value.errno == number
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_while_the_body_writes_names_the_file(tmp_path):
    def write_too_much():
        with files.replacing(tmp_path / "x"):
            fail(errno.ENOSPC)()

    with pytest.raises(OSError, match="x'") as caught:
        write_too_much()
    assert caught.value.errno == errno.ENOSPC


def test_errors_about_other_files_stay_as_they_are(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="other"),
        files.replacing(tmp_path / "x"),
    ):
        open(tmp_path / "other")


def test_the_file_and_its_folder_reach_the_disk(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def watched(handle):
        synced.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        real(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write(tmp_path / "x")
    assert synced == [False, True]


def test_several_files_are_renamed_when_all_are_written(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        write(path, b"old")

    def stop_between():
        with files.replacing_all(paths) as parts:
            parts[0].write_bytes(b"new")
            raise Stop

    with pytest.raises(Stop):
        stop_between()
    assert [path.read_bytes() for path in paths] == [b"old", b"old"]
    with files.replacing_all(paths) as parts:
        for part in parts:
            part.write_bytes(b"new")
    assert [path.read_bytes() for path in paths] == [b"new", b"new"]


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i4", "i8", "u1", "u4", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
def test_arrays_of_every_kind_round_trip(tmp_path, dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    kind = {"format": "f", "version": "1"}
    files.write_record(tmp_path / "x", {"a": array}, kind)
    arrays, metadata = files.read_record(tmp_path / "x", "f", 1, "thing")
    assert metadata == kind
    assert arrays["a"].dtype == array.dtype
    np.testing.assert_array_equal(arrays["a"], array)
    assert arrays["a"].flags.writeable


SEVERAL = """
import os, sys
from lore_jax.io import files
folder, last = sys.argv[1], int(sys.argv[2])
paths = [os.path.join(folder, name) for name in ("a", "b")]
for text in ("old", "new"):
    with files.replacing_all(paths) as temporary:
        for path in temporary:
            path.write_text(text)
        replace, calls = os.replace, []
        def killed(*names):
            calls.append(names)
            if len(calls) == last:
                os._exit(9)
            replace(*names)
        if text == "new":
            os.replace = killed
"""


@pytest.mark.parametrize(("last", "want"), [(1, "old"), (2, "new"), (3, "new")])
def test_files_that_belong_together_are_all_old_or_all_new(tmp_path, last, want):
    """A process that ends before the first rename, or before one of the later ones."""
    script = [sys.executable, "-c", SEVERAL, str(tmp_path), str(last)]
    assert subprocess.run(script, check=False).returncode == 9
    files.finish_replacing(tmp_path)
    paths = [tmp_path / "a", tmp_path / "b"]
    assert [path.read_text() for path in paths] == [want, want]
    with files.replacing_all(paths) as temporary:
        for path in temporary:
            path.write_text("newest")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert {path.read_text() for path in paths} == {"newest"}
