"""The pair classifier: which pairs it draws, its losses against torch's own, and that it learns."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_embedding_loss, cross_entropy, normalize

from likewise.training.methods.base import Batch, StepOutput
from likewise.training.methods.pair_classifier import PairClassifier, negative_mask, subsample_mask


class Flat(nn.Module):
    """Pixels as features, so that what is learned is the classifier alone."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def classifier(margin: float | None = None, ratio: float = 1.0, alike: float | None = None) -> PairClassifier:
    torch.manual_seed(0)
    return PairClassifier(
        Flat(),
        12,
        negative_threshold=0.2,
        negatives_per_positive=ratio,
        margin=margin,
        positive_threshold=alike,
    )


def show(method: PairClassifier, views: Tensor, captions: Tensor | None) -> StepOutput:
    return method(Batch(views=list(views), rank_sizes=(views.shape[1],), caption_embeddings=captions))


def test_negatives_are_unlike_and_have_captions() -> None:
    captions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6], [0.0, 0.0]])
    found = negative_mask(captions, captions, 0.2)
    assert found.nonzero().tolist() == [[0, 1], [1, 0]]


def test_pairs_are_drawn_evenly_and_no_others() -> None:
    allowed = torch.rand(6, 6) > 0.5
    count = int(allowed.sum())
    seen = torch.zeros(6, 6)
    for _ in range(400):
        found = subsample_mask(allowed, torch.tensor(3.0))
        assert found.sum() == 3
        assert not (found & ~allowed).any()
        seen += found
    share = seen[allowed] / 400
    assert (share - 3 / count).abs().max() < 0.12
    assert torch.equal(subsample_mask(allowed, torch.tensor(float(count))), allowed)
    assert subsample_mask(allowed, torch.tensor(0.3)).sum() == 1
    assert subsample_mask(allowed, torch.tensor(0.0)).sum() == 0
    assert subsample_mask(torch.zeros(3, 3, dtype=torch.bool), torch.tensor(2.0)).sum() == 0


@pytest.mark.parametrize("margin", [None, 0.3])
def test_loss_is_that_of_torch_over_pairs_laid_out(margin: float | None) -> None:
    # All captions at right angles: every two different images are a negative, two for each positive.
    method = classifier(margin, ratio=2.0)
    views = torch.randn(2, 3, 3, 2, 2)
    step = show(method, views, torch.eye(3).expand(2, 3, 3))
    first, second = views.flatten(2)
    pairs = [(i, i) for i in range(3)] + [(i, j) for i in range(3) for j in range(3) if i != j]
    a, b = (torch.stack([side[p[n]] for p in pairs]) for n, side in enumerate((first, second)))
    same = torch.tensor([1] * 3 + [0] * 6)
    if margin is None:
        assert method.classifier is not None
        expected = cross_entropy(method.classifier(torch.cat([a, b], dim=1)), same)
    else:
        expected = cosine_embedding_loss(a, b, 2 * same - 1, margin=margin)
    torch.testing.assert_close(step.loss, expected)
    assert step.logs["positives"] == 3
    assert step.logs["negatives"] == 6


def test_pairs_within_a_batch_are_all_that_are_alike_or_unlike_once() -> None:
    said = normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [0, 0]]), dim=1)
    method = classifier(alike=0.8)
    views = torch.randn(1, 5, 3, 2, 2)
    step = show(method, views, said.expand(2, 5, 2))
    (rows,) = views.flatten(2)
    # Images 0 and 1 are alike, and 2 and 3; of the four others two are drawn; the last has no caption.
    assert step.logs["positives"] == 2
    assert step.logs["negatives"] == 2
    assert method.classifier is not None
    alike = method.classifier(torch.cat([rows[[0, 2]], rows[[1, 3]]], dim=1))
    positives = cross_entropy(alike.detach(), torch.ones(2, dtype=torch.long), reduction="sum")
    every = method.classifier(torch.cat([rows[[0, 0, 1, 1]], rows[[2, 3, 2, 3]]], dim=1))
    negatives = cross_entropy(every.detach(), torch.zeros(4, dtype=torch.long), reduction="none")
    sums = {
        round(float((positives + negatives[i] + negatives[j]) / 4), 4) for i in range(4) for j in range(i)
    }
    assert round(float(step.loss.detach()), 4) in sums


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_positives_and_negatives_are_balanced_by_the_ratio(ratio: float) -> None:
    captions = normalize(torch.randn(2, 64, 3), dim=-1)
    step = show(classifier(ratio=ratio, alike=0.9), torch.randn(1, 64, 3, 2, 2), captions)
    assert step.logs["positives"] > 10
    assert float(step.logs["negatives"] / step.logs["positives"]) == pytest.approx(ratio, rel=0.05)


def test_a_batch_without_negatives_teaches_nothing() -> None:
    method = classifier()
    step = show(method, torch.randn(2, 4, 3, 2, 2), torch.ones(2, 4, 1))
    step.loss.backward()
    assert step.skip_update == 1
    assert step.loss == 0
    assert method.classifier is not None
    assert method.classifier.weight.grad is not None
    assert (method.classifier.weight.grad == 0).all()


def test_it_cannot_be_trained_without_captions() -> None:
    with pytest.raises(TypeError, match="needs the vectors of captions"):
        show(classifier(), torch.randn(2, 4, 3, 2, 2), None)
