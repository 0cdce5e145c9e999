"""Search settings: which images may be found, and how."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from likewise.errors import InputError, close_matches


def check_choices(settings: Any) -> None:
    """Hold every setting whose values are a closed list against that list.

    Raises:
        InputError: listing what is known.
    """
    for name, hint in get_type_hints(type(settings)).items():
        known = [
            value for part in (hint, *get_args(hint)) for value in get_args(part) if isinstance(value, str)
        ]
        value = getattr(settings, name)
        if isinstance(value, str) and known and value not in known:
            told = "source of pairs" if name == "pairs" else name.replace("_", " ")
            near = close_matches(value, known)
            raise InputError(f"unknown {told} {value!r}; known: {', '.join(known)}.{near}")


def check_between(name: str, value: int | float | None, low: int | float, high: int | float | None) -> None:
    """Hold a number against its bounds.

    Raises:
        InputError: where it lies outside.
    """
    if value is None or (value >= low and (high is None or value <= high)):
        return
    bounds = f"at least {low}" if high is None else f"between {low} and {high}"
    raise InputError(f"{name.replace('_', ' ')} is {value}; it must be {bounds}")


CaptionUse = Literal["mean", "best", "draw"]


Scope = Literal["any", "same", "other"]


IndexKind = Literal["auto", "exact", "ivf"]


@dataclass(frozen=True, kw_only=True)
class SearchRule:
    """Who may be found at all: decided before neighbors are searched for.

    Attributes:
        captions: How an image with several captions is compared: by their `mean`, by the `best` match of any
            two, or by one that is drawn anew each epoch (`draw`).
        scope: Partners of `any` group, of the `same` one, or of any `other`; images without a group then
            find nobody.
        distinct_captions: Pass over images whose captions read the same but for case, spaces and
            punctuation.
        distinct_images: Pass over near-duplicate images (difference hashes at most 3 of 64 bits apart, and
            the same colours).
        filter: A filter file as `likewise audit` writes it: images and captions that take no part.
        index: `exact`, or an approximate inverted file (`ivf`); `auto` is exact up to a million images.
        index_recall: Share of the exact ten nearest that an approximate index must find on a sample.
    """

    captions: CaptionUse = "mean"
    scope: Scope = "any"
    distinct_captions: bool = False
    distinct_images: bool = False
    filter: Path | None = None
    index: IndexKind = "auto"
    index_recall: float = 0.95

    def __post_init__(self) -> None:
        """Refuse what no search can mean.

        Raises:
            InputError: naming the setting and what it may be.
        """
        check_choices(self)
        check_between("index_recall", self.index_recall, 0, 1)


TABLE_DEPTH = 10  # neighbors an image that a search keeps where nobody asks for more


POOL_DEPTH = 50  # from how many a corrected or fused order is made
