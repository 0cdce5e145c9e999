"""Exceptions that the package raises on purpose.

LikewiseError
├── InvalidInputError      wrong path, column, value or option
├── ArtifactError          a directory on disk is not what this step needs
├── ModelError             unknown model name, weights that do not fit
├── TrainingError          too few images, non-finite loss
├── InterruptedRunError    stopped by the user; the same call resumes
└── DependencyError        an optional package is not installed

Messages name config fields in backticks, such as `batch_size`; the command line prints them as flags.
"""

from pathlib import Path


class LikewiseError(Exception):
    """Base class: an error that the caller can correct, described by its message alone.

    Attributes:
        field: The config field or parameter that caused the error, if one did.
        path: The file or directory that caused the error, if one did.
    """

    def __init__(self, message: str, *, field: str | None = None, path: str | Path | None = None) -> None:
        """Set the message and, if known, the responsible field or path."""
        # A lone surrogate, of a name that is not UTF-8 or of a damaged text, could not be printed.
        super().__init__(message.encode("utf-8", "backslashreplace").decode())
        self.field = field
        self.path = None if path is None else Path(path)


class InvalidInputError(LikewiseError):
    """Invalid input: a wrong path, an empty folder, a missing column, an option out of range."""


class ArtifactError(LikewiseError):
    """A directory is not the artifact that a step needs: another kind, other settings, incomplete."""


class ModelError(LikewiseError):
    """A model cannot be built or loaded: an unknown name, or weights that do not fit."""


class TrainingError(LikewiseError):
    """Training cannot start or continue: too few images, or a non-finite loss."""


class InterruptedRunError(LikewiseError):
    """The user interrupted a run; its checkpoint is on disk, and the same call resumes it."""


class DependencyError(LikewiseError):
    """An optional package is missing; the message says how to install it."""


def did_you_mean(name: str, choices: list[str], n: int = 5) -> str:
    """Return ` Did you mean a, b?` for a misspelled name, or an empty string without close matches."""
    import difflib

    matches = difflib.get_close_matches(name, choices, n=n, cutoff=0.5)
    return f" Did you mean {', '.join(matches)}?" if matches else ""


def describe_error(error: BaseException) -> str:
    """Return the type of an exception of a library and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
