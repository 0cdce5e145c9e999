"""Small configs of every method, and one training step of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm

from likewise.distributed import (
    CPUSyncBatchNorm,
    DistributedContext,
    convert_to_sync_batchnorm,
    wrap_ddp,
)
from likewise.models.backbones import BackboneConfig, build_backbone
from likewise.progress import NULL_PROGRESS, Progress, ProgressBar
from likewise.training.config import TrainConfig, mines_in_batch, train_config_to_dict
from likewise.training.methods.base import Batch, Method
from likewise.training.methods.build import build_method
from likewise.training.methods.options import (
    METHODS,
    MemoryBankOptions,
    MethodOptions,
    SwAVOptions,
    option_names,
    parse_method_options,
)

BATCH_SIZE, CAPTION_DIM = 9, 6  # odd, so that the shards of two processes differ in size

_SMALL_OPTIONS: dict[str, Any] = {
    "embed_dim": 12,
    "text_width": 64,
    "text_layers": 1,
    "num_prototypes": 10,
    "num_local_crops": 1,
    "projector_dims": (24, 12),
}


def small_config(method: str, **options: Any) -> TrainConfig:
    """Return the config of a method with small networks."""
    names = option_names(METHODS[method])
    options = {name: value for name, value in _SMALL_OPTIONS.items() if name in names} | options
    return TrainConfig(
        method=parse_method_options(method, options), backbone="resnet10t", image_size=32, batch_size=8
    )


def with_options(config: TrainConfig, **options: Any) -> TrainConfig:
    """Return a config with other options of its method."""
    values: Any = options
    return replace(config, method=replace(config.method_options, **values))


def option(config: TrainConfig, name: str) -> Any:
    """Return an option of the method, or None if the method does not have it."""
    return train_config_to_dict(config).get(name)


VARIANTS = {method: small_config(method) for method in METHODS} | {
    "clip, frozen": small_config("clip", text_tower="frozen"),
    "simclr, reweighted": small_config("simclr", false_negatives="reweight", false_negative_threshold=0.3),
    "pair-classifier, in batch": small_config(
        "pair-classifier", mine_in_batch=True, positive_threshold=0.5, negative_threshold=0.4
    ),
    "pair-classifier, margin": small_config("pair-classifier", margin=0.2),
    "moco, in chunks": replace(small_config("moco"), grad_cache_chunk_size=4),
}


def build_small_method(config: TrainConfig) -> Method:
    """Build a method in training mode; the same weights for the same config."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        backbone, feature_dim = build_backbone(BackboneConfig(name="resnet10t", image_size=32))
        method = build_method(
            small_bank(config.method_options), backbone, feature_dim, caption_embedding_dim=CAPTION_DIM
        )
    method.grad_cache_chunk_size = config.grad_cache_chunk_size
    return method.train()


def small_bank(options: MethodOptions) -> MethodOptions:
    """Return options with a memory bank of 16 vectors, if the method has one."""
    return replace(options, memory_bank_size=16) if isinstance(options, MemoryBankOptions) else options


def random_batch(config: TrainConfig) -> Batch:
    """Return a batch of random views for a method; always the same."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    options = config.method_options
    num_views = 1 if options.inputs == "anchor" or mines_in_batch(options) else 2
    views = [noise(BATCH_SIZE, 3, 32, 32) for _ in range(num_views)]
    if isinstance(options, SwAVOptions):
        views += [noise(BATCH_SIZE, 3, 24, 24) for _ in range(options.num_local_crops)]
    tokens = torch.randint(1, 400, (BATCH_SIZE, 9), generator=generator)
    tokens[:, -1] = 49_407
    return Batch(
        views=views,
        rank_sizes=(BATCH_SIZE,),
        caption_embeddings=normalize(noise(2, BATCH_SIZE, CAPTION_DIM), dim=-1),
        tokens=tokens,
        labels=None,
        train_fraction=0.5,
    )


def freeze_bn_stats(method: Method, batch: Batch) -> None:
    """Set the statistics of batch norm from a batch and freeze them, so that all chunks use the same."""
    norms: list[Any] = [m for m in method.modules() if isinstance(m, _BatchNorm | CPUSyncBatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        method.encode(batch)
    for norm in norms:
        norm.eval()


def loss_and_gradients(method: Method, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a loss, its gradients and the state of all buffers after the step."""
    loss.backward()
    results = {f"state/{name}": buffer.detach().clone() for name, buffer in method.named_buffers()}
    results |= {f"gradient/{n}": p.grad for n, p in method.named_parameters() if p.grad is not None}
    return results | {"loss": loss.detach()}


def train_step(name: str, dist: DistributedContext) -> dict[str, torch.Tensor]:
    """Take one training step of a variant on the local part of the batch."""
    config = VARIANTS[name]
    method = build_small_method(config)
    if dist.world_size > 1:
        convert_to_sync_batchnorm(method, torch.device("cpu"))
    ddp_method = wrap_ddp(method) if dist.world_size > 1 else method
    batch, local = random_batch(config), dist.local_slice(BATCH_SIZE)
    assert batch.tokens is not None
    batch = replace(
        batch,
        views=[view[local] for view in batch.views],
        tokens=batch.tokens[local],
        rank_sizes=dist.shard_sizes(BATCH_SIZE),
    )
    if config.grad_cache_chunk_size is not None:
        freeze_bn_stats(method, batch)  # chunks, and so their statistics, depend on the number of processes
    torch.manual_seed(2)
    with patch.object(method, "encode", wraps=method.encode) as encode:
        results = loss_and_gradients(method, ddp_method(batch).loss)
    assert (encode.call_count > 1) == (config.grad_cache_chunk_size is not None)
    return {f"{name}/{key}": value for key, value in results.items()}


class InterruptedTrainingError(Exception):
    """Raised by `InterruptAfter` in the middle of training."""


class InterruptAfter(Progress):
    """Progress that interrupts training in the step after `num_steps`."""

    def __init__(self, num_steps: int) -> None:
        self.remaining = num_steps

    @contextmanager
    def task(self, description: str, total: int, unit: str, completed: int = 0) -> Iterator[ProgressBar]:
        """Count the steps of training."""
        with NULL_PROGRESS.task(description, total, unit, completed) as progress_bar:
            yield _InterruptingBar(self) if description == "training" else progress_bar


class _InterruptingBar(ProgressBar):
    def __init__(self, progress: InterruptAfter) -> None:
        self.progress = progress

    def update(self, n: int = 1, postfix: str | None = None) -> None:
        if n and self.progress.remaining == 0:
            raise InterruptedTrainingError
        self.progress.remaining -= n
