"""Options of the pre-training methods: one frozen dataclass per method, with its defaults.

This module imports no torch, because the command line reads it before it parses arguments. Widths,
temperatures, momenta and sizes of memory banks are those of the LGSSL code where it has the method, else
those of the method's paper.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from likewise.errors import InvalidInputError, did_you_mean
from likewise.neighbors.config import check_choices, check_range

MethodInputs = Literal["anchor", "pair", "pair_and_caption"]
Negatives = Literal["none", "batch", "memory bank", "batch and memory bank"]
TextTowerMode = Literal["train", "frozen"]


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Base class of the options of a method.

    Subclasses add one field per option. The class variables describe the method itself.

    Attributes:
        name: The name of the method, as in `TrainConfig(method=name)`.
        summary: The objective in one line.
        inputs: The views of a step: the anchor alone, the anchor and its partners, or these and a plain crop
            of the anchor to compare with its caption.
        needs_text: Whether the caption is an input of the method.
        negatives: The source of negatives.
        requirements: Components and inputs beyond images, a backbone and a projection head.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    inputs: ClassVar[MethodInputs] = "pair"
    needs_text: ClassVar[bool] = False
    negatives: ClassVar[Negatives] = "none"
    requirements: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Validate every option by its name; an option means the same in all methods.

        Raises:
            InvalidInputError: if an option is outside of its range; `field` is its name.
        """
        check_choices(self)
        options = option_values(self)
        for name in ("num_prototypes", "num_positives", "text_layers", "predictor_hidden_dim", "embed_dim"):
            check_range(name, options.get(name), 1, None)
        for name in ("memory_bank_size", "num_local_crops"):
            check_range(name, options.get(name), 0, None)
        for name, low in (("negative_threshold", -1), ("margin", -1), ("ema_momentum", 0)):
            check_range(name, options.get(name), low, 1)
        for name in (
            "temperature",
            "negatives_per_positive",
            "false_negative_threshold",
            "positive_threshold",
        ):
            check_positive(name, options.get(name))
        for name in ("false_negative_threshold", "positive_threshold"):
            check_range(name, options.get(name), 0, 1)
        dims = options.get("projector_dims", (1,))
        if not dims or min(dims) < 1:
            raise InvalidInputError(
                f"`projector_dims` must be one or more widths above 0, got {dims}", field="projector_dims"
            )
        text_width = options.get("text_width", 64)
        if text_width < 64 or text_width % 64:
            raise InvalidInputError(
                f"`text_width` must be a multiple of 64, got {text_width}", field="text_width"
            )

    @property
    def uses_caption_embeddings(self) -> bool:
        """Whether a batch includes caption embeddings."""
        return False

    @property
    def uses_tokens(self) -> bool:
        """Whether a batch includes tokenized captions."""
        return False


@dataclass(frozen=True, kw_only=True)
class MemoryBankOptions(MethodOptions):
    """Base class of the options of methods with a memory bank."""

    default_memory_bank_size: ClassVar[int]

    memory_bank_size: int | None = None
    """Vectors in the memory bank; defaults to the method's, at most a quarter of the training images."""

    @property
    def bank_size(self) -> int:
        """The size of the memory bank: `memory_bank_size`, or the default of the method."""
        return self.default_memory_bank_size if self.memory_bank_size is None else self.memory_bank_size


@dataclass(frozen=True, kw_only=True)
class TextMethodOptions(MethodOptions):
    """Base class of the options of methods that compare images with captions."""

    inputs: ClassVar[MethodInputs] = "anchor"
    needs_text: ClassVar[bool] = True
    negatives: ClassVar[Negatives] = "batch"
    requirements: ClassVar[tuple[str, ...]] = ("captions",)

    embed_dim: int = 512
    """Dimension of the space that images and captions share."""
    text_tower: TextTowerMode = "train"
    """Encode captions with a text tower (`train`), or project their embeddings (`frozen`)."""
    text_width: int = 512
    """Width of the text tower, a multiple of 64."""
    text_layers: int = 12
    """Layers of the text tower."""

    @property
    def uses_caption_embeddings(self) -> bool:
        """Whether a batch includes caption embeddings."""
        return self.text_tower == "frozen"

    @property
    def uses_tokens(self) -> bool:
        """Whether a batch includes tokenized captions."""
        return self.text_tower == "train"


@dataclass(frozen=True, kw_only=True)
class SimCLROptions(MethodOptions):
    """Options of SimCLR; with language pairs, LGSimCLR."""

    name: ClassVar[str] = "simclr"
    summary: ClassVar[str] = "NT-Xent over the batch"
    negatives: ClassVar[Negatives] = "batch"

    projector_dims: tuple[int, ...] = (2048, 2048, 128)
    """Widths of the projection head."""
    temperature: float = 0.1
    """Softmax temperature."""
    false_negatives: Literal["keep", "mask", "reweight", "soft_targets"] = "keep"
    """Treatment of in-batch negatives with similar captions: `keep` them, `mask` them, `reweight` them by
    dissimilarity, or use their similarities as `soft_targets`."""
    false_negative_threshold: float = 0.8
    """Caption cosine similarity from which a negative counts as false."""

    @property
    def uses_caption_embeddings(self) -> bool:
        """Whether a batch includes caption embeddings."""
        return self.false_negatives != "keep"


@dataclass(frozen=True, kw_only=True)
class DCLOptions(MethodOptions):
    """Options of decoupled contrastive learning."""

    name: ClassVar[str] = "dcl"
    summary: ClassVar[str] = "NT-Xent without the positive in its own denominator"
    negatives: ClassVar[Negatives] = "batch"

    projector_dims: tuple[int, ...] = (2048, 2048, 128)
    """Widths of the projection head."""
    temperature: float = 0.1
    """Softmax temperature."""
    # Without a positive in the denominator there is no distribution to compare with soft targets.
    false_negatives: Literal["keep", "mask", "reweight"] = "keep"
    """Treatment of in-batch negatives with similar captions: `keep` them, `mask` them, or `reweight` them by
    dissimilarity."""
    false_negative_threshold: float = 0.8
    """Caption cosine similarity from which a negative counts as false."""

    @property
    def uses_caption_embeddings(self) -> bool:
        """Whether a batch includes caption embeddings."""
        return self.false_negatives != "keep"


@dataclass(frozen=True, kw_only=True)
class SupConOptions(MethodOptions):
    """Options of supervised contrastive learning."""

    name: ClassVar[str] = "supcon"
    summary: ClassVar[str] = "all positives at once, or all images of the label"
    negatives: ClassVar[Negatives] = "batch"

    projector_dims: tuple[int, ...] = (2048, 2048, 128)
    """Widths of the projection head."""
    temperature: float = 0.1
    """Softmax temperature."""
    num_positives: int = 1
    """Partners per anchor in a step; each is sampled from the `k` nearest."""


@dataclass(frozen=True, kw_only=True)
class NNCLROptions(MemoryBankOptions):
    """Options of NNCLR."""

    name: ClassVar[str] = "nnclr"
    summary: ClassVar[str] = "the anchor's nearest neighbor in a memory bank is the positive"
    negatives: ClassVar[Negatives] = "batch"
    requirements: ClassVar[tuple[str, ...]] = ("memory bank", "prediction head")
    default_memory_bank_size: ClassVar[int] = 16_384

    projector_dims: tuple[int, ...] = (2048, 2048, 256)
    """Widths of the projection head."""
    predictor_hidden_dim: int = 4096
    """Width of the hidden layer of the prediction head."""
    temperature: float = 0.1
    """Softmax temperature."""


@dataclass(frozen=True, kw_only=True)
class MoCoOptions(MemoryBankOptions):
    """Options of MoCo v2."""

    name: ClassVar[str] = "moco"
    summary: ClassVar[str] = "MoCo v2: InfoNCE against a queue of momentum-encoder keys"
    negatives: ClassVar[Negatives] = "memory bank"
    requirements: ClassVar[tuple[str, ...]] = ("memory bank", "momentum encoder")
    default_memory_bank_size: ClassVar[int] = 65_536

    projector_dims: tuple[int, ...] = (2048, 128)
    """Widths of the projection head."""
    temperature: float = 0.2
    """Softmax temperature."""
    ema_momentum: float = 0.999
    """Momentum of the exponential moving average (EMA) of the encoder."""


@dataclass(frozen=True, kw_only=True)
class MoCoV3Options(MethodOptions):
    """Options of MoCo v3."""

    name: ClassVar[str] = "moco-v3"
    summary: ClassVar[str] = "InfoNCE against the momentum encoder's keys of the batch"
    negatives: ClassVar[Negatives] = "batch"
    requirements: ClassVar[tuple[str, ...]] = ("momentum encoder", "prediction head")

    projector_dims: tuple[int, ...] = (4096, 4096, 256)
    """Widths of the projection head."""
    predictor_hidden_dim: int = 4096
    """Width of the hidden layer of the prediction head."""
    temperature: float = 0.2
    """Softmax temperature."""
    ema_momentum: float = 0.99
    """Initial momentum of the EMA of the encoder; it rises to 1 along a cosine."""


@dataclass(frozen=True, kw_only=True)
class SimSiamOptions(MethodOptions):
    """Options of SimSiam; with language pairs, LGSimSiam."""

    name: ClassVar[str] = "simsiam"
    summary: ClassVar[str] = "predict the partner with a stopped gradient"
    requirements: ClassVar[tuple[str, ...]] = ("prediction head",)

    projector_dims: tuple[int, ...] = (2048, 2048, 2048)
    """Widths of the projection head."""
    predictor_hidden_dim: int = 512
    """Width of the hidden layer of the prediction head."""


@dataclass(frozen=True, kw_only=True)
class BYOLOptions(MethodOptions):
    """Options of BYOL."""

    name: ClassVar[str] = "byol"
    summary: ClassVar[str] = "predict the momentum encoder's output for the partner"
    requirements: ClassVar[tuple[str, ...]] = ("momentum encoder", "prediction head")

    projector_dims: tuple[int, ...] = (4096, 256)
    """Widths of the projection head."""
    predictor_hidden_dim: int = 4096
    """Width of the hidden layer of the prediction head."""
    ema_momentum: float = 0.996
    """Initial momentum of the EMA of the encoder; it rises to 1 along a cosine."""


@dataclass(frozen=True, kw_only=True)
class SwAVOptions(MemoryBankOptions):
    """Options of SwAV; `memory_bank_size=0` trains without a memory bank."""

    name: ClassVar[str] = "swav"
    summary: ClassVar[str] = "predict the partner's cluster assignment"
    requirements: ClassVar[tuple[str, ...]] = ("memory bank", "prototypes")
    default_memory_bank_size: ClassVar[int] = 3840

    projector_dims: tuple[int, ...] = (2048, 128)
    """Widths of the projection head."""
    temperature: float = 0.1
    """Softmax temperature."""
    num_prototypes: int = 3000
    """Number of prototypes."""
    num_local_crops: int = 0
    """Small crops per step in addition to the two views (multi-crop); 6 in the paper of SwAV."""


@dataclass(frozen=True, kw_only=True)
class VICRegOptions(MethodOptions):
    """Options of VICReg."""

    name: ClassVar[str] = "vicreg"
    summary: ClassVar[str] = "invariance, variance and covariance terms"

    projector_dims: tuple[int, ...] = (8192, 8192, 8192)
    """Widths of the projection head."""


@dataclass(frozen=True, kw_only=True)
class BarlowTwinsOptions(MethodOptions):
    """Options of Barlow Twins."""

    name: ClassVar[str] = "barlow-twins"
    summary: ClassVar[str] = "cross-correlation of the views equals the identity"

    projector_dims: tuple[int, ...] = (8192, 8192, 8192)
    """Widths of the projection head."""


@dataclass(frozen=True, kw_only=True)
class CLIPOptions(TextMethodOptions):
    """Options of CLIP."""

    name: ClassVar[str] = "clip"
    summary: ClassVar[str] = "InfoNCE between images and captions"


@dataclass(frozen=True, kw_only=True)
class SigLIPOptions(TextMethodOptions):
    """Options of SigLIP."""

    name: ClassVar[str] = "siglip"
    summary: ClassVar[str] = "a sigmoid loss per image-caption pair"


@dataclass(frozen=True, kw_only=True)
class DeCLIPOptions(TextMethodOptions, MemoryBankOptions):
    """Options of DeCLIP."""

    name: ClassVar[str] = "declip"
    summary: ClassVar[str] = "`clip`, and the caption's nearest neighbor in a memory bank"
    negatives: ClassVar[Negatives] = "batch and memory bank"
    requirements: ClassVar[tuple[str, ...]] = ("captions", "memory bank")
    default_memory_bank_size: ClassVar[int] = 16_384


@dataclass(frozen=True, kw_only=True)
class SLIPOptions(TextMethodOptions):
    """Options of SLIP; with language pairs, LGSLIP."""

    name: ClassVar[str] = "slip"
    summary: ClassVar[str] = "the sum of `clip` and `simclr`"
    inputs: ClassVar[MethodInputs] = "pair_and_caption"

    projector_dims: tuple[int, ...] = (2048, 2048, 512)
    """Widths of the projection head."""
    temperature: float = 0.1
    """Softmax temperature."""


@dataclass(frozen=True, kw_only=True)
class PairClassifierOptions(MethodOptions):
    """Options of the pair classifier."""

    name: ClassVar[str] = "pair-classifier"
    summary: ClassVar[str] = "classify whether two images have similar captions"
    negatives: ClassVar[Negatives] = "batch"
    requirements: ClassVar[tuple[str, ...]] = ("caption embeddings",)

    negative_threshold: float = 0.2
    """Caption cosine similarity up to which two images are a negative."""
    negatives_per_positive: float = 1.0
    """Negatives per positive."""
    margin: float | None = None
    """Margin of a cosine embedding loss; by default a classifier is trained."""
    mine_in_batch: bool = False
    """Take the positives from all pairs of the batch as well."""
    positive_threshold: float = 0.8
    """Caption cosine similarity from which two images of a batch are a positive (`mine_in_batch`)."""

    @property
    def uses_caption_embeddings(self) -> bool:
        """Whether a batch includes caption embeddings."""
        return True


METHODS: dict[str, type[MethodOptions]] = {
    options.name: options
    for options in (
        SimCLROptions,
        DCLOptions,
        SupConOptions,
        NNCLROptions,
        MoCoOptions,
        MoCoV3Options,
        SimSiamOptions,
        BYOLOptions,
        SwAVOptions,
        VICRegOptions,
        BarlowTwinsOptions,
        CLIPOptions,
        SigLIPOptions,
        DeCLIPOptions,
        SLIPOptions,
        PairClassifierOptions,
    )
}


def option_names(options: MethodOptions | type[MethodOptions]) -> tuple[str, ...]:
    """Return the names of a method's options."""
    return tuple(field.name for field in fields(options))


def option_values(options: MethodOptions) -> dict[str, Any]:
    """Return a method's options by name."""
    return {name: getattr(options, name) for name in option_names(options)}


def parse_method_options(method: str, overrides: Mapping[str, Any]) -> MethodOptions:
    """Return the options of a method.

    Args:
        method: The name of the method.
        overrides: Options that differ from the defaults, by name.

    Raises:
        InvalidInputError: if the method is unknown, an option does not belong to it, or a value is invalid.
    """
    if method not in METHODS:
        raise InvalidInputError(
            f"unknown method {method!r}; known: {', '.join(METHODS)}.{did_you_mean(method, list(METHODS))}",
            field="method",
        )
    options = METHODS[method]
    for name in overrides:
        if name not in option_names(options):
            used_by = ", ".join(other for other in METHODS if name in option_names(METHODS[other]))
            raise InvalidInputError(
                f"`{name}` is not an option of method {method!r}"
                + (f" (used by: {used_by})" if used_by else f"; its options: {_join_names(options)}"),
                field=name,
            )
    return options(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in overrides.items()}
    )


def _join_names(options: type[MethodOptions]) -> str:
    return ", ".join(f"`{name}`" for name in option_names(options)) or "none"


def check_positive(name: str, value: float | None) -> None:
    """Check that a number is above 0, if it is given.

    Raises:
        InvalidInputError: if it is not; `field` is its name.
    """
    if value is not None and not value > 0:
        raise InvalidInputError(f"`{name}` must be above 0, got {value}", field=name)
