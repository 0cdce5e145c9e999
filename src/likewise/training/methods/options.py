"""What each method needs: one table, read before anything is loaded."""

from dataclasses import dataclass
from typing import Literal

from likewise.errors import InputError, close_matches

Negatives = Literal["all", "mask", "weight", "soften"]


Text = Literal["tower", "frozen"]


# What images a step shows: the anchor alone; the anchor and its partners; or, where pairs are shown by other
# views than crops, a plain crop of the anchor besides, for its caption.
Shown = Literal["anchor", "pair", "pair and caption"]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method needs and which settings mean something to it.

    Attributes:
        what: The method in a few words.
        shown: Which images a step shows.
        text: Whether the caption itself is an input, through a text tower or as a frozen vector.
        negatives: What an image is told from: the rest of the batch, a queue, both, or nothing.
        momentum: The share of a moving average of the encoder that is kept each step; None without one.
        queue: How many earlier outputs are remembered; None without a queue.
        temperature: What similarities are divided by; None where nothing is, or where it is learned.
        head: Widths of the projection head; none where the features are used as they are.
        predictor: Width of the hidden layer of the prediction head; None without one.
        takes: Settings that mean something to this method beside those that mean something to all.
    """

    what: str
    shown: Shown = "pair"
    text: bool = False
    negatives: Literal["batch", "queue", "batch and queue", "none"] = "none"
    momentum: float | None = None
    queue: int | None = None
    temperature: float | None = None
    head: tuple[int, ...] = ()
    predictor: int | None = None
    takes: frozenset[str] = frozenset()

    @property
    def besides(self) -> tuple[str, ...]:
        """What a method needs beside images and a projection head, in words."""
        parts = {
            "captions": self.text,
            "queue": self.queue is not None,
            "slow copy": self.momentum is not None,
            "prediction head": self.predictor is not None,
            "prototypes": "prototypes" in self.takes,
            "embeddings of captions": "unlike" in self.takes,
        }
        return tuple(name for name, needed in parts.items() if needed)

    @property
    def meant(self) -> frozenset[str]:
        """Every setting of a method that means something to this one."""
        own = {name for name in ("momentum", "queue", "temperature") if getattr(self, name) is not None}
        own |= {"head"} if self.head else set()
        own |= {"text", "text_width", "text_layers"} if self.text else set()
        return self.takes | own


_WIDE, _TEXT = (2048, 2048, 128), (512,)

# Widths, temperatures, queues and momenta are those of the LGSSL code where it has the method, else of the
# method's own paper.
METHODS = {
    "simclr": Needs(
        what="pairs find each other among the batch",
        negatives="batch",
        temperature=0.1,
        head=_WIDE,
        takes=frozenset({"negatives", "alike"}),
    ),
    "dcl": Needs(
        what="simclr without the positive in its denominator",
        negatives="batch",
        temperature=0.1,
        head=_WIDE,
        takes=frozenset({"negatives", "alike"}),
    ),
    "supcon": Needs(
        what="all partners, or all of one label, find each other",
        negatives="batch",
        temperature=0.1,
        head=_WIDE,
        takes=frozenset({"partners"}),
    ),
    "nnclr": Needs(
        what="the anchor's nearest neighbor in a queue is the positive",
        negatives="batch",
        queue=16_384,
        temperature=0.1,
        head=(2048, 2048, 256),
        predictor=4096,
    ),
    "moco": Needs(
        what="version 2: a slow copy of the encoder fills a queue of negatives",
        negatives="queue",
        momentum=0.999,
        queue=65_536,
        temperature=0.2,
        head=(2048, 128),
    ),
    "moco-v3": Needs(
        what="a slow copy of the encoder gives the keys of the batch",
        negatives="batch",
        momentum=0.99,
        temperature=0.2,
        head=(4096, 4096, 256),
        predictor=4096,
    ),
    "simsiam": Needs(
        what="one view predicts the other, whose gradient is stopped",
        head=(2048, 2048, 2048),
        predictor=512,
    ),
    "byol": Needs(
        what="one view predicts what a slow copy makes of the other",
        momentum=0.996,
        head=(4096, 256),
        predictor=4096,
    ),
    "swav": Needs(
        what="views predict each other's cluster",
        queue=3840,
        temperature=0.1,
        head=(2048, 128),
        takes=frozenset({"prototypes", "small_views"}),
    ),
    "vicreg": Needs(
        what="partners alike, coordinates spread and uncorrelated",
        head=(8192, 8192, 8192),
    ),
    "barlow-twins": Needs(
        what="the views' cross-correlation is the identity",
        head=(8192, 8192, 8192),
    ),
    "clip": Needs(
        what="image and caption find each other among the batch",
        shown="anchor",
        text=True,
        negatives="batch",
        head=_TEXT,
    ),
    "siglip": Needs(
        what="image and caption are told to belong together, pair by pair",
        shown="anchor",
        text=True,
        negatives="batch",
        head=_TEXT,
    ),
    "declip": Needs(
        what="clip, and the caption's nearest neighbor in a queue",
        shown="anchor",
        text=True,
        negatives="batch and queue",
        queue=16_384,
        head=_TEXT,
    ),
    "slip": Needs(
        what="clip and simclr together",
        shown="pair and caption",
        text=True,
        negatives="batch",
        temperature=0.1,
        head=(2048, 2048, 512),
    ),
    "pair-classifier": Needs(
        what="pairs described alike are told from pairs that are not",
        negatives="batch",
        takes=frozenset({"alike", "unlike", "negative_ratio", "margin", "in_batch"}),
    ),
}


def needs_of(method: str) -> Needs:
    """Return what a method needs.

    Raises:
        InputError: for an unknown method, listing the known ones.
    """
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise InputError(f"unknown method {method!r}; known: {known}.{close_matches(method, list(METHODS))}")
    return METHODS[method]


def check_meaning(method: str, given: frozenset[str]) -> None:
    """Refuse settings that a method would pass over in silence.

    Args:
        method: The method.
        given: The settings that were changed.

    Raises:
        InputError: naming the setting and the methods that it means something to.
    """
    meant = needs_of(method).meant
    anybody = frozenset().union(*(needs.meant for needs in METHODS.values()))
    for name in sorted(given & anybody - meant):
        others = ", ".join(each for each, needs in METHODS.items() if name in needs.meant)
        flag = name.replace("_", "-")
        raise InputError(f"--{flag} means nothing to --method {method}, only to {others}; leave it out")
