"""The self-join against a brute force in float64 and against faiss."""

import faiss
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from likewise.neighbors.search import group_equal, top_k


def unit_rows(n: int, d: int, distinct: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(distinct, d)).astype(np.float32)
    vectors = base[rng.integers(0, distinct, n)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs in float64, self struck out by identity, ties to the lower position."""
    exact = vectors.astype(np.float64)
    similar = (exact[:, None] * exact[None]).sum(-1)
    np.fill_diagonal(similar, -np.inf)
    order = np.lexsort((np.broadcast_to(np.arange(len(vectors)), similar.shape), -similar))[:, :k]
    return order, np.take_along_axis(similar, order, axis=1)


def test_by_hand() -> None:
    vectors = np.array([[1, 0], [0, 1], [1, 0], [0.6, 0.8]], np.float32)
    neighbors, similarity = top_k(vectors, group_equal(vectors), np.arange(4), 2)
    # Row 0 and row 2 are equal: each is the other's nearest, and neither its own.
    assert neighbors.tolist() == [[2, 3], [3, 0], [0, 3], [1, 0]]
    np.testing.assert_allclose(similarity, [[1, 0.6], [0.8, 0], [1, 0.6], [0.8, 0.6]], atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(2, 120),
    distinct=st.integers(1, 120),
    k=st.integers(1, 20),
    memory=st.sampled_from([1, 10_000_000]),
    seed=st.integers(0, 2**31),
)
def test_equals_brute_force_with_repeats(n: int, distinct: int, k: int, memory: int, seed: int) -> None:
    vectors = unit_rows(n, 8, min(n, distinct), seed)
    neighbors, similarity = top_k(vectors, group_equal(vectors), np.arange(n), k, memory=memory)
    expected, scores = brute_force(vectors, k)
    held = min(k, n - 1)
    np.testing.assert_array_equal(neighbors[:, :held], expected[:, :held])
    np.testing.assert_allclose(similarity[:, :held], scores[:, :held], atol=1e-6)
    assert (neighbors[:, held:] == -1).all()


def test_block_size_and_part_change_nothing() -> None:
    vectors = unit_rows(3000, 32, 2500, 0)
    grouped = group_equal(vectors)
    whole, scores = top_k(vectors, grouped, np.arange(3000), 7)
    # 1,024 columns a block is the least; queries in parts and out of order.
    small, _ = top_k(vectors, grouped, np.arange(3000), 7, memory=1)
    np.testing.assert_array_equal(small, whole)
    some = np.array([2999, 5, 1024])
    part, part_scores = top_k(vectors, grouped, some, 7)
    np.testing.assert_array_equal(part, whole[some])
    np.testing.assert_array_equal(part_scores, scores[some])


def test_agrees_with_faiss() -> None:
    vectors = np.random.default_rng(1).normal(size=(5000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    neighbors, similarity = top_k(vectors, group_equal(vectors), np.arange(5000), 10)
    index = faiss.IndexFlatIP(64)
    index.add(vectors)
    scores, found = index.search(vectors, 11)
    assert (found[:, 0] == np.arange(5000)).all()
    # faiss scores in float32, so neighbors that differ by less than its error may swap.
    np.testing.assert_allclose(similarity, scores[:, 1:], atol=2e-6)
    assert (found[:, 1:] == neighbors).mean() > 0.999


def test_groups_are_the_distinct_rows_in_order_of_appearance() -> None:
    vectors = unit_rows(400, 5, 37, 2)
    grouped = group_equal(vectors)
    distinct = {row.tobytes() for row in vectors}
    assert len(grouped.first) == len(distinct)
    assert (np.diff(grouped.first) > 0).all()
    np.testing.assert_array_equal(vectors[grouped.first[grouped.group]], vectors)
    for group in range(len(grouped.first)):
        members = grouped.members[grouped.starts[group] : grouped.starts[group + 1]]
        np.testing.assert_array_equal(members, np.flatnonzero(grouped.group == group))
