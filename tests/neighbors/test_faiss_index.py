"""Approximate search, compared to the exact search: measured recall and constraints."""

import sys
from itertools import product

import numpy as np
import pytest

from likewise.errors import DependencyError
from likewise.neighbors.faiss_index import IVFIndex
from likewise.neighbors.search import ExactIndex
from likewise.neighbors.vectors import SearchConstraints


def clustered(n: int, d: int, seed: int) -> np.ndarray:
    """Return unit rows around n / 20 centers, with duplicates and a few zero rows."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n // 20, d))[rng.integers(0, n // 20, n)] + rng.normal(size=(n, d))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    vectors[rng.integers(0, n, n // 10)] = vectors[rng.integers(0, n, n // 10)]
    vectors[[3, n - 5]] = 0
    return vectors


def recall(neighbors: np.ndarray, expected: np.ndarray) -> float:
    hits = sum(
        len(set(f) & set(w) - {-1}) for f, w in zip(neighbors.tolist(), expected.tolist(), strict=True)
    )
    return hits / int((expected >= 0).sum())


@pytest.mark.parametrize("target_recall", [0.6, 0.95])
def test_reported_recall_equals_the_measured_recall(target_recall: float) -> None:
    vectors = clustered(6000, 24, 0)
    index = IVFIndex(vectors, target_recall=target_recall)
    rows = np.arange(len(vectors))
    neighbors, similarity = index.search(rows, 10)
    expected, exact_similarity = ExactIndex(vectors).search(rows, 10)
    assert index.recall >= target_recall
    assert index.nprobe < index.nlist
    # The standard error of a recall of 0.8 on 500 rows of 10 is far below 0.03.
    assert abs(recall(neighbors, expected) - index.recall) < 0.03
    is_equal = neighbors == expected
    np.testing.assert_array_equal(similarity[is_equal], exact_similarity[is_equal])
    assert (np.diff(similarity, axis=1) <= 0).all()


def test_unreachable_target_recall_searches_all_lists() -> None:
    vectors = clustered(1000, 6, 1)
    index = IVFIndex(vectors, target_recall=1.1)
    # All rows are equally similar to a zero row, so its neighbors are arbitrary.
    rows = np.flatnonzero(vectors.any(axis=1))
    assert index.nprobe == index.nlist > 1
    # float32 may swap nearly equal neighbors, which are rare.
    assert recall(index.search(rows, 10)[0], ExactIndex(vectors).search(rows, 10)[0]) > 0.9999


@pytest.mark.parametrize(("excludes", "requires", "by_image"), product([False, True], repeat=3))
def test_neighbors_are_admissible_and_complete(excludes: bool, requires: bool, by_image: bool) -> None:
    n, k, rng = 2000, 6, np.random.default_rng(2)
    vectors = clustered(n, 12, 2)
    exclude = np.stack([rng.integers(-1, 300, n), rng.integers(-1, 2, n)], axis=1) if excludes else None
    require = rng.integers(-1, 40, n) if requires else None
    image_ids = np.arange(n) // 3 if by_image else None
    constraints = SearchConstraints(exclude=exclude, require=require, image_ids=image_ids)
    neighbors, similarity = IVFIndex(vectors, constraints).search(np.arange(n), k)
    expected, _ = ExactIndex(vectors, constraints).search(np.arange(n), k)
    np.testing.assert_array_equal((neighbors >= 0).sum(axis=1), (expected >= 0).sum(axis=1))
    assert recall(neighbors, expected) > 0.9
    rows, columns = np.nonzero(neighbors >= 0)
    candidates = neighbors[rows, columns]
    assert (rows != candidates).all()
    if exclude is not None:
        assert not ((exclude[rows] == exclude[candidates]) & (exclude[rows] >= 0)).any()
    if require is not None:
        assert ((require[rows] == require[candidates]) & (require[rows] >= 0)).all()
    if image_ids is not None:
        assert (image_ids[rows] != image_ids[candidates]).all()
        assert all(len({*image_ids[row[row >= 0]]}) == (row >= 0).sum() for row in neighbors)
    cosine = (vectors[rows].astype(np.float64) * vectors[candidates]).sum(axis=1).astype(np.float32)
    np.testing.assert_array_equal(similarity[rows, columns], cosine)


def test_index_is_deterministic_given_the_seed() -> None:
    vectors = clustered(3000, 16, 4)
    first, repeated, other_seed = (
        IVFIndex(vectors, target_recall=0.5, seed=seed).search(np.arange(3000), 5) for seed in (1, 1, 2)
    )
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, repeated, strict=True))
    assert first[0].tobytes() != other_seed[0].tobytes()


@pytest.mark.parametrize("n", [2, 5, 60])
def test_few_rows_are_searched_exactly(n: int) -> None:
    vectors = clustered(40, 4, 5)[:n] if n < 40 else np.repeat(clustered(40, 4, 5)[:2], n // 2, axis=0)
    for a, b in zip(
        IVFIndex(vectors).search(np.arange(n), 10), ExactIndex(vectors).search(np.arange(n), 10), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_missing_faiss_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DependencyError, match=r"pip install .likewise.approximate."):
        IVFIndex(clustered(100, 4, 0))
