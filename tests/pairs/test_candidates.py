"""Rules on tables: against loops, and by what must hold for any table."""

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


def table(n: int, k: int, seed: int) -> Candidates:
    """The nearest k of n random vectors, some rows cut short."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    k = min(k, n - 1)
    order = np.argsort(-similar, axis=1)[:, :k]
    values = np.take_along_axis(similar, order, axis=1).astype(np.float32)
    cut = np.arange(k) >= rng.integers(0, k + 1, n)[:, None]
    return Candidates(np.where(cut, -1, order), np.where(cut, -np.inf, values).astype(np.float32))


def pairs_of(candidates: Candidates) -> set[tuple[int, int]]:
    rows, places = np.nonzero(candidates.mask)
    return set(zip(rows.tolist(), candidates.positions[rows, places].tolist(), strict=True))


SIZES = {"n": st.integers(3, 40), "k": st.integers(1, 12), "seed": st.integers(0, 10**6)}


@settings(deadline=None, max_examples=40)
@given(**SIZES)
def test_no_rule_adds_a_pair_and_rows_stay_closed(n: int, k: int, seed: int) -> None:
    base = table(n, k, seed)
    allowed = np.random.default_rng(seed).random(n) < 0.7
    for kept in (
        restrict_to(base, allowed),
        filter_min_similarity(base, 0.3),
        ratio_test(base, 1.2),
        filter_mutual(base, 3),
        base.topk(2),
        base.rerank(csls_scores(base, base)),
    ):
        assert pairs_of(kept) <= pairs_of(base)
        assert (np.sort(~kept.mask, axis=1) == ~kept.mask).all()  # -1 only at the end
        assert np.isneginf(kept.similarity[~kept.mask]).all()
        of = {
            (i, int(j)): s
            for i in range(n)
            for j, s in zip(base.positions[i], base.similarity[i], strict=True)
        }
        rows, places = np.nonzero(kept.mask)
        for i, place in zip(rows.tolist(), places.tolist(), strict=True):
            assert of[i, int(kept.positions[i, place])] == kept.similarity[i, place]


@settings(deadline=None, max_examples=40)
@given(**SIZES, m=st.integers(1, 8))
def test_mutual_is_symmetric_and_exact(n: int, k: int, seed: int, m: int) -> None:
    base = table(n, k, seed)
    found = pairs_of(filter_mutual(base, m))
    assert found == {(j, i) for i, j in found}
    near = pairs_of(base.topk(m))
    assert found == {(i, j) for i, j in near if (j, i) in near}


@settings(deadline=None, max_examples=30)
@given(**SIZES)
def test_limits_equal_loops(n: int, k: int, seed: int) -> None:
    base = table(n, k, seed)
    allowed = np.random.default_rng(seed).random(n) < 0.5
    assert pairs_of(restrict_to(base, allowed)) == {(i, j) for i, j in pairs_of(base) if allowed[j]}
    strong = {
        (i, int(j))
        for i in range(n)
        for j, s in zip(base.positions[i], base.similarity[i], strict=True)
        if j >= 0 and s >= 0.25 - 1e-6
    }
    assert pairs_of(filter_min_similarity(base, 0.25)) == strong
    clear = pairs_of(ratio_test(base, 1.5))
    for i in range(n):
        near = [float(s) for s in base.similarity[i] if np.isfinite(s)]
        passes = len(near) == 1 or (len(near) > 1 and 1 - near[1] >= 1.5 * (1 - near[0]))
        assert ({pair for pair in clear if pair[0] == i} != set()) == passes


@settings(deadline=None, max_examples=30)
@given(**SIZES)
def test_hub_corrections_equal_their_formulas(n: int, k: int, seed: int) -> None:
    base = table(n, k, seed)
    r = [
        np.mean([s for s in row[:10] if np.isfinite(s)] or [0]) for row in base.similarity.astype(np.float64)
    ]
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=n) / 10, rng.random(n) + 0.1
    csls, proximity = csls_scores(base, base), mutual_proximity_scores(base, mean, std)
    for i, place in zip(*np.nonzero(base.mask), strict=True):
        j, s = base.positions[i, place], float(base.similarity[i, place])
        # The part of CSLS that does not change within a row is left out.
        assert csls[i, place] == pytest.approx(2 * s - r[j], abs=1e-6)
        expected = norm.cdf(s, mean[i], std[i]) * norm.cdf(s, mean[j], std[j])
        assert np.exp(proximity[i, place]) == pytest.approx(expected, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(**SIZES, weight=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_rank_fusion_equals_a_loop(n: int, k: int, seed: int, weight: float) -> None:
    words, looks = table(n, k, seed), table(n, k, seed + 1)
    width = words.positions.shape[1]
    positions, scores = reciprocal_rank_fusion(words, looks, np.full((n, 1), weight), width)
    for i in range(n):
        total: dict[int, float] = {}
        for candidates, w in ((words, 1 - weight), (looks, weight)):
            for rank, j in enumerate(candidates.positions[i], start=1):
                if j >= 0:
                    total[int(j)] = total.get(int(j), 0.0) + w / (60 + rank)
        best = sorted(total, key=lambda j: (-total[j], j))[:width]
        found = [int(j) for j in positions[i] if j >= 0]
        np.testing.assert_allclose(scores[i, : len(found)], [total[j] for j in best])
        assert len(set(found)) == len(best)


def test_merged_adds_twins_up_by_hand() -> None:
    first, second = np.array([[3, 1, -1]]), np.array([[1, 2, -1]])
    positions, scores = merge_scores(
        first, second, np.array([[0.5, 0.4, 9.0]]), np.array([[0.3, 0.1, 9.0]]), 4
    )
    assert positions.tolist() == [[1, 3, 2, -1]]
    np.testing.assert_allclose(scores[0, :3], [0.7, 0.5, 0.1])
