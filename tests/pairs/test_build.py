"""Sources of pairs and the rules on them, on real captions and pictures."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
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

LOOKS = "image:random:resnet10t"
USES: tuple[MissingCaption, ...] = ("self", "drop", "visual", "borrow")


@pytest.fixture(scope="module")
def several(collection: CaptionDataset, tmp_path_factory: pytest.TempPathFactory) -> CaptionDataset:
    """The collection once more with embeddings of its captions and of its images, for tests to add to."""
    import shutil

    copy = CaptionDataset(shutil.copytree(collection.path, tmp_path_factory.mktemp("several") / "c"))
    embed(copy, LOOKS)
    return copy


def partners(pairs: Pairs) -> list[list[int]]:
    assert isinstance(pairs.sampler, CandidateSampler)
    return [pairs.sampler.list_partners(i) for i in range(len(pairs.excluded))]


def vectors(collection: CaptionDataset, modality: Literal["captions", "images"] = "captions") -> np.ndarray:
    stored = ImageVectors(find_embeddings(collection, None, modality=modality), len(collection))
    return stored.get(np.arange(len(collection))).astype(np.float64)


def similarities(
    collection: CaptionDataset, modality: Literal["captions", "images"] = "captions"
) -> np.ndarray:
    each = vectors(collection, modality)
    similar = each @ each.T
    np.fill_diagonal(similar, -np.inf)
    return similar


def test_nearest_caption_is_the_partner(several: CaptionDataset) -> None:
    pairs = build_pairs(several, PairConfig())
    drawn = pairs.sample_partners(np.arange(len(several)), seed=3, epoch=5)
    similar = similarities(several)
    np.testing.assert_allclose(similar[np.arange(len(several)), drawn], similar.max(axis=1), atol=1e-6)
    # Both houses draw most concepts under one name, so most partners carry the very same captions.
    assert np.mean([several[i].captions == several[int(p)].captions for i, p in enumerate(drawn)]) > 0.8


def test_unreadable_images_are_neither_partners_nor_anchors(several: CaptionDataset) -> None:
    lost = partners(build_pairs(several, PairConfig()))[0][0]
    usable = np.delete(np.arange(len(several)), lost)
    pairs = build_pairs(several, PairConfig(k=2), allowed=np.isin(np.arange(len(several)), usable))
    assert all(lost not in each for each in partners(pairs))
    np.testing.assert_array_equal(pairs.anchors, usable)


def test_rules_are_kept_by_every_pair(several: CaptionDataset) -> None:
    similar = similarities(several)
    said = [{normalize_text(c) for c in record.captions} for record in several]
    group = [record.group for record in several]
    rules = {
        "limit": PairConfig(k=4, min_similarity=0.7),
        "same": PairConfig(k=3, group_scope="same"),
        "other": PairConfig(k=3, group_scope="different", exclude_identical_captions=True),
        "mutual": PairConfig(k=5, mutual_k=5),
    }
    made = {name: partners(build_pairs(several, rule)) for name, rule in rules.items()}
    for i in range(len(several)):
        assert all(i not in found[i] for found in made.values())
        assert all(similar[i, j] >= 0.7 - 1e-6 for j in made["limit"][i])
        assert all(group[i] == group[j] for j in made["same"][i])
        assert all(group[i] != group[j] and said[i] != said[j] for j in made["other"][i])
        assert all(i in made["mutual"][j] for j in made["mutual"][i])
    # Scope is decided in the search, so that it costs no partners: the best of the same group are found.
    same = np.array([[a == b for b in group] for a in group])
    allowed = np.where(same, similar, -np.inf)
    best = -np.sort(-allowed, axis=1)[:, :3]
    for i, found in enumerate(made["same"]):
        np.testing.assert_allclose(similar[i, found], best[i], atol=1e-5)


def test_best_match_of_several_captions_equals_a_direct_computation(several: CaptionDataset) -> None:
    stored = ImageVectors(find_embeddings(several, None), len(several))
    rows = stored.caption_vectors(np.arange(len(stored.embedding_rows))).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    between = rows @ rows.T
    n = len(several)
    best = np.full((n, n), -np.inf)
    np.maximum.at(best, (stored.image_ids[:, None], stored.image_ids[None]), between)
    np.fill_diagonal(best, -np.inf)
    found = find_neighbors(several, k=4, search_config=SearchConfig(caption_pooling="max"))
    positions, similarity = found.topk()
    np.testing.assert_allclose(similarity, -np.sort(-best, axis=1)[:, :4], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(best, positions, axis=1), similarity, atol=1e-5)
    drawn = find_neighbors(several, k=4, search_config=SearchConfig(caption_pooling="sample"))
    assert len(drawn) == len(stored.embedding_rows)
    to_images = np.full((len(rows), n), -np.inf)
    np.maximum.at(to_images.T, stored.image_ids, between)
    to_images[np.arange(len(rows)), stored.image_ids] = -np.inf
    np.testing.assert_allclose(drawn.topk()[1], -np.sort(-to_images, axis=1)[:, :4], atol=1e-5)
    pairs = build_pairs(several, PairConfig(caption_pooling="sample"))
    epochs = np.stack([pairs.sample_partners(np.arange(n), seed=0, epoch=e) for e in range(30)])
    assert (epochs != epochs[0]).any()
    assert (epochs != np.arange(n)).all()


def test_pairs_by_looks_and_by_both(several: CaptionDataset) -> None:
    similar, looks = similarities(several), similarities(several, "images")
    seen = partners(build_pairs(several, PairConfig(source="vision")))
    np.testing.assert_allclose([looks[i, j[0]] for i, j in enumerate(seen)], looks.max(axis=1), atol=1e-5)
    for weight, expected in ((0.0, similar), (1.0, looks)):
        rule = PairConfig(source="hybrid", fusion="weighted", image_weight=weight)
        both = partners(build_pairs(several, rule))
        np.testing.assert_allclose(
            [expected[i, j[0]] for i, j in enumerate(both)], expected.max(axis=1), atol=1e-5
        )
    ranked = partners(build_pairs(several, PairConfig(source="hybrid", k=5)))
    assert all(len(each) == 5 for each in ranked)


def test_labels_pair_within_the_class(several: CaptionDataset) -> None:
    pairs = build_pairs(several, PairConfig(source="label"))
    labels = [record.label for record in several]
    drawn = pairs.sample_partners(np.arange(len(several)), seed=0, epoch=0)
    alone = ~pairs.has_partner
    assert all(labels[i] == labels[int(j)] for i, j in enumerate(drawn))
    assert (drawn[alone] == np.flatnonzero(alone)).all()
    assert (drawn[~alone] != np.flatnonzero(~alone)).all()


def test_given_pairs_are_taken_as_they_are(several: CaptionDataset, tmp_path: Path) -> None:
    ids = [record.id for record in several]
    file = tmp_path / "pairs.csv"
    file.write_text(
        f"anchor,partner,similarity\n{ids[0]},{ids[5]},0.2\n{ids[0]},{ids[7]},0.9\n{ids[3]},{ids[1]},0.4\n"
    )
    found = partners(build_pairs(several, PairConfig(source="file", pairs_file=file)))
    assert found[0] == [7, 5]
    assert found[3] == [1]
    assert sum(map(len, found)) == 3
    dropped = build_pairs(several, PairConfig(source="file", pairs_file=file, fallback="drop"))
    assert dropped.anchors.tolist() == [0, 3]
    limited = partners(build_pairs(several, PairConfig(source="file", pairs_file=file, min_similarity=0.3)))
    assert limited[0] == [7]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("anchor,partner\n", "holds no pairs"),
        ("", "cannot be read as a table of pairs"),
        ("anchor,other\na,b\n", "no column partner; its columns are: anchor, other"),
        ("anchor,partner\nnobody,nothing\n", "row 1: anchor 'nobody' is no image"),
        ("anchor,partner\n{0},{0}\n", "row 1: .* is paired with itself"),
        ("anchor,partner,similarity\n{0},{1},x\n", "column similarity holds string"),
        ("anchor,partner,similarity\n{0},{1},nan\n", "row 1: the similarity is no number"),
    ],
)
def test_bad_files_of_pairs_name_the_row(
    several: CaptionDataset, tmp_path: Path, text: str, told: str
) -> None:
    (tmp_path / "p.csv").write_text(text.format(several[0].id, several[1].id))
    with pytest.raises(InvalidInputError, match=told):
        build_pairs(several, PairConfig(source="file", pairs_file=tmp_path / "p.csv"))
    with pytest.raises(InvalidInputError, match="no file of pairs"):
        build_pairs(several, PairConfig(source="file", pairs_file=tmp_path / "none.csv"))


def test_nobody_with_a_partner_is_an_error_and_fallbacks_are_counted(several: CaptionDataset) -> None:
    with pytest.raises(InvalidInputError, match="no image of .* has a partner .*relax the constraints"):
        build_pairs(several, PairConfig(min_similarity=1.0, exclude_identical_captions=True))
    strict = PairConfig(min_similarity=0.9, exclude_identical_captions=True)
    pairs = build_pairs(several, strict)
    paired = int(pairs.has_partner.sum())
    assert 0 < paired < len(several)
    assert f"{paired:,} of {len(several):,} images have a partner" in pairs.summary()
    left = build_pairs(several, replace(strict, fallback="drop"))
    assert len(left.anchors) == paired
    assert f"{len(several) - paired:,} without a partner are no anchors" in left.summary()
    near = build_pairs(several, replace(strict, fallback="nearest"))
    assert near.has_partner.all()
    assert near.key != pairs.key != left.key


def test_more_partners_than_there_are_images_are_told(several: CaptionDataset) -> None:
    pairs = build_pairs(several, PairConfig(k=10_000))
    assert f"none has more than {len(several) - 1:,} partners" in pairs.summary()
    assert all(len(each) == len(several) - 1 for each in partners(pairs))


def test_images_without_caption_follow_their_looks(emoji: Path, tmp_path: Path) -> None:
    lines = emoji.read_text().splitlines()[:60]
    kept = [lines[0]]
    for number, line in enumerate(lines[1:]):
        cells = line.split(",")
        cells[0] = f"{emoji.parent}/{cells[0]}"
        kept.append(",".join([cells[0], "" if number % 4 == 0 else cells[1], "", *cells[3:]]))
    (tmp_path / "some.csv").write_text("\n".join(kept) + "\n")
    made = import_dataset(tmp_path / "some.csv", tmp_path / "c", ImportOptions(caption_column=("caption",)))
    embed(made, MINILM)
    embed(made, LOOKS)
    silent = np.array([not record.captions for record in made])
    looks = similarities(made, "images")
    told = {use: build_pairs(made, PairConfig(k=3, missing_caption=use)) for use in USES}
    nearest = looks.argmax(axis=1)
    assert not told["self"].has_partner[silent].any()
    assert told["drop"].anchors.tolist() == np.flatnonzero(~silent).tolist()
    of = {name: partners(pairs) for name, pairs in told.items()}
    for i in np.flatnonzero(silent):
        assert of["visual"][i] == [nearest[i]]
        lender = int(np.where(silent, -np.inf, looks[i]).argmax())
        assert of["borrow"][i] == [lender, *of["self"][lender][:2]]
    for i in np.flatnonzero(~silent):
        assert of["borrow"][i] == of["self"][i] == of["visual"][i]
    assert f"{int(silent.sum())} of those without a partner have no caption" in told["self"].summary()
    with pytest.raises(InvalidInputError, match="has a group"):
        build_pairs(made, PairConfig(group_scope="same"))


def test_moments_of_similarity_equal_all_pairs(several: CaptionDataset) -> None:
    stored = ImageVectors(find_embeddings(several, None), len(several))
    mean, std = stored.similarity_moments()
    each = vectors(several)
    similar = each @ each.T
    others = similar[~np.eye(len(each), dtype=bool)].reshape(len(each), -1)
    np.testing.assert_allclose(mean, others.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(std, others.std(axis=1), atol=1e-5)


def test_missing_embeddings_name_the_command(emoji: Path, tmp_path: Path) -> None:
    made = import_dataset(emoji, tmp_path / "c", ImportOptions(caption_column=("caption",)))
    with pytest.raises(ArtifactError, match="embed the dataset first"):
        build_pairs(made, PairConfig())
