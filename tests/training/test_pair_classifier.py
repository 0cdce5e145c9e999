"""The pair classifier: its pairs, and its losses against PyTorch's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_embedding_loss, cross_entropy, normalize

from likewise.training.methods.base import Batch, StepOutput
from likewise.training.methods.options import PairClassifierOptions
from likewise.training.methods.pair_classifier import PairClassifier, negative_mask, subsample_mask


class FlatBackbone(nn.Module):
    """Return the pixels as features."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def classifier(**options: Any) -> PairClassifier:
    torch.manual_seed(0)
    return PairClassifier(FlatBackbone(), 12, PairClassifierOptions(**options))


def step(method: PairClassifier, views: Tensor, captions: Tensor | None) -> StepOutput:
    return method(Batch(views=list(views), rank_sizes=(views.shape[1],), caption_embeddings=captions))


def test_negatives_have_dissimilar_captions() -> None:
    captions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6], [0.0, 0.0]])
    mask = negative_mask(captions, captions, 0.2)
    assert mask.nonzero().tolist() == [[0, 1], [1, 0]]


def test_subsampled_masks_are_uniform() -> None:
    mask = torch.rand(6, 6) > 0.5
    count = int(mask.sum())
    frequency = torch.zeros(6, 6)
    for _ in range(400):
        subset = subsample_mask(mask, torch.tensor(3.0))
        assert subset.sum() == 3
        assert not (subset & ~mask).any()
        frequency += subset
    assert (frequency[mask] / 400 - 3 / count).abs().max() < 0.12
    assert torch.equal(subsample_mask(mask, torch.tensor(float(count))), mask)
    assert subsample_mask(mask, torch.tensor(0.3)).sum() == 1
    assert subsample_mask(mask, torch.tensor(0.0)).sum() == 0
    assert subsample_mask(torch.zeros(3, 3, dtype=torch.bool), torch.tensor(2.0)).sum() == 0


@pytest.mark.parametrize("margin", [None, 0.3])
def test_loss_equals_torch_on_listed_pairs(margin: float | None) -> None:
    # Orthogonal captions: all pairs of different images are negatives, two per positive.
    method = classifier(margin=margin, negatives_per_positive=2.0)
    views = torch.randn(2, 3, 3, 2, 2)
    output = step(method, views, torch.eye(3).expand(2, 3, 3))
    anchors, partners = views.flatten(2)
    pairs = [(i, i) for i in range(3)] + [(i, j) for i in range(3) for j in range(3) if i != j]
    a, b = (torch.stack([side[p[n]] for p in pairs]) for n, side in enumerate((anchors, partners)))
    same = torch.tensor([1] * 3 + [0] * 6)
    if margin is None:
        assert method.classifier is not None
        expected = cross_entropy(method.classifier(torch.cat([a, b], dim=1)), same)
    else:
        expected = cosine_embedding_loss(a, b, 2 * same - 1, margin=margin)
    torch.testing.assert_close(output.loss, expected)
    assert output.logs["positives"] == 3
    assert output.logs["negatives"] == 6


def test_each_pair_of_a_batch_is_mined_once() -> None:
    captions = normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [0, 0]]), dim=1)
    method = classifier(mine_in_batch=True, positive_threshold=0.8)
    views = torch.randn(1, 5, 3, 2, 2)
    output = step(method, views, captions.expand(2, 5, 2))
    (rows,) = views.flatten(2)
    # Images 0 and 1 are similar, and 2 and 3; of the four other pairs two are sampled; 4 has no caption.
    assert output.logs["positives"] == 2
    assert output.logs["negatives"] == 2
    assert method.classifier is not None
    positive_logits = method.classifier(torch.cat([rows[[0, 2]], rows[[1, 3]]], dim=1))
    positives = cross_entropy(positive_logits.detach(), torch.ones(2, dtype=torch.long), reduction="sum")
    negative_logits = method.classifier(torch.cat([rows[[0, 0, 1, 1]], rows[[2, 3, 2, 3]]], dim=1))
    negatives = cross_entropy(negative_logits.detach(), torch.zeros(4, dtype=torch.long), reduction="none")
    possible_losses = {
        round(float((positives + negatives[i] + negatives[j]) / 4), 4) for i in range(4) for j in range(i)
    }
    assert round(float(output.loss.detach()), 4) in possible_losses


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_negatives_per_positive_is_the_ratio_of_sampled_pairs(ratio: float) -> None:
    captions = normalize(torch.randn(2, 64, 3), dim=-1)
    output = step(
        classifier(negatives_per_positive=ratio, mine_in_batch=True, positive_threshold=0.9),
        torch.randn(1, 64, 3, 2, 2),
        captions,
    )
    assert output.logs["positives"] > 10
    assert float(output.logs["negatives"] / output.logs["positives"]) == pytest.approx(ratio, rel=0.05)


def test_a_batch_without_negatives_skips_the_update() -> None:
    method = classifier()
    output = step(method, torch.randn(2, 4, 3, 2, 2), torch.ones(2, 4, 1))
    output.loss.backward()
    assert output.skip_update == 1
    assert output.loss == 0
    assert method.classifier is not None
    assert method.classifier.weight.grad is not None
    assert (method.classifier.weight.grad == 0).all()


def test_training_without_caption_embeddings_raises() -> None:
    with pytest.raises(TypeError, match="caption_embeddings"):
        step(classifier(), torch.randn(2, 4, 3, 2, 2), None)
