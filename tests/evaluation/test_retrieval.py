import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from sklearn.metrics import average_precision_score
from torch import Tensor

from likewise.errors import InvalidInputError
from likewise.evaluation.protocols.retrieval import retrieve


def random_features(seed: int, count: int = 60, instances: int = 15) -> tuple[Tensor, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(instances, 10))
    names = rng.integers(0, instances, count)
    return torch.from_numpy(centers[names] + rng.normal(size=(count, 10))), names, rng.integers(0, 3, count)


def brute_force(
    features: Tensor, instances: np.ndarray, domains: np.ndarray | None, ks: tuple[int, ...]
) -> dict[int, tuple[list[bool], float]]:
    """Return hits at ks and average precision by query, computed query by query."""
    unit = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    results = {}
    for q in range(len(unit)):
        gallery = [i for i in range(len(unit)) if i != q and (domains is None or domains[i] != domains[q])]
        gallery.sort(key=lambda i: (-(unit[i] @ unit[q]), i))
        relevant = [bool(instances[i] == instances[q]) for i in gallery]
        if any(relevant):
            precisions = [sum(relevant[: r + 1]) / (r + 1) for r, hit in enumerate(relevant) if hit]
            results[q] = [any(relevant[:k]) for k in ks], float(np.mean(precisions))
    return results


@pytest.mark.parametrize("use_domains", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_match_brute_force(use_domains: bool, seed: int) -> None:
    features, instances, domains = random_features(seed)
    domains = domains if use_domains else None
    ks = (1, 3, 10, 500)
    result = retrieve(features, instances, domains, ks)
    expected = brute_force(features, instances, domains, ks)
    assert result.queries.tolist() == list(expected)
    assert result.num_skipped == 60 - len(expected)
    assert list(result.recall) == list(ks)
    for column, k in enumerate(ks):
        assert result.recall[k].dtype == bool
        assert result.recall[k].tolist() == [hits[column] for hits, _ in expected.values()]
    np.testing.assert_allclose(result.average_precision, [ap for _, ap in expected.values()], rtol=1e-12)


def test_average_precision_matches_scikit_learn() -> None:
    features, instances, domains = random_features(2)
    result = retrieve(features, instances, domains)
    unit = (features / features.norm(dim=1, keepdim=True)).numpy()
    for query, actual in zip(result.queries, result.average_precision, strict=True):
        gallery = domains != domains[query]
        truth = instances[gallery] == instances[query]
        assert actual == pytest.approx(average_precision_score(truth, unit[gallery] @ unit[query]))


def test_recall_and_average_precision_of_five_images() -> None:
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 2.0])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    result = retrieve(features, np.array(["cup", "bag", "cup", "cup", "hat"]), ks=(1, 2))
    assert result.queries.tolist() == [0, 2, 3]
    assert result.num_skipped == 2
    # Ranking of the first cup: bag, cup, cup; of the third: cup, bag, cup; of the second: two tie.
    assert result.average_precision[0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert result.average_precision[2] == pytest.approx((1 + 2 / 3) / 2)
    assert result.recall[1].tolist()[::2] == [False, True]
    assert result.recall[2].tolist() == [True, True, True]


def test_ties_go_to_the_smaller_index() -> None:
    features = torch.ones(4, 2)
    result = retrieve(features, np.array([7, 7, 8, 8]), ks=(1, 2))
    assert result.recall[1].tolist() == [True, True, False, False]
    assert result.recall[2].tolist() == [True, True, False, False]
    assert result.average_precision.tolist() == pytest.approx([1, 1, 1 / 3, 1 / 3])


def test_domains_exclude_closer_images_of_the_same_domain() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.9, 0.1]])
    instances, domains = np.array([0, 0, 0, 1]), np.array(["street", "street", "shop", "shop"])
    result = retrieve(features, instances, domains, ks=(1,))
    assert result.queries.tolist() == [0, 1, 2]
    assert result.recall[1].tolist() == [False, False, True]
    assert result.average_precision.tolist() == pytest.approx([0.5, 0.5, 1])


def test_queries_without_a_relevant_image_are_skipped() -> None:
    result = retrieve(torch.eye(3), np.arange(3))
    assert result.num_skipped == 3
    assert len(result.queries) == len(result.average_precision) == len(result.recall[1]) == 0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=20), st.integers(0, 10))
def test_recall_increases_with_k_and_order_does_not_matter(labels: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, instances = torch.from_numpy(rng.normal(size=(len(labels), 5))), np.array(labels)
    result = retrieve(features, instances, ks=(1, 2, 50))
    assert (result.recall[1] <= result.recall[2]).all()
    assert result.recall[50].all()
    assert ((result.average_precision > 0) & (result.average_precision <= 1)).all()
    order = rng.permutation(len(labels))
    permuted = retrieve(features[order] * 3, instances[order], ks=(1, 2, 50))
    by_query = dict(zip(order[permuted.queries].tolist(), permuted.average_precision.tolist(), strict=True))
    assert by_query == pytest.approx(
        dict(zip(result.queries.tolist(), result.average_precision.tolist(), strict=True))
    )


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    features, instances, domains = random_features(4)
    whole = retrieve(features, instances, domains)
    monkeypatch.setattr("likewise.evaluation.protocols.retrieval._BLOCK_ELEMENTS", 60 * 7)
    blocked = retrieve(features, instances, domains)
    np.testing.assert_array_equal(blocked.queries, whole.queries)
    np.testing.assert_allclose(blocked.average_precision, whole.average_precision, rtol=1e-12)


def test_invalid_arguments_raise() -> None:
    with pytest.raises((ValueError, TypeCheckError)):
        retrieve(torch.eye(3), np.arange(2))
    with pytest.raises((ValueError, TypeCheckError)):
        retrieve(torch.eye(3), np.arange(3), np.arange(2))
    with pytest.raises(InvalidInputError) as excinfo:
        retrieve(torch.eye(3), np.arange(3), ks=(0,))
    assert excinfo.value.field == "recall_ks"
