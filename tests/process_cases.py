"""Processes on loopback for tests."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def free_port() -> str:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return str(held.getsockname()[1])


def run(script: str, arguments, *, timeout: int = 240, **more):
    """(exit status, output, errors) of a script started once per list of arguments.

    It ends all of them when one takes too long.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment |= more
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fixtures" / script), *map(str, one)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for one in arguments
    ]
    try:
        found = []
        for process in started:
            out, error = process.communicate(timeout=timeout)
            found.append((process.returncode, out, error))
        return found
    finally:
        for process in started:
            process.kill()
            process.communicate()
