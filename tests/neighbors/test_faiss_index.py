"""Inverted lists against the exact search: recall as told, and nobody who may not be found."""

import sys
from itertools import product

import numpy as np
import pytest

from likewise.errors import DependencyError
from likewise.neighbors.faiss_index import IVFIndex
from likewise.neighbors.search import ExactIndex


def clustered(n: int, d: int, seed: int) -> np.ndarray:
    """Unit rows around n / 20 centers, with repeats and a few zero rows."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n // 20, d))[rng.integers(0, n // 20, n)] + rng.normal(size=(n, d))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    vectors[rng.integers(0, n, n // 10)] = vectors[rng.integers(0, n, n // 10)]
    vectors[[3, n - 5]] = 0
    return vectors


def share_found(found: np.ndarray, wanted: np.ndarray) -> float:
    hits = sum(len(set(f) & set(w) - {-1}) for f, w in zip(found.tolist(), wanted.tolist(), strict=True))
    return hits / int((wanted >= 0).sum())


@pytest.mark.parametrize("least", [0.6, 0.95])
def test_recall_is_as_told(least: float) -> None:
    vectors = clustered(6000, 24, 0)
    index = IVFIndex(vectors, target_recall=least)
    rows = np.arange(len(vectors))
    found, similarity = index.search(rows, 10)
    wanted, exact = ExactIndex(vectors).search(rows, 10)
    assert index.recall >= least
    assert index.nprobe < index.nlist
    # 500 rows of 10 tell a share of 0.8 to 0.03 with a probability of nearly 1.
    assert abs(share_found(found, wanted) - index.recall) < 0.03
    both = found == wanted
    np.testing.assert_array_equal(similarity[both], exact[both])
    assert (np.diff(similarity, axis=1) <= 0).all()


def test_a_recall_of_all_searches_all_lists() -> None:
    vectors = clustered(1000, 6, 1)
    index = IVFIndex(vectors, target_recall=1.1)
    # To a zero row all others are equally near, and which of them are found is open.
    rows = np.flatnonzero(vectors.any(axis=1))
    assert index.nprobe == index.nlist > 1
    # Float32 orders what is nearer than it can tell by chance; hardly any row is so.
    assert share_found(index.search(rows, 10)[0], ExactIndex(vectors).search(rows, 10)[0]) > 0.9999


@pytest.mark.parametrize(("apart", "scoped", "records"), product([False, True], repeat=3))
def test_only_admissible_rows_are_found_and_as_many_as_there_are(
    apart: bool, scoped: bool, records: bool
) -> None:
    n, k, rng = 2000, 6, np.random.default_rng(2)
    vectors = clustered(n, 12, 2)
    differ = np.stack([rng.integers(-1, 300, n), rng.integers(-1, 2, n)], axis=1) if apart else None
    same = rng.integers(-1, 40, n) if scoped else None
    record = np.arange(n) // 3 if records else None
    found, similarity = IVFIndex(vectors, exclude=differ, require=same, image_ids=record).search(
        np.arange(n), k
    )
    wanted, _ = ExactIndex(vectors, exclude=differ, require=same, image_ids=record).search(np.arange(n), k)
    np.testing.assert_array_equal((found >= 0).sum(axis=1), (wanted >= 0).sum(axis=1))
    assert share_found(found, wanted) > 0.9
    rows, places = np.nonzero(found >= 0)
    others = found[rows, places]
    assert (rows != others).all()
    if differ is not None:
        assert not ((differ[rows] == differ[others]) & (differ[rows] >= 0)).any()
    if same is not None:
        assert ((same[rows] == same[others]) & (same[rows] >= 0)).all()
    if record is not None:
        assert (record[rows] != record[others]).all()
        assert all(len({*record[row[row >= 0]]}) == (row >= 0).sum() for row in found)
    cosine = (vectors[rows].astype(np.float64) * vectors[others]).sum(axis=1).astype(np.float32)
    np.testing.assert_array_equal(similarity[rows, places], cosine)


def test_building_again_changes_nothing_and_another_seed_does() -> None:
    vectors = clustered(3000, 16, 4)
    first, again, other = (
        IVFIndex(vectors, target_recall=0.5, seed=seed).search(np.arange(3000), 5) for seed in (1, 1, 2)
    )
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))
    assert first[0].tobytes() != other[0].tobytes()


@pytest.mark.parametrize("n", [2, 5, 60])
def test_few_rows_are_searched_whole(n: int) -> None:
    vectors = clustered(40, 4, 5)[:n] if n < 40 else np.repeat(clustered(40, 4, 5)[:2], n // 2, axis=0)
    for a, b in zip(
        IVFIndex(vectors).search(np.arange(n), 10), ExactIndex(vectors).search(np.arange(n), 10), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_without_faiss_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DependencyError, match=r"pip install .likewise.approximate."):
        IVFIndex(clustered(100, 4, 0))
