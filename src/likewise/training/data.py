"""The data of a run: from a dataset and a pair config to loaders of training and validation pairs."""

import logging

import numpy as np
import torch

from likewise.data.dataset import CaptionDataset
from likewise.data.filters import DatasetView, open_view
from likewise.data.image_cache import build_image_cache, cache_resolution
from likewise.distributed import DistributedContext
from likewise.embeddings.store import find_embeddings
from likewise.errors import InvalidInputError
from likewise.neighbors.vectors import ImageVectors
from likewise.pairs.build import find_candidates, select_partners
from likewise.pairs.config import PairConfig
from likewise.parallel import default_num_workers
from likewise.progress import Progress
from likewise.training.config import DEFAULT_PREPROCESSING, Preprocessing, TrainConfig, build_view_specs
from likewise.training.loader import CaptionInputs, PairDataset, PairLoader, tokenize_captions
from likewise.training.validation import PairRetrievalEvaluator, split_validation

logger = logging.getLogger(__name__)


def build_loader(
    dataset: CaptionDataset,
    config: TrainConfig,
    pair_config: PairConfig,
    *,
    dist_context: DistributedContext,
    device: torch.device,
    num_workers: int | None,
    progress: Progress,
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING,
) -> tuple[PairLoader, PairRetrievalEvaluator | None]:
    """Build the loader of training pairs, and the evaluator if validation pairs are held out.

    Missing neighbors, tokens and image caches are computed.

    Args:
        dataset: The dataset.
        config: The training config.
        pair_config: The pair config.
        dist_context: The process.
        device: The device that searches for neighbors.
        num_workers: Threads; defaults to all cores for the image cache, half of them for the loader.
        progress: Progress bars.
        preprocessing: Interpolation and normalization of the views.
    """
    view_specs = build_view_specs(config, pair_config, preprocessing)
    view = open_view(dataset, pair_config.filter)
    caption_inputs = _open_caption_inputs(view, config, pair_config, progress)
    candidates = find_candidates(view, pair_config, device=device.type, progress=progress)
    pairs = select_partners(candidates, pair_config)
    short_side = cache_resolution(view_specs[0].image_size, len(dataset))
    image_cache = build_image_cache(dataset, short_side, num_workers=num_workers, progress=progress)
    if len(image_cache.readable) < len(dataset):
        pairs = select_partners(candidates, pair_config, image_cache.readable_mask)
    evaluator = None
    if config.num_val_pairs:
        split = split_validation(pairs, config.num_val_pairs, seed=config.seed)
        labels = label_indices(dataset, split.anchors)
        evaluator = PairRetrievalEvaluator(image_cache, pairs, split, view_specs[0], labels, seed=config.seed)
        training_mask = split.training_mask(image_cache.readable_mask)
        pairs = select_partners(candidates, pair_config, training_mask)
    pair_dataset = PairDataset(
        image_cache, pairs, seed=config.seed, view_specs=view_specs, caption_inputs=caption_inputs
    )
    if num_workers is None:
        num_workers = max(1, default_num_workers() // (2 * dist_context.local_world_size))
    loader = PairLoader(
        pair_dataset, batch_size=config.batch_size, num_workers=num_workers, dist_context=dist_context
    )
    return loader, evaluator


def input_keys(
    dataset: CaptionDataset, pair_dataset: PairDataset, start_fingerprint: str | None
) -> dict[str, str]:
    """Return the fingerprints of all inputs of a run; that of its start is None for random weights."""
    caption_inputs = pair_dataset.caption_inputs
    keys = {
        "dataset": dataset.key,
        "images": pair_dataset.image_cache.key,
        "pairs": pair_dataset.pairs.key,
    }
    if caption_inputs.vectors is not None:
        keys["captions"] = caption_inputs.vectors.key
    if caption_inputs.tokens is not None:
        keys["tokens"] = caption_inputs.tokens.key
    if start_fingerprint is not None:
        keys["init"] = start_fingerprint
    return keys


def _open_caption_inputs(
    view: DatasetView, config: TrainConfig, pair_config: PairConfig, progress: Progress
) -> CaptionInputs:
    """Open the caption embeddings or tokens that the method uses.

    Raises:
        InvalidInputError: if the method needs captions and the dataset has none.
    """
    options = config.method_options
    if not (options.uses_caption_embeddings or options.uses_tokens):
        return CaptionInputs()
    dataset, caption_mask = view.dataset, view.caption_mask
    vectors = tokens = has_caption = None
    if options.uses_caption_embeddings:
        embeddings = find_embeddings(dataset, pair_config.caption_encoder)
        vectors = ImageVectors(embeddings, len(dataset), caption_mask)
        has_caption = vectors.captions_per_image > 0
    if options.uses_tokens:
        tokens = tokenize_captions(dataset, caption_mask, progress=progress)
        has_caption = tokens.has_caption
    if not options.needs_text:
        return CaptionInputs(vectors=vectors)
    if has_caption is None or not has_caption.any():
        raise InvalidInputError(
            f"method {options.name!r} compares images with captions, and {dataset.path} has no captions; "
            "import it with a `caption_column`, or use a method without text",
            field="method",
            path=dataset.path,
        )
    num_missing = int((~has_caption).sum())
    if num_missing:
        logger.info(
            "%s of %s images have no caption and are excluded", f"{num_missing:,}", f"{len(dataset):,}"
        )
    return CaptionInputs(
        vectors=vectors,
        tokens=tokens,
        use_partner_caption=options.inputs == "anchor",
        has_caption=has_caption,
    )


def label_indices(dataset: CaptionDataset, positions: np.ndarray) -> np.ndarray | None:
    """Return the label of images as integers, -1 without one; None with fewer than two labels."""
    names = [dataset[int(position)].label for position in positions]
    label_ids = {name: i for i, name in enumerate(sorted({n for n in names if n is not None}))}
    if len(label_ids) < 2:
        return None
    return np.array([-1 if name is None else label_ids[name] for name in names], np.int64)
