"""Exact search, compared to brute force in float64 and to faiss."""

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from likewise.errors import InvalidInputError
from likewise.neighbors._bf16_scan import (
    MatmulPrecision,
    error_bound,
    matmul,
    quantize_rows,
    score_interval,
    to_sparse_if_sparse,
)
from likewise.neighbors.search import ExactIndex, deduplicate_rows, exact_topk
from likewise.neighbors.vectors import SearchConstraints

PRECISIONS = {
    "float32": MatmulPrecision("cpu", torch.float32, 0.0, 0.0),
    "bfloat16": MatmulPrecision("cpu", torch.bfloat16, 0.0, 2.0**-8),
    # A possible float32 precision on GPUs: the intervals are much wider than necessary on a CPU.
    "tensorfloat32": MatmulPrecision("cpu", torch.float32, 2.0**-9, 0.0),
}


def unit_rows(n: int, d: int, distinct: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(distinct, d)).astype(np.float32)
    vectors = base[rng.integers(0, distinct, n)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def admissible(
    n: int, exclude: np.ndarray | None, require: np.ndarray | None, image_ids: np.ndarray | None
) -> np.ndarray:
    """Return which pairs are admissible, pair by pair: (n, n) bool."""
    allowed = ~np.eye(n, dtype=bool)
    for x in range(n):
        for y in range(n):
            if exclude is not None:
                allowed[x, y] &= not any(
                    a == b and a >= 0 for a, b in zip(exclude[x], exclude[y], strict=True)
                )
            if require is not None:
                allowed[x, y] &= bool(require[x] == require[y] and require[x] >= 0)
            if image_ids is not None:
                allowed[x, y] &= bool(image_ids[x] != image_ids[y])
    return allowed


def brute_force(
    vectors: np.ndarray,
    k: int,
    exclude: np.ndarray | None = None,
    require: np.ndarray | None = None,
    image_ids: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Search all pairs in float64, one row at a time, padded with -1 and -inf.

    Ties are ordered by the first row of each group of equal rows, and within a group round-robin.
    """
    n = len(vectors)
    parts = [vectors, *(c.reshape(n, -1) for c in (exclude, require, image_ids) if c is not None)]
    row_bytes = [b"".join(np.ascontiguousarray(part[y]).tobytes() for part in parts) for y in range(n)]
    lowest = [row_bytes.index(key) for key in row_bytes]
    exact = vectors.astype(np.float64)
    scores_matrix = (exact[:, None] * exact[None]).sum(-1)
    allowed = admissible(n, exclude, require, image_ids)
    ids, values = np.full((n, k), -1), np.full((n, k), -np.inf)
    for x in range(n):
        results, seen_images = [], set()
        for y in sorted(
            np.flatnonzero(allowed[x]), key=lambda y: (-scores_matrix[x, y], lowest[y], (y - x) % n)
        ):
            if image_ids is None or image_ids[y] not in seen_images:
                seen_images.add(None if image_ids is None else image_ids[y])
                results.append(y)
        results = results[:k]
        ids[x, : len(results)], values[x, : len(results)] = results, scores_matrix[x, results]
    return ids, values


def test_equal_rows_are_ordered_round_robin() -> None:
    vectors = np.array([[1, 0], [0, 1], [1, 0], [0.6, 0.8]], np.float32)
    neighbors, similarity = exact_topk(vectors, deduplicate_rows(vectors), np.arange(4), 2)
    # Rows 0 and 2 are equal: each is the nearest of the other, and not of itself.
    # Both are equally far from row 1, whose neighbor is the next one (round-robin).
    assert neighbors.tolist() == [[2, 3], [3, 2], [0, 3], [1, 0]]
    np.testing.assert_allclose(similarity, [[1, 0.6], [0.8, 0], [1, 0.6], [0.8, 0.6]], atol=1e-6)


def nearly_equal_rows(n: int, seed: int) -> np.ndarray:
    """Return duplicates, zero rows, and rows whose similarities bfloat16 or float32 cannot distinguish."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(max(1, n // 4), 8))
    vectors = base[rng.integers(0, len(base), n)] + rng.normal(size=(n, 8)) * rng.choice(
        [0, 1e-7, 1e-3, 1], (n, 1)
    )
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    vectors[rng.random(n) < 0.05] = 0
    return vectors


def round_to_bf16(vectors: np.ndarray) -> np.ndarray:
    return torch.from_numpy(vectors).bfloat16().float().numpy()


def random_codes(n: int, num_codes: int, missing_prob: float, rng: np.random.Generator) -> np.ndarray:
    sampled = rng.integers(0, max(1, num_codes), n) * 2**40
    return np.where(rng.random(n) < missing_prob, -1, sampled)


@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(2, 90),
    k=st.integers(1, 20),
    num_codes=st.lists(st.integers(1, 60), min_size=0, max_size=2),
    groups=st.sampled_from([0, 1, 3, 30]),
    num_images=st.sampled_from([0, 1, 8, 60]),
    missing_prob=st.sampled_from([0.0, 0.5]),
    memory_bytes=st.sampled_from([1, 10_000_000]),
    precision=st.sampled_from(sorted(PRECISIONS)),
    is_bf16=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_exact_search_equals_brute_force(
    n: int,
    k: int,
    num_codes: list[int],
    groups: int,
    num_images: int,
    missing_prob: float,
    memory_bytes: int,
    precision: str,
    is_bf16: bool,
    seed: int,
) -> None:
    vectors, rng = nearly_equal_rows(n, seed), np.random.default_rng(seed)
    vectors = round_to_bf16(vectors) if is_bf16 else vectors
    exclude = (
        np.stack([random_codes(n, count, missing_prob, rng) for count in num_codes], axis=1)
        if num_codes
        else None
    )
    require = random_codes(n, groups, missing_prob, rng) if groups else None
    image_ids = random_codes(n, num_images, 0.0, rng) if num_images else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("likewise.neighbors.search.fastest_precision", lambda _: PRECISIONS[precision])
        constraints = SearchConstraints(exclude=exclude, require=require, image_ids=image_ids)
        index = ExactIndex(vectors, constraints, memory_bytes=memory_bytes)
        neighbors, similarity = index.search(np.arange(n), k)
    expected, scores = brute_force(vectors, k, exclude, require, image_ids)
    np.testing.assert_array_equal(neighbors, expected)
    np.testing.assert_array_equal(similarity, scores.astype(np.float32))


@pytest.mark.parametrize("constrained", [False, True])
def test_result_depends_neither_on_blocks_nor_precision_nor_batch(
    constrained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k, rng = 1500, 7, np.random.default_rng(3)
    vectors = unit_rows(n, 32, 1200, 0)
    exclude = (
        np.stack([random_codes(n, 4, 0.5, rng), random_codes(n, 900, 0.1, rng)], axis=1)
        if constrained
        else None
    )
    require = random_codes(n, 3, 0.1, rng) if constrained else None
    constraints = SearchConstraints(exclude=exclude, require=require)
    dedup = deduplicate_rows(vectors, constraints)
    expected = exact_topk(vectors, dedup, np.arange(n), k, constraints=constraints)
    for precision in PRECISIONS.values():
        monkeypatch.setattr("likewise.neighbors.search.fastest_precision", lambda _, a=precision: a)
        for memory_bytes in (1_500_000, 2**29):
            actual = exact_topk(
                vectors, dedup, np.arange(n), k, constraints=constraints, memory_bytes=memory_bytes
            )
            assert all(a.tobytes() == b.tobytes() for a, b in zip(expected, actual, strict=True))
    rows = np.array([1499, 5, 1024, 5])
    subset = exact_topk(vectors, dedup, rows, k, constraints=constraints)
    assert all(a.tobytes() == b[rows].tobytes() for a, b in zip(subset, expected, strict=True))


def word_counts(n: int, num_words: int, weights: list[float], seed: int) -> np.ndarray:
    """Return unit rows with one or four words of very different frequency, and some zero rows."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((n, num_words), np.float32)
    for row in range(n):
        columns = rng.choice(
            num_words, rng.choice([1, 4]), replace=False, p=(p := 1 / np.arange(1, num_words + 1)) / p.sum()
        )
        counts[row, columns] = rng.choice(weights, len(columns))
    counts[rng.random(n) < 0.05] = 0
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("memory_bytes", [1, 2**29])
def test_sparse_vectors_with_many_ties_equal_brute_force(constrained: bool, memory_bytes: int) -> None:
    n, k, rng = 500, 9, np.random.default_rng(4)
    # Components are 1, -1, 0.5 and -0.5, so that sums do not depend on the order.
    vectors = word_counts(n, 300, [1, -1], 5)
    assert not isinstance(to_sparse_if_sparse(vectors), np.ndarray)
    exclude = random_codes(n, 30, 0.5, rng)[:, None] if constrained else None
    require = random_codes(n, 3, 0.1, rng) if constrained else None
    constraints = SearchConstraints(exclude=exclude, require=require)
    results = ExactIndex(vectors, constraints, memory_bytes=memory_bytes).search(np.arange(n), k)
    expected, scores = brute_force(vectors, k, exclude, require)
    np.testing.assert_array_equal(results[0], expected)
    np.testing.assert_array_equal(results[1], scores.astype(np.float32))


def test_sparse_result_depends_neither_on_blocks_nor_batch_and_equals_dense() -> None:
    n, k = 3000, 7
    vectors = word_counts(n, 500, [0.3, 1, 1.7, -2.9], 6)
    expected = ExactIndex(vectors).search(np.arange(n), k)
    actual = ExactIndex(vectors, memory_bytes=1_500_000).search(np.arange(n), k)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(expected, actual, strict=True))
    rows = np.array([2999, 5, 1024, 5])
    subset = ExactIndex(vectors).search(rows, k)
    assert all(a.tobytes() == b[rows].tobytes() for a, b in zip(subset, expected, strict=True))
    _, similarity = exact_topk(vectors, deduplicate_rows(vectors), np.arange(n), k)
    np.testing.assert_allclose(expected[1], similarity, rtol=2e-7)


def test_many_excluded_ties_are_searched_in_bounded_memory() -> None:
    # 1,500 equal rows, of which each is excluded for one other: every row has 1,498 ties.
    n, k = 2000, 5
    vectors = unit_rows(n, 16, 500, 1)
    vectors[:1500] = vectors[0]
    constraints = SearchConstraints(exclude=np.arange(n)[:, None] // 2)
    ids, similarity = exact_topk(
        vectors,
        deduplicate_rows(vectors, constraints),
        np.arange(n),
        k,
        constraints=constraints,
        memory_bytes=2_000_000,
    )
    for row in (0, 1, 2, 3, 1499):
        expected = [other for other in range(1500) if other // 2 != row // 2][:k]
        assert ids[row].tolist() == expected
    np.testing.assert_allclose(similarity[:1500], 1, atol=1e-6)


@pytest.mark.parametrize("sizes", [(2,) * 700, (1, 3, 900, 5, 400)])
def test_required_codes_with_groups_of_any_size(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    require = rng.permutation(np.repeat(np.arange(len(sizes)) * 7, sizes))
    vectors = unit_rows(len(require), 8, len(require), 6)
    ids, similarity = ExactIndex(vectors, SearchConstraints(require=require)).search(
        np.arange(len(require)), 4
    )
    exact = vectors.astype(np.float64)
    scores_matrix = np.where(require[:, None] == require, (exact[:, None] * exact[None]).sum(-1), -np.inf)
    np.fill_diagonal(scores_matrix, -np.inf)
    positions = np.arange(len(require))
    order = np.lexsort(((positions - positions[:, None]) % len(require), -scores_matrix), axis=1)[:, :4]
    scores = np.take_along_axis(scores_matrix, order, axis=1)
    np.testing.assert_array_equal(ids, np.where(np.isfinite(scores), order, -1))
    np.testing.assert_array_equal(similarity, scores.astype(np.float32))


def test_memory_mapped_vectors_give_the_same_neighbors(tmp_path: Path) -> None:
    vectors = unit_rows(600, 12, 500, 8)
    vectors.tofile(tmp_path / "vectors")
    mapped = np.memmap(tmp_path / "vectors", np.float32, "r", shape=vectors.shape)
    for a, b in zip(
        ExactIndex(mapped).search(np.arange(600), 3),
        ExactIndex(vectors).search(np.arange(600), 3),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", sorted(PRECISIONS))
@pytest.mark.parametrize("dim", [3, 64, 768])
@pytest.mark.parametrize("is_bf16", [False, True])
def test_score_interval_contains_the_exact_product(name: str, dim: int, is_bf16: bool) -> None:
    rng, precision = np.random.default_rng(dim), PRECISIONS[name]
    x, y = (rng.normal(size=(200, dim)) * rng.choice([1e-4, 1, 30], (200, dim)) for _ in range(2))
    x, y = (
        v.astype(np.float32) / np.linalg.norm(v, axis=1, keepdims=True).astype(np.float32) for v in (x, y)
    )
    y[:50] = x[:50]
    if is_bf16:  # exact in bfloat16, so that only the result is rounded
        x, y = round_to_bf16(x), round_to_bf16(y)
    queries, columns = quantize_rows(x, precision), quantize_rows(y, precision)
    value = matmul(queries, columns).double().numpy()
    low, high = score_interval(value, error_bound(queries, columns, precision)[:, None], precision)
    true = x.astype(np.float64) @ y.astype(np.float64).T
    assert ((low <= true) & (true <= high)).all()
    # The error of bfloat16 exceeds the bound of float32: the test would detect a swapped precision.
    assert name != "bfloat16" or np.abs(value - true).max() > 1e-4


def test_constraints_of_wrong_shape_raise() -> None:
    vectors = unit_rows(10, 4, 10, 0)
    with pytest.raises(InvalidInputError, match="shape") as excinfo:
        ExactIndex(vectors, SearchConstraints(require=np.zeros(9, np.int64)))
    assert excinfo.value.field == "require"


def test_exact_search_agrees_with_faiss() -> None:
    vectors = np.random.default_rng(1).normal(size=(5000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    neighbors, similarity = exact_topk(vectors, deduplicate_rows(vectors), np.arange(5000), 10)
    index = faiss.IndexFlatIP(64)
    index.add(vectors)
    scores, results = index.search(vectors, 11)
    assert (results[:, 0] == np.arange(5000)).all()
    # faiss scores in float32: neighbors that differ by less than its error may swap.
    np.testing.assert_allclose(similarity, scores[:, 1:], atol=2e-6)
    assert (results[:, 1:] == neighbors).mean() > 0.999


def test_deduplicated_groups_are_distinct_rows_in_order() -> None:
    vectors = unit_rows(400, 5, 37, 2)
    dedup = deduplicate_rows(vectors)
    distinct = {row.tobytes() for row in vectors}
    assert len(dedup.first_rows) == len(distinct)
    assert (np.diff(dedup.first_rows) > 0).all()
    np.testing.assert_array_equal(vectors[dedup.first_rows[dedup.group_ids]], vectors)
    for group in range(len(dedup.first_rows)):
        members = dedup.members[dedup.group_starts[group] : dedup.group_starts[group + 1]]
        np.testing.assert_array_equal(members, np.flatnonzero(dedup.group_ids == group))


def test_deduplication_distinguishes_constraint_codes() -> None:
    vectors = unit_rows(300, 5, 20, 2)
    rng = np.random.default_rng(0)
    exclude, require = rng.integers(-1, 3, (300, 2)), rng.integers(-1, 2, 300)
    dedup = deduplicate_rows(vectors, SearchConstraints(exclude=exclude, require=require))
    keys = [(v.tobytes(), tuple(d), s) for v, d, s in zip(vectors, exclude, require, strict=True)]
    assert len(dedup.first_rows) == len(set(keys))
    assert all(keys[dedup.first_rows[group]] == key for group, key in zip(dedup.group_ids, keys, strict=True))
