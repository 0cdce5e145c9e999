"""The level `adapter` of `adapt`: a residual adapter on the features of a frozen encoder."""

from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import dropout

from likewise.errors import TrainingError
from likewise.models.adapter import FeatureAdapter
from likewise.models.checkpoints import ADAPTER_PREFIX, save_tensors
from likewise.models.encoders import ImageEncoder, resolve_load_args
from likewise.neighbors.vectors import ImageVectors
from likewise.progress import Progress
from likewise.rng import Stream, epoch_permutation, uniform
from likewise.run_directory import RunDirectory
from likewise.training.adapt_config import AdaptConfig, AdapterOptions
from likewise.training.adapt_data import AdaptData
from likewise.training.blending import Blender, BlendFeatures
from likewise.training.losses import nt_xent_loss, soft_target_loss
from likewise.training.methods.base import projection_head
from likewise.training.optim import build_optimizer, warmup_cosine_lr
from likewise.training.run_files import MetricsLogger
from likewise.training.validation import effective_rank, feature_std

WARMUP_STEPS = 30
_NUM_LOGGED_ROWS = 50
_MIN_STD, _MIN_RELATIVE_STD = 1e-6, 0.1


@final
class FeatureBlender(Blender):
    """Blends of features and adapted features, by scaling the residual of the adapter."""

    def __init__(self, start: ImageEncoder, adapter: FeatureAdapter, data: AdaptData) -> None:
        """Combine a start and its adapter with the features to blend."""
        self._start, self._adapter, self._data = start, adapter, data

    def features(self, blend: float) -> BlendFeatures:
        """Return the features of a blend."""
        adapter, vectors = deepcopy(self._adapter).scale_residual_(blend), self._data.features.vectors
        anchors, partners = (
            adapter(torch.from_numpy(vectors[positions]))
            for positions in (self._data.split.anchors, self._data.split.partners)
        )
        retain = self._data.retain
        retained = None if retain is None else adapter(retain.features)
        return BlendFeatures(anchors=anchors, partners=partners, retained=retained)

    def save(self, path: Path, blend: float) -> None:
        """Write the start with the scaled adapter."""
        save_adapted_encoder(path, self._start, deepcopy(self._adapter).scale_residual_(blend))


class _AdapterObjective(nn.Module):
    """The adapter with the heads of its loss, which are discarded after training."""

    def __init__(
        self,
        adapter: FeatureAdapter,
        config: AdaptConfig,
        options: AdapterOptions,
        caption_dim: int | None,
    ) -> None:
        """Add a projection head, and one into the space of the caption embeddings if they are used."""
        super().__init__()
        feature_dim, self.config = adapter.down.in_features, config
        self.options = options
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
        config, options = self.config, self.options
        inputs = dropout(torch.cat([anchors, partners]), options.input_dropout)
        adapted = self.adapter(inputs)
        z1, z2 = self.projector(adapted).chunk(2)
        loss = nt_xent_loss(z1, z2, config.temperature)
        if captions is None or self.caption_projector is None:
            return loss
        has_caption = captions.any(dim=1)
        z = self.caption_projector(adapted[: len(anchors)])[has_caption]
        targets = captions[has_caption]
        return loss + options.caption_weight * soft_target_loss(
            z, targets, config.temperature, options.caption_temperature
        )


def train_adapter(
    data: AdaptData,
    encoder: ImageEncoder,
    config: AdaptConfig,
    options: AdapterOptions,
    out: Path,
    progress: Progress,
) -> FeatureAdapter:
    """Train the adapter on the features; the result is a function of the seed and the inputs."""
    device, run_dir = encoder.device, RunDirectory(out)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        adapter = FeatureAdapter(encoder.feature_dim, options.hidden_dim)
        mean, std = feature_moments(data.features.vectors, data.pairs.anchors)
        adapter.mean.copy_(mean)
        adapter.std.copy_(std)
        captions_dim = None if data.captions is None else data.captions.dim
        objective = _AdapterObjective(adapter, config, options, captions_dim).to(device).train()
        optimizer = build_optimizer("adamw", objective, lr=config.peak_lr, weight_decay=config.weight_decay)
        log_every = max(1, config.max_steps // _NUM_LOGGED_ROWS)
        metrics_logger = MetricsLogger(run_dir.metrics_path, run_dir.tensorboard_dir, 0)
        with progress.task("adapting", config.max_steps, "steps") as bar:
            for step in range(config.max_steps):
                anchors, partners, captions = _batch(data, config, step, device)
                lr = warmup_cosine_lr(
                    step, total_steps=config.max_steps, warmup_steps=WARMUP_STEPS, peak_lr=config.peak_lr
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
    data: AdaptData, config: AdaptConfig, step: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the features of anchors and partners (b, d), and one caption embedding per anchor (b, e)."""
    all_anchors, seed = data.pairs.anchors, config.seed
    epoch, batch_index = divmod(step, len(all_anchors) // config.pairs_per_step)
    order = epoch_permutation(len(all_anchors), seed=seed, epoch=epoch)
    anchors = all_anchors[order[batch_index * config.pairs_per_step :][: config.pairs_per_step]]
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
    """Return mean and standard deviation of selected rows, in float64 by blocks.

    The deviation is at least a tenth of its median: a feature that hardly varies on these images, such as a
    rectified one that is always 0, may vary on others, and must not outweigh all features there.
    """
    total = np.zeros(vectors.shape[1])
    squares = np.zeros(vectors.shape[1])
    for start in range(0, len(indices), block_size):
        block = vectors[indices[start : start + block_size]].astype(np.float64)
        total += block.sum(axis=0)
        squares += (block**2).sum(axis=0)
    mean = total / len(indices)
    std = np.sqrt(np.maximum(squares / len(indices) - mean**2, 0))
    std = np.maximum(std, max(_MIN_STD, _MIN_RELATIVE_STD * float(np.median(std))))
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


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
        metadata["start"] = {
            "load_args": resolve_load_args(start.load_args),
            "fingerprint": start.fingerprint,
        }
    else:
        tensors |= start.model.state_dict()
        metadata |= {"backbone": asdict(start.backbone_config), "transform": asdict(start.transform)}
    save_tensors(path, tensors, metadata)
