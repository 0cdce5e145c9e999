"""Partner sampling: uniform or by similarity, and a pure function of seed, epoch and image."""

import numpy as np

from likewise.pairs.candidates import Candidates
from likewise.pairs.config import PairConfig
from likewise.pairs.sampling import CandidateSampler, LabelSampler, NullSampler, Pairs

DEFAULT = PairConfig()


def make_pairs(
    sampler: CandidateSampler | LabelSampler | NullSampler,
    pair_config: PairConfig = DEFAULT,
    num_images: int = 4,
) -> Pairs:
    return Pairs(pair_config, sampler, "key", excluded=np.zeros(num_images, bool))


def make_candidates(rows: list[list[int]], similarity: list[list[float]] | None = None) -> Candidates:
    positions = np.array(rows)
    similarity_array = (
        np.ones(positions.shape, np.float32) if similarity is None else np.array(similarity, np.float32)
    )
    return Candidates(positions, np.where(positions < 0, -np.inf, similarity_array).astype(np.float32))


def frequencies(samples: np.ndarray, num_images: int = 4) -> np.ndarray:
    return np.bincount(samples, minlength=num_images) / len(samples)


def sample_many(pairs: Pairs, image: int, count: int = 4000) -> np.ndarray:
    return np.concatenate([pairs.sample_partners(np.array([image]), seed=0, epoch=e) for e in range(count)])


def test_partners_are_sampled_uniformly_and_images_without_candidates_pair_with_themselves() -> None:
    pairs = make_pairs(
        CandidateSampler(make_candidates([[1, 2, 3], [-1, -1, -1], [0, 1, -1], [0, -1, -1]])), PairConfig(k=3)
    )
    np.testing.assert_allclose(frequencies(sample_many(pairs, 0)), [0, 1 / 3, 1 / 3, 1 / 3], atol=0.03)
    np.testing.assert_allclose(frequencies(sample_many(pairs, 2)), [0.5, 0.5, 0, 0], atol=0.03)
    assert set(sample_many(pairs, 1, 20)) == {1}
    assert set(sample_many(pairs, 3, 20)) == {0}
    assert pairs.has_partner.tolist() == [True, False, True, True]
    assert "3 of 4 images have a partner; 1 are paired with themselves" in pairs.summary()


def test_sampling_by_similarity_follows_the_softmax() -> None:
    candidates = make_candidates([[1, 2, 3]] * 4, [[0.9, 0.7, 0.2]] * 4)
    pairs = make_pairs(
        CandidateSampler(candidates, temperature=0.3), PairConfig(k=3, sampling_temperature=0.3)
    )
    weights = np.exp(np.array([0.9, 0.7, 0.2]) / 0.3)
    np.testing.assert_allclose(frequencies(sample_many(pairs, 0))[1:], weights / weights.sum(), atol=0.03)
    nearly_greedy = make_pairs(
        CandidateSampler(candidates, temperature=1e-4), PairConfig(k=3, sampling_temperature=1e-4)
    )
    assert set(sample_many(nearly_greedy, 0, 50)) == {1}


def test_self_pair_prob_is_the_frequency_of_self_pairs() -> None:
    pairs = make_pairs(
        CandidateSampler(make_candidates([[1], [2], [3], [0]])), PairConfig(self_pair_prob=0.25)
    )
    np.testing.assert_allclose(frequencies(sample_many(pairs, 0)), [0.25, 0.75, 0, 0], atol=0.03)


def test_captions_are_sampled_uniformly_before_their_neighbors() -> None:
    # Image 0 has three captions, one of them without neighbors; image 1 has no caption, image 2 one.
    candidates = make_candidates([[1, 3], [-1, -1], [2, -1], [3, 1]])
    sampler = CandidateSampler(candidates, row_starts=np.array([0, 3, 3, 4, 4]))
    pairs = make_pairs(sampler, PairConfig(k=2))
    np.testing.assert_allclose(frequencies(sample_many(pairs, 0)), [0, 0.25, 0.5, 0.25], atol=0.03)
    assert pairs.has_partner.tolist() == [True, False, True, False]
    assert sampler.list_partners(0) == [1, 3, 2]
    assert sampler.list_partners(1) == []


def test_label_sampler_is_uniform_over_other_members() -> None:
    labels = np.array([5, -1, 5, 5, 7, -1, 5])
    pairs = make_pairs(LabelSampler(labels), PairConfig(source="label"), num_images=7)
    np.testing.assert_allclose(
        frequencies(sample_many(pairs, 2), 7), [1 / 3, 0, 0, 1 / 3, 0, 0, 1 / 3], atol=0.03
    )
    assert pairs.has_partner.tolist() == [True, False, True, True, False, False, True]
    for image in (1, 4, 5):
        assert set(sample_many(pairs, image, 20)) == {image}


def test_samples_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(0)
    candidates = make_candidates((rng.integers(1, 500, (500, 6)) + np.arange(500)[:, None]).tolist())
    pairs = Pairs(PairConfig(k=6), CandidateSampler(candidates), "key", excluded=np.zeros(500, bool))
    anchors = np.arange(500)
    expected = pairs.sample_partners(anchors, seed=1, epoch=2)
    np.testing.assert_array_equal(expected[::-1], pairs.sample_partners(anchors[::-1], seed=1, epoch=2))
    batches = [pairs.sample_partners(batch, seed=1, epoch=2) for batch in np.array_split(anchors, 7)]
    np.testing.assert_array_equal(expected, np.concatenate(batches))
    assert (expected != pairs.sample_partners(anchors, seed=1, epoch=3)).any()
    assert (expected != pairs.sample_partners(anchors, seed=2, epoch=2)).any()


def test_null_sampler_yields_self_pairs_and_excluded_images_are_not_anchors() -> None:
    pairs = make_pairs(NullSampler(4), PairConfig(source="self"))
    assert pairs.sample_partners(np.array([3, 1]), seed=0, epoch=0).tolist() == [3, 1]
    reduced = Pairs(
        PairConfig(),
        CandidateSampler(make_candidates([[1], [0], [0], [-1]])),
        "key",
        excluded=np.array([False, False, True, True]),
    )
    assert reduced.anchors.tolist() == [0, 1]
    assert reduced.has_partner.tolist() == [True, True, False, False]
