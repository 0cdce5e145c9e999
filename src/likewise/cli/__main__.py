"""Run the command line: hand the arguments to a verb, turn what went wrong into a sentence and a code."""

import os
import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

# Importing a module registers its verbs.
from likewise.cli import data, evaluation, training  # noqa: F401
from likewise.cli.common import app, print_error
from likewise.errors import InterruptedRunError, LikewiseError

# GNU OpenMP threads busy-wait for each other. Without a bound they take the cores from the threads that make
# batches and from other programs (training is 3 times slower on 2 cores of which one is busy); without any
# spinning, small matrix products wait for the scheduler (the linear probe is 6 times slower). It is read when
# torch is imported, which happens later, inside the commands.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave with 0 (done), 1 (failed), 2 (bad usage) or 130 (interrupted)."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    try:
        exit_code = _run(tokens, debug="--debug" in tokens)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; what is left must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_code = 1
    sys.exit(exit_code)


def _run(tokens: list[str], *, debug: bool) -> int:
    try:
        app(tokens, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return 2
    except KeyboardInterrupt:
        return print_error("interrupted; what is finished is kept, run the same command again to go on", 130)
    except InterruptedRunError as error:
        return print_error(str(error), 130)
    except LikewiseError as error:
        if debug:
            raise
        return print_error(f"error: {error}", 1)
    except OSError as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        return print_error(f"error: {error.strerror or error}: {error.filename or 'no file named'}", 1)
    return 0


if __name__ == "__main__":
    main()
