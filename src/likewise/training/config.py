"""The settings of a training run and what follows from them."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from likewise.errors import InputError, TrainingError
from likewise.neighbors.config import check_between, check_choices
from likewise.pairs.config import PairRule
from likewise.training.methods.options import Needs, Negatives, Text, check_meaning, needs_of

REFERENCE_BATCH = 512
MAX_STEPS = 250_000  # the paper's
DEFAULT_EPOCHS = 100
SCORES = 20  # of held-out images, in a run
WARMUP_SHARE = 0.02  # the paper's 5,000 of 250,000 steps
QUEUE_SHARE = 4  # a queue holds at most a quarter of the images where nobody asks for more
_SMALL_CROP = (0.05, 0.14)  # of SwAV's small views, at 3/7 of the side
_SMALL_SIDE = 96 / 224

Stem = Literal["standard", "small"]
Precision = Literal["auto", "float32", "bf16", "fp16"]
Optimizer = Literal["adamw", "adam"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What decides the weights of a run beside the pairs; the defaults are the paper's recipe.

    Attributes:
        backbone: Any timm model.
        size: Side of the square views in pixels.
        epochs: Passes over the images; 100 if neither this nor `steps` is given, but at most 250,000 steps.
        steps: Steps in all, instead of epochs.
        batch_size: Pairs a step.
        chunk_size: Pairs that pass through the network at a time, of all processes together and at least two
            of each, for batches beyond memory (gradient caching). The loss is still that of the whole batch;
            a step costs one more forward pass, and batch norm sees chunks. All at once where not given.
        method: What the loss asks: `simclr`, `dcl`, `supcon`, `nnclr`, `moco`, `moco-v3`, `simsiam`,
            `byol`, `swav`, `vicreg`, `barlow-twins`, `clip`, `siglip`, `declip`, `slip` or `pair-classifier`;
            docs/guide/training.md tells them apart.
        views: `crop` (crops of 50 to 100 % alone) or `simclr` (also mirrored, jittered, grey, blurred);
            by default `simclr` where images are paired with themselves and `crop` else, as in the paper.
        stem: `small` keeps resolution for images up to 64 pixels, `standard` is timm's own; by the size.
        optimizer: `adamw`, or `adam` (decay is then part of the gradient).
        rate: Learning rate at a batch of 512; scaled linearly with the batch.
        weight_decay: Never on norms and biases.
        temperature: What similarities are divided by; by the method.
        head: Widths of the projection head; by the method.
        momentum: Share of the slow copy of the encoder that is kept each step; by the method.
        queue: Earlier outputs that are remembered; by the method, but at most a quarter of the images. With
            `swav`, 0 does without.
        prototypes: Clusters of `swav`.
        small_views: Small crops that `swav` shows beside the two views; the paper of SwAV has 6.
        partners: Partners that `supcon` shows at once; they are drawn from the k nearest (`-k`).
        text: Captions go through a text `tower` that is trained too, or are `frozen` embeddings.
        text_width: Width of the text tower; a multiple of 64.
        text_layers: Layers of the text tower.
        negatives: What becomes of negatives whose captions are alike to the image's: they count like `all`
            others, are left out (`mask`), count less the more alike they are (`weight`), or become targets in
            proportion to their similarity (`soften`).
        alike: From which cosine similarity on captions are alike: also the positives of `pair-classifier`
            with `in_batch`.
        unlike: Up to which cosine similarity captions are unlike: the negatives of `pair-classifier`.
        negative_ratio: Negatives a positive, of `pair-classifier`.
        margin: Train `pair-classifier` by a margin on cosine instead of a classifier.
        in_batch: Let `pair-classifier` take its positives, too, from the pairs within a batch.
        precision: `auto` is bf16 or fp16 where the device has it, else float32.
        init: `scratch`, `pretrained` (timm's weights, needs a network), or a file or run to start from.
        held_out: Images kept out of training to score the encoder by as it learns; the best encoder is then
            kept instead of the last. 0 scores nothing and keeps the last.
        score_every: Steps from score to score; 20 scores a run where not given.
        patience: Stop after so many scores without a better one; never where not given.
        seed: Decides the initial weights, the order, the partners and the views.
    """

    method: str = "simclr"
    backbone: str = "resnet50"
    size: int = 224
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 512
    chunk_size: int | None = None
    views: str | None = None
    stem: Stem | None = None
    optimizer: Optimizer = "adamw"
    rate: float = 1e-3
    weight_decay: float = 0.01
    temperature: float | None = None
    head: tuple[int, ...] | None = None
    momentum: float | None = None
    queue: int | None = None
    prototypes: int = 3000
    small_views: int = 0
    partners: int = 1
    text: Text = "tower"
    text_width: int = 512
    text_layers: int = 12
    negatives: Negatives = "all"
    alike: float = 0.8
    unlike: float = 0.2
    negative_ratio: float = 1.0
    margin: float | None = None
    in_batch: bool = False
    precision: Precision = "auto"
    init: str = "scratch"
    held_out: int = 0
    score_every: int | None = None
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            InputError: naming the setting and what it may be.
        """
        check_choices(self)
        if self.epochs is not None and self.steps is not None:
            raise InputError("give --epochs or --steps, not both")
        check_meaning(self.method, self._given())
        if self.seed < 0:
            raise InputError(f"--seed is {self.seed}; it must be 0 or more")
        if self.size < 16:
            raise InputError(f"--size is {self.size}; views of fewer than 16 pixels show nothing")
        if self.batch_size < 2:
            raise InputError(
                f"--batch-size is {self.batch_size}; images are told from others, and batch norm compares "
                "them: a step needs at least 2"
            )
        if self.chunk_size is not None and self.chunk_size < 2:
            raise InputError(f"--chunk-size is {self.chunk_size}; batch norm compares images: give 2 or more")
        for name in ("epochs", "steps", "prototypes", "partners", "text_layers", "score_every", "patience"):
            check_between(name, getattr(self, name), 1, None)
        for name in ("queue", "small_views", "held_out"):
            check_between(name, getattr(self, name), 0, None)
        for name, low in (("unlike", -1), ("margin", -1), ("momentum", 0)):
            check_between(name, getattr(self, name), low, 1)
        for name in ("temperature", "rate", "negative_ratio", "alike"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
        if self.alike > 1:
            raise InputError(f"--alike is {self.alike}; it must be at most 1")
        self._check_parts()

    def _given(self) -> frozenset[str]:
        return frozenset(each.name for each in fields(self) if getattr(self, each.name) != each.default)

    def _check_parts(self) -> None:
        """Refuse combinations that no method can mean."""
        if self.head is not None and not (self.head and min(self.head) > 0):
            raise InputError(f"--head is {self.head}; give widths above 0, such as 2048 2048 128")
        if self.text_width % 64 or self.text_width < 64:
            raise InputError(f"--text-width is {self.text_width}; it must be a multiple of 64")
        if self.method == "dcl" and self.negatives == "soften":
            raise InputError("dcl leaves the positive out of its denominator and has no targets to soften; "
                             "use --negatives mask or weight, or --method simclr")  # fmt: skip
        if (
            self.queue is not None
            and self.queue < self.batch_size
            and not (self.method == "swav" and self.queue == 0)
        ):
            raise InputError(f"--queue is {self.queue}; it must hold a batch of {self.batch_size}")
        if self.patience is not None and self.held_out == 0:
            raise InputError("--patience counts scores on images held out of training: give --held-out too")
        if self.score_every is not None and self.held_out == 0:
            raise InputError("--score-every needs images to score by: give --held-out too")
        if 0 < self.held_out < 10:
            raise InputError(f"--held-out is {self.held_out}; fewer than 10 images tell nothing")

    @property
    def needs(self) -> Needs:
        """What the method needs."""
        return needs_of(self.method)

    @property
    def uses_caption_vectors(self) -> bool:
        """Whether batches bring the embeddings of captions along."""
        frozen = self.needs.text and self.text == "frozen"
        return self.method == "pair-classifier" or self.negatives != "all" or frozen

    @property
    def uses_tokens(self) -> bool:
        """Whether batches bring the captions themselves along."""
        return self.needs.text and self.text == "tower"


def check_together(settings: TrainSettings, rule: PairRule) -> None:
    """Refuse a method and a source of pairs that make no sense of each other.

    Raises:
        InputError: with what to do.
    """
    if settings.in_batch and rule.pairs != "self":
        raise InputError(
            "--in-batch takes pairs from within each batch, not from --pairs "
            f"{rule.pairs}; give --pairs self with it"
        )
    if settings.partners > 1 and rule.pairs != "label" and (rule.k is None or rule.k < settings.partners):
        raise InputError(
            f"--partners {settings.partners} wants that many to draw from: give -k {settings.partners} or "
            "more"
        )
    if settings.held_out and settings.in_batch:
        raise InputError("--held-out scores pairs, and with --in-batch there are none; leave it out")


@dataclass(frozen=True, kw_only=True)
class Showing:
    """One view of a batch: of whom, how, and how large.

    Attributes:
        who: 0 for the anchor, n for its nth partner.
        views: The recipe.
        size: Side in pixels.
        crop: Least and greatest share of the area, where it is not the recipe's.
    """

    who: int
    views: str
    size: int
    crop: tuple[float, float] | None = None


def showings(settings: TrainSettings, rule: PairRule) -> tuple[Showing, ...]:
    """Return the views that a step of a method shows, in the order that the method expects."""
    views, size = view_name(settings, rule), settings.size
    anchor = Showing(who=0, views=views, size=size)
    if settings.needs.shown == "anchor" or settings.in_batch:
        return (anchor,)
    partners = tuple(Showing(who=n, views=views, size=size) for n in range(1, settings.partners + 1))
    small = round(size * _SMALL_SIDE)
    rest = tuple(
        Showing(who=n % 2, views=views, size=small, crop=_SMALL_CROP) for n in range(settings.small_views)
    )
    if settings.needs.shown == "pair and caption" and views != "crop":
        rest = (Showing(who=0, views="crop", size=size),)
    return (anchor, *partners, *rest)


def view_name(settings: TrainSettings, rule: PairRule) -> str:
    """Return the recipe of views by name: as asked for, or what suits the pairs.

    An image beside itself differs from itself in what views change alone; crops would teach little. An image
    beside its caption does not.
    """
    if settings.views is not None:
        return settings.views
    if settings.needs.shown == "anchor":
        return "crop"
    return "simclr" if rule.pairs == "self" or rule.self_share > 0 else "crop"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What follows from the settings for a number of images; recorded, never written back."""

    steps: int
    steps_per_epoch: int
    warmup: int
    peak_rate: float
    log_every: int
    score_every: int
    queue: int | None


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
    queue = settings.needs.queue if settings.queue is None else settings.queue
    if queue is not None and settings.queue is None:
        queue = max(settings.batch_size, min(queue, images // QUEUE_SHARE))
    if queue is not None and queue > images:
        raise TrainingError(
            f"--queue {queue} is longer than the {images} usable images of {collection}, which would meet "
            f"themselves in it; use at most {images}, better {images // QUEUE_SHARE}"
        )
    return Plan(
        steps=steps,
        steps_per_epoch=per_epoch,
        warmup=round(WARMUP_SHARE * steps),
        # Linear in the batch (Goyal et al. 2017).
        peak_rate=settings.rate * settings.batch_size / REFERENCE_BATCH,
        log_every=max(1, min(50, steps // 100)),
        score_every=settings.score_every or max(1, steps // SCORES),
        queue=queue,
    )
