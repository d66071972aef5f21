"""Two real processes on loopback: arrays that span them are refused by name."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def test_arrays_of_two_processes_are_refused_on_both():
    port = str(free_port())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    script = ROOT / "tests" / "fixtures" / "processes.py"
    both = [
        subprocess.Popen(
            [sys.executable, str(script), port, str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in range(2)
    ]
    try:
        for process in both:
            out, error = process.communicate(timeout=120)
            assert process.returncode == 0, error[-2000:]
            ours = [line for line in out.splitlines() if not line.startswith("[")]
            lines = dict(line.split(": ", 1) for line in ours)
            assert lines.pop("own") == "(2, 2)"
            assert len(lines) == 17
            for name, said in lines.items():
                assert "spans processes" in said, f"{name}: {said}"
    finally:
        for process in both:
            process.kill()
            process.communicate()
