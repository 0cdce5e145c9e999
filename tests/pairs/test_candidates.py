"""Filters and re-ranking of candidates, compared to loops, and their invariants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from likewise.pairs.candidates import (
    Candidates,
    csls_scores,
    filter_min_similarity,
    filter_mutual,
    merge_scores,
    mutual_proximity_scores,
    ratio_test,
    reciprocal_rank_fusion,
    restrict_to,
)


def random_candidates(n: int, k: int, seed: int) -> Candidates:
    """Return the k nearest of n random vectors, with some rows truncated."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    k = min(k, n - 1)
    order = np.argsort(-scores, axis=1)[:, :k]
    similarity = np.take_along_axis(scores, order, axis=1).astype(np.float32)
    is_truncated = np.arange(k) >= rng.integers(0, k + 1, n)[:, None]
    return Candidates(
        np.where(is_truncated, -1, order), np.where(is_truncated, -np.inf, similarity).astype(np.float32)
    )


def list_pairs(candidates: Candidates) -> set[tuple[int, int]]:
    rows, columns = np.nonzero(candidates.mask)
    return set(zip(rows.tolist(), candidates.positions[rows, columns].tolist(), strict=True))


SIZES = {"n": st.integers(3, 40), "k": st.integers(1, 12), "seed": st.integers(0, 10**6)}


@settings(deadline=None, max_examples=40)
@given(**SIZES)
def test_filters_add_no_pair_and_pad_at_the_end(n: int, k: int, seed: int) -> None:
    base = random_candidates(n, k, seed)
    allowed = np.random.default_rng(seed).random(n) < 0.7
    for filtered in (
        restrict_to(base, allowed),
        filter_min_similarity(base, 0.3),
        ratio_test(base, 1.2),
        filter_mutual(base, 3),
        base.topk(2),
        base.rerank(csls_scores(base, base)),
    ):
        assert list_pairs(filtered) <= list_pairs(base)
        assert (np.sort(~filtered.mask, axis=1) == ~filtered.mask).all()  # -1 only at the end
        assert np.isneginf(filtered.similarity[~filtered.mask]).all()
        similarity_of = {
            (i, int(j)): s
            for i in range(n)
            for j, s in zip(base.positions[i], base.similarity[i], strict=True)
        }
        rows, columns = np.nonzero(filtered.mask)
        for i, column in zip(rows.tolist(), columns.tolist(), strict=True):
            assert similarity_of[i, int(filtered.positions[i, column])] == filtered.similarity[i, column]


@settings(deadline=None, max_examples=40)
@given(**SIZES, m=st.integers(1, 8))
def test_mutual_filter_is_symmetric_and_exact(n: int, k: int, seed: int, m: int) -> None:
    base = random_candidates(n, k, seed)
    pairs = list_pairs(filter_mutual(base, m))
    assert pairs == {(j, i) for i, j in pairs}
    nearest = list_pairs(base.topk(m))
    assert pairs == {(i, j) for i, j in nearest if (j, i) in nearest}


@settings(deadline=None, max_examples=30)
@given(**SIZES)
def test_filters_by_mask_similarity_and_ratio_equal_loops(n: int, k: int, seed: int) -> None:
    base = random_candidates(n, k, seed)
    allowed = np.random.default_rng(seed).random(n) < 0.5
    assert list_pairs(restrict_to(base, allowed)) == {(i, j) for i, j in list_pairs(base) if allowed[j]}
    expected = {
        (i, int(j))
        for i in range(n)
        for j, s in zip(base.positions[i], base.similarity[i], strict=True)
        if j >= 0 and s >= 0.25 - 1e-6
    }
    assert list_pairs(filter_min_similarity(base, 0.25)) == expected
    distinct = list_pairs(ratio_test(base, 1.5))
    for i in range(n):
        nearest = [float(s) for s in base.similarity[i] if np.isfinite(s)]
        passes = len(nearest) == 1 or (len(nearest) > 1 and 1 - nearest[1] >= 1.5 * (1 - nearest[0]))
        assert ({pair for pair in distinct if pair[0] == i} != set()) == passes


@settings(deadline=None, max_examples=30)
@given(**SIZES)
def test_hubness_corrections_equal_their_formulas(n: int, k: int, seed: int) -> None:
    base = random_candidates(n, k, seed)
    r = [
        np.mean([s for s in row[:10] if np.isfinite(s)] or [0]) for row in base.similarity.astype(np.float64)
    ]
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=n) / 10, rng.random(n) + 0.1
    csls, proximity = csls_scores(base, base), mutual_proximity_scores(base, mean, std)
    for i, column in zip(*np.nonzero(base.mask), strict=True):
        j, s = base.positions[i, column], float(base.similarity[i, column])
        # The term of CSLS that is constant within a row is omitted.
        assert csls[i, column] == pytest.approx(2 * s - r[j], abs=1e-6)
        expected = norm.cdf(s, mean[i], std[i]) * norm.cdf(s, mean[j], std[j])
        assert np.exp(proximity[i, column]) == pytest.approx(expected, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(**SIZES, weight=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_reciprocal_rank_fusion_equals_a_loop(n: int, k: int, seed: int, weight: float) -> None:
    by_caption, by_image = random_candidates(n, k, seed), random_candidates(n, k, seed + 1)
    width = by_caption.positions.shape[1]
    positions, scores = reciprocal_rank_fusion(by_caption, by_image, np.full((n, 1), weight), width)
    for i in range(n):
        score_of: dict[int, float] = {}
        for candidates, w in ((by_caption, 1 - weight), (by_image, weight)):
            for rank, j in enumerate(candidates.positions[i], start=1):
                if j >= 0:
                    score_of[int(j)] = score_of.get(int(j), 0.0) + w / (60 + rank)
        expected = sorted(score_of, key=lambda j: (-score_of[j], j))[:width]
        pairs = [int(j) for j in positions[i] if j >= 0]
        np.testing.assert_allclose(scores[i, : len(pairs)], [score_of[j] for j in expected])
        assert len(set(pairs)) == len(expected)


def test_merge_adds_scores_of_common_candidates() -> None:
    a, b = np.array([[3, 1, -1]]), np.array([[1, 2, -1]])
    positions, scores = merge_scores(a, b, np.array([[0.5, 0.4, 9.0]]), np.array([[0.3, 0.1, 9.0]]), 4)
    assert positions.tolist() == [[1, 3, 2, -1]]
    np.testing.assert_allclose(scores[0, :3], [0.7, 0.5, 0.1])
