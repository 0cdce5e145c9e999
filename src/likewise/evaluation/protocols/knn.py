"""kNN classification on frozen features: no training, and no hyperparameters unless selected on val."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from likewise.errors import InvalidInputError
from likewise.evaluation.protocols.base import (
    ClassificationConfig,
    EvalContext,
    Protocol,
    Score,
    Split,
    accuracy_score,
    check_fraction,
    check_positive,
    stratified_split,
)
from likewise.evaluation.results import ResultRow

# Similarities per block: 64 MiB in float32, independent of the number of images.
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True, kw_only=True)
class KNNConfig(ClassificationConfig):
    """Options of kNN classification."""

    k: int = 20
    """Number of neighbors; clipped to the number of training images."""
    temperature: float = 0.07
    """Temperature of the vote weights exp(cosine / temperature)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(self, "k", "temperature")


@dataclass(frozen=True, kw_only=True)
class KNNGridConfig(ClassificationConfig):
    """Options of kNN classification with `k` and `temperature` selected on validation images."""

    ks: tuple[int, ...] = (1, 5, 10, 20, 50, 100, 200)
    """Values of `k` to try."""
    temperatures: tuple[float, ...] = (0.02, 0.07, 0.2, 1.0)
    """Values of `temperature` to try."""
    val_fraction: float = 0.2
    """Fraction of each class held out of train if the dataset has no validation split."""
    seed: int = 0
    """Seed of the held-out images."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("ks", "temperatures"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise InvalidInputError(
                    f"`{name}` must hold at least one value, all positive, got {values}", field=name
                )
        check_fraction(self, "val_fraction")


def knn_predict(
    config: KNNConfig, train: Split, test_x: Float[Tensor, "m d"], num_classes: int
) -> Int[Tensor, " m"]:
    """Predict the class with the largest sum of exp(cosine / temperature) over the k nearest train images.

    This is the weighted vote of Wu et al. 2018 (section 3.4) with the settings of DINO (Caron et al. 2021).
    Ties between training images go to the smaller index, ties between classes to the first.

    Args:
        config: `k` is clipped to the number of training images.
        train: Features (n, d) of any floating dtype, in which the cosine similarity is computed, and labels.
        test_x: (m, d) features of the images to classify.
        num_classes: Number of classes; labels are below it.

    Returns:
        (m,) int64.

    Raises:
        ValueError: There is no training image.
    """
    gallery = _gallery(train)
    blocks = normalize(test_x, dim=1).split(max(1, _BLOCK_ELEMENTS // len(gallery)))
    votes = [_class_votes(config, block @ gallery.T, train.y, num_classes) for block in blocks]
    return torch.cat(votes).argmax(dim=1)


def search_knn_grid(
    config: KNNGridConfig, train: Split, val: Split, num_classes: int
) -> dict[KNNConfig, float]:
    """Return the validation accuracy of every k and temperature, from one similarity matrix.

    Raises:
        ValueError: There is no training image.
    """
    knn_configs = [
        KNNConfig(k=k, temperature=temperature) for k in config.ks for temperature in config.temperatures
    ]
    gallery = _gallery(train)
    num_correct = dict.fromkeys(knn_configs, 0)
    block_size = max(1, _BLOCK_ELEMENTS // len(gallery))
    for x, y in zip(normalize(val.x, dim=1).split(block_size), val.y.split(block_size), strict=True):
        similarity = x @ gallery.T
        for knn_config in knn_configs:
            predictions = _class_votes(knn_config, similarity, train.y, num_classes).argmax(dim=1)
            num_correct[knn_config] += int((predictions == y).sum())
    return {knn_config: count / len(val) for knn_config, count in num_correct.items()}


def _gallery(train: Split) -> Float[Tensor, "n d"]:
    if not len(train):
        raise ValueError("kNN needs at least one training image")
    return normalize(train.x, dim=1)


def _class_votes(
    config: KNNConfig, similarity: Float[Tensor, "b n"], labels: Int[Tensor, " n"], num_classes: int
) -> Float[Tensor, "b c"]:
    neighbors = _topk_stable(similarity, config.k)
    top_similarity = similarity.gather(1, neighbors).double()
    # Relative to the nearest neighbor: the winner is the same, and no temperature can overflow.
    weights = ((top_similarity - top_similarity.amax(dim=1, keepdim=True)) / config.temperature).exp()
    votes = top_similarity.new_zeros(len(top_similarity), num_classes)
    # One neighbor at a time: a sum in fixed order is the same on every device and in every run.
    for weight, label in zip(weights.T, labels[neighbors].T, strict=True):
        votes.scatter_add_(1, label[:, None], weight[:, None])
    return votes


def _topk_stable(similarity: Float[Tensor, "b n"], k: int) -> Int[Tensor, "b k"]:
    """Return the ascending indices of the k largest values per row; ties go to the smaller index."""
    num_columns = similarity.shape[1]
    if k >= num_columns:
        return torch.arange(num_columns, device=similarity.device).expand(len(similarity), num_columns)
    values, indices = similarity.topk(k + 1, dim=1)
    selected = indices[:, :k]
    # topk breaks ties arbitrarily, which matters only if the last selected value equals the next one.
    is_tied = values[:, k - 1] == values[:, k]
    selected[is_tied] = similarity[is_tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    return selected.sort(dim=1).values


class KNN(Protocol):
    """Weighted kNN classification with fixed `k` and `temperature`."""

    name = "knn"
    title = "kNN"
    summary = "weighted vote of the nearest training images"
    config: KNNConfig

    def run(self, context: EvalContext) -> list[Score]:
        """Classify the test images by their neighbors in train and val."""
        test = context.split("test")
        predictions = knn_predict(
            self.config, context.split("train", "val"), test.x, len(context.labeled_dataset.classes)
        )
        return [accuracy_score(predictions, test.y, self.config)]

    @classmethod
    def explain(cls, row: ResultRow) -> str:
        """Describe the vote."""
        return (
            f"The {row.config['k']} most similar training images vote on the class of each test image; "
            "nothing is trained."
        )


class KNNGrid(Protocol):
    """Weighted kNN classification with `k` and `temperature` selected on validation images."""

    name = "knn-grid"
    title = "kNN, tuned"
    summary = "knn with k and temperature selected on validation images"
    config: KNNGridConfig

    def run(self, context: EvalContext) -> list[Score]:
        """Select `k` and `temperature` on val, then classify the test images with train and val."""
        num_classes = len(context.labeled_dataset.classes)
        train, val, test = (context.split(name) for name in ("train", "val", "test"))
        if not len(val):
            train_indices, val_indices = stratified_split(train.y, self.config.val_fraction, self.config.seed)
            train, val = train.subset(train_indices), train.subset(val_indices)
        val_accuracies = search_knn_grid(self.config, train, val, num_classes)
        best_config = max(val_accuracies, key=lambda knn_config: val_accuracies[knn_config])
        predictions = knn_predict(best_config, context.split("train", "val"), test.x, num_classes)
        details = {
            "k": best_config.k,
            "temperature": best_config.temperature,
            "val_accuracy": val_accuracies[best_config],
        }
        return [accuracy_score(predictions, test.y, self.config, details)]

    @classmethod
    def explain(cls, row: ResultRow) -> str:
        """Describe the vote and the selected values."""
        return (
            "The most similar training images vote on the class of each test image. The number of neighbors "
            f"({row.details['k']}) and the temperature ({row.details['temperature']:g}) are selected on "
            "validation images."
        )
