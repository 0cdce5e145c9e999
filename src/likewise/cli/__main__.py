"""Entry point: run a command, print errors as one line, return an exit code."""

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from cyclopts import CycloptsError

# Importing a module registers its commands.
from likewise.cli import data, evaluation, pipeline, training  # noqa: F401
from likewise.cli.common import app, log_to_console, print_error
from likewise.cli.flags import flag_names, translate_fields
from likewise.errors import InterruptedRunError, LikewiseError, describe_error

# OpenMP threads busy-wait for each other. Without a limit they take the cores from the threads that load
# batches (training is 3 times slower on 2 cores of which one is busy); without any busy-waiting, small
# matrix products wait for the scheduler (the linear probe is 6 times slower).
GOMP_SPINCOUNT = "10000"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit with 0 (done), 1 (failed), 2 (invalid usage) or 130 (interrupted)."""
    os.environ.setdefault("GOMP_SPINCOUNT", GOMP_SPINCOUNT)  # torch reads it when it is imported
    tokens = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be valid in the encoding of the terminal.
        sys.stdout.reconfigure(errors="backslashreplace")
    exit_code = _run(tokens, debug="--debug" in tokens)
    # The interpreter flushes at exit again, where an error could not be handled.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not _flush(stream):
            exit_code = exit_code or 1
    sys.exit(exit_code)


def _run(tokens: list[str], *, debug: bool) -> int:
    """Run a command, report its error and return the exit code."""
    try:
        with log_to_console(quiet="--quiet" in tokens):
            app(tokens, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return 2
    except KeyboardInterrupt:
        return print_error("interrupted; the same command resumes", 130)
    except InterruptedRunError as error:
        return print_error(str(error), 130)
    except Exception as error:  # the last resort: no exception of a library reaches the user
        if isinstance(error, BrokenPipeError) and not _is_open(sys.stdout, sys.stderr):
            return 1  # the reader, such as `head`, is gone
        if debug:
            raise
        return print_error(f"error: {_describe(error, tokens)}", 1)
    return 0


def _describe(error: Exception, tokens: Sequence[str]) -> str:
    """Return one line about an error: its message, or its type if it is not one of this package."""
    if isinstance(error, LikewiseError):
        return translate_fields(str(error), flag_names(tokens[0]) if tokens else {})
    if isinstance(error, OSError) and error.errno is not None:
        path = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{path}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter of torch
        return "not enough memory; use smaller batches or images or fewer workers, or close other programs"
    return (
        f"unexpected {describe_error(error)}; this is a bug of likewise: please report it with the stack "
        "trace, which the same command with --debug prints"
    )


def _is_open(*streams: Any) -> bool:
    """Return whether the readers of all streams still read, which only a write can tell."""
    try:
        for stream in streams:
            if stream is not None:
                stream.write("\n")
                stream.flush()
    except BrokenPipeError:
        return False
    return True


def _flush(stream: Any) -> bool:
    """Write what is buffered; if that fails, redirect the stream, so that it does not fail again at exit."""
    try:
        stream.flush()
    except OSError as error:
        if error.errno != errno.EPIPE and stream is not sys.stderr:
            print_error(f"error: {error.strerror}", 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


if __name__ == "__main__":
    main()
