"""Every loss and its gradients against lightly, open_clip or the formula in float64, on random inputs."""

import math
from collections.abc import Callable, Sequence

import lightly.loss
import numpy as np
import open_clip.loss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from torch import Tensor
from torch.nn.functional import normalize

from likewise.training import losses

Sizes = {"b": st.integers(2, 12), "d": st.integers(2, 16), "seed": st.integers(0, 10**6)}


def random_rows(b: int, d: int, seed: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, d, generator=generator, requires_grad=True) for _ in range(count)]


def assert_same(loss: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> None:
    """Compare value and gradients; a difference is relative where the loss is large."""
    torch.testing.assert_close(loss, expected.to(loss.dtype).reshape(()), atol=1e-5, rtol=1e-5)
    gradients, expected_gradients = (torch.autograd.grad(x.sum(), inputs) for x in (loss, expected))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient.to(gradient.dtype), atol=1e-5, rtol=1e-4)


REFERENCES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "dcl": (lambda a, b: losses.dcl_loss(a, b, 0.2), lightly.loss.DCLLoss(temperature=0.2)),
    "negative cosine": (losses.negative_cosine_loss, lightly.loss.NegativeCosineSimilarity()),
    "vicreg": (losses.vicreg_loss, lightly.loss.VICRegLoss()),
    "barlow twins": (losses.barlow_twins_loss, lightly.loss.BarlowTwinsLoss()),
    "clip": (
        lambda a, b: losses.clip_loss(a, b, torch.tensor(7.0)),
        lambda a, b: open_clip.loss.ClipLoss()(normalize(a, dim=1), normalize(b, dim=1), torch.tensor(7.0)),
    ),
    "siglip": (
        lambda a, b: losses.siglip_loss(a, b, torch.tensor(9.0), torch.tensor(-3.0)),
        lambda a, b: open_clip.loss.SigLipLoss()(
            normalize(a, dim=1), normalize(b, dim=1), torch.tensor(9.0), torch.tensor(-3.0)
        ),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
@settings(deadline=None, max_examples=20)
@given(**Sizes)
def test_loss_and_gradients_equal_the_reference(name: str, b: int, d: int, seed: int) -> None:
    inputs = random_rows(b, d, seed)
    loss_fn, reference = REFERENCES[name]
    assert_same(loss_fn(*inputs), reference(*inputs), inputs)


@settings(deadline=None, max_examples=20)
@given(**Sizes, n=st.integers(12, 20))
def test_info_nce_equals_the_formula(b: int, d: int, seed: int, n: int) -> None:
    queries, keys = random_rows(b, d, seed)[0], random_rows(n, d, seed + 1)[0]
    labels = torch.arange(b).flip(0)
    q, k = (normalize(x.double(), dim=1) for x in (queries, keys))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(b):
        scores = [torch.exp(q[i] @ k[j] / 0.3) for j in range(n)]
        total = total - torch.log(scores[int(labels[i])] / sum(scores))
    assert_same(losses.info_nce_loss(queries, keys, labels, 0.3), total / b, [queries, keys])


@settings(deadline=None, max_examples=20)
@given(**Sizes, q=st.integers(1, 9))
def test_moco_loss_equals_the_formula(b: int, d: int, seed: int, q: int) -> None:
    queries, keys = random_rows(b, d, seed)
    bank = normalize(random_rows(q, d, seed + 1, 1)[0].detach(), dim=1)
    a, k, n = (normalize(x.double(), dim=1) for x in (queries, keys, bank))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(b):
        positive = torch.exp(a[i] @ k[i] / 0.2)
        total = total - torch.log(
            positive / (positive + torch.stack([torch.exp(a[i] @ key / 0.2) for key in n]).sum())
        )
    assert_same(losses.moco_loss(queries, keys, bank, 0.2), total / b, [queries, keys])


@settings(deadline=None, max_examples=20)
@given(**Sizes)
def test_supcon_loss_equals_the_formula(b: int, d: int, seed: int) -> None:
    (views,) = random_rows(b, d, seed, 1)
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, b))
    z = normalize(views.double(), dim=1)
    total, num_anchors = torch.zeros((), dtype=torch.float64), 0
    for i in range(b):
        positives = [p for p in range(b) if p != i and labels[p] == labels[i]]
        others = sum(torch.exp(z[i] @ z[a] / 0.5) for a in range(b) if a != i)
        if positives:
            num_anchors += 1
            log_probs = [torch.log(torch.exp(z[i] @ z[p] / 0.5) / others) for p in positives]
            total = total - torch.stack(log_probs).mean()
    if num_anchors:
        assert_same(losses.supcon_loss(views, labels, 0.5), total / num_anchors, [views])
    else:
        assert losses.supcon_loss(views, labels, 0.5) == 0


def test_supcon_loss_of_pairs_is_nt_xent() -> None:
    z1, z2 = torch.randn(2, 8, 5)
    pairs = torch.arange(8).repeat(2)
    torch.testing.assert_close(
        losses.supcon_loss(torch.cat([z1, z2]), pairs, 0.1), losses.nt_xent_loss(z1, z2, 0.1)
    )


@settings(deadline=None, max_examples=20)
@given(**Sizes, threshold=st.sampled_from([0.3, 0.8]), mode=st.sampled_from(["mask", "reweight"]))
def test_dcl_loss_with_weights_equals_the_formula(
    b: int, d: int, seed: int, threshold: float, mode: str
) -> None:
    z1, z2 = random_rows(b, d, seed)
    captions = normalize(random_rows(2 * b, 3, seed + 1, 1)[0].detach(), dim=1)
    weights, _ = losses.false_negative_weights(captions @ captions.T, threshold, mode)
    assert weights is not None
    z = normalize(torch.cat([z1, z2]).double(), dim=1)
    rows = []
    for i in range(2 * b):
        partner = (i + b) % (2 * b)
        others = [j for j in range(2 * b) if j not in (i, partner) and weights[i, j] > 0]
        if others:
            negatives = torch.stack(
                [float(weights[i, j]) * torch.exp(z[i] @ z[j] / 0.5) for j in others]
            ).sum()
            rows.append(torch.log(negatives) - z[i] @ z[partner] / 0.5)
    loss = losses.dcl_loss(z1, z2, 0.5, weights)
    if rows:
        assert_same(loss, torch.stack(rows).mean(), [z1, z2])
    else:
        assert loss == 0
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, [z1, z2]))


@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 20), p=st.integers(2, 12), seed=st.integers(0, 10**6))
def test_sinkhorn_equals_lightly_and_uses_prototypes_equally(n: int, p: int, seed: int) -> None:
    scores = normalize(random_rows(n, p, seed, 1)[0].detach(), dim=1)
    codes = losses.sinkhorn(scores)
    torch.testing.assert_close(
        codes, lightly_sinkhorn(scores, iterations=3, epsilon=0.05), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(n))
    converged = losses.sinkhorn(scores, iterations=500)
    torch.testing.assert_close(converged.sum(dim=0), torch.full((p,), n / p), atol=0.05, rtol=0.02)


def test_sinkhorn_does_not_overflow() -> None:
    assert torch.isfinite(losses.sinkhorn(50 * torch.randn(6, 4))).all()


@settings(deadline=None, max_examples=20)
@given(b=st.integers(2, 10), num_local=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_swav_loss_equals_lightly(b: int, num_local: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(b, 5, generator=generator, requires_grad=True) for _ in range(2 + num_local)]
    codes = [losses.sinkhorn(x.detach()) for x in scores[:2]]
    assert_same(
        losses.swav_loss(scores, codes, 0.1),
        lightly.loss.SwaVLoss()(scores[:2], scores[2:]),
        scores,
    )


def test_losses_of_orthogonal_views() -> None:
    # One other image: its two orthogonal views are the negatives of each view, e^0 each.
    assert losses.dcl_loss(torch.eye(2), torch.eye(2), 1.0).item() == pytest.approx(math.log(2) - 1)
    assert losses.negative_cosine_loss(torch.eye(3), 2 * torch.eye(3)).item() == pytest.approx(-1)
    # Unit scale, no bias: two matches at cosine 1, two mismatches at cosine 0.
    expected = math.log(1 + math.exp(-1)) + math.log(2)
    scale, bias = torch.tensor(1.0), torch.tensor(0.0)
    assert losses.siglip_loss(torch.eye(2), torch.eye(2), scale, bias).item() == pytest.approx(expected)
