"""Config of the neighbor search; imports no heavy library, because the command line reads it first."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from likewise.errors import InvalidInputError, did_you_mean


def check_choices(config: Any) -> None:
    """Check every field whose type is a Literal.

    Raises:
        InvalidInputError: if a value is not among the choices.
    """
    for name, hint in get_type_hints(type(config)).items():
        choices = [
            value for arg in (hint, *get_args(hint)) for value in get_args(arg) if isinstance(value, str)
        ]
        value = getattr(config, name)
        if isinstance(value, str) and choices and value not in choices:
            suggestion = did_you_mean(value, choices)
            raise InvalidInputError(
                f"unknown `{name}` {value!r}; known: {', '.join(choices)}.{suggestion}", field=name
            )


def check_range(name: str, value: int | float | None, low: int | float, high: int | float | None) -> None:
    """Check that a number is None or between `low` and `high`, inclusive.

    Raises:
        InvalidInputError: if it is not.
    """
    if value is None or (value >= low and (high is None or value <= high)):
        return
    bounds = f"at least {low}" if high is None else f"between {low} and {high}"
    raise InvalidInputError(f"`{name}` must be {bounds}, got {value}", field=name)


CaptionPooling = Literal["mean", "max", "sample"]
GroupScope = Literal["any", "same", "different"]
IndexType = Literal["auto", "exact", "ivf"]

DEFAULT_K = 10  # neighbors per image
NUM_RERANK_CANDIDATES = 50  # neighbors that are re-ranked or fused


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Neighbor search: which images are compared, and how."""

    caption_pooling: CaptionPooling = "mean"
    """Comparison of images with several captions: the `mean` embedding, the `max` over pairs of captions,
    or a `sample` of one caption each epoch."""
    group_scope: GroupScope = "any"
    """Partners from `any` group, the `same` or a `different` one; images without a group then have none."""
    exclude_identical_captions: bool = False
    """Exclude images whose captions are equal except for case, spaces and punctuation."""
    exclude_near_duplicates: bool = False
    """Exclude near-duplicate images (difference hashes at most 3 of 64 bits apart, and similar colors)."""
    filter: Path | None = None
    """Filter file, as written by `audit`, of images and captions to exclude."""
    index: IndexType = "auto"
    """`exact` search, an approximate inverted file (`ivf`), or `auto`: exact up to a million rows."""
    target_recall: float = 0.95
    """Recall at 10 that an approximate index must reach on a sample."""

    def __post_init__(self) -> None:
        """Validate the config.

        Raises:
            InvalidInputError: if a value is out of range.
        """
        check_choices(self)
        check_range("target_recall", self.target_recall, 0, 1)
