"""What each method needs: one table, read before anything is loaded."""

from dataclasses import dataclass
from typing import Literal

from likewise.errors import InvalidInputError, did_you_mean

FalseNegativeMode = Literal["keep", "mask", "reweight", "soft_targets"]


TextTowerMode = Literal["train", "frozen"]


# What images a step shows: the anchor alone; the anchor and its partners; or, where pairs are shown by other
# views than crops, a plain crop of the anchor besides, for its caption.
MethodInputs = Literal["anchor", "pair", "pair and caption"]


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """What a method needs and which settings mean something to it.

    Attributes:
        summary: The method in a few words.
        inputs: Which images a step shows.
        needs_text: Whether the caption itself is an input, through a text tower or as a frozen vector.
        negatives: What an image is told from: the rest of the batch, a queue, both, or nothing.
        ema_momentum: The share of a moving average of the encoder that is kept each step; None without one.
        memory_bank_size: How many earlier outputs are remembered; None without a queue.
        temperature: What similarities are divided by; None where nothing is, or where it is learned.
        projector_dims: Widths of the projection head; none where the features are used as they are.
        predictor_hidden_dim: Width of the hidden layer of the prediction head; None without one.
        extra_options: Settings that mean something to this method beside those that mean something to all.
    """

    summary: str
    inputs: MethodInputs = "pair"
    needs_text: bool = False
    negatives: Literal["batch", "queue", "batch and queue", "none"] = "none"
    ema_momentum: float | None = None
    memory_bank_size: int | None = None
    temperature: float | None = None
    projector_dims: tuple[int, ...] = ()
    predictor_hidden_dim: int | None = None
    extra_options: frozenset[str] = frozenset()

    @property
    def requirements(self) -> tuple[str, ...]:
        """What a method needs beside images and a projection head, in words."""
        is_required = {
            "captions": self.needs_text,
            "queue": self.memory_bank_size is not None,
            "slow copy": self.ema_momentum is not None,
            "prediction head": self.predictor_hidden_dim is not None,
            "prototypes": "num_prototypes" in self.extra_options,
            "embeddings of captions": "negative_threshold" in self.extra_options,
        }
        return tuple(name for name, required in is_required.items() if required)

    @property
    def option_names(self) -> frozenset[str]:
        """Every setting of a method that means something to this one."""
        names = {
            name
            for name in ("ema_momentum", "memory_bank_size", "temperature")
            if getattr(self, name) is not None
        }
        names |= {"projector_dims"} if self.projector_dims else set()
        names |= {"text_tower", "text_width", "text_layers"} if self.needs_text else set()
        return self.extra_options | names


_SIMCLR_DIMS, _CLIP_DIMS = (2048, 2048, 128), (512,)

# Widths, temperatures, queues and momenta are those of the LGSSL code where it has the method, else of the
# method's own paper.
METHODS = {
    "simclr": MethodOptions(
        summary="pairs find each other among the batch",
        negatives="batch",
        temperature=0.1,
        projector_dims=_SIMCLR_DIMS,
        extra_options=frozenset({"false_negatives", "positive_threshold"}),
    ),
    "dcl": MethodOptions(
        summary="simclr without the positive in its denominator",
        negatives="batch",
        temperature=0.1,
        projector_dims=_SIMCLR_DIMS,
        extra_options=frozenset({"false_negatives", "positive_threshold"}),
    ),
    "supcon": MethodOptions(
        summary="all partners, or all of one label, find each other",
        negatives="batch",
        temperature=0.1,
        projector_dims=_SIMCLR_DIMS,
        extra_options=frozenset({"num_positives"}),
    ),
    "nnclr": MethodOptions(
        summary="the anchor's nearest neighbor in a queue is the positive",
        negatives="batch",
        memory_bank_size=16_384,
        temperature=0.1,
        projector_dims=(2048, 2048, 256),
        predictor_hidden_dim=4096,
    ),
    "moco": MethodOptions(
        summary="version 2: a slow copy of the encoder fills a queue of negatives",
        negatives="queue",
        ema_momentum=0.999,
        memory_bank_size=65_536,
        temperature=0.2,
        projector_dims=(2048, 128),
    ),
    "moco-v3": MethodOptions(
        summary="a slow copy of the encoder gives the keys of the batch",
        negatives="batch",
        ema_momentum=0.99,
        temperature=0.2,
        projector_dims=(4096, 4096, 256),
        predictor_hidden_dim=4096,
    ),
    "simsiam": MethodOptions(
        summary="one view predicts the other, whose gradient is stopped",
        projector_dims=(2048, 2048, 2048),
        predictor_hidden_dim=512,
    ),
    "byol": MethodOptions(
        summary="one view predicts what a slow copy makes of the other",
        ema_momentum=0.996,
        projector_dims=(4096, 256),
        predictor_hidden_dim=4096,
    ),
    "swav": MethodOptions(
        summary="views predict each other's cluster",
        memory_bank_size=3840,
        temperature=0.1,
        projector_dims=(2048, 128),
        extra_options=frozenset({"num_prototypes", "num_local_crops"}),
    ),
    "vicreg": MethodOptions(
        summary="partners alike, coordinates spread and uncorrelated",
        projector_dims=(8192, 8192, 8192),
    ),
    "barlow-twins": MethodOptions(
        summary="the views' cross-correlation is the identity",
        projector_dims=(8192, 8192, 8192),
    ),
    "clip": MethodOptions(
        summary="image and caption find each other among the batch",
        inputs="anchor",
        needs_text=True,
        negatives="batch",
        projector_dims=_CLIP_DIMS,
    ),
    "siglip": MethodOptions(
        summary="image and caption are told to belong together, pair by pair",
        inputs="anchor",
        needs_text=True,
        negatives="batch",
        projector_dims=_CLIP_DIMS,
    ),
    "declip": MethodOptions(
        summary="clip, and the caption's nearest neighbor in a queue",
        inputs="anchor",
        needs_text=True,
        negatives="batch and queue",
        memory_bank_size=16_384,
        projector_dims=_CLIP_DIMS,
    ),
    "slip": MethodOptions(
        summary="clip and simclr together",
        inputs="pair and caption",
        needs_text=True,
        negatives="batch",
        temperature=0.1,
        projector_dims=(2048, 2048, 512),
    ),
    "pair-classifier": MethodOptions(
        summary="pairs described alike are told from pairs that are not",
        negatives="batch",
        extra_options=frozenset(
            {"positive_threshold", "negative_threshold", "negatives_per_positive", "margin", "mine_in_batch"}
        ),
    ),
}


def get_method_options(method: str) -> MethodOptions:
    """Return what a method needs.

    Raises:
        InputError: for an unknown method, listing the known ones.
    """
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise InvalidInputError(
            f"unknown method {method!r}; known: {known}.{did_you_mean(method, list(METHODS))}"
        )
    return METHODS[method]


def check_method_options(method: str, overrides: frozenset[str]) -> None:
    """Refuse settings that a method would pass over in silence.

    Args:
        method: The method.
        overrides: The settings that were changed.

    Raises:
        InputError: naming the setting and the methods that it means something to.
    """
    option_names = get_method_options(method).option_names
    method_specific = frozenset().union(*(options.option_names for options in METHODS.values()))
    for name in sorted(overrides & method_specific - option_names):
        used_by = ", ".join(
            other_method for other_method, options in METHODS.items() if name in options.option_names
        )
        flag = name.replace("_", "-")
        raise InvalidInputError(
            f"--{flag} means nothing to --method {method}, only to {used_by}; leave it out"
        )
