"""Which images share a text, from 64 bits of each caption."""

from dataclasses import dataclass

import numpy as np

from likewise.collection.records import Collection


@dataclass(frozen=True, kw_only=True, eq=False)
class Holders:
    """The images of every text: t texts, ascending by code, each image once.

    Attributes:
        codes: The texts, (t,) uint64.
        counts: How many images have each, (t,) int64.
        owners: The images, text by text, each ascending, (sum of counts,) int64.
    """

    codes: np.ndarray
    counts: np.ndarray
    owners: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Where the images of each text begin in `owners`, (t,) int64."""
        return np.cumsum(self.counts) - self.counts

    def images(self, text: int) -> np.ndarray:
        """Return the images of one text, by its place among the codes."""
        start = int(self.starts[text])
        return self.owners[start : start + int(self.counts[text])]

    def most_frequent(self, least: int, most: int) -> list[int]:
        """Return the places of at most so many texts on at least so many images; ties by first image."""
        chosen = np.flatnonzero(self.counts >= least)
        order = np.lexsort((self.owners[self.starts[chosen]], -self.counts[chosen]))
        return chosen[order][:most].tolist()


def holders_of(codes: np.ndarray, owners: np.ndarray) -> Holders:
    """Gather the images by text: codes (r,) uint64, of which 0 is no text, and owners (r,) int64."""
    order = np.lexsort((owners, codes))
    codes, owners = codes[order], owners[order]
    new = codes != 0
    new[1:] &= (codes[1:] != codes[:-1]) | (owners[1:] != owners[:-1])
    named, counts = np.unique(codes[new], return_counts=True)
    return Holders(codes=named, counts=counts, owners=owners[new])


def caption_of_code(collection: Collection, codes: np.ndarray, owners: np.ndarray, code: int) -> str:
    """Return the first caption with a code; the arrays are in the order of records and their captions."""
    row = int(np.argmax(codes == np.uint64(code)))
    position = int(owners[row])
    return collection[position].captions[row - int(np.searchsorted(owners, position))]
