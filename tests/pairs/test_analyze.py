"""Figures of pairs against naive loops and scipy, and the whole diagnosis against brute force."""

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

LOOKS = "image:random:resnet10t"
Table = list[tuple[int, int, float, float, float]]  # anchor, partner, weight, weight of the best, similarity


def _pairs(n: int, temperature: float | None, *, several: bool, seed: int = 0) -> tuple[Pairs, np.ndarray]:
    """Make pairs of random candidates, a row an image or a few, with holes."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 4, n) if several else np.ones(n, np.int64)
    owner = np.repeat(np.arange(n), rows)
    positions = np.stack([rng.permutation(np.delete(np.arange(n // 2), a % (n // 2)))[:6] for a in owner])
    similarity = -np.sort(-rng.uniform(-0.2, 1, positions.shape).astype(np.float32), axis=1)
    table = Candidates(positions, similarity).filter(
        rng.random(positions.shape) < rng.random((len(owner), 1))
    )
    choice = CandidateSampler(table, temperature, np.concatenate([[0], np.cumsum(rows)]))
    return Pairs(PairConfig(), choice, "key", excluded=rng.random(n) < 0.1), owner


def _naive_table(pairs: Pairs, owner: np.ndarray) -> Table:
    """List draws as the rule says them: a row of the image evenly, then a candidate of the row."""
    choice = pairs.sampler
    assert isinstance(choice, CandidateSampler)
    rows = defaultdict(list)
    for row, image in enumerate(owner):
        near = [(int(p), float(s)) for p, s in zip(*_row(choice.candidates, row), strict=True) if p >= 0]
        if near and not pairs.excluded[image]:
            rows[int(image)].append(near)
    told = []
    for image, lists in rows.items():
        for near in lists:
            chances = [1.0 if choice.temperature is None else np.exp(s / choice.temperature) for _, s in near]
            for place, (p, s) in enumerate(near):
                weight = chances[place] / sum(chances) / len(lists)
                told.append((image, p, weight, (place == 0) / len(lists), s))
    return told


def _row(table: Candidates, row: int) -> tuple[np.ndarray, np.ndarray]:
    return table.positions[row], table.similarity[row]


def _evidence(n: int, seed: int = 1) -> PairSignals:
    rng = np.random.default_rng(seed)
    return PairSignals(
        caption_hashes=rng.integers(-1, 4, n),
        image_hashes=rng.integers(0, 2**63, n).astype(np.uint64),
        is_readable=rng.random(n) < 0.8,
        near_duplicate_ids=rng.integers(-1, 9, n),
        labels=rng.integers(-1, 3, n),
        image_vectors=None,
    )


def _naive_precision(table: Table, labels: np.ndarray, column: int) -> list[float]:
    right, whole = defaultdict(float), defaultdict(float)
    for each in table:
        a, p, w = each[0], each[1], each[column]
        if labels[a] >= 0 and labels[p] >= 0 and w > 0:
            whole[a] += w
            right[a] += w * (labels[a] == labels[p])
    return [right[a] / whole[a] for a in whole]


@pytest.mark.parametrize(("temperature", "several"), [(None, False), (0.2, False), (None, True), (0.2, True)])
def test_figures_are_those_of_naive_loops(
    collection: CaptionDataset, temperature: float | None, *, several: bool
) -> None:
    n = 80
    pairs, owner = _pairs(n, temperature, several=several)
    told, evidence = _naive_table(pairs, owner), _evidence(n)
    found = compute_pair_stats(pair_distribution(pairs, owner), evidence, collection)
    total = sum(w for _, _, w, _, _ in told)
    edges = {(a, p) for a, p, *_ in told}
    chosen = np.zeros(n)
    for _, p, w, _, _ in told:
        chosen[p] += w

    assert found.paired_fraction == len({a for a, *_ in told}) / n
    assert found.hubness_skew == pytest.approx(stats.skew(chosen), abs=1e-9)
    assert found.coverage == np.mean(chosen > 0)
    assert found.reciprocity == pytest.approx(sum(w for a, p, w, *_ in told if (p, a) in edges) / total)
    for figure, codes in (
        (found.identical_caption_fraction, evidence.caption_hashes),
        (found.near_duplicate_fraction, evidence.near_duplicate_ids),
    ):
        same = sum(w for a, p, w, *_ in told if codes[a] == codes[p] >= 0)
        assert 0 < figure == pytest.approx(same / total)
    seen = [(a, p, w) for a, p, w, *_ in told if evidence.is_readable[a] and evidence.is_readable[p]]
    bits = sum(
        w * (int(evidence.image_hashes[a]) ^ int(evidence.image_hashes[p])).bit_count() for a, p, w in seen
    )
    assert found.hash_distance == pytest.approx(bits / sum(w for *_, w in seen))
    ordered = sorted((s, w) for _, _, w, _, s in told)
    reached = np.cumsum([w for _, w in ordered]) / total
    naive = [next(s for (s, _), r in zip(ordered, reached, strict=True) if r >= q) for q in (0.1, 0.5, 0.9)]
    assert found.similarity == pytest.approx(naive)
    assert evidence.labels is not None
    for share, column in ((found.top1_precision, 3), (found.label_precision, 2)):
        values = _naive_precision(told, evidence.labels, column)
        assert share is not None
        assert share.num_images == len(values)
        assert share.value == pytest.approx(np.mean(values))
        low, high = stats.norm.interval(0.95, np.mean(values), stats.sem(values))
        assert (share.low, share.high) == pytest.approx((low, high), abs=1e-6)
    most = sorted(range(n), key=lambda at: (-chosen[at], at))[: len(found.hubs)]
    assert [hub.position for hub in found.hubs] == most
    assert [hub.expected_in_degree for hub in found.hubs] == pytest.approx(chosen[most])


@pytest.mark.parametrize("several", [False, True])
def test_weights_are_those_of_the_draw(*, several: bool) -> None:
    pairs, owner = _pairs(24, 0.3, several=several, seed=3)
    draws, epochs = pair_distribution(pairs, owner), 4000
    anchors = np.flatnonzero(pairs.has_partner)
    drawn = np.stack([pairs.sample_partners(anchors, seed=0, epoch=epoch) for epoch in range(epochs)])
    for column, anchor in enumerate(anchors):
        mine = draws.anchors == anchor
        expected = np.bincount(draws.partners[mine], draws.prob[mine], minlength=24)
        counted = np.bincount(drawn[:, column], minlength=24) / epochs
        np.testing.assert_allclose(counted, expected, atol=0.04)


def test_pairs_of_one_label_are_counted_exactly(collection: CaptionDataset) -> None:
    groups = np.array([0, 0, 0, 1, 1, 2, -1])
    draws = pair_distribution(
        Pairs(PairConfig(source="label"), LabelSampler(groups), "key", excluded=np.zeros(7, bool)), groups
    )
    assert draws.anchors.tolist() == [0, 1, 2, 3, 4]
    assert (groups[draws.partners] == groups[draws.anchors]).all()
    assert (draws.partners != draws.anchors).all()
    assert draws.expected_in_degree.tolist() == [1, 1, 1, 1, 1, 0, 0]
    evidence = _evidence(7)
    told = compute_pair_stats(draws, evidence, collection)
    assert (told.reciprocity, told.coverage, told.paired_fraction) == (1.0, 5 / 7, 5 / 7)
    assert told.similarity is None
    assert told.hubs == ()


def test_chance_is_the_mean_over_all_pairs(collection: CaptionDataset) -> None:
    looks = ImageVectors(find_embeddings(collection, MINILM), len(collection))
    n = len(collection)
    base = _evidence(n)
    evidence = PairSignals(
        caption_hashes=base.caption_hashes,
        image_hashes=base.image_hashes,
        is_readable=base.is_readable,
        near_duplicate_ids=base.near_duplicate_ids,
        labels=base.labels,
        image_vectors=looks,
    )
    found, both = random_baseline(evidence), list(combinations(range(n), 2))
    assert base.labels is not None
    labelled = [(a, b) for a, b in both if base.labels[a] >= 0 and base.labels[b] >= 0]
    assert found.label_precision == pytest.approx(
        np.mean([base.labels[a] == base.labels[b] for a, b in labelled])
    )
    for figure, codes in (
        (found.identical_caption_fraction, base.caption_hashes),
        (found.near_duplicate_fraction, base.near_duplicate_ids),
    ):
        assert figure == pytest.approx(np.mean([codes[a] == codes[b] >= 0 for a, b in both]))
    seen = [
        (int(base.image_hashes[a]) ^ int(base.image_hashes[b])).bit_count()
        for a, b in both
        if base.is_readable[a] and base.is_readable[b]
    ]
    assert found.hash_distance == pytest.approx(np.mean(seen))
    vectors = looks.get(np.arange(n)).astype(np.float64)
    cosines = vectors @ vectors.T
    assert found.image_similarity == pytest.approx(cosines[np.triu_indices(n, 1)].mean(), abs=1e-6)


def test_figures_without_anything_to_judge_are_absent() -> None:
    assert skewness(np.ones(5)) == 0.0
    a, p, w = np.array([0, 1]), np.array([1, 0]), np.ones(2)
    assert label_precision(a, p, w, np.array([0, -1])) is None
    alone = label_precision(a[:1], p[:1], w[:1], np.array([2, 2]))
    assert alone is not None
    assert (alone.value, alone.low, alone.high, alone.num_images) == (1.0, 0.0, 1.0, 1)


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 6, (40, 12)).astype(np.float32)  # many ties
    second = first + rng.integers(-3, 4, first.shape).astype(np.float32)
    there = rng.random(first.shape) < 0.7
    there[0] = False
    first[1] = 2
    found = rank_correlations(first, second, there)
    assert np.isnan(found[:2]).all()
    expected = [stats.spearmanr(first[i, there[i]], second[i, there[i]])[0] for i in range(2, 40)]
    np.testing.assert_allclose(found[2:], expected, atol=1e-12)


def test_rules_are_told_as_they_are_typed() -> None:
    for text in (
        *LANGUAGE_PAIR_CONFIGS,
        "k=3,mutual-k=10",
        "source=vision",
        "sampling-temperature=0.1,k=4",
        "scope=other",
    ):
        rule = parse_pair_config(text)
        assert parse_pair_config(format_pair_config(rule)) == rule
    assert format_pair_config(parse_pair_config("default")) == "default"
    assert (
        format_pair_config(parse_pair_config("exclude-identical-captions,k=2,caption-encoder=tfidf"))
        == "exclude-identical-captions,k=2"
    )


@pytest.fixture(scope="module")
def usual(collection: CaptionDataset) -> PairAnalysis:
    return analyze_pairs(collection)


def _by_rule(found: PairAnalysis) -> dict[str, AnalysisRow]:
    return {row.pair_config: row for row in found.rows}


def _figures(row: AnalysisRow) -> PairStats:
    assert row.error is None
    assert row.stats is not None
    return row.stats


def test_the_usual_rules_are_applied_with_labels_as_the_oracle(
    collection: CaptionDataset, usual: PairAnalysis
) -> None:
    assert [row.pair_config for row in usual.rows] == [*LANGUAGE_PAIR_CONFIGS, "source=label"]
    assert {row.encoder for row in usual.rows[:-1]} == {MINILM}
    oracle = _figures(usual.rows[-1])
    assert oracle.label_precision is not None
    assert oracle.label_precision.value == 1.0
    assert usual.random_baseline.label_precision is not None
    assert usual.random_baseline.label_precision < 0.1
    assert (usual.num_images, usual.num_labeled) == (len(collection), len(collection))
    assert len(usual.anchors) == 6
    assert all(len(anchor.partners) == len(usual.rows) for anchor in usual.anchors)
    assert json.loads(json.dumps(usual.to_dict()))["rows"][0]["stats"]["paired_fraction"] == 1.0


def test_the_papers_rule_is_judged_as_by_brute_force(collection: CaptionDataset, usual: PairAnalysis) -> None:
    """Nearest in float64; concepts that both houses call by one name are told apart by nothing else."""
    embeddings = find_embeddings(collection, MINILM)
    pooled = np.concatenate(
        [embeddings.load_mean_vectors(i)[0] for i in range(embeddings.num_shards)]
    ).astype(np.float64)
    cosine = pooled @ pooled.T
    np.fill_diagonal(cosine, -2)
    best = np.where(cosine > cosine.max(axis=1, keepdims=True) - 1e-6, np.arange(len(cosine)), len(cosine))
    nearest = best.min(axis=1)
    found, records = _figures(_by_rule(usual)["default"]), list(collection)
    labels = [record.label for record in records]
    right = np.mean([labels[a] == labels[p] for a, p in enumerate(nearest)])
    assert found.label_precision is not None
    assert found.label_precision.value == pytest.approx(right)
    assert found.similarity is not None
    assert found.similarity[1] == pytest.approx(np.median(cosine.max(axis=1)), abs=1e-3)
    assert found.coverage == len(set(nearest.tolist())) / len(records)
    assert found.reciprocity == np.mean([nearest[p] == a for a, p in enumerate(nearest)])
    bits = compute_perceptual_hashes(collection).hashes
    distances = [(int(bits[a]) ^ int(bits[p])).bit_count() for a, p in enumerate(nearest)]
    assert found.hash_distance is not None
    assert found.hash_distance == pytest.approx(np.mean(distances))
    assert usual.random_baseline.hash_distance is not None
    assert usual.random_baseline.hash_distance > found.hash_distance > 0
    same = [sorted(records[a].captions) == sorted(records[p].captions) for a, p in enumerate(nearest)]
    assert found.identical_caption_fraction == pytest.approx(np.mean(same))


def test_rules_change_what_they_promise(usual: PairAnalysis) -> None:
    rules = {name: _figures(row) for name, row in _by_rule(usual).items()}
    assert (
        rules["exclude-identical-captions"].identical_caption_fraction
        == 0
        < rules["default"].identical_caption_fraction
    )
    least = rules["min-similarity=0.7"].similarity
    assert least is not None
    assert least[0] >= 0.7
    assert rules["k=5"].coverage > rules["default"].coverage
    k5 = rules["k=5"]
    assert k5.label_precision is not None
    assert k5.top1_precision is not None
    assert k5.label_precision.value < k5.top1_precision.value


def test_all_mutual_neighbors_are_reciprocal_pairs(collection: CaptionDataset) -> None:
    (row,) = analyze_pairs(collection, pair_configs=["k=10,mutual-k=10"]).rows
    assert _figures(row).reciprocity == pytest.approx(1.0)


def test_a_rule_that_leaves_nobody_is_a_row(collection: CaptionDataset) -> None:
    found = analyze_pairs(
        collection,
        [MINILM],
        ["exclude-identical-captions,min-similarity=1", "source=self", "default", "default"],
    )
    assert [row.stats is None for row in found.rows] == [True, False, True]
    nobody, paper, itself = found.rows
    assert nobody.error is not None
    assert "has a partner" in nobody.error
    assert itself.error == "no image has a partner other than itself"
    assert paper.error is None
    assert [[shown.row for shown in anchor.partners] for anchor in found.anchors] == [[1]] * 6


def test_captions_drawn_each_epoch_are_judged_by_caption(collection: CaptionDataset) -> None:
    draw, best = analyze_pairs(collection, [MINILM], ["caption-pooling=sample", "caption-pooling=max"]).rows
    assert _figures(draw).paired_fraction == _figures(best).paired_fraction == 1.0
    assert _figures(draw).coverage > 0.5


def test_the_same_question_has_the_same_answer(collection: CaptionDataset, usual: PairAnalysis) -> None:
    assert analyze_pairs(collection) == usual


def test_what_cannot_be_diagnosed_is_refused(collection: CaptionDataset) -> None:
    with pytest.raises(InvalidInputError, match="unknown field 'mutal'"):
        analyze_pairs(collection, pair_configs=["mutal=10"])
    with pytest.raises(ArtifactError, match="no embeddings"):
        analyze_pairs(collection, pair_configs=["source=vision"])


def test_nearest_of_a_sample_are_those_of_the_search(collection: CaptionDataset, usual: PairAnalysis) -> None:
    found = sample_neighbors(collection, MINILM, use_image_embeddings=False)
    np.testing.assert_array_equal(found.anchors, np.arange(len(collection)))
    assert sum(found.histogram.counts) == len(collection)
    assert found.histogram == usual.similarity_histograms[0]


@pytest.fixture(scope="module")
def several(collection: CaptionDataset, tmp_path_factory: pytest.TempPathFactory) -> CaptionDataset:
    """The same collection with embeddings of captions by words, and of images by an untrained network."""
    folder = tmp_path_factory.mktemp("several") / "c"
    shutil.copytree(collection.path, folder)
    embed(folder, "tfidf")
    embed(folder, LOOKS)
    return CaptionDataset(folder)


def test_encoders_are_compared_side_by_side(several: CaptionDataset) -> None:
    found = analyze_pairs(several, pair_configs=["default", "source=vision", "source=hybrid"])
    assert {(row.pair_config, row.encoder) for row in found.rows} == {
        ("default", MINILM),
        ("default", "tfidf"),
        ("source=vision", LOOKS),
        ("source=hybrid", f"{MINILM} + {LOOKS}"),
        ("source=hybrid", f"tfidf + {LOOKS}"),
    }
    by_looks = {row.pair_config: _figures(row).image_similarity or 0.0 for row in found.rows}
    assert found.image_encoder == LOOKS
    assert found.random_baseline.image_similarity is not None
    assert (
        by_looks["source=vision"]
        > by_looks["source=hybrid"]
        > by_looks["default"]
        > found.random_baseline.image_similarity
    )
    assert {each.encoder for each in found.similarity_histograms} == {MINILM, "tfidf", LOOKS}
    assert len(found.agreements) == 3
    one = analyze_pairs(several, ["tfidf"], ["default"])
    assert [row.encoder for row in one.rows] == ["tfidf"]
    assert one.image_encoder == LOOKS
    assert "source=hybrid" in {row.pair_config for row in analyze_pairs(several, ["tfidf", LOOKS]).rows}


def test_agreement_is_that_of_the_nearest(several: CaptionDataset) -> None:
    """Ten nearest and similarities recomputed image by image, ties as the search breaks them."""
    sides = [
        sample_neighbors(several, MINILM, use_image_embeddings=False),
        sample_neighbors(several, "tfidf", use_image_embeddings=False),
    ]
    told = compute_agreement(*sides)
    assert told is not None
    vectors = [side.vectors.get(np.arange(len(several))) for side in sides]
    overlaps, correlations = [], []
    for image in range(len(several)):
        tens = [{int(p) for p in side.neighbor_positions[image] if p >= 0} for side in sides]
        if not all(tens):
            continue
        overlaps.append(len(tens[0] & tens[1]) / max(map(len, tens)))
        union = sorted(tens[0] | tens[1])
        values = [(v[union] * v[image]).sum(axis=1) for v in vectors]
        if all(np.ptp(each) > 0 for each in values):
            correlations.append(stats.spearmanr(*values)[0])
    assert told.num_images == len(overlaps)
    assert told.overlap == pytest.approx(np.mean(overlaps))
    assert told.correlation == pytest.approx(np.mean(correlations), abs=0.01)


def _likewise(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "likewise.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line_prints_a_table_and_writes_a_page(
    collection: CaptionDataset, tmp_path: Path
) -> None:
    page, asked = (
        tmp_path / "pairs.html",
        ("default", "k=3,mutual-k=10", "exclude-identical-captions,min-similarity=0.99"),
    )
    rules = [word for rule in asked for word in ("--pair-config", rule)]
    told = _likewise("analyze-pairs", collection.path, "--encoder", MINILM, *rules, "--out", page)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    starts = [line.split()[0] for line in lines if line.startswith("  ") and line.strip()]
    assert [each for each in starts if each in asked] == list(asked)
    assert any("has a partner" in line for line in lines)
    assert page.is_file()
    assert page.with_suffix(".json").is_file()


def test_the_command_line_tells_machines_the_same(collection: CaptionDataset, tmp_path: Path) -> None:
    page = tmp_path / "pairs.html"
    told = _likewise(
        "analyze-pairs",
        collection.path,
        "--pair-config",
        "default",
        "--pair-config",
        "k=3",
        "--json",
        "--quiet",
        "--out",
        page,
    )
    assert told.returncode == 0, told.stderr
    result = json.loads(told.stdout)
    assert [row["pair_config"] for row in result["rows"]] == ["default", "k=3"]
    assert result["page"] == str(page)
    saved = json.loads(page.with_suffix(".json").read_text())
    assert saved == {name: value for name, value in result.items() if name != "page"}
    assert saved == json.loads(
        json.dumps(analyze_pairs(collection, pair_configs=["default", "k=3"]).to_dict())
    )


def test_draws_are_plain_arrays() -> None:
    pairs, owner = _pairs(12, None, several=False)
    draws = pair_distribution(pairs, owner)
    assert isinstance(draws, PairDistribution)
    sums = np.bincount(draws.anchors, draws.prob, minlength=12)
    np.testing.assert_allclose(sums[pairs.has_partner], 1)
    assert not sums[~pairs.has_partner].any()
