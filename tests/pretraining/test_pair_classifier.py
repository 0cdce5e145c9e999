"""The pair classifier: which pairs it draws, its losses against torch's own, and that it learns."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from likewise.pretraining.methods.pair_classifier import PairClassifier, draw_pairs, unlike_pairs


class Flat(nn.Module):
    """Pixels as features, so that what is learned is the classifier alone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def classifier(margin: float | None = None) -> PairClassifier:
    torch.manual_seed(0)
    return PairClassifier(Flat(), 12, unlike=0.2, ratio=1.0, margin=margin)


def test_negatives_are_unlike_and_have_captions() -> None:
    captions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6], [0.0, 0.0]])
    found = unlike_pairs(captions, captions, 0.2)
    assert found.nonzero().tolist() == [[0, 1], [1, 0]]
    rows, columns = draw_pairs(found, 5)
    assert {(int(r), int(c)) for r, c in zip(rows, columns, strict=True)} == {(0, 1), (1, 0)}
    assert len(draw_pairs(found, 1)[0]) == 1


def test_loss_is_cross_entropy_over_positives_and_negatives() -> None:
    method = classifier()
    views = torch.randn(2, 3, 3, 2, 2)
    captions = torch.eye(3).expand(2, 3, 3)
    torch.manual_seed(4)
    step = method.step(views, captions)
    torch.manual_seed(4)
    left, right = draw_pairs(~torch.eye(3, dtype=torch.bool), 3)
    assert not (left == right).any()
    first, second = views.flatten(2)
    pairs = [torch.cat([first[i], second[i]]) for i in range(3)]
    pairs += [torch.cat([first[i], second[j]]) for i, j in zip(left, right, strict=True)]
    logits = method.classifier(torch.stack(pairs))
    torch.testing.assert_close(step.loss, cross_entropy(logits, torch.tensor([1, 1, 1, 0, 0, 0])))
    assert step.logs["negatives"] == 3


def test_margin_loss_by_hand() -> None:
    views = torch.randn(2, 2, 3, 2, 2)
    captions = torch.eye(2).expand(2, 2, 2)
    step = classifier(margin=0.3).step(views, captions)
    first, second = (normalize(v, dim=1) for v in views.flatten(2))
    cosine = first @ second.T
    negatives = (cosine[[0, 1], [1, 0]] - 0.3).clamp(min=0)
    expected = ((1 - cosine.diagonal()).sum() + negatives.sum()) / 4
    torch.testing.assert_close(step.loss, expected)


def test_a_batch_without_negatives_is_counted_and_teaches_nothing() -> None:
    method = classifier()
    step = method.step(torch.randn(2, 4, 3, 2, 2), torch.ones(2, 4, 1))
    step.loss.backward()
    assert step.logs["skipped"] == 1
    assert step.loss == 0
    assert method.classifier.weight.grad is not None
    assert (method.classifier.weight.grad == 0).all()


def test_it_cannot_be_trained_without_captions() -> None:
    with pytest.raises(TypeError, match="needs the vectors of captions"):
        classifier().step(torch.randn(2, 4, 3, 2, 2))
