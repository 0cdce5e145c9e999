"""What is made ready before the first step of a run."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from likewise.artifacts import Artifact, begin, fingerprint
from likewise.collection.filters import read_filter
from likewise.collection.packed import PackedImages, pack_images, side_to_pack
from likewise.collection.records import Collection
from likewise.embeddings.embed import look_up_embeddings
from likewise.errors import InputError, ModelError
from likewise.models.backbones import BackboneSpec, build_backbone, check_side, default_stem
from likewise.models.checkpoints import load_state_dict, load_strictly
from likewise.models.encoders import RUN_ENCODER
from likewise.neighbors.pairs import Pairs
from likewise.neighbors.rules import PairRule
from likewise.neighbors.sources import make_pairs
from likewise.neighbors.space import kept_captions
from likewise.neighbors.vectors import RecordVectors
from likewise.pretraining.batches import PairBatches, Words
from likewise.pretraining.description import (
    told,
)
from likewise.pretraining.processes import Processes
from likewise.pretraining.scoring import PairScorer, hold_out
from likewise.pretraining.settings import (
    Plan,
    TrainSettings,
    plan,
    showings,
)
from likewise.pretraining.tokens import make_tokens
from likewise.progress import Progress

KIND = "run"
_NAMES = ("encoder", "image_encoder", "filter", "pairs_file", "index")


@dataclass(frozen=True)
class Work:
    """What is ready before the first step."""

    artifact: Artifact
    backbone: nn.Module
    width: int
    spec: BackboneSpec
    state: torch.Tensor
    images: PackedImages
    pairs: Pairs
    batches: PairBatches
    words: Words
    scorer: PairScorer | None
    plan: Plan


def prepare(
    source: Collection,
    run: Path,
    chosen: TrainSettings,
    shown: PairRule,
    among: Processes,
    workers: int | None,
    on: torch.device,
    progress: Progress,
) -> Work:
    """Make or find everything that training needs; what can fail fails before what takes long."""
    spec = spec_of(chosen)
    backbone, width, state = initial_backbone(chosen, spec)
    views = showings(chosen, shown)
    for side in {each.size for each in views} - {chosen.size}:
        check_side(backbone, spec.name, side)
    plan(chosen, len(source), source.path)
    words = _words(source, chosen, shown, progress)
    pairs = make_pairs(source, shown, device=on.type, progress=progress)
    images = pack_images(source, side_to_pack(chosen.size, len(source)), workers=workers, progress=progress)
    if len(images.usable) < len(source):
        pairs = make_pairs(source, shown, images.usable, device=on.type, progress=progress)
    scorer = None
    if chosen.held_out:
        held, whole = hold_out(pairs, chosen.held_out, seed=chosen.seed), pairs
        pairs = make_pairs(source, shown, held.rest(images.usable), device=on.type, progress=progress)
        labels = _labels(source, held.anchors)
        scorer = PairScorer(images, whole, held, views[0], labels, seed=chosen.seed)
    batches = PairBatches(
        images, pairs, views, batch_size=chosen.batch_size, seed=chosen.seed, words=words, among=among
    )
    steps = plan(chosen, len(batches.anchors), source.path)
    inputs = _inputs(source, images, pairs, words, chosen)
    # Where partners come from is told by the inputs, however it was named.
    artifact = begin(run, KIND, told(shown) | asdict(chosen), inputs, volatile=_NAMES)
    return Work(artifact, backbone, width, spec, state, images, pairs, batches, words, scorer, steps)


def spec_of(settings: TrainSettings) -> BackboneSpec:
    """Return what it takes to build the settings' backbone."""
    stem = settings.stem or default_stem(settings.size)
    return BackboneSpec(name=settings.backbone, size=settings.size, stem=stem)


def initial_backbone(settings: TrainSettings, spec: BackboneSpec) -> tuple[nn.Module, int, torch.Tensor]:
    """Return the backbone with its initial weights, its width, and the generator's state for the heads."""
    torch.manual_seed(settings.seed)
    backbone, width = build_backbone(spec, pretrained=settings.init == "pretrained")
    state = torch.get_rng_state()
    if settings.init not in ("scratch", "pretrained"):
        weights = initial_weights(settings.init)
        load_strictly(backbone, load_state_dict(weights), str(weights))
    return backbone, width, state


def initial_weights(init: str) -> Path:
    """Return the file that `--init` names: a file, or the encoder of a run.

    Raises:
        ModelError: where there is neither.
    """
    path = Path(init)
    found = path / RUN_ENCODER if path.is_dir() else path
    if not found.is_file():
        raise ModelError(
            f"--init {init}: no such weights; give scratch, pretrained, a file, or a finished run"
        )
    return found


def _inputs(
    source: Collection,
    images: PackedImages,
    pairs: Pairs,
    words: Words,
    settings: TrainSettings,
) -> dict[str, str]:
    inputs = {"collection": source.key, "images": images.key, "pairs": pairs.key}
    if words.vectors is not None:
        inputs["captions"] = words.vectors.key
    if words.tokens is not None:
        inputs["tokens"] = words.tokens.key
    if settings.init not in ("scratch", "pretrained"):
        inputs["init"] = fingerprint(initial_weights(settings.init))
    return inputs


def _words(source: Collection, settings: TrainSettings, rule: PairRule, progress: Progress) -> Words:
    """Open what the method wants to know of captions.

    Raises:
        InputError: where an image is to be compared with its caption and no image has one.
    """
    if not (settings.uses_caption_vectors or settings.uses_tokens):
        return Words()
    left_out = None if rule.filter is None else read_filter(rule.filter, source)
    kept = kept_captions(source, left_out)
    vectors = tokens = captioned = None
    if settings.uses_caption_vectors:
        vectors = RecordVectors(look_up_embeddings(source, rule.encoder), len(source), kept)
        captioned = vectors.count > 0
    if settings.uses_tokens:
        tokens = make_tokens(source, kept, progress=progress)
        captioned = tokens.captioned
    if not settings.needs.text:
        return Words(vectors=vectors)
    if captioned is None or not captioned.any():
        raise InputError(
            f"--method {settings.method} compares images with captions, and {source.path} has none; import "
            "it with --caption-column, or use a method without text"
        )
    lost = int((~captioned).sum())
    if lost:
        progress.say(f"{lost:,} of {len(source):,} images have no caption and take no part")
    return Words(
        vectors=vectors,
        tokens=tokens,
        of_partners=settings.needs.shown == "anchor",
        captioned=captioned,
    )


def _labels(source: Collection, positions: np.ndarray) -> np.ndarray | None:
    """Return the labels of some images by number, -1 without one; None where there are not two."""
    names = [source[int(position)].label for position in positions]
    known = {name: number for number, name in enumerate(sorted({n for n in names if n is not None}))}
    if len(known) < 2:
        return None
    return np.array([-1 if name is None else known[name] for name in names], np.int64)
