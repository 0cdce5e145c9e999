"""Rules of pairing: settings alone, so that the command line can know them without loading anything."""

from dataclasses import dataclass
from typing import Literal, get_args

from likewise.errors import InputError, close_matches

PairSource = Literal["self", "language"]


@dataclass(frozen=True, kw_only=True)
class PairRule:
    """Who may be the partner of an image.

    Attributes:
        source: `self` pairs two views of one image; `language` pairs an image with one described alike.
        k: With `language`, the partner is drawn evenly from the k nearest; 1, the nearest, is the paper's.
    """

    source: PairSource = "language"
    k: int = 1

    def __post_init__(self) -> None:
        """Refuse what no rule can mean.

        Raises:
            InputError: for an unknown source or a k below 1.
        """
        known = list(get_args(PairSource))
        if self.source not in known:
            near = close_matches(self.source, known)
            raise InputError(f"unknown source of pairs {self.source!r}; known: {', '.join(known)}.{near}")
        if self.k < 1:
            raise InputError(f"partners are drawn from the k nearest: k is {self.k}, at least 1 is needed")
