"""Run one step of every method as one of several processes: `python ranks.py OUT`, rank and count from the
environment as torchrun sets them. What each method's loss, gradients and state are goes to OUT.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm

from likewise.distributed import (
    CPUSyncBatchNorm,
    DistributedContext,
    convert_to_sync_batchnorm,
    init_distributed,
    wrap_ddp,
)
from likewise.models.backbones import BackboneConfig, build_backbone
from likewise.training.config import TrainConfig
from likewise.training.methods.base import Batch, Method
from likewise.training.methods.options import METHODS
from likewise.training.methods.registry import build_method

PAIRS, WIDTH = 9, 6  # not divisible by two: the batch is shared unevenly


def small(method: str) -> TrainConfig:
    """Return settings that make a method as small as it can be."""
    needs = METHODS[method]
    settings = TrainConfig(method=method, backbone="resnet10t", image_size=32, batch_size=8)
    if needs.projector_dims:
        settings = replace(settings, projector_dims=(24, 12) if len(needs.projector_dims) > 1 else (12,))
    if needs.needs_text:
        settings = replace(settings, text_width=64, text_layers=1)
    if method == "swav":
        settings = replace(settings, num_prototypes=10, num_local_crops=1)
    return settings


VARIANTS = {method: small(method) for method in METHODS} | {
    "clip, frozen": replace(small("clip"), text_tower="frozen"),
    "simclr, weighted": replace(small("simclr"), false_negatives="reweight", positive_threshold=0.3),
    "pair-classifier, in batch": replace(
        small("pair-classifier"), mine_in_batch=True, positive_threshold=0.5, negative_threshold=0.4
    ),
    "pair-classifier, margin": replace(small("pair-classifier"), margin=0.2),
    "moco, in chunks": replace(small("moco"), grad_cache_chunk_size=4),
}


def whole_batch(settings: TrainConfig) -> Batch:
    """Return a batch of random views that is the same wherever it is made."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    one = settings.method_options.inputs == "anchor" or settings.mine_in_batch
    views = [noise(PAIRS, 3, 32, 32) for _ in range(1 if one else 2)]
    views += [noise(PAIRS, 3, 24, 24) for _ in range(settings.num_local_crops)]
    tokens = torch.randint(1, 400, (PAIRS, 9), generator=generator)
    tokens[:, -1] = 49_407
    return Batch(
        views=views,
        rank_sizes=(PAIRS,),
        caption_embeddings=normalize(noise(2, PAIRS, WIDTH), dim=-1),
        tokens=tokens,
        labels=None,
        train_fraction=0.5,
    )


def hold_norms(method: Method, shown: Batch) -> None:
    """Take batch norms' statistics from a batch and keep them, so that every chunk is normed alike."""
    norms: list[Any] = [m for m in method.modules() if isinstance(m, _BatchNorm | CPUSyncBatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        method.encode(shown)
    for norm in norms:
        norm.eval()


def one_step(name: str, among_rank: int, count: int) -> dict[str, torch.Tensor]:
    """Build a method, show it this process's part of the batch, and return what came of it."""
    settings, among = VARIANTS[name], DistributedContext(among_rank, count)
    torch.manual_seed(1)
    backbone, width = build_backbone(BackboneConfig(name="resnet10t", image_size=32))
    method = build_method(settings, backbone, width, memory_bank_size=16, caption_embedding_dim=WIDTH).train()
    if count > 1:
        convert_to_sync_batchnorm(method, torch.device("cpu"))
    stepper = wrap_ddp(method) if count > 1 else method
    batch, mine = whole_batch(settings), among.local_slice(PAIRS)
    assert batch.tokens is not None
    shown = replace(
        batch,
        views=[view[mine] for view in batch.views],
        tokens=batch.tokens[mine],
        rank_sizes=among.shard_sizes(PAIRS),
    )
    if settings.grad_cache_chunk_size is not None:
        hold_norms(method, shown)  # Other processes have other chunks, and norms in training compare those.
    torch.manual_seed(2)
    with patch.object(method, "embed", wraps=method.encode) as embeds:
        loss = stepper(shown).loss
        loss.backward()
    assert (embeds.call_count > 1) == (settings.grad_cache_chunk_size is not None)
    found = {f"{name}/gradient/{key}": p.grad for key, p in method.named_parameters() if p.grad is not None}
    found |= {f"{name}/state/{key}": b.detach().clone() for key, b in method.named_buffers()}
    return found | {f"{name}/loss": loss.detach()}


def main() -> None:
    """Take one step of each method and write the results of the first process."""
    torch.set_num_threads(1)
    with init_distributed(torch.device("cpu")) as among:
        found = {}
        for name in VARIANTS:
            found |= one_step(name, among.rank, among.world_size)
        if among.is_main_process:
            save_file({k: v.contiguous() for k, v in found.items()}, Path(sys.argv[1]))
        among.barrier()


if __name__ == "__main__":
    main()
