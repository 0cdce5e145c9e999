"""The settings of a training run and what follows from them."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from likewise.errors import InvalidInputError, TrainingError
from likewise.neighbors.config import check_choices, check_range
from likewise.pairs.config import PairConfig
from likewise.training.methods.options import (
    FalseNegativeMode,
    MethodOptions,
    TextTowerMode,
    check_method_options,
    get_method_options,
)

LR_REFERENCE_BATCH = 512
MAX_STEPS = 250_000  # the paper's
DEFAULT_EPOCHS = 100
DEFAULT_NUM_VALIDATIONS = 20  # of held-out images, in a run
WARMUP_FRACTION = 0.02  # the paper's 5,000 of 250,000 steps
BANK_SIZE_DIVISOR = 4  # a queue holds at most a quarter of the images where nobody asks for more
_LOCAL_CROP_SCALE = (0.05, 0.14)  # of SwAV's small views, at 3/7 of the side
_LOCAL_CROP_SIZE_RATIO = 96 / 224

Stem = Literal["default", "cifar"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
OptimizerName = Literal["adamw", "adam"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What decides the weights of a run beside the pairs; the defaults are the paper's recipe.

    Attributes:
        backbone: Any timm model.
        image_size: Side of the square views in pixels.
        epochs: Passes over the images; 100 if neither this nor `max_steps` is given, but at most 250,000
            steps.
        max_steps: Steps in all, instead of epochs.
        batch_size: Pairs a step.
        grad_cache_chunk_size: Pairs that pass through the network at a time, of all processes together and
            at least two
            of each, for batches beyond memory (gradient caching). The loss is still that of the whole batch;
            a step costs one more forward pass, and batch norm sees chunks. All at once where not given.
        method: What the loss asks: `simclr`, `dcl`, `supcon`, `nnclr`, `moco`, `moco-v3`, `simsiam`,
            `byol`, `swav`, `vicreg`, `barlow-twins`, `clip`, `siglip`, `declip`, `slip` or `pair-classifier`;
            docs/guide/training.md tells them apart.
        augmentation: `crop` (crops of 50 to 100 % alone) or `simclr` (also mirrored, jittered, grey,
            blurred);
            by default `simclr` where images are paired with themselves and `crop` else, as in the paper.
        stem: `small` keeps resolution for images up to 64 pixels, `standard` is timm's own; by the size.
        optimizer: `adamw`, or `adam` (decay is then part of the gradient).
        base_lr: Learning rate at a batch of 512; scaled linearly with the batch.
        weight_decay: Never on norms and biases.
        temperature: What similarities are divided by; by the method.
        projector_dims: Widths of the projection head; by the method.
        ema_momentum: Share of the slow copy of the encoder that is kept each step; by the method.
        memory_bank_size: Earlier outputs that are remembered; by the method, but at most a quarter of the
            images. With
            `swav`, 0 does without.
        num_prototypes: Clusters of `swav`.
        num_local_crops: Small crops that `swav` shows beside the two views; the paper of SwAV has 6.
        num_positives: Partners that `supcon` shows at once; they are drawn from the k nearest (`-k`).
        text_tower: Captions go through a text `tower` that is trained too, or are `frozen` embeddings.
        text_width: Width of the text tower; a multiple of 64.
        text_layers: Layers of the text tower.
        false_negatives: What becomes of negatives whose captions are alike to the image's: they count like
            `all`
            others, are left out (`mask`), count less the more alike they are (`weight`), or become targets in
            proportion to their similarity (`soften`).
        positive_threshold: From which cosine similarity on captions are alike: also the positives of
            `pair-classifier`
            with `mine_in_batch`.
        negative_threshold: Up to which cosine similarity captions are unlike: the negatives of
            `pair-classifier`.
        negatives_per_positive: Negatives a positive, of `pair-classifier`.
        margin: Train `pair-classifier` by a margin on cosine instead of a classifier.
        mine_in_batch: Let `pair-classifier` take its positives, too, from the pairs within a batch.
        precision: `auto` is bf16 or fp16 where the device has it, else float32.
        init: `scratch`, `pretrained` (timm's weights, needs a network), or a file or run to start from.
        num_val_pairs: Images kept out of training to score the encoder by as it learns; the best encoder is
            then
            kept instead of the last. 0 scores nothing and keeps the last.
        val_every: Steps from score to score; 20 scores a run where not given.
        early_stopping_patience: Stop after so many scores without a better one; never where not given.
        seed: Decides the initial weights, the order, the partners and the views.
    """

    method: str = "simclr"
    backbone: str = "resnet50"
    image_size: int = 224
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int = 512
    grad_cache_chunk_size: int | None = None
    augmentation: str | None = None
    stem: Stem | None = None
    optimizer: OptimizerName = "adamw"
    base_lr: float = 1e-3
    weight_decay: float = 0.01
    temperature: float | None = None
    projector_dims: tuple[int, ...] | None = None
    ema_momentum: float | None = None
    memory_bank_size: int | None = None
    num_prototypes: int = 3000
    num_local_crops: int = 0
    num_positives: int = 1
    text_tower: TextTowerMode = "train"
    text_width: int = 512
    text_layers: int = 12
    false_negatives: FalseNegativeMode = "keep"
    positive_threshold: float = 0.8
    negative_threshold: float = 0.2
    negatives_per_positive: float = 1.0
    margin: float | None = None
    mine_in_batch: bool = False
    precision: Precision = "auto"
    init: str = "scratch"
    num_val_pairs: int = 0
    val_every: int | None = None
    early_stopping_patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            InputError: naming the setting and what it may be.
        """
        check_choices(self)
        if self.epochs is not None and self.max_steps is not None:
            raise InvalidInputError("give --epochs or --steps, not both")
        check_method_options(self.method, self._non_default_fields())
        if self.seed < 0:
            raise InvalidInputError(f"--seed is {self.seed}; it must be 0 or more")
        if self.image_size < 16:
            raise InvalidInputError(
                f"--size is {self.image_size}; views of fewer than 16 pixels show nothing"
            )
        if self.batch_size < 2:
            raise InvalidInputError(
                f"--batch-size is {self.batch_size}; images are told from others, and batch norm compares "
                "them: a step needs at least 2"
            )
        if self.grad_cache_chunk_size is not None and self.grad_cache_chunk_size < 2:
            raise InvalidInputError(
                f"--chunk-size is {self.grad_cache_chunk_size}; batch norm compares images: give 2 or more"
            )
        for name in (
            "epochs",
            "max_steps",
            "num_prototypes",
            "num_positives",
            "text_layers",
            "val_every",
            "early_stopping_patience",
        ):
            check_range(name, getattr(self, name), 1, None)
        for name in ("memory_bank_size", "num_local_crops", "num_val_pairs"):
            check_range(name, getattr(self, name), 0, None)
        for name, minimum in (("negative_threshold", -1), ("margin", -1), ("ema_momentum", 0)):
            check_range(name, getattr(self, name), minimum, 1)
        for name in ("temperature", "base_lr", "negatives_per_positive", "positive_threshold"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidInputError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
        if self.positive_threshold > 1:
            raise InvalidInputError(f"--alike is {self.positive_threshold}; it must be at most 1")
        self._validate_combinations()

    def _non_default_fields(self) -> frozenset[str]:
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) != field.default)

    def _validate_combinations(self) -> None:
        """Refuse combinations that no method can mean."""
        if self.projector_dims is not None and not (self.projector_dims and min(self.projector_dims) > 0):
            raise InvalidInputError(
                f"--head is {self.projector_dims}; give widths above 0, such as 2048 2048 128"
            )
        if self.text_width % 64 or self.text_width < 64:
            raise InvalidInputError(f"--text-width is {self.text_width}; it must be a multiple of 64")
        if self.method == "dcl" and self.false_negatives == "soft_targets":
            raise InvalidInputError(
                "`false_negatives`: method 'dcl' has no positive in its denominator, so no 'soft_targets'; "
                "use 'mask' or 'reweight', or method 'simclr'"
            )
        if (
            self.memory_bank_size is not None
            and self.memory_bank_size < self.batch_size
            and not (self.method == "swav" and self.memory_bank_size == 0)
        ):
            raise InvalidInputError(
                f"--queue is {self.memory_bank_size}; it must hold a batch of {self.batch_size}"
            )
        if self.early_stopping_patience is not None and self.num_val_pairs == 0:
            raise InvalidInputError(
                "--patience counts scores on images held out of training: give --held-out too"
            )
        if self.val_every is not None and self.num_val_pairs == 0:
            raise InvalidInputError("--score-every needs images to score by: give --held-out too")
        if 0 < self.num_val_pairs < 10:
            raise InvalidInputError(f"--held-out is {self.num_val_pairs}; fewer than 10 images tell nothing")

    @property
    def method_options(self) -> MethodOptions:
        """What the method needs."""
        return get_method_options(self.method)

    @property
    def uses_caption_embeddings(self) -> bool:
        """Whether batches bring the embeddings of captions along."""
        uses_frozen_text = self.method_options.needs_text and self.text_tower == "frozen"
        return self.method == "pair-classifier" or self.false_negatives != "keep" or uses_frozen_text

    @property
    def uses_tokens(self) -> bool:
        """Whether batches bring the captions themselves along."""
        return self.method_options.needs_text and self.text_tower == "train"


def validate_combination(config: TrainConfig, pair_config: PairConfig) -> None:
    """Refuse a method and a source of pairs that make no sense of each other.

    Raises:
        InputError: with what to do.
    """
    if config.mine_in_batch and pair_config.source != "self":
        raise InvalidInputError(
            "--in-batch takes pairs from within each batch, not from --pairs "
            f"{pair_config.source}; give --pairs self with it"
        )
    if (
        config.num_positives > 1
        and pair_config.source != "label"
        and (pair_config.k is None or pair_config.k < config.num_positives)
    ):
        raise InvalidInputError(
            f"--partners {config.num_positives} wants that many to draw from: give -k "
            f"{config.num_positives} or "
            "more"
        )
    if config.num_val_pairs and config.mine_in_batch:
        raise InvalidInputError("--held-out scores pairs, and with --in-batch there are none; leave it out")


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """One view of a batch: of whom, how, and how large.

    Attributes:
        source: 0 for the anchor, n for its nth partner.
        augmentation: The recipe.
        image_size: Side in pixels.
        crop_scale: Least and greatest share of the area, where it is not the recipe's.
    """

    source: int
    augmentation: str
    image_size: int
    crop_scale: tuple[float, float] | None = None


def build_view_specs(config: TrainConfig, pair_config: PairConfig) -> tuple[ViewSpec, ...]:
    """Return the views that a step of a method shows, in the order that the method expects."""
    augmentation, image_size = resolve_augmentation(config, pair_config), config.image_size
    anchor = ViewSpec(source=0, augmentation=augmentation, image_size=image_size)
    if config.method_options.inputs == "anchor" or config.mine_in_batch:
        return (anchor,)
    partners = tuple(
        ViewSpec(source=i, augmentation=augmentation, image_size=image_size)
        for i in range(1, config.num_positives + 1)
    )
    local_size = round(image_size * _LOCAL_CROP_SIZE_RATIO)
    extra_views = tuple(
        ViewSpec(source=i % 2, augmentation=augmentation, image_size=local_size, crop_scale=_LOCAL_CROP_SCALE)
        for i in range(config.num_local_crops)
    )
    if config.method_options.inputs == "pair and caption" and augmentation != "crop":
        extra_views = (ViewSpec(source=0, augmentation="crop", image_size=image_size),)
    return (anchor, *partners, *extra_views)


def resolve_augmentation(config: TrainConfig, pair_config: PairConfig) -> str:
    """Return the recipe of views by name: as asked for, or what suits the pairs.

    An image beside itself differs from itself in what views change alone; crops would teach little. An image
    beside its caption does not.
    """
    if config.augmentation is not None:
        return config.augmentation
    if config.method_options.inputs == "anchor":
        return "crop"
    return "simclr" if pair_config.source == "self" or pair_config.self_pair_prob > 0 else "crop"


@dataclass(frozen=True, kw_only=True)
class TrainSchedule:
    """What follows from the settings for a number of images; recorded, never written back."""

    steps: int
    steps_per_epoch: int
    warmup_steps: int
    peak_lr: float
    log_every: int
    val_every: int
    memory_bank_size: int | None


def build_schedule(config: TrainConfig, num_images: int, dataset_path: Path) -> TrainSchedule:
    """Work out steps and rates.

    Raises:
        TrainingError: where there are fewer usable images than a batch holds.
    """
    steps_per_epoch = num_images // config.batch_size
    if steps_per_epoch == 0:
        raise TrainingError(
            f"{dataset_path} has {num_images} usable images, fewer than a batch of {config.batch_size}; "
            + (f"use --batch-size {num_images} or less" if num_images > 1 else "training needs at least 2")
        )
    steps = config.max_steps
    if steps is None and config.epochs is not None:
        steps = config.epochs * steps_per_epoch
    if steps is None:
        steps = min(DEFAULT_EPOCHS * steps_per_epoch, MAX_STEPS)
    memory_bank_size = (
        config.method_options.memory_bank_size if config.memory_bank_size is None else config.memory_bank_size
    )
    if memory_bank_size is not None and config.memory_bank_size is None:
        memory_bank_size = max(config.batch_size, min(memory_bank_size, num_images // BANK_SIZE_DIVISOR))
    if memory_bank_size is not None and memory_bank_size > num_images:
        raise TrainingError(
            f"--queue {memory_bank_size} is longer than the {num_images} usable images of "
            f"{dataset_path}, which would meet "
            f"themselves in it; use at most {num_images}, better {num_images // BANK_SIZE_DIVISOR}"
        )
    return TrainSchedule(
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=round(WARMUP_FRACTION * steps),
        # Linear in the batch (Goyal et al. 2017).
        peak_lr=config.base_lr * config.batch_size / LR_REFERENCE_BATCH,
        log_every=max(1, min(50, steps // 100)),
        val_every=config.val_every or max(1, steps // DEFAULT_NUM_VALIDATIONS),
        memory_bank_size=memory_bank_size,
    )
