"""`TrainConfig`, the settings of a training run, and the values derived from them.

This module imports no torch, because the command line reads it before it parses arguments.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from likewise.data.config import IMAGENET_MEAN, IMAGENET_STD
from likewise.errors import InvalidInputError, TrainingError
from likewise.neighbors.config import check_choices, check_range
from likewise.pairs.config import PairConfig
from likewise.training.methods.options import (
    MemoryBankOptions,
    MethodOptions,
    PairClassifierOptions,
    SupConOptions,
    SwAVOptions,
    check_positive,
    option_values,
    parse_method_options,
)

LR_REFERENCE_BATCH = 512
MAX_STEPS = 250_000  # of the paper
DEFAULT_BACKBONE = "resnet50"
DEFAULT_IMAGE_SIZE = 224
BACKBONE_INITS = ("scratch", "pretrained")  # `init` that builds `backbone`
DEFAULT_EPOCHS = 100
DEFAULT_NUM_VALIDATIONS = 20
WARMUP_FRACTION = 0.02  # 5,000 of 250,000 steps in the paper
BANK_SIZE_DIVISOR = 4  # the default memory bank holds at most a quarter of the images
MIN_IMAGE_SIZE = 16
MIN_VAL_PAIRS = 10
_LOCAL_CROP_SCALE = (0.05, 0.14)  # of SwAV
_LOCAL_CROP_SIZE_RATIO = 96 / 224  # of SwAV

Augmentation = Literal["crop", "simclr"]
Stem = Literal["default", "cifar"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
OptimizerName = Literal["adamw", "adam"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run, apart from the pairs; the defaults are the paper's recipe.

    ::

        TrainConfig(method="simclr", backbone="resnet18", image_size=64, batch_size=128, epochs=20)
        TrainConfig(method=SimCLROptions(temperature=0.2, false_negatives="mask"))
    """

    method: str | MethodOptions = "simclr"
    """Pre-training method: its name (`likewise methods` lists them), or its options."""
    backbone: str | None = None
    """Name of a timm model; defaults to that of `init`, else to resnet50. A weights file that names no model
    needs it, and takes `torchvision:NAME`, too."""
    image_size: int | None = None
    """Height and width of the views in pixels; defaults to that of `init`, else to 224."""
    epochs: int | None = None
    """Epochs; defaults to 100, but at most 250,000 steps."""
    max_steps: int | None = None
    """Optimizer steps, instead of `epochs`."""
    batch_size: int = 512
    """Pairs per step, over all processes."""
    grad_cache_chunk_size: int | None = None
    """Pairs of all processes that pass through the network at a time (gradient caching), for batches beyond
    memory; the loss is that of the whole batch. Defaults to the whole batch."""
    augmentation: Augmentation | None = None
    """Augmentation of the views: `crop`, or `simclr` (crop, flip, color jitter, grayscale, blur). Defaults to
    `simclr` for self pairs and to `crop` otherwise, as in the paper."""
    stem: Stem | None = None
    """First layers of the backbone: `default` is timm's, `cifar` keeps the resolution. Defaults to that of
    `init`, else to `cifar` for images up to 64 pixels."""
    optimizer: OptimizerName = "adamw"
    """`adamw`, or `adam` (weight decay is then part of the gradient)."""
    base_lr: float = 1e-3
    """Peak learning rate at batch size 512; it is scaled linearly with the batch size."""
    weight_decay: float = 0.01
    """Weight decay; biases and norms have none."""
    precision: Precision = "auto"
    """Precision of matrix products; `auto` is bf16 or fp16 if the device supports it, else fp32."""
    init: str = "scratch"
    """Initial weights: `scratch`, `pretrained` (timm's, for `backbone`), a finished run, a weights file, or a
    pretrained encoder: `timm:NAME`, `torchvision:NAME`, `hf:NAME`, `clip:ARCH/WEIGHTS` or
    `hub:OWNER/REPO/ENTRY`. An encoder keeps its image size, interpolation, mean and standard deviation."""
    num_val_pairs: int = 0
    """Pairs that are held out of training for validation; the encoder with the best score is then the result
    of the run. 0 disables validation."""
    val_every: int | None = None
    """Steps between validations; defaults to 20 validations per run."""
    early_stopping_patience: int | None = None
    """Validations without improvement after which training stops; by default it never stops early."""
    seed: int = 0
    """Seed of the initial weights, the order of images, the partners and the augmentation."""

    def __post_init__(self) -> None:
        """Validate every field and their combinations.

        Raises:
            InvalidInputError: if a field is invalid; `field` is its name.
        """
        check_choices(self)
        check_range("seed", self.seed, 0, None)
        check_range("image_size", self.image_size, MIN_IMAGE_SIZE, None)
        # Contrastive losses and batch norm compare the images of a batch, or of a chunk.
        check_range("batch_size", self.batch_size, 2, None)
        check_range("grad_cache_chunk_size", self.grad_cache_chunk_size, 2, None)
        for name in ("epochs", "max_steps", "val_every", "early_stopping_patience"):
            check_range(name, getattr(self, name), 1, None)
        check_range("num_val_pairs", self.num_val_pairs, 0, None)
        check_positive("base_lr", self.base_lr)
        self._check_combinations()

    def _check_combinations(self) -> None:
        options = self.method_options
        if self.epochs is not None and self.max_steps is not None:
            raise InvalidInputError("give `epochs` or `max_steps`, not both", field="max_steps")
        if (
            isinstance(options, MemoryBankOptions)
            and options.bank_size < self.batch_size
            and options.memory_bank_size is not None
            and not (isinstance(options, SwAVOptions) and options.memory_bank_size == 0)
        ):
            raise InvalidInputError(
                f"`memory_bank_size` must be at least `batch_size` ({self.batch_size}), "
                f"got {options.memory_bank_size}",
                field="memory_bank_size",
            )
        for name in ("early_stopping_patience", "val_every"):
            if getattr(self, name) is not None and self.num_val_pairs == 0:
                raise InvalidInputError(
                    f"`{name}` needs validation pairs: set `num_val_pairs` too", field=name
                )
        if 0 < self.num_val_pairs < MIN_VAL_PAIRS:
            raise InvalidInputError(
                f"`num_val_pairs` must be 0 or at least {MIN_VAL_PAIRS}, got {self.num_val_pairs}",
                field="num_val_pairs",
            )

    @property
    def method_options(self) -> MethodOptions:
        """The options of the method; its defaults if `method` is a name."""
        return parse_method_options(self.method, {}) if isinstance(self.method, str) else self.method


def parse_train_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Build a config from flat settings: fields of `TrainConfig` and options of its method, by name.

    Args:
        settings: For example `{"method": "simclr", "temperature": 0.2, "batch_size": 256}`.

    Raises:
        InvalidInputError: if a name or value is invalid; `field` is the name.
    """
    config_fields = {field.name for field in fields(TrainConfig)}
    common = {name: value for name, value in settings.items() if name in config_fields}
    overrides = {name: value for name, value in settings.items() if name not in config_fields}
    method = common.pop("method", TrainConfig.method)
    return TrainConfig(method=parse_method_options(method, overrides), **common)


def train_config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return a config as flat settings, the inverse of `parse_train_config`; tuples become lists."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    values |= {"method": config.method_options.name} | option_values(config.method_options)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def mines_in_batch(options: MethodOptions) -> bool:
    """Return whether a method takes its positives from within the batch instead of from pairs."""
    return isinstance(options, PairClassifierOptions) and options.mine_in_batch


def validate_combination(config: TrainConfig, pair_config: PairConfig) -> None:
    """Check that a method and a source of pairs fit together.

    Raises:
        InvalidInputError: if they do not; `field` is the option to change.
    """
    options = config.method_options
    if mines_in_batch(options) and pair_config.source != "self":
        raise InvalidInputError(
            f"`mine_in_batch` takes pairs from each batch, not from source {pair_config.source!r}; "
            "use source 'self'",
            field="source",
        )
    if mines_in_batch(options) and config.num_val_pairs:
        raise InvalidInputError(
            "validation needs pairs, and `mine_in_batch` has none: leave `num_val_pairs` at 0",
            field="num_val_pairs",
        )
    num_positives = options.num_positives if isinstance(options, SupConOptions) else 1
    if (
        num_positives > 1
        and pair_config.source != "label"
        and (pair_config.k is None or pair_config.k < num_positives)
    ):
        raise InvalidInputError(
            f"`k` must be at least `num_positives` ({num_positives}), got {pair_config.k}", field="k"
        )


def with_default_backbone(config: TrainConfig) -> TrainConfig:
    """Return a config with the default backbone and image size where it has none."""
    return replace(
        config,
        backbone=DEFAULT_BACKBONE if config.backbone is None else config.backbone,
        image_size=DEFAULT_IMAGE_SIZE if config.image_size is None else config.image_size,
    )


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Interpolation of crops and normalization of channels, as a backbone expects them."""

    interpolation: str = "bilinear"
    """`bilinear` or `bicubic`."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, in [0, 1]."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each channel."""


DEFAULT_PREPROCESSING = Preprocessing()


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """One view of each pair."""

    source: int
    """The image: 0 for the anchor, n for its nth partner."""
    augmentation: str
    """Name of the augmentation."""
    image_size: int
    """Height and width in pixels."""
    crop_scale: tuple[float, float] | None = None
    """Range of the area of a crop as a fraction of the image; defaults to that of the augmentation."""
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING
    """Interpolation of the crop and normalization of its channels."""


def build_view_specs(
    config: TrainConfig, pair_config: PairConfig, preprocessing: Preprocessing = DEFAULT_PREPROCESSING
) -> tuple[ViewSpec, ...]:
    """Return the views of a batch, in the order that the method expects."""
    options, augmentation = config.method_options, resolve_augmentation(config, pair_config)
    image_size = DEFAULT_IMAGE_SIZE if config.image_size is None else config.image_size
    anchor = ViewSpec(source=0, augmentation=augmentation, image_size=image_size, preprocessing=preprocessing)
    if options.inputs == "anchor" or mines_in_batch(options):
        return (anchor,)
    num_positives = options.num_positives if isinstance(options, SupConOptions) else 1
    partners = tuple(replace(anchor, source=i) for i in range(1, num_positives + 1))
    num_local_crops = options.num_local_crops if isinstance(options, SwAVOptions) else 0
    local_crop = replace(
        anchor, image_size=round(image_size * _LOCAL_CROP_SIZE_RATIO), crop_scale=_LOCAL_CROP_SCALE
    )
    extra_views = tuple(replace(local_crop, source=i % 2) for i in range(num_local_crops))
    if options.inputs == "pair_and_caption" and augmentation != "crop":
        extra_views = (replace(anchor, augmentation="crop"),)
    return (anchor, *partners, *extra_views)


def resolve_augmentation(config: TrainConfig, pair_config: PairConfig) -> str:
    """Return the name of the augmentation: the configured one, or the default for the method and pairs."""
    if config.augmentation is not None:
        return config.augmentation
    if config.method_options.inputs == "anchor":
        return "crop"
    return default_augmentation(pair_config)


def default_augmentation(pair_config: PairConfig) -> Augmentation:
    """Return the default augmentation for a source of pairs.

    Two views of one image differ by their augmentation alone, so self pairs need a strong one.
    """
    return "simclr" if pair_config.source == "self" or pair_config.self_pair_prob > 0 else "crop"


@dataclass(frozen=True, kw_only=True)
class TrainSchedule:
    """Values derived from a config and the number of training images."""

    steps: int
    steps_per_epoch: int
    warmup_steps: int
    peak_lr: float
    log_every: int
    val_every: int
    memory_bank_size: int | None


def build_schedule(config: TrainConfig, num_images: int, dataset_path: Path) -> TrainSchedule:
    """Derive the schedule of a run.

    Args:
        config: The config.
        num_images: Number of training images.
        dataset_path: The dataset, for error messages.

    Raises:
        TrainingError: if there are fewer images than a batch or the memory bank holds.
    """
    steps_per_epoch = num_images // config.batch_size
    if steps_per_epoch == 0:
        hint = f"set it to at most {num_images}" if num_images > 1 else "training needs at least 2 images"
        raise TrainingError(
            f"`batch_size` is {config.batch_size}, but {dataset_path} has only {num_images} usable images; "
            f"{hint}",
            field="batch_size",
            path=dataset_path,
        )
    steps = config.max_steps
    if steps is None and config.epochs is not None:
        steps = config.epochs * steps_per_epoch
    if steps is None:
        steps = min(DEFAULT_EPOCHS * steps_per_epoch, MAX_STEPS)
    return TrainSchedule(
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=round(WARMUP_FRACTION * steps),
        # Linear in the batch (Goyal et al. 2017).
        peak_lr=config.base_lr * config.batch_size / LR_REFERENCE_BATCH,
        log_every=max(1, min(50, steps // 100)),
        val_every=config.val_every or max(1, steps // DEFAULT_NUM_VALIDATIONS),
        memory_bank_size=_memory_bank_size(config, num_images, dataset_path),
    )


def _memory_bank_size(config: TrainConfig, num_images: int, dataset_path: Path) -> int | None:
    """Return the size of the memory bank; None if the method has none."""
    options = config.method_options
    if not isinstance(options, MemoryBankOptions):
        return None
    if options.memory_bank_size is None:
        return max(config.batch_size, min(options.bank_size, num_images // BANK_SIZE_DIVISOR))
    if options.memory_bank_size > num_images:
        raise TrainingError(
            f"`memory_bank_size` is {options.memory_bank_size}, but {dataset_path} has only {num_images} "
            f"usable images, which would be compared with their own past outputs; use at most {num_images}, "
            f"better {num_images // BANK_SIZE_DIVISOR}",
            field="memory_bank_size",
            path=dataset_path,
        )
    return options.memory_bank_size
