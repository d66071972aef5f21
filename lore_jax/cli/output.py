"""What the commands write: results on stdout, the log on stderr."""

import json
import logging
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def start_log(verbose: bool) -> None:
    """Sends the library's log to stderr: with the time, unless a person looks on."""
    log = logging.getLogger("lore_jax")
    for handler in list(log.handlers):
        log.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    form = "%(message)s" if on_terminal() else "%(asctime)s %(message)s"
    handler.setFormatter(logging.Formatter(form, "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


def on_terminal() -> bool:
    """Whether a person sees stderr, so that progress may be a bar."""
    return sys.stderr.isatty()


def report(result: Mapping[str, Any], as_json: bool) -> str:
    """A result as one JSON object, or as a line per entry."""
    if as_json:
        return to_json(result)
    wide = max(map(len, result))
    return "\n".join(f"{name:<{wide}}  {_said(x)}" for name, x in result.items())


def to_json(value: Any) -> str:
    """One line of JSON; what is not finite is null."""
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, pathlib.Path) else value


def _said(value: Any) -> str:
    if hasattr(value, "low"):
        return f"{value.mean:.4f} [{value.low:.4f}, {value.high:.4f}]"
    if isinstance(value, float | np.floating):
        return f"{value:.4f}"
    if isinstance(value, list):
        return ", ".join(_said(x) for x in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(x)}" for name, x in value.items())
    return str(value)


def check_out(path: pathlib.Path, endings: Sequence[str]) -> pathlib.Path:
    """The path of a file to write, before the work begins.

    Raises:
      ValueError: another ending, no such folder, or the path is a folder.
    """
    if path.suffix not in endings:
        raise ValueError(f"--out must end in {', '.join(endings)}, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--out: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"--out: {path} is a folder")
    return path
