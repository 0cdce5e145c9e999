"""The data of an adaptation: pairs, held-out pairs, features of the start, captions, retention dataset."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from likewise.data.dataset import CaptionDataset
from likewise.data.filters import open_view
from likewise.data.image_cache import ImageCache, build_image_cache, cache_resolution
from likewise.errors import InvalidInputError, TrainingError
from likewise.models.encoders import ImageEncoder
from likewise.models.features import Features, extract_features
from likewise.neighbors.vectors import ImageVectors
from likewise.pairs.build import find_candidates, select_partners
from likewise.pairs.config import PairConfig
from likewise.pairs.sampling import Pairs
from likewise.progress import Progress
from likewise.training.adapt_config import AdaptConfig, AdapterOptions, LevelOptions
from likewise.training.config import MIN_VAL_PAIRS
from likewise.training.data import label_indices
from likewise.training.validation import ValidationSplit, split_validation

_MAX_DEFAULT_VAL_PAIRS, _DEFAULT_VAL_FRACTION = 500, 0.1
_MAX_RETAINED = 2048  # where every blend encodes the images again


@dataclass(frozen=True, kw_only=True)
class RetentionSet:
    """Labeled images of another kind, on which the encoder must not become worse."""

    dataset: CaptionDataset
    positions: Int[np.ndarray, " m"]
    """Positions of the images."""
    features: Float[Tensor, "m d"]
    """The start's features."""
    labels: Int[Tensor, " m"]
    """Labels as integers, -1 without one."""


@dataclass(frozen=True, kw_only=True)
class AdaptData:
    """Everything that an adaptation reads."""

    dataset: CaptionDataset
    features: Features
    """The start's features."""
    pairs: Pairs
    """Pairs of the images that are not held out."""
    captions: ImageVectors | None
    """Caption embeddings; None if the level does not use them."""
    image_cache: ImageCache | None
    """The images; None for the level `adapter`, which reads features alone."""
    split: ValidationSplit
    """Held-out pairs."""
    retain: RetentionSet | None

    @property
    def val_labels(self) -> Int[Tensor, " m"] | None:
        """Labels of the validation anchors as integers, -1 without one; None with fewer than two labels."""
        return _label_ids(self.dataset, self.split.anchors)

    def input_keys(self, encoder: ImageEncoder) -> dict[str, str]:
        """Return the fingerprints of all inputs."""
        keys = {
            "dataset": self.dataset.key,
            "encoder": encoder.fingerprint,
            "preprocessing": encoder.key,
            "pairs": self.pairs.key,
        }
        if self.captions is not None:
            keys["captions"] = self.captions.key
        if self.image_cache is not None:
            keys["images"] = self.image_cache.key
        if self.retain is not None:
            keys["retain"] = self.retain.dataset.key
        return keys


def open_adapt_data(
    dataset: CaptionDataset,
    encoder: ImageEncoder,
    config: AdaptConfig,
    pair_config: PairConfig,
    retain: CaptionDataset | str | Path | None,
    num_workers: int | None,
    progress: Progress,
) -> AdaptData:
    """Select pairs among readable images, hold out validation pairs, and compute missing features.

    Args:
        dataset: The dataset.
        encoder: The start.
        config: The settings of the adaptation.
        pair_config: The pair sampling.
        retain: The retention dataset or its path, if there is one.
        num_workers: Threads that read images.
        progress: Progress bars.

    Raises:
        InvalidInputError: if no image has a partner, or the retention dataset has no labels.
        TrainingError: if there are too few images.
    """
    options = config.level_options
    view = open_view(dataset, pair_config.filter)
    candidates = find_candidates(view, pair_config, device=encoder.device.type, progress=progress)
    # An image is always the nearest to itself: self pairs are validated on pairs by caption.
    val_config, val_candidates = replace(pair_config, self_pair_prob=0.0), candidates
    if pair_config.source == "self":
        val_config = PairConfig(caption_encoder=pair_config.caption_encoder, filter=pair_config.filter)
        val_candidates = find_candidates(view, val_config, device=encoder.device.type, progress=progress)
    features = _features(encoder, dataset, num_workers, progress)
    readable_mask = np.zeros(len(dataset), bool)
    readable_mask[features.indices] = True
    image_cache = None
    if not isinstance(options, AdapterOptions):
        short_side = cache_resolution(encoder.transform.image_size, len(dataset))
        image_cache = build_image_cache(dataset, short_side, num_workers=num_workers, progress=progress)
        readable_mask &= image_cache.readable_mask
    val_pairs = select_partners(val_candidates, val_config, readable_mask)
    num_val_pairs = config.num_val_pairs
    if num_val_pairs is None:
        num_val_pairs = min(_MAX_DEFAULT_VAL_PAIRS, int(_DEFAULT_VAL_FRACTION * len(val_pairs.anchors)))
    if num_val_pairs < MIN_VAL_PAIRS:
        raise TrainingError(
            f"{dataset.path} has {len(val_pairs.anchors):,} usable images, too few to hold out "
            f"{MIN_VAL_PAIRS} validation pairs, without which a gain cannot be shown",
            field="num_val_pairs",
            path=dataset.path,
        )
    split = split_validation(val_pairs, num_val_pairs, seed=config.seed)
    pairs = select_partners(candidates, pair_config, split.training_mask(readable_mask))
    if len(pairs.anchors) < config.pairs_per_step:
        raise TrainingError(
            f"{dataset.path} leaves {len(pairs.anchors):,} images to train on, fewer than `batch_size` "
            f"({config.pairs_per_step})",
            field="batch_size",
            path=dataset.path,
        )
    uses_captions = isinstance(options, AdapterOptions) and options.caption_weight > 0
    captions = candidates.by_caption.vectors if uses_captions and candidates.by_caption is not None else None
    return AdaptData(
        dataset=dataset,
        features=features,
        pairs=pairs,
        captions=captions,
        image_cache=image_cache,
        split=split,
        retain=None if retain is None else _open_retain(retain, encoder, options, num_workers, progress),
    )


def _features(
    encoder: ImageEncoder, dataset: CaptionDataset, num_workers: int | None, progress: Progress
) -> Features:
    return extract_features(
        encoder, dataset, dataset.path / "features", num_workers=num_workers, progress=progress
    )


def _open_retain(
    retain: CaptionDataset | str | Path,
    encoder: ImageEncoder,
    options: LevelOptions,
    num_workers: int | None,
    progress: Progress,
) -> RetentionSet:
    """Open the retention dataset: all images for `adapter`, else an even sample."""
    dataset = CaptionDataset.open(retain)
    features = _features(encoder, dataset, num_workers, progress)
    positions = features.indices
    if not isinstance(options, AdapterOptions) and len(positions) > _MAX_RETAINED:
        positions = positions[np.linspace(0, len(positions) - 1, _MAX_RETAINED).astype(np.int64)]
    labels = _label_ids(dataset, positions)
    if labels is None:
        raise InvalidInputError(
            f"{dataset.path} has fewer than 2 labels; import it with a `label_column`, because retention is "
            "measured by a nearest-neighbor classifier",
            field="retain",
            path=dataset.path,
        )
    return RetentionSet(
        dataset=dataset,
        positions=positions,
        features=torch.from_numpy(features.vectors[positions]),
        labels=labels,
    )


def _label_ids(dataset: CaptionDataset, positions: Int[np.ndarray, " m"]) -> Int[Tensor, " m"] | None:
    """Return the labels of images as integers, -1 without one; None with fewer than two labels."""
    label_ids = label_indices(dataset, positions)
    return None if label_ids is None else torch.from_numpy(label_ids)
