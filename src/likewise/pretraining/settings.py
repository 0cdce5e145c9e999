"""The settings of a training run and what follows from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from likewise.errors import InputError, TrainingError
from likewise.neighbors.rules import PairRule, check_between, check_choices

REFERENCE_BATCH = 512
MAX_STEPS = 250_000  # the paper's
DEFAULT_EPOCHS = 100
WARMUP_SHARE = 0.02  # the paper's 5,000 of 250,000 steps
HEAD = (2048, 2048, 128)

Stem = Literal["standard", "small"]
Precision = Literal["auto", "float32", "bf16", "fp16"]
Negatives = Literal["all", "mask", "weight", "soften"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What decides the weights of a run beside the pairs; the defaults are the paper's recipe.

    Attributes:
        backbone: Any timm model.
        size: Side of the square views in pixels.
        epochs: Passes over the images; 100 if neither this nor `steps` is given, but at most 250,000 steps.
        steps: Steps in all, instead of epochs.
        batch_size: Pairs a step.
        method: What the loss asks of a pair: `simclr` (that they find each other among the batch) or
            `pair-classifier` (that pairs described alike are told from pairs that are not).
        views: `crop` (crops of 50 to 100 % alone) or `simclr` (also mirrored, jittered, grey, blurred);
            by default `simclr` where images are paired with themselves and `crop` else, as in the paper.
        stem: `small` keeps resolution for images up to 64 pixels, `standard` is timm's own; by the size.
        rate: Learning rate at a batch of 512; scaled linearly with the batch.
        weight_decay: Of AdamW; never on norms and biases.
        temperature: Of NT-Xent.
        negatives: What becomes of negatives whose captions are alike to the image's: they count like `all`
            others, are left out (`mask`), count less the more alike they are (`weight`), or become targets in
            proportion to their similarity (`soften`).
        alike: From which cosine similarity on captions are alike.
        unlike: Up to which cosine similarity captions are unlike: the negatives of `pair-classifier`.
        negative_ratio: Negatives a positive, of `pair-classifier`.
        margin: Train `pair-classifier` by a margin on cosine instead of a classifier.
        precision: `auto` is bf16 or fp16 where the device has it, else float32.
        init: `scratch`, `pretrained` (timm's weights, needs a network), or a file or run to start from.
        seed: Decides the initial weights, the order, the partners and the views.
    """

    method: str = "simclr"
    backbone: str = "resnet50"
    size: int = 224
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 512
    views: str | None = None
    stem: Stem | None = None
    rate: float = 1e-3
    weight_decay: float = 0.01
    temperature: float = 0.1
    negatives: Negatives = "all"
    alike: float = 0.8
    unlike: float = 0.2
    negative_ratio: float = 1.0
    margin: float | None = None
    precision: Precision = "auto"
    init: str = "scratch"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            InputError: naming the setting and what it may be.
        """
        check_choices(self)
        if self.epochs is not None and self.steps is not None:
            raise InputError("give --epochs or --steps, not both")
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} is {value}; at least 1 is needed")
        if self.batch_size < 2:
            raise InputError(f"--batch-size is {self.batch_size}; contrast needs at least 2 pairs a step")
        if self.seed < 0:
            raise InputError(f"--seed is {self.seed}; it must be 0 or more")
        if self.size < 16:
            raise InputError(f"--size is {self.size}; views of fewer than 16 pixels show nothing")
        if not (self.temperature > 0 and self.rate > 0):
            raise InputError("--temperature and --rate must be above 0")
        for name in ("unlike", "margin"):
            check_between(name, getattr(self, name), -1, 1)
        if not 0 < self.alike <= 1:
            raise InputError(f"--alike is {self.alike}; it must be above 0 and at most 1")
        if not self.negative_ratio > 0:
            raise InputError(f"--negative-ratio is {self.negative_ratio}; it must be above 0")


def view_name(settings: TrainSettings, rule: PairRule) -> str:
    """Return the recipe of views by name: as asked for, or what suits the pairs.

    An image beside itself differs from itself in what views change alone; crops would teach little.
    """
    if settings.views is not None:
        return settings.views
    return "simclr" if rule.pairs == "self" or rule.self_share > 0 else "crop"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What follows from the settings for a number of images; recorded, never written back."""

    steps: int
    steps_per_epoch: int
    warmup: int
    peak_rate: float
    log_every: int


def plan(settings: TrainSettings, images: int, collection: Path) -> Plan:
    """Work out steps and rates.

    Raises:
        TrainingError: where there are fewer usable images than a batch holds.
    """
    per_epoch = images // settings.batch_size
    if per_epoch == 0:
        raise TrainingError(
            f"{collection} has {images} usable images, fewer than a batch of {settings.batch_size}; "
            + (f"use --batch-size {images} or less" if images > 1 else "training needs at least 2")
        )
    steps = settings.steps
    if steps is None and settings.epochs is not None:
        steps = settings.epochs * per_epoch
    if steps is None:
        steps = min(DEFAULT_EPOCHS * per_epoch, MAX_STEPS)
    return Plan(
        steps=steps,
        steps_per_epoch=per_epoch,
        warmup=round(WARMUP_SHARE * steps),
        # Linear in the batch (Goyal et al. 2017).
        peak_rate=settings.rate * settings.batch_size / REFERENCE_BATCH,
        log_every=max(1, min(50, steps // 100)),
    )
