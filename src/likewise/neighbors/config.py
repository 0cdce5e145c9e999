"""Search settings: which images may be found, and how."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from likewise.errors import InvalidInputError, did_you_mean


def check_choices(config: Any) -> None:
    """Hold every setting whose values are a closed list against that list.

    Raises:
        InputError: listing what is known.
    """
    for name, hint in get_type_hints(type(config)).items():
        choices = [
            value for arg in (hint, *get_args(hint)) for value in get_args(arg) if isinstance(value, str)
        ]
        value = getattr(config, name)
        if isinstance(value, str) and choices and value not in choices:
            description = "source of pairs" if name == "source" else name.replace("_", " ")
            suggestion = did_you_mean(value, choices)
            raise InvalidInputError(
                f"unknown {description} {value!r}; known: {', '.join(choices)}.{suggestion}"
            )


def check_range(name: str, value: int | float | None, low: int | float, high: int | float | None) -> None:
    """Hold a number against its bounds.

    Raises:
        InputError: where it lies outside.
    """
    if value is None or (value >= low and (high is None or value <= high)):
        return
    bounds = f"at least {low}" if high is None else f"between {low} and {high}"
    raise InvalidInputError(f"{name.replace('_', ' ')} is {value}; it must be {bounds}")


CaptionPooling = Literal["mean", "max", "sample"]


GroupScope = Literal["any", "same", "different"]


IndexType = Literal["auto", "exact", "ivf"]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Who may be found at all: decided before neighbors are searched for.

    Attributes:
        caption_pooling: How an image with several captions is compared: by their `mean`, by the `best`
            match of any
            two, or by one that is drawn anew each epoch (`draw`).
        group_scope: Partners of `any` group, of the `same` one, or of any `other`; images without a group
            then
            find nobody.
        exclude_identical_captions: Pass over images whose captions read the same but for case, spaces and
            punctuation.
        exclude_near_duplicates: Pass over near-duplicate images (difference hashes at most 3 of 64 bits
            apart, and
            the same colours).
        filter: A filter file as `likewise audit` writes it: images and captions that take no part.
        index: `exact`, or an approximate inverted file (`ivf`); `auto` is exact up to a million images.
        target_recall: Share of the exact ten nearest that an approximate index must find on a sample.
    """

    caption_pooling: CaptionPooling = "mean"
    group_scope: GroupScope = "any"
    exclude_identical_captions: bool = False
    exclude_near_duplicates: bool = False
    filter: Path | None = None
    index: IndexType = "auto"
    target_recall: float = 0.95

    def __post_init__(self) -> None:
        """Refuse what no search can mean.

        Raises:
            InputError: naming the setting and what it may be.
        """
        check_choices(self)
        check_range("target_recall", self.target_recall, 0, 1)


DEFAULT_K = 10  # neighbors an image that a search keeps where nobody asks for more


NUM_RERANK_CANDIDATES = 50  # from how many a corrected or fused order is made
