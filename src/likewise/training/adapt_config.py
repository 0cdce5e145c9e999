"""`AdaptConfig`, the settings of an adaptation, and the options of its levels.

This module imports no torch, because the command line reads it before it parses arguments.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from likewise.errors import InvalidInputError, did_you_mean
from likewise.neighbors.config import check_choices, check_range
from likewise.training.config import MIN_VAL_PAIRS, Augmentation, Precision
from likewise.training.methods.options import check_positive


@dataclass(frozen=True, kw_only=True)
class LevelOptions:
    """Base class of the options of a level: what is trained, and how.

    Attributes:
        name: The name of the level, as in `AdaptConfig(level=name)`.
        summary: What is trained, in one line.
        default_batch_size: Pairs per step.
        default_lr: Peak learning rate.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    default_batch_size: ClassVar[int]
    default_lr: ClassVar[float]


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(LevelOptions):
    """Options of the level `adapter`."""

    name: ClassVar[str] = "adapter"
    summary: ClassVar[str] = "a residual adapter on frozen features"
    default_batch_size: ClassVar[int] = 512
    default_lr: ClassVar[float] = 1e-3

    hidden_dim: int = 512
    """Width of the hidden layer of the adapter."""
    input_dropout: float = 0.2
    """Dropout on the features, in place of image augmentation."""
    caption_weight: float = 1.0
    """Weight of the loss that compares images with caption embeddings; 0 leaves the loss of pairs alone."""
    caption_temperature: float = 0.05
    """Softmax temperature of the caption similarities that are the targets of this loss."""

    def __post_init__(self) -> None:
        """Validate every field.

        Raises:
            InvalidInputError: if a field is out of range; `field` is its name.
        """
        check_range("hidden_dim", self.hidden_dim, 1, None)
        check_positive("caption_temperature", self.caption_temperature)
        check_range("caption_weight", self.caption_weight, 0, None)
        _check_fraction("input_dropout", self.input_dropout)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(LevelOptions):
    """Base class of the options of levels that change the weights of the encoder."""

    default_batch_size: ClassVar[int] = 128

    augmentation: Augmentation | None = None
    """Augmentation of the views: `crop`, or `simclr` (crop, flip, color jitter, grayscale, blur). Defaults to
    `simclr` for self pairs and to `crop` otherwise."""
    frozen_fraction: float = 0.1
    """Fraction of the steps, at the start, in which the projection head alone is trained."""
    anchor_weight: float = 0.5
    """Weight of the squared distance between the features and those of the start, each divided by its
    standard deviation over the images; 0 computes no features of the start."""
    ema_momentum: float = 0.99
    """Momentum of the exponential moving average of the weights, which is the result of training."""
    grad_cache_chunk_size: int | None = None
    """Pairs of all processes that pass through the network at a time (gradient caching), for batches beyond
    memory. Defaults to the whole batch."""
    precision: Precision = "auto"
    """Precision of matrix products; `auto` is bf16 or fp16 if the device supports it, else fp32."""

    def __post_init__(self) -> None:
        """Validate every field.

        Raises:
            InvalidInputError: if a field is out of range; `field` is its name.
        """
        check_choices(self)
        check_range("anchor_weight", self.anchor_weight, 0, None)
        check_range("grad_cache_chunk_size", self.grad_cache_chunk_size, 2, None)
        for name in ("frozen_fraction", "ema_momentum"):
            _check_fraction(name, getattr(self, name))
        self._check_level()

    def _check_level(self) -> None:
        """Validate the fields of a subclass."""


@dataclass(frozen=True, kw_only=True)
class FullOptions(FinetuneOptions):
    """Options of the level `full`."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "all weights of the encoder"
    default_lr: ClassVar[float] = 1e-4

    layer_decay: float = 0.85
    """Factor of the learning rate from each layer to the one before it (layer-wise learning-rate decay)."""

    def _check_level(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise InvalidInputError(
                f"`layer_decay` must be above 0 and at most 1, got {self.layer_decay}", field="layer_decay"
            )


@dataclass(frozen=True, kw_only=True)
class LoraOptions(FinetuneOptions):
    """Options of the level `lora`."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank updates of linear and convolutional layers"
    default_lr: ClassVar[float] = 1e-3

    lora_rank: int = 8
    """Rank of the update of each layer."""
    lora_alpha: int = 16
    """Scale of the updates, which are multiplied by `lora_alpha` / `lora_rank`."""

    def _check_level(self) -> None:
        for name in ("lora_rank", "lora_alpha"):
            check_range(name, getattr(self, name), 1, None)


LEVELS: dict[str, type[LevelOptions]] = {
    options.name: options for options in (AdapterOptions, LoraOptions, FullOptions)
}


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Settings of an adaptation of a pretrained encoder, apart from the pairs.

    ::

        AdaptConfig(level="full", max_steps=1000)
        AdaptConfig(level=LoraOptions(lora_rank=4), batch_size=64)
    """

    level: str | LevelOptions = "adapter"
    """What is trained: `adapter` (a residual adapter on frozen features), `lora` (low-rank updates of the
    weights) or `full` (all weights); or the options of the level."""
    projector_dims: tuple[int, ...] = (512, 128)
    """Widths of the projection head, which is discarded after training."""
    max_steps: int = 600
    """Optimizer steps."""
    batch_size: int | None = None
    """Pairs per step; defaults to 512 for `adapter` and to 128 for `lora` and `full`."""
    lr: float | None = None
    """Peak learning rate of AdamW, after a linear warm-up; it falls along a cosine. Defaults to 1e-3 for
    `adapter` and `lora`, and to 1e-4 for `full`."""
    weight_decay: float = 0.01
    """Weight decay; biases and norms have none."""
    temperature: float = 0.1
    """Softmax temperature of the loss of pairs and, in `adapter`, of captions."""
    num_val_pairs: int | None = None
    """Pairs that are held out to choose the blend; defaults to a tenth of the images, at most 500."""
    max_retention_loss: float = 0.005
    """Largest loss of accuracy on the retention dataset, as a fraction."""
    seed: int = 0
    """Seed of initial weights, order of images, partners, captions, augmentation and dropout."""

    def __post_init__(self) -> None:
        """Validate every field.

        Raises:
            InvalidInputError: if a field is out of range; `field` is its name.
        """
        if isinstance(self.level, str):
            parse_level_options(self.level, {})
        check_range("max_steps", self.max_steps, 1, None)
        check_range("batch_size", self.batch_size, 2, None)
        check_range("seed", self.seed, 0, None)
        for name in ("lr", "temperature"):
            check_positive(name, getattr(self, name))
        for name in ("weight_decay", "max_retention_loss"):
            check_range(name, getattr(self, name), 0, None)
        check_range("num_val_pairs", self.num_val_pairs, MIN_VAL_PAIRS, None)

    @property
    def level_options(self) -> LevelOptions:
        """The options of the level; its defaults if `level` is a name."""
        return parse_level_options(self.level, {}) if isinstance(self.level, str) else self.level

    @property
    def pairs_per_step(self) -> int:
        """`batch_size`, or the default of the level."""
        return self.level_options.default_batch_size if self.batch_size is None else self.batch_size

    @property
    def peak_lr(self) -> float:
        """`lr`, or the default of the level."""
        return self.level_options.default_lr if self.lr is None else self.lr


def parse_level_options(level: str, overrides: Mapping[str, Any]) -> LevelOptions:
    """Return the options of a level.

    Args:
        level: The name of the level.
        overrides: Options that differ from the defaults, by name.

    Raises:
        InvalidInputError: if the level is unknown, an option does not belong to it, or a value is invalid.
    """
    if level not in LEVELS:
        raise InvalidInputError(
            f"unknown level {level!r}; known: {', '.join(LEVELS)}.{did_you_mean(level, list(LEVELS))}",
            field="level",
        )
    names = {name: {field.name for field in fields(options)} for name, options in LEVELS.items()}
    for option in overrides:
        if option not in names[level]:
            used_by = ", ".join(name for name in LEVELS if option in names[name])
            raise InvalidInputError(
                f"`{option}` is not an option of level {level!r}" + f" (used by: {used_by})" * bool(used_by),
                field=option,
            )
    return LEVELS[level](**overrides)


def parse_adapt_config(settings: Mapping[str, Any]) -> AdaptConfig:
    """Build a config from flat settings: fields of `AdaptConfig` and options of its level, by name.

    Raises:
        InvalidInputError: if a name or value is invalid; `field` is the name.
    """
    config_fields = {field.name for field in fields(AdaptConfig)}
    common = {name: value for name, value in settings.items() if name in config_fields}
    overrides = {name: value for name, value in settings.items() if name not in config_fields}
    level = common.pop("level", AdaptConfig.level)
    return AdaptConfig(level=parse_level_options(level, overrides), **common)


def adapt_config_to_dict(config: AdaptConfig) -> dict[str, Any]:
    """Return a config as flat settings, with the defaults of its level."""
    options = config.level_options
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    values |= {"level": options.name, "batch_size": config.pairs_per_step, "lr": config.peak_lr}
    return values | {field.name: getattr(options, field.name) for field in fields(options)}


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise InvalidInputError(f"`{name}` must be at least 0 and below 1, got {value}", field=name)
