"""Classify by the labels of the nearest training images: no training, no setting to choose."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

# Similarities held at a time: 64 MiB in float32, whatever the number of images.
_CELLS = 2**24


@dataclass(frozen=True, kw_only=True)
class KNN:
    """Settings: how many neighbors vote, and how fast a vote fades with distance."""

    k: int = 20
    temperature: float = 0.07


def knn(
    settings: KNN,
    train_x: Float[Tensor, "n d"],
    train_y: Int[Tensor, " n"],
    test_x: Float[Tensor, "m d"],
    classes: int,
) -> Int[Tensor, " m"]:
    """Predict the class with the largest sum of exp(cosine / temperature) over the k nearest train images.

    This is the weighted vote of Wu et al. 2018 (section 3.4) with the settings of DINO (Caron et al. 2021).
    Of train images with equal similarity the first ones count; of classes with equal votes the first wins.

    Args:
        settings: k is clipped to the number of training images.
        train_x: features of any floating dtype; cosine similarity is computed in it.
        train_y: int64 labels below `classes`.
        test_x: features of the images to classify.
        classes: number of classes.

    Raises:
        ValueError: k below one, a temperature not above zero, or no training images.
    """
    _check(settings, len(train_x))
    gallery = normalize(train_x, dim=1)
    blocks = normalize(test_x, dim=1).split(max(1, _CELLS // len(gallery)))
    votes = [_votes(settings, block @ gallery.T, train_y, classes) for block in blocks]
    return torch.cat(votes).argmax(dim=1)


@dataclass(frozen=True, kw_only=True)
class KNNGrid:
    """Settings that are tried on held-out images, and the seed and share of these."""

    ks: tuple[int, ...] = (1, 5, 10, 20, 50, 100, 200)
    temperatures: tuple[float, ...] = (0.02, 0.07, 0.2, 1.0)
    validation_share: float = 0.2
    seed: int = 0


def knn_grid(
    settings: KNNGrid,
    train: tuple[Float[Tensor, "n d"], Int[Tensor, " n"]],
    val: tuple[Float[Tensor, "v d"], Int[Tensor, " v"]],
    classes: int,
) -> dict[KNN, float]:
    """Return the accuracy on validation images of every k and temperature, from one product of features.

    Raises:
        ValueError: as `knn`.
    """
    (train_x, train_y), (val_x, val_y) = train, val
    tried = [KNN(k=k, temperature=t) for k in settings.ks for t in settings.temperatures]
    for each in tried:
        _check(each, len(train_x))
    gallery = normalize(train_x, dim=1)
    right = dict.fromkeys(tried, 0)
    size = max(1, _CELLS // len(gallery))
    for images, labels in zip(normalize(val_x, dim=1).split(size), val_y.split(size), strict=True):
        similarity = images @ gallery.T
        for each in tried:
            right[each] += int((_votes(each, similarity, train_y, classes).argmax(dim=1) == labels).sum())
    return {each: count / len(val_y) for each, count in right.items()}


def _check(settings: KNN, images: int) -> None:
    if settings.k < 1 or settings.temperature <= 0 or not images:
        raise ValueError(f"expected k >= 1, temperature > 0 and training images, got {settings}, {images}")


def _votes(
    settings: KNN, similarity: Float[Tensor, "b n"], labels: Int[Tensor, " n"], classes: int
) -> Float[Tensor, "b c"]:
    chosen = _nearest(similarity, settings.k)
    values = similarity.gather(1, chosen).double()
    # Relative to the nearest one: the winner is the same, and no temperature can overflow.
    weights = ((values - values.amax(dim=1, keepdim=True)) / settings.temperature).exp()
    votes = values.new_zeros(len(values), classes)
    # One neighbor at a time: a sum in fixed order is the same on every device and every run.
    for weight, label in zip(weights.T, labels[chosen].T, strict=True):
        votes.scatter_add_(1, label[:, None], weight[:, None])
    return votes


def _nearest(similarity: Float[Tensor, "b n"], k: int) -> Int[Tensor, "b k"]:
    """Indices of the k largest of each row in ascending order; at the border the smaller index is taken."""
    columns = similarity.shape[1]
    if k >= columns:
        return torch.arange(columns, device=similarity.device).expand(len(similarity), columns)
    values, indices = similarity.topk(k + 1, dim=1)
    chosen = indices[:, :k]
    # topk breaks ties as it likes, which matters only where the last one in equals the first one out.
    tied = values[:, k - 1] == values[:, k]
    chosen[tied] = similarity[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    return chosen.sort(dim=1).values
