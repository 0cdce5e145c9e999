"""`adapt`: improve a pretrained encoder for a captioned dataset by a residual adapter on its features."""

import logging
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import dropout

from likewise.artifacts import Artifact, read_json, write_json
from likewise.data.dataset import CaptionDataset
from likewise.data.filters import open_view
from likewise.errors import InvalidInputError, TrainingError
from likewise.models.adapter import FeatureAdapter
from likewise.models.checkpoints import ADAPTER_PREFIX, save_tensors
from likewise.models.encoders import ImageEncoder, load_encoder
from likewise.models.features import Features, extract_features
from likewise.neighbors.vectors import ImageVectors
from likewise.pairs.build import find_candidates, select_partners
from likewise.pairs.config import PairConfig
from likewise.pairs.sampling import Pairs
from likewise.progress import NULL_PROGRESS, Progress
from likewise.rng import Stream, epoch_permutation, uniform
from likewise.run_directory import RunDirectory
from likewise.training.config import MIN_VAL_PAIRS, AdaptConfig
from likewise.training.data import label_indices
from likewise.training.losses import nt_xent_loss, soft_target_loss
from likewise.training.methods.base import projection_head
from likewise.training.optim import build_optimizer, warmup_cosine_lr
from likewise.training.run_files import MetricsLogger, pair_config_to_dict, write_config
from likewise.training.train import Run
from likewise.training.trainer import ARTIFACT_KIND
from likewise.training.validation import (
    ValidationSplit,
    effective_rank,
    feature_std,
    knn_accuracy,
    retrieval_ranks,
    split_validation,
)

logger = logging.getLogger(__name__)

BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
_WARMUP_STEPS = 30
_NUM_LOGGED_ROWS = 50
_NUM_RESAMPLES = 2000
_MAX_DEFAULT_VAL_PAIRS, _DEFAULT_VAL_FRACTION = 500, 0.1
_METHOD = "adapter"
# Paths and names; what they refer to is hashed with the inputs.
_NON_HASHED = ("encoder", "caption_encoder", "image_encoder", "filter", "pairs_file", "index")


@dataclass(frozen=True, kw_only=True)
class BlendScore:
    """Validation of one blend of the start's features (0) and the adapted ones (1)."""

    blend: float
    """Weight of the adapted features."""
    mrr: float
    """Mean reciprocal rank of the partner of each validation anchor."""
    knn: float | None
    """Accuracy of a nearest-neighbor classifier on the validation anchors; None without labels."""
    retention: float | None
    """The same accuracy on the retention dataset; None without one."""


@dataclass(frozen=True, kw_only=True)
class AdaptOutcome:
    """The chosen blend, and what was measured to choose it."""

    blend: float
    """The chosen weight of the adapted features; 0 if the start was kept."""
    scores: tuple[BlendScore, ...]
    """Validation of all blends."""
    num_val_pairs: int
    """Number of validation pairs."""
    gain: tuple[float, float, float] | None
    """Difference of the mean reciprocal rank between the best blend and the start, with its 95 % interval
    (paired bootstrap over the validation pairs); None if no blend other than 0 was admissible."""

    @classmethod
    def read(cls, run: Run) -> "AdaptOutcome":
        """Return the outcome of a finished run of `adapt`."""
        values: dict[str, Any] = read_json(RunDirectory(run.path).adaptation_path)
        values["scores"] = tuple(BlendScore(**score) for score in values["scores"])
        values["gain"] = None if values["gain"] is None else tuple(values["gain"])
        return cls(**values)

    def summary(self) -> str:
        """Return the outcome in one sentence."""
        by_blend = {score.blend: score for score in self.scores}
        if self.gain is None:
            return "kept the start: every blend loses too much on the retention dataset"
        value, low, high = self.gain
        gain = f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points of MRR"
        if self.blend == 0:
            return f"kept the start: the adapted features are not significantly better ({gain})"
        return (
            f"adapted, blend {self.blend:g}: MRR of {self.num_val_pairs:,} held-out pairs "
            f"{100 * by_blend[0.0].mrr:.1f} -> {100 * by_blend[self.blend].mrr:.1f} ({gain})"
        )


@dataclass(frozen=True, kw_only=True)
class _RetentionSet:
    """Labeled images of another kind, on which the encoder must not become worse."""

    key: str
    features: Float[Tensor, "m d"]
    labels: Int[Tensor, " m"]


@dataclass(frozen=True, kw_only=True)
class _AdaptData:
    """Everything that the training of an adapter reads."""

    dataset: CaptionDataset
    features: Features
    pairs: Pairs
    captions: ImageVectors | None
    split: ValidationSplit
    retain: _RetentionSet | None


def adapt(
    dataset: CaptionDataset | str | Path,
    encoder: ImageEncoder | str | Path,
    out: str | Path,
    config: AdaptConfig | None = None,
    pair_config: PairConfig | None = None,
    *,
    retain: CaptionDataset | str | Path | None = None,
    num_workers: int | None = None,
    progress: Progress = NULL_PROGRESS,
) -> Run:
    """Adapt a pretrained encoder to a dataset by its captions, and keep the start if that does not help.

    The features of all images are computed once, and cached in the dataset. A residual adapter is trained on
    them. The start's features and the adapted ones are then blended with the weight that is best on held-out
    pairs; the start is kept if no blend is significantly better. The run's encoder is used like any other.

    An interrupted call resumes at the missing features; the training of the adapter takes a minute or two,
    and starts again.

    Args:
        dataset: The dataset or its path; pairs by language need caption embeddings.
        encoder: The start: an encoder, or whatever `load_encoder` accepts. It is not modified.
        out: The directory of the run.
        config: The options of the adapter.
        pair_config: The pair sampling; defaults to the nearest caption.
        retain: Other images with labels, on which a nearest-neighbor classifier may lose at most
            `config.max_retention_loss`.
        num_workers: Threads that read images; defaults to the number of cores.
        progress: Progress bars.

    Raises:
        ArtifactError: if embeddings are missing or `out` holds something else.
        InvalidInputError: if no image has a partner, or the retention dataset has no labels.
        ModelError: if the encoder cannot be loaded, or its features are not finite.
        TrainingError: if there are fewer images than a batch.
    """
    config = AdaptConfig() if config is None else config
    pair_config = PairConfig() if pair_config is None else pair_config
    dataset, out = CaptionDataset.open(dataset), Path(out)
    encoder = encoder if isinstance(encoder, ImageEncoder) else load_encoder(encoder)
    data = _open_data(dataset, encoder, config, pair_config, retain, num_workers, progress)
    settings = (
        {"method": _METHOD, "encoder": encoder.name} | pair_config_to_dict(pair_config) | asdict(config)
    )
    inputs = _input_keys(data, encoder)
    with Artifact.exclusive(out, ARTIFACT_KIND, settings, inputs, non_hashed=_NON_HASHED) as artifact:
        if artifact.is_complete:
            logger.info("%s is finished already", out)
        else:
            _adapt(data, encoder, config, artifact, progress)
    return Run(out)


def _adapt(
    data: _AdaptData, encoder: ImageEncoder, config: AdaptConfig, artifact: Artifact, progress: Progress
) -> None:
    """Train the adapter, choose the blend, and write the run."""
    run_dir = RunDirectory(artifact.path)
    write_config(
        run_dir,
        artifact.manifest.settings | {"backbone": encoder.name, "image_size": encoder.transform.image_size},
        data.pairs,
        data.dataset,
        {"device": encoder.device.type, "steps": config.max_steps, "start": dict(encoder.load_args)},
    )
    adapter = _train_adapter(data, encoder, config, artifact.path, progress)
    outcome = _choose_blend(data, adapter, config)
    write_json(run_dir.adaptation_path, asdict(outcome))
    adapter.scale_residual_(outcome.blend)
    save_adapted_encoder(run_dir.encoder_path, encoder, adapter)
    logger.info(outcome.summary())
    artifact.finish({"steps": config.max_steps, "images": len(data.pairs.anchors)}, data.features.skipped)


def _open_data(
    dataset: CaptionDataset,
    encoder: ImageEncoder,
    config: AdaptConfig,
    pair_config: PairConfig,
    retain: CaptionDataset | str | Path | None,
    num_workers: int | None,
    progress: Progress,
) -> _AdaptData:
    """Select pairs among readable images, hold out validation pairs, and compute missing features."""
    candidates = find_candidates(
        open_view(dataset, pair_config.filter), pair_config, device=encoder.device.type, progress=progress
    )
    features = _features(encoder, dataset, num_workers, progress)
    readable_mask = np.zeros(len(dataset), bool)
    readable_mask[features.indices] = True
    pairs = select_partners(candidates, pair_config, readable_mask)
    num_val_pairs = config.num_val_pairs
    if num_val_pairs is None:
        num_val_pairs = min(_MAX_DEFAULT_VAL_PAIRS, int(_DEFAULT_VAL_FRACTION * len(pairs.anchors)))
    if num_val_pairs < MIN_VAL_PAIRS:
        raise TrainingError(
            f"{dataset.path} has {len(pairs.anchors):,} usable images, too few to hold out {MIN_VAL_PAIRS} "
            "validation pairs, without which a gain cannot be shown",
            field="num_val_pairs",
            path=dataset.path,
        )
    split = split_validation(pairs, num_val_pairs, seed=config.seed)
    pairs = select_partners(candidates, pair_config, split.training_mask(readable_mask))
    if len(pairs.anchors) < config.batch_size:
        raise TrainingError(
            f"{dataset.path} leaves {len(pairs.anchors):,} images to train on, fewer than `batch_size` "
            f"({config.batch_size})",
            field="batch_size",
            path=dataset.path,
        )
    captions = None if candidates.by_caption is None else candidates.by_caption.vectors
    return _AdaptData(
        dataset=dataset,
        features=features,
        pairs=pairs,
        captions=captions if config.caption_weight else None,
        split=split,
        retain=None if retain is None else _open_retain(retain, encoder, num_workers, progress),
    )


def _features(
    encoder: ImageEncoder, dataset: CaptionDataset, num_workers: int | None, progress: Progress
) -> Features:
    return extract_features(
        encoder, dataset, dataset.path / "features", num_workers=num_workers, progress=progress
    )


def _open_retain(
    retain: CaptionDataset | str | Path, encoder: ImageEncoder, num_workers: int | None, progress: Progress
) -> _RetentionSet:
    dataset = CaptionDataset.open(retain)
    features = _features(encoder, dataset, num_workers, progress)
    labels = _label_ids(dataset, features.indices)
    if labels is None:
        raise InvalidInputError(
            f"{dataset.path} has fewer than 2 labels; import it with a `label_column`, because retention is "
            "measured by a nearest-neighbor classifier",
            field="retain",
            path=dataset.path,
        )
    return _RetentionSet(
        key=dataset.key, features=torch.from_numpy(features.vectors[features.indices]), labels=labels
    )


def _label_ids(dataset: CaptionDataset, positions: Int[np.ndarray, " m"]) -> Int[Tensor, " m"] | None:
    """Return the labels of images as integers, -1 without one; None with fewer than two labels."""
    label_ids = label_indices(dataset, positions)
    return None if label_ids is None else torch.from_numpy(label_ids)


def _input_keys(data: _AdaptData, encoder: ImageEncoder) -> dict[str, str]:
    keys = {"dataset": data.dataset.key, "encoder": encoder.fingerprint, "pairs": data.pairs.key}
    if data.captions is not None:
        keys["captions"] = data.captions.key
    if data.retain is not None:
        keys["retain"] = data.retain.key
    return keys


class _AdapterObjective(nn.Module):
    """The adapter with the heads of its loss, which are discarded after training."""

    def __init__(self, adapter: FeatureAdapter, config: AdaptConfig, caption_dim: int | None) -> None:
        """Add a projection head, and one into the space of the caption embeddings if they are used."""
        super().__init__()
        feature_dim, self.config = adapter.down.in_features, config
        self.adapter = adapter
        self.projector = projection_head(feature_dim, config.projector_dims)
        self.caption_projector = (
            None
            if caption_dim is None
            else projection_head(feature_dim, (*config.projector_dims[:-1], caption_dim))
        )

    def forward(
        self,
        anchors: Float[Tensor, "b d"],
        partners: Float[Tensor, "b d"],
        captions: Float[Tensor, "b e"] | None,
    ) -> Float[Tensor, ""]:
        """Return the loss of a batch of pairs of features, and the caption embeddings of the anchors."""
        config = self.config
        inputs = dropout(torch.cat([anchors, partners]), config.input_dropout)
        adapted = self.adapter(inputs)
        z1, z2 = self.projector(adapted).chunk(2)
        loss = nt_xent_loss(z1, z2, config.temperature)
        if captions is None or self.caption_projector is None:
            return loss
        has_caption = captions.any(dim=1)
        z = self.caption_projector(adapted[: len(anchors)])[has_caption]
        targets = captions[has_caption]
        return loss + config.caption_weight * soft_target_loss(
            z, targets, config.temperature, config.caption_temperature
        )


def _train_adapter(
    data: _AdaptData, encoder: ImageEncoder, config: AdaptConfig, out: Path, progress: Progress
) -> FeatureAdapter:
    """Train the adapter on the features; the result is a function of the seed and the inputs."""
    device, run_dir = encoder.device, RunDirectory(out)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        adapter = FeatureAdapter(encoder.feature_dim, config.hidden_dim)
        mean, std = feature_moments(data.features.vectors, data.pairs.anchors)
        adapter.mean.copy_(mean)
        adapter.std.copy_(std)
        captions_dim = None if data.captions is None else data.captions.dim
        objective = _AdapterObjective(adapter, config, captions_dim).to(device).train()
        optimizer = build_optimizer("adamw", objective, lr=config.lr, weight_decay=config.weight_decay)
        log_every = max(1, config.max_steps // _NUM_LOGGED_ROWS)
        metrics_logger = MetricsLogger(run_dir.metrics_path, run_dir.tensorboard_dir, 0)
        with progress.task("adapting", config.max_steps, "steps") as bar:
            for step in range(config.max_steps):
                anchors, partners, captions = _batch(data, config, step, device)
                lr = warmup_cosine_lr(
                    step, total_steps=config.max_steps, warmup_steps=_WARMUP_STEPS, peak_lr=config.lr
                )
                for group in optimizer.param_groups:
                    group["lr"] = lr
                loss = objective(anchors, partners, captions)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if (step + 1) % log_every == 0 or step + 1 == config.max_steps:
                    _log_step(metrics_logger, adapter, anchors, step + 1, float(loss.detach()), lr)
                bar.update(1)
        metrics_logger.close()
    return adapter.cpu().eval().requires_grad_(False)


@torch.no_grad()
def _log_step(
    metrics_logger: MetricsLogger,
    adapter: FeatureAdapter,
    anchors: Float[Tensor, "b d"],
    step: int,
    loss: float,
    lr: float,
) -> None:
    """Write a row of metrics.

    Raises:
        TrainingError: if the loss is not finite.
    """
    if not np.isfinite(loss):
        raise TrainingError(f"non-finite loss at step {step}; try a lower `lr`", field="lr")
    features = adapter(anchors)
    metrics_logger.write({
        "step": step,
        "loss": loss,
        "lr": lr,
        "effective_rank": float(effective_rank(features)),
        "feature_std": float(feature_std(features)),
    })  # fmt: skip


def _batch(
    data: _AdaptData, config: AdaptConfig, step: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the features of anchors and partners (b, d), and one caption embedding per anchor (b, e)."""
    all_anchors, seed = data.pairs.anchors, config.seed
    epoch, batch_index = divmod(step, len(all_anchors) // config.batch_size)
    order = epoch_permutation(len(all_anchors), seed=seed, epoch=epoch)
    anchors = all_anchors[order[batch_index * config.batch_size :][: config.batch_size]]
    partners = data.pairs.sample_partners(anchors, seed=seed, epoch=epoch)
    captions = None if data.captions is None else _sample_captions(data.captions, anchors, seed, epoch)
    vectors = data.features.vectors
    return (
        torch.from_numpy(vectors[anchors]).to(device),
        torch.from_numpy(vectors[partners]).to(device),
        None if captions is None else torch.from_numpy(captions).to(device),
    )


def _sample_captions(
    captions: ImageVectors, positions: Int[np.ndarray, " b"], seed: int, epoch: int
) -> Float[np.ndarray, "b e"]:
    """Return the embedding of one caption per image, zero for images without a caption."""
    u = uniform(positions, 1, seed=seed, epoch=epoch, stream=Stream.CAPTIONS)[:, 0]
    counts = captions.captions_per_image[positions]
    vectors = np.zeros((len(positions), captions.dim), np.float32)
    has_caption = counts > 0
    index = captions.first_caption[positions] + (u * counts).astype(np.int64)
    vectors[has_caption] = captions.caption_vectors(index[has_caption])
    return vectors


def feature_moments(
    vectors: Float[np.ndarray, "n d"], indices: Int[np.ndarray, " m"], block_size: int = 8192
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Return mean and standard deviation of selected rows, in float64 by blocks; std is at least 1e-6."""
    total = np.zeros(vectors.shape[1])
    squares = np.zeros(vectors.shape[1])
    for start in range(0, len(indices), block_size):
        block = vectors[indices[start : start + block_size]].astype(np.float64)
        total += block.sum(axis=0)
        squares += (block**2).sum(axis=0)
    mean = total / len(indices)
    std = np.sqrt(np.maximum(squares / len(indices) - mean**2, 0))
    return torch.from_numpy(mean).float(), torch.from_numpy(np.maximum(std, 1e-6)).float()


@torch.no_grad()
def _choose_blend(data: _AdaptData, adapter: FeatureAdapter, config: AdaptConfig) -> AdaptOutcome:
    """Choose the blend that is best on validation pairs and loses little on the retention dataset."""
    anchors, partners = (
        torch.from_numpy(data.features.vectors[positions])
        for positions in (data.split.anchors, data.split.partners)
    )
    labels = _label_ids(data.dataset, data.split.anchors)
    reciprocal_ranks, scores = {}, []
    for blend in BLENDS:
        blended = deepcopy(adapter).scale_residual_(blend)
        reciprocal_ranks[blend] = 1 / retrieval_ranks(blended(anchors), blended(partners))
        scores.append(
            BlendScore(
                blend=blend,
                mrr=float(reciprocal_ranks[blend].mean()),
                knn=None if labels is None else float(knn_accuracy(blended(anchors), labels)),
                retention=None if data.retain is None else _retention(data.retain, blended),
            )
        )
    admissible = [
        score
        for score in scores[1:]
        if score.retention is None
        or scores[0].retention is None
        or score.retention >= scores[0].retention - config.max_retention_loss
    ]
    if not admissible:
        return AdaptOutcome(blend=0.0, scores=tuple(scores), num_val_pairs=len(anchors), gain=None)
    best = max(admissible, key=lambda score: (score.mrr + (score.knn or 0.0), -score.blend))
    gain = _bootstrap_difference(reciprocal_ranks[best.blend] - reciprocal_ranks[0.0], config.seed)
    return AdaptOutcome(
        blend=best.blend if gain[1] > 0 else 0.0,
        scores=tuple(scores),
        num_val_pairs=len(anchors),
        gain=gain,
    )


def _bootstrap_difference(differences: Float[Tensor, " m"], seed: int) -> tuple[float, float, float]:
    """Return the mean of paired differences with its 95 % percentile interval over resamples."""
    values = differences.double().numpy()
    counts = np.random.default_rng(seed).multinomial(
        len(values), np.full(len(values), 1 / len(values)), size=_NUM_RESAMPLES
    )
    low, high = np.quantile(counts @ values / len(values), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def _retention(retain: _RetentionSet, adapter: FeatureAdapter) -> float:
    """Return the accuracy of a nearest-neighbor classifier on the retention dataset."""
    return float(knn_accuracy(adapter(retain.features), retain.labels))


def save_adapted_encoder(path: Path, start: ImageEncoder, adapter: FeatureAdapter) -> None:
    """Write an encoder with an adapter.

    The file contains the weights of a start that timm builds. For other starts it contains the adapter, and
    the start is loaded again from its source; its weights are then compared by their fingerprint.
    """
    tensors = {f"{ADAPTER_PREFIX}{name}": tensor for name, tensor in adapter.state_dict().items()}
    metadata: dict[str, Any] = {
        "kind": "encoder",
        "adapter": {"feature_dim": start.feature_dim, "hidden_dim": adapter.down.out_features},
    }
    if start.backbone_config is None:
        metadata["start"] = {"load_args": dict(start.load_args), "fingerprint": start.fingerprint}
    else:
        tensors |= start.model.state_dict()
        metadata |= {"backbone": asdict(start.backbone_config), "transform": asdict(start.transform)}
    save_tensors(path, tensors, metadata)
