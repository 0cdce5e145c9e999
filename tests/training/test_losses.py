"""NT-Xent against the formula in float64 and lightly, and its properties."""

import math

import lightly.loss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from likewise.training.losses import false_negative_fraction, false_negative_weights, nt_xent_loss


def naive_nt_xent(z1: np.ndarray, z2: np.ndarray, temperature: float) -> float:
    """Equation 1 of Chen et al. 2020, term by term."""
    views = np.concatenate([z1, z2]).astype(np.float64)
    views /= np.linalg.norm(views, axis=1, keepdims=True)
    b = len(z1)
    total = 0.0
    for i in range(2 * b):
        partner = (i + b) % (2 * b)
        others = [math.exp(views[i] @ views[j] / temperature) for j in range(2 * b) if j != i]
        total -= math.log(math.exp(views[i] @ views[partner] / temperature) / sum(others))
    return total / (2 * b)


def test_nt_xent_of_two_orthogonal_pairs() -> None:
    # Two pairs of equal views, orthogonal to each other: the logits are 1/t, 0, 0.
    views = torch.eye(2)
    expected = -math.log(math.e / (math.e + 2))
    assert nt_xent_loss(views, views, 1.0).item() == pytest.approx(expected, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    b=st.integers(2, 12),
    d=st.integers(2, 16),
    t=st.sampled_from([0.07, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_nt_xent_equals_the_formula_and_lightly(b: int, d: int, t: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z1, z2 = (torch.randn(b, d, generator=generator, requires_grad=True) for _ in range(2))
    loss = nt_xent_loss(z1, z2, t)
    assert loss.item() == pytest.approx(naive_nt_xent(z1.detach().numpy(), z2.detach().numpy(), t), abs=1e-5)
    gradients = torch.autograd.grad(loss, [z1, z2])
    expected = lightly.loss.NTXentLoss(temperature=t)(z1, z2)
    expected_gradients = torch.autograd.grad(expected, [z1, z2])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)


def test_nt_xent_is_invariant_to_permutation_swapped_views_and_scale() -> None:
    z1, z2 = torch.randn(2, 9, 5)
    loss = nt_xent_loss(z1, z2, 0.1)
    order = torch.randperm(9)
    torch.testing.assert_close(nt_xent_loss(z1[order], z2[order], 0.1), loss)
    torch.testing.assert_close(nt_xent_loss(z2, z1, 0.1), loss)
    torch.testing.assert_close(nt_xent_loss(7 * z1, 0.2 * z2, 0.1), loss)
    assert nt_xent_loss(z1, z2[order.roll(1)], 0.1) != loss


def naive_nt_xent_with_captions(
    z1: np.ndarray, z2: np.ndarray, captions: np.ndarray, temperature: float, threshold: float, mode: str
) -> float:
    """The loss with false negatives masked, reweighted or as soft targets, term by term in float64."""
    views = np.concatenate([z1, z2]).astype(np.float64)
    views /= np.linalg.norm(views, axis=1, keepdims=True)
    captions = captions.astype(np.float64)
    v, b, total = len(views), len(z1), 0.0
    for i in range(v):
        partner = (i + b) % v
        score, count, target = {}, {}, {}
        for j in (j for j in range(v) if j != i):
            s = captions[i] @ captions[j]
            score[j], count[j], target[j] = (
                math.exp(views[i] @ views[j] / temperature),
                1.0,
                float(j == partner),
            )
            if j != partner and s >= threshold:
                count[j] = {"mask": 0.0, "reweight": min(1.0, max(0.0, (1 - s) / (1 - threshold)))}.get(
                    mode, 1.0
                )
                target[j] = s if mode == "soft_targets" else 0.0
        denominator = sum(score[j] * count[j] for j in score)
        mass = sum(target.values())
        total -= sum(target[j] / mass * math.log(score[j] / denominator) for j in score if target[j] > 0)
    return total / v


@settings(deadline=None, max_examples=40)
@given(
    b=st.integers(2, 10),
    mode=st.sampled_from(["mask", "reweight", "soft_targets"]),
    threshold=st.sampled_from([0.3, 0.6, 0.9]),
    seed=st.integers(0, 10**6),
)
def test_nt_xent_with_false_negatives_equals_the_formula(
    b: int, mode: str, threshold: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z1, z2 = (torch.randn(b, 6, generator=generator, requires_grad=True) for _ in range(2))
    captions = torch.nn.functional.normalize(torch.randn(2 * b, 3, generator=generator), dim=1)
    captions[0] = 0  # one image without a caption
    weights, targets = false_negative_weights(captions @ captions.T, threshold, mode)
    loss = nt_xent_loss(z1, z2, 0.2, weights, targets)
    expected = naive_nt_xent_with_captions(
        z1.detach().numpy(), z2.detach().numpy(), captions.numpy(), 0.2, threshold, mode
    )
    assert loss.item() == pytest.approx(expected, abs=2e-5)
    for gradient in torch.autograd.grad(loss, [z1, z2]):
        assert torch.isfinite(gradient).all()


def test_dissimilar_captions_do_not_change_the_loss() -> None:
    z1, z2 = torch.randn(2, 7, 5)
    similarity = torch.eye(14)
    for mode in ("mask", "reweight", "soft_targets"):
        weights, targets = false_negative_weights(similarity, 0.5, mode)
        torch.testing.assert_close(nt_xent_loss(z1, z2, 0.1, weights, targets), nt_xent_loss(z1, z2, 0.1))


def test_false_negative_fraction_of_equal_and_orthogonal_captions() -> None:
    # Anchors 0 and 1 share a caption, and so do their partners: 8 of the 4 x 2 ordered negatives of v = 4.
    assert false_negative_fraction(torch.ones(4, 4), 0.8).item() == 1.0
    # Each pair shares its own caption and nothing else.
    assert false_negative_fraction(torch.eye(2).repeat(2, 2), 0.8).item() == 0.0
