"""The entry point of `lore`: errors in one line, and exit codes.

typer is imported inside `main`, so that its absence can be explained.
"""

import logging
import sys
import warnings
from collections.abc import Sequence

_BAD_INPUT = 2
_INTERRUPTED = 130
_log = logging.getLogger("lore_jax")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
      argv: arguments; default those of the process.

    Returns:
      The exit code: 0; 2 where an argument or a file is wrong, with one line on stderr;
      130 after an interrupt.
    """
    try:
        from lore_jax.cli.app import app
    except ImportError as error:
        need = "the command needs the extra cli: pip install 'lore_jax[cli]'"
        return _fail(f"{need} ({error})")
    arguments = sys.argv[1:] if argv is None else list(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda text, *_, **__: _log.warning(_one_line(text))
        try:
            return app(arguments, prog_name="lore", standalone_mode=False) or 0
        except (ValueError, TypeError, OSError, ImportError) as error:
            _log.debug("traceback:", exc_info=True)
            return _fail(error)
        except KeyboardInterrupt:
            return _INTERRUPTED
        except Exception as error:
            # A wrong option or argument: typer's classes for it are private.
            said = getattr(error, "format_message", None)
            if said is None:
                raise
            return _fail(f"{said()} (see --help)")


def _fail(error: object) -> int:
    if isinstance(error, OSError) and error.filename and error.strerror:
        error = f"{error.filename}: {error.strerror}"
    sys.stderr.write(f"lore: {_one_line(error)}\n")
    return _BAD_INPUT


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
