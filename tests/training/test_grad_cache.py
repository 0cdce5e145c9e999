"""Gradient caching: a batch encoded in chunks has the loss and the gradients of the whole batch."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.methods import (
    BATCH_SIZE,
    VARIANTS,
    build_small_method,
    freeze_bn_stats,
    loss_and_gradients,
    random_batch,
)
from likewise.errors import InvalidInputError
from likewise.training.config import TrainConfig
from likewise.training.methods.base import Batch, Method

UNCHUNKED = [name for name, config in VARIANTS.items() if config.grad_cache_chunk_size is None]


def build(name: str, chunk_size: int | None) -> Method:
    return build_small_method(replace(VARIANTS[name], grad_cache_chunk_size=chunk_size))


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys()
    scale = max(float(value.abs().max()) for name, value in expected.items() if "gradient" in name)
    for name, value in expected.items():
        atol = 1e-5 * scale if "gradient" in name else 1e-6
        torch.testing.assert_close(
            results[name], value, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", UNCHUNKED)
def test_chunked_gradients_equal_those_of_the_whole_batch_with_frozen_batch_norm(name: str) -> None:
    batch, results = random_batch(VARIANTS[name]), []
    for chunk_size in (3, None):
        method = build(name, chunk_size)
        freeze_bn_stats(method, batch)
        torch.manual_seed(2)
        results.append(loss_and_gradients(method, method(batch).loss))
    assert_same(*results)


def plain_chunks_loss(method: Method, batch: Batch, num_chunks: int) -> Tensor:
    """Return the loss of a batch encoded chunk by chunk, with all activations in memory."""
    method.on_step_start(batch)
    views = [view.tensor_split(num_chunks) for view in batch.views]
    assert batch.tokens is not None
    tokens = batch.tokens.tensor_split(num_chunks)
    parts = [
        method.encode(replace(batch, views=[view[i] for view in views], tokens=tokens[i]))[1]
        for i in range(num_chunks)
    ]
    return method.compute_loss([torch.cat(rows) for rows in zip(*parts, strict=True)], batch).loss


@pytest.mark.parametrize("name", ["simclr", "byol", "moco", "swav", "clip"])
def test_batch_norm_is_updated_once_per_chunk_and_dropout_masks_are_reused(name: str) -> None:
    batch, results = random_batch(VARIANTS[name]), []
    for chunk_size in (3, None):
        method = build(name, chunk_size)
        # Replaces timm's drop path, which samples a mask in each forward pass.
        for module in method.backbone.modules():
            if hasattr(module, "drop_path"):
                module.drop_path = torch.nn.Dropout(0.3)
        torch.manual_seed(2)
        loss = plain_chunks_loss(method, batch, 3) if chunk_size is None else method(batch).loss
        results.append(loss_and_gradients(method, loss))
    assert_same(*results)


@pytest.mark.parametrize("name", ["moco", "moco-v3", "byol"])
def test_ema_models_encode_each_chunk_once(name: str) -> None:
    method: Any = build(name, 3)
    batch, calls = random_batch(VARIANTS[name]), []
    for model_name, module in (("trained", method.projector), ("ema", method.ema_model.ema_modules[1])):
        module.register_forward_pre_hook(lambda *_, model_name=model_name: calls.append(model_name))
    method(batch).loss.backward()
    assert calls.count("ema") > 1
    assert calls.count("trained") == 2 * calls.count("ema")


def peak_memory(step: Callable[[], object]) -> int:
    """Return the peak growth of tensor memory in bytes, by torch's profiler."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    results = profile.profiler.kineto_results  # pyrefly: ignore[missing-attribute]
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def test_only_one_chunk_is_in_memory() -> None:
    batch = random_batch(VARIANTS["simclr"])
    batch = replace(
        batch,
        views=[view.repeat(32, 1, 1, 1) for view in batch.views],
        rank_sizes=(32 * BATCH_SIZE,),
        tokens=None,
    )
    peaks = []
    for chunk_size in (14, None):
        method = build("simclr", chunk_size)
        peaks.append(peak_memory(lambda method=method: method(batch).loss.backward()))
    assert peaks[0] < peaks[1] / 2


def test_a_chunk_of_one_pair_raises() -> None:
    with pytest.raises(InvalidInputError, match="at least 2"):
        TrainConfig(grad_cache_chunk_size=1)
