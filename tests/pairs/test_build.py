"""Building pairs from every source, on real captions and images."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest

from likewise.data.config import ImportOptions
from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.embeddings.embed import embed
from likewise.embeddings.store import find_embeddings
from likewise.errors import ArtifactError, InvalidInputError
from likewise.neighbors.config import SearchConfig
from likewise.neighbors.index import find_neighbors
from likewise.neighbors.vectors import ImageVectors, normalize_text
from likewise.pairs.build import build_pairs
from likewise.pairs.config import MissingCaption, PairConfig
from likewise.pairs.sampling import CandidateSampler, Pairs
from support import MINILM

IMAGE_ENCODER = "image:random:resnet10t"
MISSING_CAPTION: tuple[MissingCaption, ...] = ("self", "drop", "visual", "borrow")


@pytest.fixture(scope="module")
def embedded(dataset: CaptionDataset, tmp_path_factory: pytest.TempPathFactory) -> CaptionDataset:
    """Return a copy of the dataset with embeddings of captions and images, which tests may extend."""
    import shutil

    copy = CaptionDataset(shutil.copytree(dataset.path, tmp_path_factory.mktemp("several") / "c"))
    embed(copy, IMAGE_ENCODER)
    return copy


def test_each_image_is_paired_with_the_nearest_caption(embedded: CaptionDataset) -> None:
    """Read this first: build pairs from a dataset with embeddings, and sample a partner per image."""
    pairs = build_pairs(embedded, PairConfig())
    sampled = pairs.sample_partners(np.arange(len(embedded)), seed=3, epoch=5)
    scores = similarity_matrix(embedded)
    np.testing.assert_allclose(scores[np.arange(len(embedded)), sampled], scores.max(axis=1), atol=1e-6)
    # Both vendors use the same name for most concepts, so most partners have identical captions.
    assert np.mean([embedded[i].captions == embedded[int(p)].captions for i, p in enumerate(sampled)]) > 0.8


def partners(pairs: Pairs) -> list[list[int]]:
    assert isinstance(pairs.sampler, CandidateSampler)
    return [pairs.sampler.list_partners(i) for i in range(len(pairs.excluded))]


def vectors(dataset: CaptionDataset, modality: Literal["captions", "images"] = "captions") -> np.ndarray:
    image_vectors = ImageVectors(find_embeddings(dataset, None, modality=modality), len(dataset))
    return image_vectors.get(np.arange(len(dataset))).astype(np.float64)


def similarity_matrix(
    dataset: CaptionDataset, modality: Literal["captions", "images"] = "captions"
) -> np.ndarray:
    rows = vectors(dataset, modality)
    scores = rows @ rows.T
    np.fill_diagonal(scores, -np.inf)
    return scores


def test_images_not_allowed_are_neither_partners_nor_anchors(embedded: CaptionDataset) -> None:
    excluded = partners(build_pairs(embedded, PairConfig()))[0][0]
    allowed = np.delete(np.arange(len(embedded)), excluded)
    pairs = build_pairs(embedded, PairConfig(k=2), allowed=np.isin(np.arange(len(embedded)), allowed))
    assert all(excluded not in positions for positions in partners(pairs))
    np.testing.assert_array_equal(pairs.anchors, allowed)


def test_pairs_satisfy_their_constraints(embedded: CaptionDataset) -> None:
    scores = similarity_matrix(embedded)
    texts = [{normalize_text(c) for c in sample.captions} for sample in embedded]
    group = [sample.group for sample in embedded]
    configs = {
        "limit": PairConfig(k=4, min_similarity=0.7),
        "same": PairConfig(k=3, group_scope="same"),
        "other": PairConfig(k=3, group_scope="different", exclude_identical_captions=True),
        "mutual": PairConfig(k=5, mutual_k=5),
    }
    built = {name: partners(build_pairs(embedded, config)) for name, config in configs.items()}
    for i in range(len(embedded)):
        assert all(i not in results[i] for results in built.values())
        assert all(scores[i, j] >= 0.7 - 1e-6 for j in built["limit"][i])
        assert all(group[i] == group[j] for j in built["same"][i])
        assert all(group[i] != group[j] and texts[i] != texts[j] for j in built["other"][i])
        assert all(i in built["mutual"][j] for j in built["mutual"][i])
    # The scope constrains the search itself, which returns the nearest images of the same group.
    is_same_group = np.array([[a == b for b in group] for a in group])
    allowed = np.where(is_same_group, scores, -np.inf)
    best = -np.sort(-allowed, axis=1)[:, :3]
    for i, results in enumerate(built["same"]):
        np.testing.assert_allclose(scores[i, results], best[i], atol=1e-5)


def test_caption_pooling_equals_a_direct_computation(embedded: CaptionDataset) -> None:
    image_vectors = ImageVectors(find_embeddings(embedded, None), len(embedded))
    rows = image_vectors.caption_vectors(np.arange(len(image_vectors.embedding_rows))).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    caption_scores = rows @ rows.T
    n = len(embedded)
    best = np.full((n, n), -np.inf)
    np.maximum.at(best, (image_vectors.image_ids[:, None], image_vectors.image_ids[None]), caption_scores)
    np.fill_diagonal(best, -np.inf)
    results = find_neighbors(embedded, k=4, search_config=SearchConfig(caption_pooling="max"))
    positions, similarity = results.topk()
    np.testing.assert_allclose(similarity, -np.sort(-best, axis=1)[:, :4], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(best, positions, axis=1), similarity, atol=1e-5)
    sampled = find_neighbors(embedded, k=4, search_config=SearchConfig(caption_pooling="sample"))
    assert len(sampled) == len(image_vectors.embedding_rows)
    to_images = np.full((len(rows), n), -np.inf)
    np.maximum.at(to_images.T, image_vectors.image_ids, caption_scores)
    to_images[np.arange(len(rows)), image_vectors.image_ids] = -np.inf
    np.testing.assert_allclose(sampled.topk()[1], -np.sort(-to_images, axis=1)[:, :4], atol=1e-5)
    pairs = build_pairs(embedded, PairConfig(caption_pooling="sample"))
    epochs = np.stack([pairs.sample_partners(np.arange(n), seed=0, epoch=e) for e in range(30)])
    assert (epochs != epochs[0]).any()
    assert (epochs != np.arange(n)).all()


def test_vision_and_hybrid_pairs_are_the_most_similar(embedded: CaptionDataset) -> None:
    scores, image_scores = similarity_matrix(embedded), similarity_matrix(embedded, "images")
    partner_lists = partners(build_pairs(embedded, PairConfig(source="vision")))
    np.testing.assert_allclose(
        [image_scores[i, j[0]] for i, j in enumerate(partner_lists)], image_scores.max(axis=1), atol=1e-5
    )
    for weight, expected in ((0.0, scores), (1.0, image_scores)):
        config = PairConfig(source="hybrid", fusion="weighted", image_weight=weight)
        fused = partners(build_pairs(embedded, config))
        np.testing.assert_allclose(
            [expected[i, j[0]] for i, j in enumerate(fused)], expected.max(axis=1), atol=1e-5
        )
    ranked = partners(build_pairs(embedded, PairConfig(source="hybrid", k=5)))
    assert all(len(positions) == 5 for positions in ranked)


def test_label_pairs_have_the_same_label(embedded: CaptionDataset) -> None:
    pairs = build_pairs(embedded, PairConfig(source="label"))
    labels = [sample.label for sample in embedded]
    sampled = pairs.sample_partners(np.arange(len(embedded)), seed=0, epoch=0)
    unpaired = ~pairs.has_partner
    assert all(labels[i] == labels[int(j)] for i, j in enumerate(sampled))
    assert (sampled[unpaired] == np.flatnonzero(unpaired)).all()
    assert (sampled[~unpaired] != np.flatnonzero(~unpaired)).all()


def test_pairs_file_lists_the_partners_of_each_anchor(embedded: CaptionDataset, tmp_path: Path) -> None:
    ids = [sample.id for sample in embedded]
    file = tmp_path / "pairs.csv"
    file.write_text(
        f"anchor,partner,similarity\n{ids[0]},{ids[5]},0.2\n{ids[0]},{ids[7]},0.9\n{ids[3]},{ids[1]},0.4\n"
    )
    results = partners(build_pairs(embedded, PairConfig(source="file", pairs_file=file)))
    assert results[0] == [7, 5]
    assert results[3] == [1]
    assert sum(map(len, results)) == 3
    dropped = build_pairs(embedded, PairConfig(source="file", pairs_file=file, fallback="drop"))
    assert dropped.anchors.tolist() == [0, 3]
    limited = partners(build_pairs(embedded, PairConfig(source="file", pairs_file=file, min_similarity=0.3)))
    assert limited[0] == [7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("anchor,partner\n", "contains no pairs"),
        ("", "cannot read the pairs file: .*is empty"),
        ("anchor,other\na,b\n", "no column partner; its columns are: anchor, other"),
        ("anchor,partner\nunknown,missing\n", "anchor is not an id of .*line 2: 'unknown'"),
        ("anchor,partner\n{0},{0}\n", "an image is paired with itself .*line 2"),
        ("anchor,partner,similarity\n{0},{1},x\n", "the similarity is not a finite number .*line 2"),
        ("anchor,partner,similarity\n{0},{1},nan\n", "the similarity is not a finite number .*line 2"),
    ],
)
def test_invalid_pairs_file_raises(embedded: CaptionDataset, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(text.format(embedded[0].id, embedded[1].id))
    with pytest.raises(InvalidInputError, match=message):
        build_pairs(embedded, PairConfig(source="file", pairs_file=tmp_path / "p.csv"))
    with pytest.raises(InvalidInputError, match="does not exist") as excinfo:
        build_pairs(embedded, PairConfig(source="file", pairs_file=tmp_path / "none.csv"))
    assert (excinfo.value.field, excinfo.value.path) == ("pairs_file", tmp_path / "none.csv")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_invalid_rows_of_a_pairs_file_are_counted(
    embedded: CaptionDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    ids = [sample.id for sample in embedded]
    rows = [(ids[0], ids[5], 0.2), (ids[0], "unknown", 0.9), (ids[3], ids[3], 0.4), (ids[3], ids[1], None)]
    frame = pd.DataFrame(rows, columns=["anchor", "partner", "similarity"])
    file = tmp_path / f"pairs.{suffix}"
    if suffix == "parquet":
        frame.to_parquet(file)
    elif suffix == "jsonl":
        frame.to_json(file, orient="records", lines=True)
    else:
        frame.to_csv(file, index=False, sep="\t" if suffix == "tsv" else ",", encoding="utf-16")
    results = partners(build_pairs(embedded, PairConfig(source="file", pairs_file=file)))
    assert results[0] == [5]
    assert sum(map(len, results)) == 1
    assert "skipped 3 rows: " in caplog.text
    for reason in ("partner is not an id", "paired with itself", "not a finite number"):
        assert reason in caplog.text


def test_no_partners_raises_and_fallbacks_are_counted(embedded: CaptionDataset) -> None:
    with pytest.raises(InvalidInputError, match="has a partner"):
        build_pairs(embedded, PairConfig(min_similarity=1.0, exclude_identical_captions=True))
    strict = PairConfig(min_similarity=0.9, exclude_identical_captions=True)
    pairs = build_pairs(embedded, strict)
    paired = int(pairs.has_partner.sum())
    assert 0 < paired < len(embedded)
    assert f"{paired:,} of {len(embedded):,} images have a partner" in pairs.summary()
    dropped = build_pairs(embedded, replace(strict, fallback="drop"))
    assert len(dropped.anchors) == paired
    assert f"{len(embedded) - paired:,} without a partner are excluded" in dropped.summary()
    nearest_fallback = build_pairs(embedded, replace(strict, fallback="nearest"))
    assert nearest_fallback.has_partner.all()
    assert nearest_fallback.key != pairs.key != dropped.key


def test_k_beyond_the_dataset_is_reported(embedded: CaptionDataset) -> None:
    pairs = build_pairs(embedded, PairConfig(k=10_000))
    assert f"no image has more than {len(embedded) - 1:,} partners" in pairs.summary()
    assert all(len(positions) == len(embedded) - 1 for positions in partners(pairs))


def test_missing_caption_options_select_the_partners_of_uncaptioned_images(
    emoji: Path, tmp_path: Path
) -> None:
    lines = emoji.read_text().splitlines()[:60]
    csv_lines = [lines[0]]
    for i, line in enumerate(lines[1:]):
        cells = line.split(",")
        cells[0] = f"{emoji.parent}/{cells[0]}"
        csv_lines.append(",".join([cells[0], "" if i % 4 == 0 else cells[1], "", *cells[3:]]))
    (tmp_path / "some.csv").write_text("\n".join(csv_lines) + "\n")
    built = import_dataset(tmp_path / "some.csv", tmp_path / "c", ImportOptions(caption_column=("caption",)))
    embed(built, MINILM)
    embed(built, IMAGE_ENCODER)
    is_uncaptioned = np.array([not sample.captions for sample in built])
    image_scores = similarity_matrix(built, "images")
    by_option = {
        option: build_pairs(built, PairConfig(k=3, missing_caption=option)) for option in MISSING_CAPTION
    }
    nearest = image_scores.argmax(axis=1)
    assert not by_option["self"].has_partner[is_uncaptioned].any()
    assert by_option["drop"].anchors.tolist() == np.flatnonzero(~is_uncaptioned).tolist()
    of = {name: partners(pairs) for name, pairs in by_option.items()}
    for i in np.flatnonzero(is_uncaptioned):
        assert of["visual"][i] == [nearest[i]]
        lender = int(np.where(is_uncaptioned, -np.inf, image_scores[i]).argmax())
        assert of["borrow"][i] == [lender, *of["self"][lender][:2]]
    for i in np.flatnonzero(~is_uncaptioned):
        assert of["borrow"][i] == of["self"][i] == of["visual"][i]
    assert (
        f"{int(is_uncaptioned.sum())} of those without a partner have no caption"
        in by_option["self"].summary()
    )
    with pytest.raises(InvalidInputError, match="has a group"):
        build_pairs(built, PairConfig(group_scope="same"))


def test_similarity_moments_equal_all_pairs(embedded: CaptionDataset) -> None:
    image_vectors = ImageVectors(find_embeddings(embedded, None), len(embedded))
    mean, std = image_vectors.similarity_moments()
    rows = vectors(embedded)
    scores = rows @ rows.T
    others = scores[~np.eye(len(rows), dtype=bool)].reshape(len(rows), -1)
    np.testing.assert_allclose(mean, others.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(std, others.std(axis=1), atol=1e-5)


def test_missing_embeddings_raise(emoji: Path, tmp_path: Path) -> None:
    built = import_dataset(emoji, tmp_path / "c", ImportOptions(caption_column=("caption",)))
    with pytest.raises(ArtifactError, match="embed the dataset"):
        build_pairs(built, PairConfig())
