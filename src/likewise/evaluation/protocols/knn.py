"""Classify by the labels of the nearest training images: no training, no setting to choose."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

# Similarities held at a time: 64 MiB in float32, whatever the number of images.
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True, kw_only=True)
class KNNConfig:
    """Settings: how many neighbors vote, and how fast a vote fades with distance."""

    k: int = 20
    temperature: float = 0.07


def knn_predict(
    config: KNNConfig,
    train_x: Float[Tensor, "n d"],
    train_y: Int[Tensor, " n"],
    test_x: Float[Tensor, "m d"],
    num_classes: int,
) -> Int[Tensor, " m"]:
    """Predict the class with the largest sum of exp(cosine / temperature) over the k nearest train images.

    This is the weighted vote of Wu et al. 2018 (section 3.4) with the settings of DINO (Caron et al. 2021).
    Of train images with equal similarity the first ones count; of classes with equal votes the first wins.

    Args:
        config: k is clipped to the number of training images.
        train_x: features of any floating dtype; cosine similarity is computed in it.
        train_y: int64 labels below `num_classes`.
        test_x: features of the images to classify.
        num_classes: number of classes.

    Raises:
        ValueError: k below one, a temperature not above zero, or no training images.
    """
    _validate_config(config, len(train_x))
    gallery = normalize(train_x, dim=1)
    blocks = normalize(test_x, dim=1).split(max(1, _BLOCK_ELEMENTS // len(gallery)))
    votes = [_class_votes(config, block @ gallery.T, train_y, num_classes) for block in blocks]
    return torch.cat(votes).argmax(dim=1)


@dataclass(frozen=True, kw_only=True)
class KNNGridConfig:
    """Settings that are tried on held-out images, and the seed and share of these."""

    ks: tuple[int, ...] = (1, 5, 10, 20, 50, 100, 200)
    temperatures: tuple[float, ...] = (0.02, 0.07, 0.2, 1.0)
    val_fraction: float = 0.2
    seed: int = 0


def search_knn_grid(
    config: KNNGridConfig,
    train: tuple[Float[Tensor, "n d"], Int[Tensor, " n"]],
    val: tuple[Float[Tensor, "v d"], Int[Tensor, " v"]],
    num_classes: int,
) -> dict[KNNConfig, float]:
    """Return the accuracy on validation images of every k and temperature, from one product of features.

    Raises:
        ValueError: as `knn`.
    """
    (train_x, train_y), (val_x, val_y) = train, val
    knn_configs = [
        KNNConfig(k=k, temperature=temperature) for k in config.ks for temperature in config.temperatures
    ]
    for knn_config in knn_configs:
        _validate_config(knn_config, len(train_x))
    gallery = normalize(train_x, dim=1)
    num_correct = dict.fromkeys(knn_configs, 0)
    block_size = max(1, _BLOCK_ELEMENTS // len(gallery))
    for features, labels in zip(
        normalize(val_x, dim=1).split(block_size), val_y.split(block_size), strict=True
    ):
        similarity = features @ gallery.T
        for knn_config in knn_configs:
            num_correct[knn_config] += int(
                (_class_votes(knn_config, similarity, train_y, num_classes).argmax(dim=1) == labels).sum()
            )
    return {knn_config: count / len(val_y) for knn_config, count in num_correct.items()}


def _validate_config(config: KNNConfig, num_train: int) -> None:
    if config.k < 1 or config.temperature <= 0 or not num_train:
        raise ValueError(f"expected k >= 1, temperature > 0 and training images, got {config}, {num_train}")


def _class_votes(
    config: KNNConfig, similarity: Float[Tensor, "b n"], labels: Int[Tensor, " n"], num_classes: int
) -> Float[Tensor, "b c"]:
    neighbors = _topk_stable(similarity, config.k)
    top_similarity = similarity.gather(1, neighbors).double()
    # Relative to the nearest one: the winner is the same, and no temperature can overflow.
    weights = ((top_similarity - top_similarity.amax(dim=1, keepdim=True)) / config.temperature).exp()
    votes = top_similarity.new_zeros(len(top_similarity), num_classes)
    # One neighbor at a time: a sum in fixed order is the same on every device and every run.
    for weight, label in zip(weights.T, labels[neighbors].T, strict=True):
        votes.scatter_add_(1, label[:, None], weight[:, None])
    return votes


def _topk_stable(similarity: Float[Tensor, "b n"], k: int) -> Int[Tensor, "b k"]:
    """Indices of the k largest of each row in ascending order; at the border the smaller index is taken."""
    num_columns = similarity.shape[1]
    if k >= num_columns:
        return torch.arange(num_columns, device=similarity.device).expand(len(similarity), num_columns)
    values, indices = similarity.topk(k + 1, dim=1)
    selected = indices[:, :k]
    # topk breaks ties as it likes, which matters only where the last one in equals the first one out.
    is_tied = values[:, k - 1] == values[:, k]
    selected[is_tied] = similarity[is_tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    return selected.sort(dim=1).values
