"""Everything that `likewise` raises on purpose: one sentence each, with what, where and what to do."""


class LikewiseError(Exception):
    """A fault that the user can mend; the message is the whole story and needs no stack trace."""


class InvalidInputError(LikewiseError):
    """What was given cannot be read: a wrong path, an empty folder, a missing column."""


class ArtifactError(LikewiseError):
    """A folder on disk is not what this step needs: another kind, other settings, unfinished."""


class ModelError(LikewiseError):
    """A model cannot be built or loaded: an unknown name, weights that do not fit."""


class TrainingError(LikewiseError):
    """Training cannot start or go on: too few images, a loss that is not a number."""


class InterruptedRunError(LikewiseError):
    """The user asked to stop; everything up to there is on disk, and the same command goes on."""


class DependencyError(LikewiseError):
    """An optional package is missing; the message says how to install it."""


def did_you_mean(name: str, choices: list[str], n: int = 5) -> str:
    """Return ` Did you mean a, b?` for a misspelt name, or an empty string where nothing is near."""
    import difflib

    matches = difflib.get_close_matches(name, choices, n=n, cutoff=0.5)
    return f" Did you mean {', '.join(matches)}?" if matches else ""
