"""Entry point: run a command, print errors as one line, return an exit code."""

import os
import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

# Importing a module registers its commands.
from likewise.cli import data, evaluation, pipeline, training  # noqa: F401
from likewise.cli.common import app, log_to_console, print_error
from likewise.cli.flags import flag_names, translate_fields
from likewise.errors import InterruptedRunError, LikewiseError

# OpenMP threads busy-wait for each other. Without a limit they take the cores from the threads that load
# batches (training is 3 times slower on 2 cores of which one is busy); without any busy-waiting, small
# matrix products wait for the scheduler (the linear probe is 6 times slower).
GOMP_SPINCOUNT = "10000"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit with 0 (done), 1 (failed), 2 (invalid usage) or 130 (interrupted)."""
    os.environ.setdefault("GOMP_SPINCOUNT", GOMP_SPINCOUNT)  # torch reads it when it is imported
    tokens = list(sys.argv[1:] if argv is None else argv)
    try:
        with log_to_console(quiet="--quiet" in tokens):
            exit_code = _run(tokens, debug="--debug" in tokens)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, is gone; the interpreter must not flush to it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_code = 1
    sys.exit(exit_code)


def _run(tokens: list[str], *, debug: bool) -> int:
    try:
        app(tokens, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return 2
    except KeyboardInterrupt:
        return print_error("interrupted; the same command resumes", 130)
    except InterruptedRunError as error:
        return print_error(str(error), 130)
    except LikewiseError as error:
        if debug:
            raise
        return print_error(f"error: {translate_fields(str(error), flag_names(tokens[0]))}", 1)
    except OSError as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        path = f": {error.filename}" if error.filename else ""
        return print_error(f"error: {error.strerror or error}{path}", 1)
    return 0


if __name__ == "__main__":
    main()
