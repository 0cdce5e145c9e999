"""Draws of partners: even or by similarity, reproducible, and functions of seed, epoch and image alone."""

import numpy as np

from likewise.pairs.candidates import Candidates
from likewise.pairs.config import PairConfig
from likewise.pairs.sampling import CandidateSampler, LabelSampler, NullSampler, Pairs

NEAREST = PairConfig()


def pairs(
    choice: CandidateSampler | LabelSampler | NullSampler, rule: PairConfig = NEAREST, images: int = 4
) -> Pairs:
    return Pairs(rule, choice, "key", excluded=np.zeros(images, bool))


def of(rows: list[list[int]], similarity: list[list[float]] | None = None) -> Candidates:
    positions = np.array(rows)
    values = np.ones(positions.shape, np.float32) if similarity is None else np.array(similarity, np.float32)
    return Candidates(positions, np.where(positions < 0, -np.inf, values).astype(np.float32))


def shares(drawn: np.ndarray, images: int = 4) -> np.ndarray:
    return np.bincount(drawn, minlength=images) / len(drawn)


def draws(made: Pairs, image: int, count: int = 4000) -> np.ndarray:
    return np.concatenate([made.sample_partners(np.array([image]), seed=0, epoch=e) for e in range(count)])


def test_even_draws_and_images_without_candidates() -> None:
    made = pairs(CandidateSampler(of([[1, 2, 3], [-1, -1, -1], [0, 1, -1], [0, -1, -1]])), PairConfig(k=3))
    np.testing.assert_allclose(shares(draws(made, 0)), [0, 1 / 3, 1 / 3, 1 / 3], atol=0.03)
    np.testing.assert_allclose(shares(draws(made, 2)), [0.5, 0.5, 0, 0], atol=0.03)
    assert set(draws(made, 1, 20)) == {1}
    assert set(draws(made, 3, 20)) == {0}
    assert made.has_partner.tolist() == [True, False, True, True]
    assert "3 of 4 images have a partner; 1 are paired with themselves" in made.summary()


def test_draws_by_similarity_follow_the_softmax() -> None:
    table = of([[1, 2, 3]] * 4, [[0.9, 0.7, 0.2]] * 4)
    made = pairs(CandidateSampler(table, temperature=0.3), PairConfig(k=3, sampling_temperature=0.3))
    weights = np.exp(np.array([0.9, 0.7, 0.2]) / 0.3)
    np.testing.assert_allclose(shares(draws(made, 0))[1:], weights / weights.sum(), atol=0.03)
    cold = pairs(CandidateSampler(table, temperature=1e-4), PairConfig(k=3, sampling_temperature=1e-4))
    assert set(draws(cold, 0, 50)) == {1}


def test_a_share_with_themselves() -> None:
    made = pairs(CandidateSampler(of([[1], [2], [3], [0]])), PairConfig(self_pair_prob=0.25))
    np.testing.assert_allclose(shares(draws(made, 0)), [0.25, 0.75, 0, 0], atol=0.03)


def test_a_caption_is_drawn_first() -> None:
    # Image 0 has three captions, one of which found nobody; image 1 has none, image 2 one.
    table = of([[1, 3], [-1, -1], [2, -1], [3, 1]])
    choice = CandidateSampler(table, row_starts=np.array([0, 3, 3, 4, 4]))
    made = pairs(choice, PairConfig(k=2))
    np.testing.assert_allclose(shares(draws(made, 0)), [0, 0.25, 0.5, 0.25], atol=0.03)
    assert made.has_partner.tolist() == [True, False, True, False]
    assert choice.list_partners(0) == [1, 3, 2]
    assert choice.list_partners(1) == []


def test_groups_draw_any_other_member_evenly() -> None:
    group = np.array([5, -1, 5, 5, 7, -1, 5])
    made = pairs(LabelSampler(group), PairConfig(source="label"), images=7)
    np.testing.assert_allclose(shares(draws(made, 2), 7), [1 / 3, 0, 0, 1 / 3, 0, 0, 1 / 3], atol=0.03)
    assert made.has_partner.tolist() == [True, False, True, True, False, False, True]
    for alone in (1, 4, 5):
        assert set(draws(made, alone, 20)) == {alone}


def test_order_and_company_change_no_draw() -> None:
    rng = np.random.default_rng(0)
    table = of((rng.integers(1, 500, (500, 6)) + np.arange(500)[:, None]).tolist())
    made = Pairs(PairConfig(k=6), CandidateSampler(table), "key", excluded=np.zeros(500, bool))
    everyone = np.arange(500)
    one = made.sample_partners(everyone, seed=1, epoch=2)
    np.testing.assert_array_equal(one[::-1], made.sample_partners(everyone[::-1], seed=1, epoch=2))
    parts = [made.sample_partners(part, seed=1, epoch=2) for part in np.array_split(everyone, 7)]
    np.testing.assert_array_equal(one, np.concatenate(parts))
    assert (one != made.sample_partners(everyone, seed=1, epoch=3)).any()
    assert (one != made.sample_partners(everyone, seed=2, epoch=2)).any()


def test_self_pairs_and_dropped_images() -> None:
    made = pairs(NullSampler(4), PairConfig(source="self"))
    assert made.sample_partners(np.array([3, 1]), seed=0, epoch=0).tolist() == [3, 1]
    left = Pairs(
        PairConfig(),
        CandidateSampler(of([[1], [0], [0], [-1]])),
        "key",
        excluded=np.array([False, False, True, True]),
    )
    assert left.anchors.tolist() == [0, 1]
    assert left.has_partner.tolist() == [True, True, False, False]
