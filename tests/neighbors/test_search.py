"""The self-join against a brute force in float64 and against faiss."""

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

ARITHMETICS = {
    "float32": MatmulPrecision("cpu", torch.float32, 0.0, 0.0),
    "bfloat16": MatmulPrecision("cpu", torch.bfloat16, 0.0, 2.0**-8),
    # What a GPU's float32 may be: much wider intervals than the products need.
    "tensorfloat32": MatmulPrecision("cpu", torch.float32, 2.0**-9, 0.0),
}


def unit_rows(n: int, d: int, distinct: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(distinct, d)).astype(np.float32)
    vectors = base[rng.integers(0, distinct, n)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def admissible(
    n: int, differ: np.ndarray | None, same: np.ndarray | None, record: np.ndarray | None
) -> np.ndarray:
    """Pair by pair, as the docstrings say it: (n, n) bool."""
    allowed = ~np.eye(n, dtype=bool)
    for x in range(n):
        for y in range(n):
            if differ is not None:
                allowed[x, y] &= not any(a == b and a >= 0 for a, b in zip(differ[x], differ[y], strict=True))
            if same is not None:
                allowed[x, y] &= bool(same[x] == same[y] and same[x] >= 0)
            if record is not None:
                allowed[x, y] &= bool(record[x] != record[y])
    return allowed


def brute_force(
    vectors: np.ndarray,
    k: int,
    differ: np.ndarray | None = None,
    same: np.ndarray | None = None,
    record: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs in float64, one row at a time; -1 and -inf at the end.

    Ties go to the lower set of equal rows, and within it to the rows after one's own, and round.
    """
    n = len(vectors)
    parts = [vectors, *(c.reshape(n, -1) for c in (differ, same, record) if c is not None)]
    kinds = [b"".join(np.ascontiguousarray(part[y]).tobytes() for part in parts) for y in range(n)]
    lowest = [kinds.index(kind) for kind in kinds]
    exact = vectors.astype(np.float64)
    similar = (exact[:, None] * exact[None]).sum(-1)
    allowed = admissible(n, differ, same, record)
    ids, values = np.full((n, k), -1), np.full((n, k), -np.inf)
    for x in range(n):
        found, seen = [], set()
        for y in sorted(np.flatnonzero(allowed[x]), key=lambda y: (-similar[x, y], lowest[y], (y - x) % n)):
            if record is None or record[y] not in seen:
                seen.add(None if record is None else record[y])
                found.append(y)
        found = found[:k]
        ids[x, : len(found)], values[x, : len(found)] = found, similar[x, found]
    return ids, values


def test_by_hand() -> None:
    vectors = np.array([[1, 0], [0, 1], [1, 0], [0.6, 0.8]], np.float32)
    neighbors, similarity = exact_topk(vectors, deduplicate_rows(vectors), np.arange(4), 2)
    # Row 0 and row 2 are equal: each is the other's nearest, and neither its own.
    # Both are as far from row 1, which finds the one after itself.
    assert neighbors.tolist() == [[2, 3], [3, 2], [0, 3], [1, 0]]
    np.testing.assert_allclose(similarity, [[1, 0.6], [0.8, 0], [1, 0.6], [0.8, 0.6]], atol=1e-6)


def near_rows(n: int, seed: int) -> np.ndarray:
    """Repeats, zero rows, and rows that are nearer to each other than bfloat16 or float32 can tell."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(max(1, n // 4), 8))
    vectors = base[rng.integers(0, len(base), n)] + rng.normal(size=(n, 8)) * rng.choice(
        [0, 1e-7, 1e-3, 1], (n, 1)
    )
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    vectors[rng.random(n) < 0.05] = 0
    return vectors


def shortened(vectors: np.ndarray) -> np.ndarray:
    return torch.from_numpy(vectors).bfloat16().float().numpy()


def codes(n: int, kinds: int, absent: float, rng: np.random.Generator) -> np.ndarray:
    drawn = rng.integers(0, max(1, kinds), n) * 2**40
    return np.where(rng.random(n) < absent, -1, drawn)


@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(2, 90),
    k=st.integers(1, 20),
    kinds=st.lists(st.integers(1, 60), min_size=0, max_size=2),
    groups=st.sampled_from([0, 1, 3, 30]),
    records=st.sampled_from([0, 1, 8, 60]),
    absent=st.sampled_from([0.0, 0.5]),
    memory=st.sampled_from([1, 10_000_000]),
    arithmetic=st.sampled_from(sorted(ARITHMETICS)),
    short=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_brute_force(
    n: int,
    k: int,
    kinds: list[int],
    groups: int,
    records: int,
    absent: float,
    memory: int,
    arithmetic: str,
    short: bool,
    seed: int,
) -> None:
    vectors, rng = near_rows(n, seed), np.random.default_rng(seed)
    vectors = shortened(vectors) if short else vectors
    differ = np.stack([codes(n, count, absent, rng) for count in kinds], axis=1) if kinds else None
    same = codes(n, groups, absent, rng) if groups else None
    record = codes(n, records, 0.0, rng) if records else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("likewise.neighbors.search.fastest_precision", lambda _: ARITHMETICS[arithmetic])
        index = ExactIndex(vectors, exclude=differ, require=same, image_ids=record, memory_bytes=memory)
        neighbors, similarity = index.search(np.arange(n), k)
    expected, scores = brute_force(vectors, k, differ, same, record)
    np.testing.assert_array_equal(neighbors, expected)
    np.testing.assert_array_equal(similarity, scores.astype(np.float32))


@pytest.mark.parametrize("coded", [False, True])
def test_block_size_arithmetic_and_part_change_no_byte(coded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, rng = 1500, 7, np.random.default_rng(3)
    vectors = unit_rows(n, 32, 1200, 0)
    differ = np.stack([codes(n, 4, 0.5, rng), codes(n, 900, 0.1, rng)], axis=1) if coded else None
    same = codes(n, 3, 0.1, rng) if coded else None
    grouped = deduplicate_rows(vectors, differ, same)
    whole = exact_topk(vectors, grouped, np.arange(n), k, exclude=differ, require=same)
    for arithmetic in ARITHMETICS.values():
        monkeypatch.setattr("likewise.neighbors.search.fastest_precision", lambda _, a=arithmetic: a)
        for memory in (1_500_000, 2**29):
            again = exact_topk(
                vectors, grouped, np.arange(n), k, exclude=differ, require=same, memory_bytes=memory
            )
            assert all(a.tobytes() == b.tobytes() for a, b in zip(whole, again, strict=True))
    some = np.array([1499, 5, 1024, 5])
    part = exact_topk(vectors, grouped, some, k, exclude=differ, require=same)
    assert all(a.tobytes() == b[some].tobytes() for a, b in zip(part, whole, strict=True))


def word_counts(n: int, words: int, weights: list[float], seed: int) -> np.ndarray:
    """Unit rows of one or four words of very different frequency, and some without any."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((n, words), np.float32)
    for row in range(n):
        own = rng.choice(
            words, rng.choice([1, 4]), replace=False, p=(p := 1 / np.arange(1, words + 1)) / p.sum()
        )
        counts[row, own] = rng.choice(weights, len(own))
    counts[rng.random(n) < 0.05] = 0
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("memory", [1, 2**29])
def test_sparse_vectors_with_many_ties_equal_brute_force(coded: bool, memory: int) -> None:
    n, k, rng = 500, 9, np.random.default_rng(4)
    # Numbers are 1, -1, 0.5 and -0.5, so that sums are the same in every order.
    vectors = word_counts(n, 300, [1, -1], 5)
    assert not isinstance(to_sparse_if_sparse(vectors), np.ndarray)
    differ = codes(n, 30, 0.5, rng)[:, None] if coded else None
    same = codes(n, 3, 0.1, rng) if coded else None
    found = ExactIndex(vectors, exclude=differ, require=same, memory_bytes=memory).search(np.arange(n), k)
    expected, scores = brute_force(vectors, k, differ, same)
    np.testing.assert_array_equal(found[0], expected)
    np.testing.assert_array_equal(found[1], scores.astype(np.float32))


def test_blocks_and_parts_of_sparse_vectors_change_no_byte_and_agree_with_dense_ones() -> None:
    n, k = 3000, 7
    vectors = word_counts(n, 500, [0.3, 1, 1.7, -2.9], 6)
    whole = ExactIndex(vectors).search(np.arange(n), k)
    again = ExactIndex(vectors, memory_bytes=1_500_000).search(np.arange(n), k)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(whole, again, strict=True))
    some = np.array([2999, 5, 1024, 5])
    part = ExactIndex(vectors).search(some, k)
    assert all(a.tobytes() == b[some].tobytes() for a, b in zip(part, whole, strict=True))
    _, similarity = exact_topk(vectors, deduplicate_rows(vectors), np.arange(n), k)
    np.testing.assert_allclose(whole[1], similarity, rtol=2e-7)


def test_crowds_of_equals_that_codes_keep_apart_are_searched_in_bounded_memory() -> None:
    # 1,500 equal rows in pairs that must not be found by each other: every row has 1,498 ties.
    n, k = 2000, 5
    vectors = unit_rows(n, 16, 500, 1)
    vectors[:1500] = vectors[0]
    own = np.arange(n)[:, None] // 2
    ids, similarity = exact_topk(
        vectors, deduplicate_rows(vectors, own), np.arange(n), k, exclude=own, memory_bytes=2_000_000
    )
    for row in (0, 1, 2, 3, 1499):
        expected = [other for other in range(1500) if other // 2 != row // 2][:k]
        assert ids[row].tolist() == expected
    np.testing.assert_allclose(similarity[:1500], 1, atol=1e-6)


@pytest.mark.parametrize("sizes", [(2,) * 700, (1, 3, 900, 5, 400)])
def test_scopes_of_every_size_hold_what_they_hold(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    same = rng.permutation(np.repeat(np.arange(len(sizes)) * 7, sizes))
    vectors = unit_rows(len(same), 8, len(same), 6)
    ids, similarity = ExactIndex(vectors, require=same).search(np.arange(len(same)), 4)
    exact = vectors.astype(np.float64)
    similar = np.where(same[:, None] == same, (exact[:, None] * exact[None]).sum(-1), -np.inf)
    np.fill_diagonal(similar, -np.inf)
    places = np.arange(len(same))
    order = np.lexsort(((places - places[:, None]) % len(same), -similar), axis=1)[:, :4]
    scores = np.take_along_axis(similar, order, axis=1)
    np.testing.assert_array_equal(ids, np.where(np.isfinite(scores), order, -1))
    np.testing.assert_array_equal(similarity, scores.astype(np.float32))


def test_vectors_may_lie_on_disk(tmp_path: Path) -> None:
    vectors = unit_rows(600, 12, 500, 8)
    vectors.tofile(tmp_path / "vectors")
    mapped = np.memmap(tmp_path / "vectors", np.float32, "r", shape=vectors.shape)
    for a, b in zip(
        ExactIndex(mapped).search(np.arange(600), 3),
        ExactIndex(vectors).search(np.arange(600), 3),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", sorted(ARITHMETICS))
@pytest.mark.parametrize("dimension", [3, 64, 768])
@pytest.mark.parametrize("short", [False, True])
def test_intervals_hold_the_true_product(name: str, dimension: int, short: bool) -> None:
    rng, arithmetic = np.random.default_rng(dimension), ARITHMETICS[name]
    x, y = (rng.normal(size=(200, dimension)) * rng.choice([1e-4, 1, 30], (200, dimension)) for _ in range(2))
    x, y = (
        v.astype(np.float32) / np.linalg.norm(v, axis=1, keepdims=True).astype(np.float32) for v in (x, y)
    )
    y[:50] = x[:50]
    if short:  # what bfloat16 holds exactly, so that only the result is rounded
        x, y = shortened(x), shortened(y)
    queries, columns = quantize_rows(x, arithmetic), quantize_rows(y, arithmetic)
    value = matmul(queries, columns).double().numpy()
    low, high = score_interval(value, error_bound(queries, columns, arithmetic)[:, None], arithmetic)
    true = x.astype(np.float64) @ y.astype(np.float64).T
    assert ((low <= true) & (true <= high)).all()
    # Rounding to bfloat16 errs by more than float32's bound, so the test can tell them apart.
    assert name != "bfloat16" or np.abs(value - true).max() > 1e-4


def test_codes_of_another_length_are_refused() -> None:
    vectors = unit_rows(10, 4, 10, 0)
    with pytest.raises(InvalidInputError, match="`same` have the shape"):
        ExactIndex(vectors, require=np.zeros(9, np.int64))


def test_agrees_with_faiss() -> None:
    vectors = np.random.default_rng(1).normal(size=(5000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    neighbors, similarity = exact_topk(vectors, deduplicate_rows(vectors), np.arange(5000), 10)
    index = faiss.IndexFlatIP(64)
    index.add(vectors)
    scores, found = index.search(vectors, 11)
    assert (found[:, 0] == np.arange(5000)).all()
    # faiss scores in float32, so neighbors that differ by less than its error may swap.
    np.testing.assert_allclose(similarity, scores[:, 1:], atol=2e-6)
    assert (found[:, 1:] == neighbors).mean() > 0.999


def test_groups_are_the_distinct_rows_in_order_of_appearance() -> None:
    vectors = unit_rows(400, 5, 37, 2)
    grouped = deduplicate_rows(vectors)
    distinct = {row.tobytes() for row in vectors}
    assert len(grouped.first_rows) == len(distinct)
    assert (np.diff(grouped.first_rows) > 0).all()
    np.testing.assert_array_equal(vectors[grouped.first_rows[grouped.group_ids]], vectors)
    for group in range(len(grouped.first_rows)):
        members = grouped.members[grouped.group_starts[group] : grouped.group_starts[group + 1]]
        np.testing.assert_array_equal(members, np.flatnonzero(grouped.group_ids == group))


def test_groups_are_told_apart_by_codes_too() -> None:
    vectors = unit_rows(300, 5, 20, 2)
    rng = np.random.default_rng(0)
    differ, same = rng.integers(-1, 3, (300, 2)), rng.integers(-1, 2, 300)
    grouped = deduplicate_rows(vectors, differ, same)
    keys = [(v.tobytes(), tuple(d), s) for v, d, s in zip(vectors, differ, same, strict=True)]
    assert len(grouped.first_rows) == len(set(keys))
    assert all(
        keys[grouped.first_rows[group]] == key for group, key in zip(grouped.group_ids, keys, strict=True)
    )
