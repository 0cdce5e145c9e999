"""Sources of pairs and the rules on them, on real captions and pictures."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from likewise.data.dataset import Collection
from likewise.data.importing import import_collection
from likewise.data.readers.base import ImportOptions
from likewise.embeddings.embed import embed
from likewise.embeddings.store import look_up_embeddings
from likewise.errors import ArtifactError, InputError
from likewise.neighbors.config import SearchRule
from likewise.neighbors.index import find_neighbors
from likewise.neighbors.vectors import RecordVectors, plain
from likewise.pairs.build import make_pairs
from likewise.pairs.config import PairRule, Uncaptioned
from likewise.pairs.sampling import FromTable, Pairs
from support import MINILM

LOOKS = "image:random:resnet10t"
USES: tuple[Uncaptioned, ...] = ("self", "drop", "vision", "borrow")


@pytest.fixture(scope="module")
def several(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """The collection once more with embeddings of its captions and of its images, for tests to add to."""
    import shutil

    copy = Collection(shutil.copytree(collection.path, tmp_path_factory.mktemp("several") / "c"))
    embed(copy, LOOKS)
    return copy


def partners(pairs: Pairs) -> list[list[int]]:
    assert isinstance(pairs.choice, FromTable)
    return [pairs.choice.partners_of(i) for i in range(len(pairs.dropped))]


def vectors(collection: Collection, modality: Literal["captions", "images"] = "captions") -> np.ndarray:
    stored = RecordVectors(look_up_embeddings(collection, None, modality=modality), len(collection))
    return stored.of(np.arange(len(collection))).astype(np.float64)


def similarities(collection: Collection, modality: Literal["captions", "images"] = "captions") -> np.ndarray:
    each = vectors(collection, modality)
    similar = each @ each.T
    np.fill_diagonal(similar, -np.inf)
    return similar


def test_nearest_caption_is_the_partner(several: Collection) -> None:
    pairs = make_pairs(several, PairRule())
    drawn = pairs.partners(np.arange(len(several)), seed=3, epoch=5)
    similar = similarities(several)
    np.testing.assert_allclose(similar[np.arange(len(several)), drawn], similar.max(axis=1), atol=1e-6)
    # Both houses draw most concepts under one name, so most partners carry the very same captions.
    assert np.mean([several[i].captions == several[int(p)].captions for i, p in enumerate(drawn)]) > 0.8


def test_unreadable_images_are_neither_partners_nor_anchors(several: Collection) -> None:
    lost = partners(make_pairs(several, PairRule()))[0][0]
    usable = np.delete(np.arange(len(several)), lost)
    pairs = make_pairs(several, PairRule(k=2), usable)
    assert all(lost not in each for each in partners(pairs))
    np.testing.assert_array_equal(pairs.anchors, usable)


def test_rules_are_kept_by_every_pair(several: Collection) -> None:
    similar = similarities(several)
    said = [{plain(c) for c in record.captions} for record in several]
    group = [record.group for record in several]
    rules = {
        "limit": PairRule(k=4, min_similarity=0.7),
        "same": PairRule(k=3, scope="same"),
        "other": PairRule(k=3, scope="other", distinct_captions=True),
        "mutual": PairRule(k=5, mutual=5),
    }
    made = {name: partners(make_pairs(several, rule)) for name, rule in rules.items()}
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


def test_best_match_of_several_captions_equals_a_direct_computation(several: Collection) -> None:
    stored = RecordVectors(look_up_embeddings(several, None), len(several))
    rows = stored.caption(np.arange(len(stored.rows))).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    between = rows @ rows.T
    n = len(several)
    best = np.full((n, n), -np.inf)
    np.maximum.at(best, (stored.ids[:, None], stored.ids[None]), between)
    np.fill_diagonal(best, -np.inf)
    found = find_neighbors(several, k=4, rule=SearchRule(captions="best"))
    positions, similarity = found.table()
    np.testing.assert_allclose(similarity, -np.sort(-best, axis=1)[:, :4], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(best, positions, axis=1), similarity, atol=1e-5)
    drawn = find_neighbors(several, k=4, rule=SearchRule(captions="draw"))
    assert len(drawn) == len(stored.rows)
    to_images = np.full((len(rows), n), -np.inf)
    np.maximum.at(to_images.T, stored.ids, between)
    to_images[np.arange(len(rows)), stored.ids] = -np.inf
    np.testing.assert_allclose(drawn.table()[1], -np.sort(-to_images, axis=1)[:, :4], atol=1e-5)
    pairs = make_pairs(several, PairRule(captions="draw"))
    epochs = np.stack([pairs.partners(np.arange(n), seed=0, epoch=e) for e in range(30)])
    assert (epochs != epochs[0]).any()
    assert (epochs != np.arange(n)).all()


def test_pairs_by_looks_and_by_both(several: Collection) -> None:
    similar, looks = similarities(several), similarities(several, "images")
    seen = partners(make_pairs(several, PairRule(pairs="vision")))
    np.testing.assert_allclose([looks[i, j[0]] for i, j in enumerate(seen)], looks.max(axis=1), atol=1e-5)
    for weight, expected in ((0.0, similar), (1.0, looks)):
        rule = PairRule(pairs="hybrid", fusion="similarity", image_weight=weight)
        both = partners(make_pairs(several, rule))
        np.testing.assert_allclose(
            [expected[i, j[0]] for i, j in enumerate(both)], expected.max(axis=1), atol=1e-5
        )
    ranked = partners(make_pairs(several, PairRule(pairs="hybrid", k=5)))
    assert all(len(each) == 5 for each in ranked)


def test_labels_pair_within_the_class(several: Collection) -> None:
    pairs = make_pairs(several, PairRule(pairs="label"))
    labels = [record.label for record in several]
    drawn = pairs.partners(np.arange(len(several)), seed=0, epoch=0)
    alone = ~pairs.with_partner
    assert all(labels[i] == labels[int(j)] for i, j in enumerate(drawn))
    assert (drawn[alone] == np.flatnonzero(alone)).all()
    assert (drawn[~alone] != np.flatnonzero(~alone)).all()


def test_given_pairs_are_taken_as_they_are(several: Collection, tmp_path: Path) -> None:
    ids = [record.id for record in several]
    file = tmp_path / "pairs.csv"
    file.write_text(
        f"anchor,partner,similarity\n{ids[0]},{ids[5]},0.2\n{ids[0]},{ids[7]},0.9\n{ids[3]},{ids[1]},0.4\n"
    )
    found = partners(make_pairs(several, PairRule(pairs="file", pairs_file=file)))
    assert found[0] == [7, 5]
    assert found[3] == [1]
    assert sum(map(len, found)) == 3
    dropped = make_pairs(several, PairRule(pairs="file", pairs_file=file, fallback="drop"))
    assert dropped.anchors.tolist() == [0, 3]
    limited = partners(make_pairs(several, PairRule(pairs="file", pairs_file=file, min_similarity=0.3)))
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
def test_bad_files_of_pairs_name_the_row(several: Collection, tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "p.csv").write_text(text.format(several[0].id, several[1].id))
    with pytest.raises(InputError, match=told):
        make_pairs(several, PairRule(pairs="file", pairs_file=tmp_path / "p.csv"))
    with pytest.raises(InputError, match="no file of pairs"):
        make_pairs(several, PairRule(pairs="file", pairs_file=tmp_path / "none.csv"))


def test_nobody_with_a_partner_is_an_error_and_fallbacks_are_counted(several: Collection) -> None:
    with pytest.raises(InputError, match="no image of .* has a partner .*loosen the rule"):
        make_pairs(several, PairRule(min_similarity=1.0, distinct_captions=True))
    strict = PairRule(min_similarity=0.9, distinct_captions=True)
    pairs = make_pairs(several, strict)
    paired = int(pairs.with_partner.sum())
    assert 0 < paired < len(several)
    assert f"{paired:,} of {len(several):,} images have a partner" in pairs.summary()
    left = make_pairs(several, replace(strict, fallback="drop"))
    assert len(left.anchors) == paired
    assert f"{len(several) - paired:,} without a partner are no anchors" in left.summary()
    near = make_pairs(several, replace(strict, fallback="nearest"))
    assert near.with_partner.all()
    assert near.key != pairs.key != left.key


def test_more_partners_than_there_are_images_are_told(several: Collection) -> None:
    pairs = make_pairs(several, PairRule(k=10_000))
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
    made = import_collection(
        tmp_path / "some.csv", tmp_path / "c", ImportOptions(caption_column=("caption",))
    )
    embed(made, MINILM)
    embed(made, LOOKS)
    silent = np.array([not record.captions for record in made])
    looks = similarities(made, "images")
    told = {use: make_pairs(made, PairRule(k=3, uncaptioned=use)) for use in USES}
    nearest = looks.argmax(axis=1)
    assert not told["self"].with_partner[silent].any()
    assert told["drop"].anchors.tolist() == np.flatnonzero(~silent).tolist()
    of = {name: partners(pairs) for name, pairs in told.items()}
    for i in np.flatnonzero(silent):
        assert of["vision"][i] == [nearest[i]]
        lender = int(np.where(silent, -np.inf, looks[i]).argmax())
        assert of["borrow"][i] == [lender, *of["self"][lender][:2]]
    for i in np.flatnonzero(~silent):
        assert of["borrow"][i] == of["self"][i] == of["vision"][i]
    assert f"{int(silent.sum())} of those without are not captioned" in told["self"].summary()
    with pytest.raises(InputError, match="has a group"):
        make_pairs(made, PairRule(scope="same"))


def test_moments_of_similarity_equal_all_pairs(several: Collection) -> None:
    stored = RecordVectors(look_up_embeddings(several, None), len(several))
    mean, std = stored.moments()
    each = vectors(several)
    similar = each @ each.T
    others = similar[~np.eye(len(each), dtype=bool)].reshape(len(each), -1)
    np.testing.assert_allclose(mean, others.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(std, others.std(axis=1), atol=1e-5)


def test_missing_embeddings_name_the_command(emoji: Path, tmp_path: Path) -> None:
    made = import_collection(emoji, tmp_path / "c", ImportOptions(caption_column=("caption",)))
    with pytest.raises(ArtifactError, match="run: likewise embed"):
        make_pairs(made, PairRule())
