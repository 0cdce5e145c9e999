"""Chunks of a batch, embedded twice, have the loss and the gradients of the whole (gradient caching)."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

import ranks
from likewise.errors import InvalidInputError
from likewise.models.backbones import BackboneConfig, build_backbone
from likewise.training.config import TrainConfig
from likewise.training.methods.base import Batch, Method
from likewise.training.methods.registry import build_method

PLAIN = [name for name, settings in ranks.VARIANTS.items() if settings.grad_cache_chunk_size is None]


def build(name: str, chunk_size: int | None) -> Method:
    settings = replace(ranks.VARIANTS[name], grad_cache_chunk_size=chunk_size)
    torch.manual_seed(1)
    backbone, width = build_backbone(BackboneConfig(name="resnet10t", image_size=32))
    return build_method(
        settings, backbone, width, memory_bank_size=16, caption_embedding_dim=ranks.WIDTH
    ).train()


def found(method: Method, loss: Tensor) -> dict[str, Tensor]:
    """Return a loss, the gradients it leaves and the state of all buffers."""
    loss.backward()
    state = {f"state/{name}": buffer.clone() for name, buffer in method.named_buffers()}
    gradients = {f"gradient/{n}": p.grad for n, p in method.named_parameters() if p.grad is not None}
    return state | gradients | {"loss": loss.detach()}


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    scale = max(float(value.abs().max()) for name, value in theirs.items() if "gradient" in name)
    for name, expected in theirs.items():
        atol = 1e-5 * scale if "gradient" in name else 1e-6
        torch.testing.assert_close(
            mine[name], expected, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", PLAIN)
def test_without_batch_statistics_chunks_change_nothing(name: str) -> None:
    shown, results = ranks.whole_batch(ranks.VARIANTS[name]), []
    for chunk_size in (3, None):
        method = build(name, chunk_size)
        ranks.hold_norms(method, shown)
        torch.manual_seed(2)
        results.append(found(method, method(shown).loss))
    assert_same(*results)


def in_plain_chunks(method: Method, shown: Batch, chunks: int) -> Tensor:
    """Embed a batch chunk by chunk with every activation kept, as one would write it down."""
    method.on_step_start(shown)
    views = [view.tensor_split(chunks) for view in shown.views]
    assert shown.tokens is not None
    tokens = shown.tokens.tensor_split(chunks)
    parts = [
        method.encode(replace(shown, views=[view[i] for view in views], tokens=tokens[i]))[1]
        for i in range(chunks)
    ]
    return method.compute_loss([torch.cat(rows) for rows in zip(*parts, strict=True)], shown).loss


@pytest.mark.parametrize("name", ["simclr", "byol", "moco", "swav", "clip"])
def test_norms_see_each_chunk_once_and_dropout_repeats_itself(name: str) -> None:
    shown, results = ranks.whole_batch(ranks.VARIANTS[name]), []
    for chunk_size in (3, None):
        method = build(name, chunk_size)
        # timm's drop path, which draws anew in each forward pass.
        for module in method.backbone.modules():
            if hasattr(module, "drop_path"):
                module.drop_path = torch.nn.Dropout(0.3)
        torch.manual_seed(2)
        loss = in_plain_chunks(method, shown, 3) if chunk_size is None else method(shown).loss
        results.append(found(method, loss))
    assert_same(*results)


@pytest.mark.parametrize("name", ["moco", "moco-v3", "byol"])
def test_slow_copies_see_each_chunk_once(name: str) -> None:
    method: Any = build(name, 3)
    shown, seen = ranks.whole_batch(ranks.VARIANTS[name]), []
    for which, module in (("trained", method.projector), ("slow", method.slow.copies[1])):
        module.register_forward_pre_hook(lambda *_, which=which: seen.append(which))
    method(shown).loss.backward()
    assert seen.count("slow") > 1
    assert seen.count("trained") == 2 * seen.count("slow")


def peak_of(step: Callable[[], object]) -> int:
    """Return by how many bytes the memory of tensors grows at most, as torch's profiler counts it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        step()
    results = seen.profiler.kineto_results  # pyrefly: ignore[missing-attribute]
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def test_only_one_chunk_is_in_memory_at_a_time() -> None:
    shown = ranks.whole_batch(ranks.VARIANTS["simclr"])
    shown = replace(
        shown,
        views=[view.repeat(32, 1, 1, 1) for view in shown.views],
        rank_sizes=(32 * ranks.PAIRS,),
        tokens=None,
    )
    most = []
    for chunk_size in (14, None):
        method = build("simclr", chunk_size)
        most.append(peak_of(lambda method=method: method(shown).loss.backward()))
    assert most[0] < most[1] / 2


def test_a_chunk_of_one_is_refused() -> None:
    with pytest.raises(
        InvalidInputError, match="--chunk-size is 1; batch norm compares images: give 2 or more"
    ):
        TrainConfig(grad_cache_chunk_size=1)
