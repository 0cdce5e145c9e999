"""Statistics of pairs, compared to loops and scipy, and the analysis, compared to brute force."""

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from likewise.data.dataset import CaptionDataset
from likewise.data.perceptual_hash import compute_perceptual_hashes
from likewise.embeddings.embed import embed
from likewise.embeddings.store import find_embeddings
from likewise.errors import ArtifactError, InvalidInputError
from likewise.neighbors.vectors import ImageVectors
from likewise.pairs.analyze import (
    LANGUAGE_PAIR_CONFIGS,
    AnalysisRow,
    PairAnalysis,
    analyze_pairs,
    format_pair_config,
)
from likewise.pairs.candidates import Candidates
from likewise.pairs.config import PairConfig, parse_pair_config
from likewise.pairs.sampling import CandidateSampler, LabelSampler, Pairs
from likewise.pairs.stats import (
    PairDistribution,
    PairSignals,
    PairStats,
    compute_agreement,
    compute_pair_stats,
    label_precision,
    pair_distribution,
    random_baseline,
    rank_correlations,
    sample_neighbors,
    skewness,
)
from support import MINILM

IMAGE_ENCODER = "image:random:resnet10t"
# (anchor, partner, probability, probability if only the best is sampled, similarity)
PairRows = list[tuple[int, int, float, float, float]]


def _make_pairs(
    n: int, temperature: float | None, *, multiple_rows: bool, seed: int = 0
) -> tuple[Pairs, np.ndarray]:
    """Return pairs of random candidates, with one or several rows per image, some of them empty."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 4, n) if multiple_rows else np.ones(n, np.int64)
    image_ids = np.repeat(np.arange(n), rows)
    positions = np.stack([rng.permutation(np.delete(np.arange(n // 2), a % (n // 2)))[:6] for a in image_ids])
    similarity = -np.sort(-rng.uniform(-0.2, 1, positions.shape).astype(np.float32), axis=1)
    candidates = Candidates(positions, similarity).filter(
        rng.random(positions.shape) < rng.random((len(image_ids), 1))
    )
    sampler = CandidateSampler(candidates, temperature, np.concatenate([[0], np.cumsum(rows)]))
    return Pairs(PairConfig(), sampler, "key", excluded=rng.random(n) < 0.1), image_ids


def _list_pairs(pairs: Pairs, image_ids: np.ndarray) -> PairRows:
    """List all pairs by definition: a uniform row of the image, then a candidate of the row."""
    sampler = pairs.sampler
    assert isinstance(sampler, CandidateSampler)
    rows = defaultdict(list)
    for row, image in enumerate(image_ids):
        row_candidates = [
            (int(p), float(s)) for p, s in zip(*_row(sampler.candidates, row), strict=True) if p >= 0
        ]
        if row_candidates and not pairs.excluded[image]:
            rows[int(image)].append(row_candidates)
    pair_rows = []
    for image, image_rows in rows.items():
        for row_candidates in image_rows:
            weights = [
                1.0 if sampler.temperature is None else np.exp(s / sampler.temperature)
                for _, s in row_candidates
            ]
            for rank, (p, s) in enumerate(row_candidates):
                weight = weights[rank] / sum(weights) / len(image_rows)
                pair_rows.append((image, p, weight, (rank == 0) / len(image_rows), s))
    return pair_rows


def _row(candidates: Candidates, row: int) -> tuple[np.ndarray, np.ndarray]:
    return candidates.positions[row], candidates.similarity[row]


def _make_signals(n: int, seed: int = 1) -> PairSignals:
    rng = np.random.default_rng(seed)
    return PairSignals(
        caption_hashes=rng.integers(-1, 4, n),
        image_hashes=rng.integers(0, 2**63, n).astype(np.uint64),
        is_readable=rng.random(n) < 0.8,
        near_duplicate_ids=rng.integers(-1, 9, n),
        labels=rng.integers(-1, 3, n),
        image_vectors=None,
    )


def _label_precisions(pair_rows: PairRows, labels: np.ndarray, column: int) -> list[float]:
    correct, total = defaultdict(float), defaultdict(float)
    for row in pair_rows:
        a, p, w = row[0], row[1], row[column]
        if labels[a] >= 0 and labels[p] >= 0 and w > 0:
            total[a] += w
            correct[a] += w * (labels[a] == labels[p])
    return [correct[a] / total[a] for a in total]


@pytest.mark.parametrize(
    ("temperature", "multiple_rows"), [(None, False), (0.2, False), (None, True), (0.2, True)]
)
def test_pair_stats_equal_loops(
    dataset: CaptionDataset, temperature: float | None, *, multiple_rows: bool
) -> None:
    n = 80
    pairs, image_ids = _make_pairs(n, temperature, multiple_rows=multiple_rows)
    pair_rows, signals = _list_pairs(pairs, image_ids), _make_signals(n)
    result = compute_pair_stats(pair_distribution(pairs, image_ids), signals, dataset)
    total = sum(w for _, _, w, _, _ in pair_rows)
    edges = {(a, p) for a, p, *_ in pair_rows}
    in_degree = np.zeros(n)
    for _, p, w, _, _ in pair_rows:
        in_degree[p] += w

    assert result.paired_fraction == len({a for a, *_ in pair_rows}) / n
    assert result.hubness_skew == pytest.approx(stats.skew(in_degree), abs=1e-9)
    assert result.coverage == np.mean(in_degree > 0)
    assert result.reciprocity == pytest.approx(sum(w for a, p, w, *_ in pair_rows if (p, a) in edges) / total)
    for fraction, hashes in (
        (result.identical_caption_fraction, signals.caption_hashes),
        (result.near_duplicate_fraction, signals.near_duplicate_ids),
    ):
        equal_weight = sum(w for a, p, w, *_ in pair_rows if hashes[a] == hashes[p] >= 0)
        assert 0 < fraction == pytest.approx(equal_weight / total)
    readable = [(a, p, w) for a, p, w, *_ in pair_rows if signals.is_readable[a] and signals.is_readable[p]]
    weighted_distance = sum(
        w * (int(signals.image_hashes[a]) ^ int(signals.image_hashes[p])).bit_count() for a, p, w in readable
    )
    assert result.hash_distance == pytest.approx(weighted_distance / sum(w for *_, w in readable))
    by_similarity = sorted((s, w) for _, _, w, _, s in pair_rows)
    cumulative = np.cumsum([w for _, w in by_similarity]) / total
    expected = [
        next(s for (s, _), r in zip(by_similarity, cumulative, strict=True) if r >= q)
        for q in (0.1, 0.5, 0.9)
    ]
    assert result.similarity == pytest.approx(expected)
    assert signals.labels is not None
    for estimate, column in ((result.top1_precision, 3), (result.label_precision, 2)):
        values = _label_precisions(pair_rows, signals.labels, column)
        assert estimate is not None
        assert estimate.num_images == len(values)
        assert estimate.value == pytest.approx(np.mean(values))
        low, high = stats.norm.interval(0.95, np.mean(values), stats.sem(values))
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-6)
    expected_hubs = sorted(range(n), key=lambda i: (-in_degree[i], i))[: len(result.hubs)]
    assert [hub.position for hub in result.hubs] == expected_hubs
    assert [hub.expected_in_degree for hub in result.hubs] == pytest.approx(in_degree[expected_hubs])


@pytest.mark.parametrize("multiple_rows", [False, True])
def test_probabilities_equal_sampled_frequencies(*, multiple_rows: bool) -> None:
    pairs, image_ids = _make_pairs(24, 0.3, multiple_rows=multiple_rows, seed=3)
    distribution, epochs = pair_distribution(pairs, image_ids), 4000
    anchors = np.flatnonzero(pairs.has_partner)
    sampled = np.stack([pairs.sample_partners(anchors, seed=0, epoch=epoch) for epoch in range(epochs)])
    for column, anchor in enumerate(anchors):
        is_anchor = distribution.anchors == anchor
        expected = np.bincount(distribution.partners[is_anchor], distribution.prob[is_anchor], minlength=24)
        counted = np.bincount(sampled[:, column], minlength=24) / epochs
        np.testing.assert_allclose(counted, expected, atol=0.04)


def test_label_pairs_are_uniform_within_a_label(dataset: CaptionDataset) -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, -1])
    distribution = pair_distribution(
        Pairs(PairConfig(source="label"), LabelSampler(labels), "key", excluded=np.zeros(7, bool)), labels
    )
    assert distribution.anchors.tolist() == [0, 1, 2, 3, 4]
    assert (labels[distribution.partners] == labels[distribution.anchors]).all()
    assert (distribution.partners != distribution.anchors).all()
    assert distribution.expected_in_degree.tolist() == [1, 1, 1, 1, 1, 0, 0]
    signals = _make_signals(7)
    pair_stats = compute_pair_stats(distribution, signals, dataset)
    assert (pair_stats.reciprocity, pair_stats.coverage, pair_stats.paired_fraction) == (1.0, 5 / 7, 5 / 7)
    assert pair_stats.similarity is None
    assert pair_stats.hubs == ()


def test_random_baseline_is_the_mean_over_all_pairs(dataset: CaptionDataset) -> None:
    image_vectors = ImageVectors(find_embeddings(dataset, MINILM), len(dataset))
    n = len(dataset)
    base = _make_signals(n)
    signals = PairSignals(
        caption_hashes=base.caption_hashes,
        image_hashes=base.image_hashes,
        is_readable=base.is_readable,
        near_duplicate_ids=base.near_duplicate_ids,
        labels=base.labels,
        image_vectors=image_vectors,
    )
    result, all_pairs = random_baseline(signals), list(combinations(range(n), 2))
    assert base.labels is not None
    labeled_pairs = [(a, b) for a, b in all_pairs if base.labels[a] >= 0 and base.labels[b] >= 0]
    assert result.label_precision == pytest.approx(
        np.mean([base.labels[a] == base.labels[b] for a, b in labeled_pairs])
    )
    for fraction, hashes in (
        (result.identical_caption_fraction, base.caption_hashes),
        (result.near_duplicate_fraction, base.near_duplicate_ids),
    ):
        assert fraction == pytest.approx(np.mean([hashes[a] == hashes[b] >= 0 for a, b in all_pairs]))
    readable = [
        (int(base.image_hashes[a]) ^ int(base.image_hashes[b])).bit_count()
        for a, b in all_pairs
        if base.is_readable[a] and base.is_readable[b]
    ]
    assert result.hash_distance == pytest.approx(np.mean(readable))
    vectors = image_vectors.get(np.arange(n)).astype(np.float64)
    cosines = vectors @ vectors.T
    assert result.image_similarity == pytest.approx(cosines[np.triu_indices(n, 1)].mean(), abs=1e-6)


def test_stats_without_data_are_none() -> None:
    assert skewness(np.ones(5)) == 0.0
    a, p, w = np.array([0, 1]), np.array([1, 0]), np.ones(2)
    assert label_precision(a, p, w, np.array([0, -1])) is None
    estimate = label_precision(a[:1], p[:1], w[:1], np.array([2, 2]))
    assert estimate is not None
    assert (estimate.value, estimate.low, estimate.high, estimate.num_images) == (1.0, 0.0, 1.0, 1)


def test_rank_correlation_equals_scipy() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 6, (40, 12)).astype(np.float32)  # many ties
    b = a + rng.integers(-3, 4, a.shape).astype(np.float32)
    mask = rng.random(a.shape) < 0.7
    mask[0] = False
    a[1] = 2
    result = rank_correlations(a, b, mask)
    assert np.isnan(result[:2]).all()
    expected = [stats.spearmanr(a[i, mask[i]], b[i, mask[i]])[0] for i in range(2, 40)]
    np.testing.assert_allclose(result[2:], expected, atol=1e-12)


def test_pair_config_text_round_trip() -> None:
    for text in (
        *LANGUAGE_PAIR_CONFIGS,
        "k=3,mutual_k=10",
        "source=vision",
        "sampling_temperature=0.1,k=4",
        "group_scope=different",
    ):
        pair_config = parse_pair_config(text)
        assert parse_pair_config(format_pair_config(pair_config)) == pair_config
    assert format_pair_config(parse_pair_config("default")) == "default"
    assert (
        format_pair_config(parse_pair_config("exclude_identical_captions,k=2,caption_encoder=tfidf"))
        == "exclude_identical_captions,k=2"
    )


@pytest.fixture(scope="module")
def analysis(dataset: CaptionDataset) -> PairAnalysis:
    return analyze_pairs(dataset)


def _by_config(result: PairAnalysis) -> dict[str, AnalysisRow]:
    return {row.pair_config: row for row in result.rows}


def _stats_of(row: AnalysisRow) -> PairStats:
    assert row.error is None
    assert row.stats is not None
    return row.stats


def test_default_configs_are_analyzed_with_every_encoder(
    dataset: CaptionDataset, analysis: PairAnalysis
) -> None:
    assert [row.pair_config for row in analysis.rows] == [*LANGUAGE_PAIR_CONFIGS, "source=label"]
    assert {row.encoder for row in analysis.rows[:-1]} == {MINILM}
    oracle = _stats_of(analysis.rows[-1])
    assert oracle.label_precision is not None
    assert oracle.label_precision.value == 1.0
    assert analysis.random_baseline.label_precision is not None
    assert analysis.random_baseline.label_precision < 0.1
    assert (analysis.num_images, analysis.num_labeled) == (len(dataset), len(dataset))
    assert len(analysis.anchors) == 6
    assert all(len(anchor.partners) == len(analysis.rows) for anchor in analysis.anchors)
    assert json.loads(json.dumps(analysis.to_dict()))["rows"][0]["stats"]["paired_fraction"] == 1.0


def test_default_config_equals_brute_force(dataset: CaptionDataset, analysis: PairAnalysis) -> None:
    """Compare with nearest captions in float64; both vendors use the same name for many concepts."""
    embeddings = find_embeddings(dataset, MINILM)
    pooled = np.concatenate(
        [embeddings.load_mean_vectors(i)[0] for i in range(embeddings.num_shards)]
    ).astype(np.float64)
    cosine = pooled @ pooled.T
    np.fill_diagonal(cosine, -2)
    best_positions = np.where(
        cosine > cosine.max(axis=1, keepdims=True) - 1e-6, np.arange(len(cosine)), len(cosine)
    )
    nearest = best_positions.min(axis=1)
    result, samples = _stats_of(_by_config(analysis)["default"]), list(dataset)
    labels = [sample.label for sample in samples]
    correct = np.mean([labels[a] == labels[p] for a, p in enumerate(nearest)])
    assert result.label_precision is not None
    assert result.label_precision.value == pytest.approx(correct)
    assert result.similarity is not None
    assert result.similarity[1] == pytest.approx(np.median(cosine.max(axis=1)), abs=1e-3)
    assert result.coverage == len(set(nearest.tolist())) / len(samples)
    assert result.reciprocity == np.mean([nearest[p] == a for a, p in enumerate(nearest)])
    image_hashes = compute_perceptual_hashes(dataset).hashes
    distances = [(int(image_hashes[a]) ^ int(image_hashes[p])).bit_count() for a, p in enumerate(nearest)]
    assert result.hash_distance is not None
    assert result.hash_distance == pytest.approx(np.mean(distances))
    assert analysis.random_baseline.hash_distance is not None
    assert analysis.random_baseline.hash_distance > result.hash_distance > 0
    is_identical = [sorted(samples[a].captions) == sorted(samples[p].captions) for a, p in enumerate(nearest)]
    assert result.identical_caption_fraction == pytest.approx(np.mean(is_identical))


def test_configs_change_their_statistics(analysis: PairAnalysis) -> None:
    config_stats = {name: _stats_of(row) for name, row in _by_config(analysis).items()}
    assert (
        config_stats["exclude_identical_captions"].identical_caption_fraction
        == 0
        < config_stats["default"].identical_caption_fraction
    )
    similarity = config_stats["min_similarity=0.7"].similarity
    assert similarity is not None
    assert similarity[0] >= 0.7
    assert config_stats["k=5"].coverage > config_stats["default"].coverage
    k5 = config_stats["k=5"]
    assert k5.label_precision is not None
    assert k5.top1_precision is not None
    assert k5.label_precision.value < k5.top1_precision.value


def test_mutual_neighbors_are_reciprocal(dataset: CaptionDataset) -> None:
    (row,) = analyze_pairs(dataset, pair_configs=["k=10,mutual_k=10"]).rows
    assert _stats_of(row).reciprocity == pytest.approx(1.0)


def test_config_without_pairs_is_a_row_with_an_error(dataset: CaptionDataset) -> None:
    result = analyze_pairs(
        dataset,
        [MINILM],
        ["exclude_identical_captions,min_similarity=1", "source=self", "default", "default"],
    )
    assert [row.stats is None for row in result.rows] == [True, False, True]
    no_partner, default, self_pairs = result.rows
    assert no_partner.error is not None
    assert "has a partner" in no_partner.error
    assert self_pairs.error == "no image has a partner other than itself"
    assert default.error is None
    assert [[partner.row for partner in anchor.partners] for anchor in result.anchors] == [[1]] * 6


def test_sampled_captions_are_analyzed_per_caption(dataset: CaptionDataset) -> None:
    sampled, max_pooled = analyze_pairs(
        dataset, [MINILM], ["caption_pooling=sample", "caption_pooling=max"]
    ).rows
    assert _stats_of(sampled).paired_fraction == _stats_of(max_pooled).paired_fraction == 1.0
    assert _stats_of(sampled).coverage > 0.5


def test_analysis_is_deterministic(dataset: CaptionDataset, analysis: PairAnalysis) -> None:
    assert analyze_pairs(dataset) == analysis


def test_invalid_analysis_raises(dataset: CaptionDataset) -> None:
    with pytest.raises(InvalidInputError, match="'mutal'"):
        analyze_pairs(dataset, pair_configs=["mutal=10"])
    with pytest.raises(ArtifactError, match="no embeddings"):
        analyze_pairs(dataset, pair_configs=["source=vision"])


def test_sampled_neighbors_equal_the_search(dataset: CaptionDataset, analysis: PairAnalysis) -> None:
    result = sample_neighbors(dataset, MINILM, use_image_embeddings=False)
    np.testing.assert_array_equal(result.anchors, np.arange(len(dataset)))
    assert sum(result.histogram.counts) == len(dataset)
    assert result.histogram == analysis.similarity_histograms[0]


@pytest.fixture(scope="module")
def embedded(dataset: CaptionDataset, tmp_path_factory: pytest.TempPathFactory) -> CaptionDataset:
    """Return a copy of the dataset with TF-IDF embeddings of captions and untrained embeddings of images."""
    folder = tmp_path_factory.mktemp("dataset") / "c"
    shutil.copytree(dataset.path, folder)
    embed(folder, "tfidf")
    embed(folder, IMAGE_ENCODER)
    return CaptionDataset(folder)


def test_encoders_are_compared(embedded: CaptionDataset) -> None:
    result = analyze_pairs(embedded, pair_configs=["default", "source=vision", "source=hybrid"])
    assert {(row.pair_config, row.encoder) for row in result.rows} == {
        ("default", MINILM),
        ("default", "tfidf"),
        ("source=vision", IMAGE_ENCODER),
        ("source=hybrid", f"{MINILM} + {IMAGE_ENCODER}"),
        ("source=hybrid", f"tfidf + {IMAGE_ENCODER}"),
    }
    image_similarity = {row.pair_config: _stats_of(row).image_similarity or 0.0 for row in result.rows}
    assert result.image_encoder == IMAGE_ENCODER
    assert result.random_baseline.image_similarity is not None
    assert (
        image_similarity["source=vision"]
        > image_similarity["source=hybrid"]
        > image_similarity["default"]
        > result.random_baseline.image_similarity
    )
    assert {row.encoder for row in result.similarity_histograms} == {MINILM, "tfidf", IMAGE_ENCODER}
    assert len(result.agreements) == 3
    tfidf_only = analyze_pairs(embedded, ["tfidf"], ["default"])
    assert [row.encoder for row in tfidf_only.rows] == ["tfidf"]
    assert tfidf_only.image_encoder == IMAGE_ENCODER
    assert "source=hybrid" in {
        row.pair_config for row in analyze_pairs(embedded, ["tfidf", IMAGE_ENCODER]).rows
    }


def test_agreement_equals_a_direct_computation(embedded: CaptionDataset) -> None:
    """Recompute overlap and correlation of the ten nearest, image by image."""
    by_encoder = [
        sample_neighbors(embedded, MINILM, use_image_embeddings=False),
        sample_neighbors(embedded, "tfidf", use_image_embeddings=False),
    ]
    agreement = compute_agreement(*by_encoder)
    assert agreement is not None
    vectors = [neighbors.vectors.get(np.arange(len(embedded))) for neighbors in by_encoder]
    overlaps, correlations = [], []
    for image in range(len(embedded)):
        nearest = [
            {int(p) for p in neighbors.neighbor_positions[image] if p >= 0} for neighbors in by_encoder
        ]
        if not all(nearest):
            continue
        overlaps.append(len(nearest[0] & nearest[1]) / max(map(len, nearest)))
        union = sorted(nearest[0] | nearest[1])
        values = [(v[union] * v[image]).sum(axis=1) for v in vectors]
        if all(np.ptp(row) > 0 for row in values):
            correlations.append(stats.spearmanr(*values)[0])
    assert agreement.num_images == len(overlaps)
    assert agreement.overlap == pytest.approx(np.mean(overlaps))
    assert agreement.correlation == pytest.approx(np.mean(correlations), abs=0.01)


def _likewise(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "likewise.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_prints_a_table_and_writes_a_report(dataset: CaptionDataset, tmp_path: Path) -> None:
    page, configs = (
        tmp_path / "pairs.html",
        ("default", "k=3,mutual_k=10", "exclude_identical_captions,min_similarity=0.99"),
    )
    flags = [flag for pair_config in configs for flag in ("--pair-config", pair_config)]
    completed = _likewise("analyze-pairs", dataset.path, "--encoder", MINILM, *flags, "--out", page)
    assert completed.returncode == 0, completed.stderr
    output_lines = completed.stdout.splitlines()
    starts = [line.split()[0] for line in output_lines if line.startswith("  ") and line.strip()]
    assert [start for start in starts if start in configs] == list(configs)
    assert any("has a partner" in line for line in output_lines)
    assert page.is_file()
    assert page.with_suffix(".json").is_file()


def test_command_prints_the_analysis_as_json(dataset: CaptionDataset, tmp_path: Path) -> None:
    page = tmp_path / "pairs.html"
    completed = _likewise(
        "analyze-pairs",
        dataset.path,
        "--pair-config",
        "default",
        "--pair-config",
        "k=3",
        "--json",
        "--quiet",
        "--out",
        page,
    )
    assert completed.returncode == 0, completed.stderr
    result = json.loads(completed.stdout)
    assert [row["pair_config"] for row in result["rows"]] == ["default", "k=3"]
    assert result["page"] == str(page)
    saved = json.loads(page.with_suffix(".json").read_text())
    assert saved == {name: value for name, value in result.items() if name != "page"}
    assert saved == json.loads(json.dumps(analyze_pairs(dataset, pair_configs=["default", "k=3"]).to_dict()))


def test_distribution_sums_to_one_per_anchor() -> None:
    pairs, image_ids = _make_pairs(12, None, multiple_rows=False)
    distribution = pair_distribution(pairs, image_ids)
    assert isinstance(distribution, PairDistribution)
    sums = np.bincount(distribution.anchors, distribution.prob, minlength=12)
    np.testing.assert_allclose(sums[pairs.has_partner], 1)
    assert not sums[~pairs.has_partner].any()
