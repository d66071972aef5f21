"""Processes killed while they write lose nothing; `.ci/slow` kills more of them."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NUMBER = os.environ.get("KILLS", "5")
WRITERS = (
    *("fit", "progress", "users"),
    *("table", "texts", "features", "json", "embed"),
)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and fork")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_killed_writer_loses_nothing(writer):
    if writer == "embed":
        pytest.importorskip("tqdm", reason="needs the extra 'quickstart'")
    script = ROOT / "tests" / "fixtures" / "kills.py"
    done = subprocess.run(
        [sys.executable, script, writer, NUMBER, "0"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
