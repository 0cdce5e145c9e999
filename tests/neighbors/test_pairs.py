"""Partners: never oneself, drawn evenly and reproducibly, and only among readable images."""

import numpy as np
import pytest

from likewise.collection.records import Collection
from likewise.errors import ArtifactError, InputError
from likewise.neighbors.neighbors import look_up_neighbors
from likewise.neighbors.pairs import Pairs, make_pairs
from likewise.neighbors.rules import PairRule


def all_positions(collection: Collection) -> np.ndarray:
    return np.arange(len(collection))


def test_nearest_caption_is_the_partner(collection: Collection) -> None:
    pairs, found = make_pairs(collection, PairRule(source="language"), None, all_positions(collection))
    assert found is not None
    nearest, similarity = found.table(1)
    partners = pairs.partners(all_positions(collection), seed=3, epoch=5)
    np.testing.assert_array_equal(partners, nearest[:, 0])
    assert (partners != all_positions(collection)).all()
    # Both houses draw most concepts under one name, so most partners carry the very same captions.
    same = [collection[i].captions == collection[int(p)].captions for i, p in enumerate(partners)]
    assert np.mean(same) > 0.8
    assert (similarity[same, 0] > 0.999).all()


def test_self_pairs_every_image_with_itself(collection: Collection) -> None:
    pairs, found = make_pairs(collection, PairRule(source="self"), None, all_positions(collection))
    assert found is None
    np.testing.assert_array_equal(pairs.partners(np.array([4, 1]), seed=0, epoch=0), [4, 1])


def test_draws_are_even_and_depend_on_seed_and_epoch_alone(collection: Collection) -> None:
    pairs, found = make_pairs(collection, PairRule(source="language", k=3), None, all_positions(collection))
    assert found is not None
    everyone = all_positions(collection)
    one = pairs.partners(everyone, seed=1, epoch=2)
    np.testing.assert_array_equal(one[::-1], pairs.partners(everyone[::-1], seed=1, epoch=2))
    assert (one != pairs.partners(everyone, seed=1, epoch=3)).any()
    assert (one != pairs.partners(everyone, seed=2, epoch=2)).any()
    drawn = np.stack([pairs.partners(everyone, seed=0, epoch=e) for e in range(60)])
    nearest = found.table(3)[0]
    shares = [(drawn == nearest[:, place]).mean() for place in range(3)]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)


def test_unreadable_images_are_never_partners(collection: Collection) -> None:
    _, found = make_pairs(collection, PairRule(source="language"), None, all_positions(collection))
    assert found is not None
    lost = int(found.table(1)[0][0, 0])
    usable = np.delete(all_positions(collection), lost)
    pairs, _ = make_pairs(collection, PairRule(source="language", k=2), None, usable)
    for epoch in range(5):
        assert lost not in pairs.partners(usable, seed=0, epoch=epoch)


def test_images_without_neighbors_stay_with_themselves() -> None:
    pairs = Pairs(3, np.array([[1, -1], [-1, -1], [0, 1]]), PairRule(k=2), "key")
    assert pairs.partners(np.array([1]), seed=0, epoch=0).tolist() == [1]
    assert {int(pairs.partners(np.array([0]), seed=s, epoch=0)[0]) for s in range(20)} == {1}
    assert "1 without a caption" in pairs.summary()


def test_bad_rules_are_refused(collection: Collection) -> None:
    with pytest.raises(InputError, match="k is 0"):
        PairRule(k=0)
    with pytest.raises(ArtifactError, match="k >= 50"):
        look_up_neighbors(collection, None, 50)
