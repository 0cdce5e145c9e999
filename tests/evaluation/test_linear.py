import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy

from likewise.errors import InvalidInputError
from likewise.evaluation.protocols.base import Split, accuracy_score, stratified_split
from likewise.evaluation.protocols.linear import (
    LinearProbe,
    LinearProbeConfig,
    fit_logistic,
    search_grid,
)

FEATURES, LABELS = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
FEATURES = FEATURES / 16
X0, Y0 = FEATURES[:50], LABELS[:50]


def test_linear_probe_selects_c_and_predicts_labels() -> None:
    """Fit on training features, select C on held-out images, and predict."""
    train, test = Split(FEATURES[:1000], LABELS[:1000]), Split(FEATURES[1000:], LABELS[1000:])
    probe = LinearProbe.fit(train, num_classes=10)
    assert probe.converged
    assert probe.sweep[probe.C] == probe.val_accuracy > 0.9
    assert (probe.predict(test.x) == test.y).double().mean() > 0.9


def reference(x: Tensor, y: Tensor, C: float) -> LogisticRegression:
    return LogisticRegression(C=C, tol=1e-10, max_iter=20_000).fit(x.tolist(), y.tolist())


def objective(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, C: float) -> Tensor:
    return C * cross_entropy(x @ weight.T + bias, y, reduction="sum") + weight.square().sum() / 2


@pytest.mark.parametrize("C", [1e-6, 1e-2, 1.0, 1e2])
def test_coefficients_match_scikit_learn(C: float) -> None:
    x, y = FEATURES[:600], LABELS[:600]
    expected = reference(x, y, C)
    weight, bias, converged = fit_logistic(x, y, C, 10, tolerance=1e-9)
    assert converged
    scale = float(weight.abs().max())
    coefficients, intercept = torch.as_tensor(expected.coef_), torch.as_tensor(expected.intercept_)
    torch.testing.assert_close(weight, coefficients, rtol=1e-3, atol=1e-4 * scale)
    torch.testing.assert_close(bias, intercept, rtol=1e-3, atol=1e-4 * scale)
    predictions = (FEATURES @ weight.T + bias).argmax(dim=1)
    np.testing.assert_array_equal(predictions, expected.predict(FEATURES.tolist()))


def test_two_classes_match_scikit_learn_at_twice_the_c() -> None:
    x, y = FEATURES[LABELS < 2], LABELS[LABELS < 2]
    weight, bias, _ = fit_logistic(x, y, 0.5, 2, tolerance=1e-9)
    expected = reference(x, y, 1.0)
    np.testing.assert_allclose(weight[1] - weight[0], expected.coef_[0], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(bias[1] - bias[0], expected.intercept_[0], rtol=1e-3)


@pytest.mark.parametrize("C", [1e-6, 1.0, 1e6])
def test_float32_reaches_the_minimum_of_float64(C: float) -> None:
    """With C of 1e6 the classes are separable, and a bound on the gradient alone stops too early."""
    x, y = FEATURES[:800] * 16 + 3, LABELS[:800]
    exact = fit_logistic(x, y, C, 10, tolerance=1e-8, max_iterations=5000)
    single = fit_logistic(x.float(), y, C, 10)
    assert exact[2] and single[2]
    assert single[0].dtype == torch.float32
    lowest = objective(exact[0], exact[1], x, y, C)
    reached = objective(single[0].double(), single[1].double(), x, y, C)
    # With C of 1e6, scores are in the hundreds: a float32 bias that includes the mean is less precise.
    assert float(reached) == pytest.approx(float(lowest), rel=1e-4 if C > 1 else 1e-5)


def test_gradient_by_autograd_vanishes_at_the_solution() -> None:
    x, y = FEATURES[:300], LABELS[:300]
    weight, bias, _ = fit_logistic(x, y, 3.0, 10, tolerance=1e-10)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    slopes = torch.autograd.grad(objective(weight, bias, x, y, 3.0), (weight, bias))
    assert all(slope.abs().max() < 1e-6 for slope in slopes)


def test_initialization_does_not_change_the_solution() -> None:
    x, y = FEATURES[:300], LABELS[:300]
    cold = fit_logistic(x, y, 0.1, 10, tolerance=1e-9)
    start = fit_logistic(x, y, 0.03, 10)
    warm = fit_logistic(x, y, 0.1, 10, init=start[:2], tolerance=1e-9)
    torch.testing.assert_close(warm[0], cold[0], rtol=1e-5, atol=1e-7)
    restart = fit_logistic(x, y, 0.1, 10, init=cold[:2], tolerance=1e-8, max_iterations=0)
    assert restart[2]
    torch.testing.assert_close(restart[0], cold[0])


def test_shifted_features_give_the_same_weights() -> None:
    x, y = FEATURES[:300], LABELS[:300]
    weight, bias, _ = fit_logistic(x, y, 1.0, 10, tolerance=1e-9)
    moved_weight, moved_bias, _ = fit_logistic(x + 5, y, 1.0, 10, tolerance=1e-9)
    torch.testing.assert_close(moved_weight, weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moved_bias + moved_weight.sum(dim=1) * 5, bias, rtol=1e-5, atol=1e-5)


def test_blocks_do_not_change_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit_logistic(FEATURES[:300], LABELS[:300], 1.0, 10, tolerance=1e-9)
    monkeypatch.setattr("likewise.evaluation.protocols.linear._BLOCK_ELEMENTS", 700)
    torch.testing.assert_close(fit_logistic(FEATURES[:300], LABELS[:300], 1.0, 10, tolerance=1e-9), whole)


def test_class_without_training_images_is_never_predicted() -> None:
    known = LABELS != 4
    weight, bias, converged = fit_logistic(FEATURES[known][:300], LABELS[known][:300], 1.0, 12)
    assert converged
    assert bias[[4, 10, 11]].tolist() == [-torch.inf] * 3
    assert not weight[[4, 10, 11]].any()
    assert not torch.isin((FEATURES @ weight.T + bias).argmax(dim=1), torch.tensor([4, 10, 11])).any()


def test_fit_with_one_class_or_fewer_images_than_features() -> None:
    weight, bias, converged = fit_logistic(FEATURES[:1], torch.tensor([2]), 1.0, 3)
    assert converged and not weight.any() and bias.argmax() == 2
    few = fit_logistic(FEATURES[:20], LABELS[:20], 1.0, 10, tolerance=1e-9)
    expected = reference(FEATURES[:20], LABELS[:20], 1.0)
    torch.testing.assert_close(few[0], torch.as_tensor(expected.coef_), rtol=1e-3, atol=1e-5)


def test_fit_reports_missing_convergence() -> None:
    assert not fit_logistic(FEATURES[:300], LABELS[:300], 1e6, 10, max_iterations=3)[2]


@pytest.mark.parametrize("C", [0.0, -1.0, float("nan")])
def test_invalid_c_raises(C: float) -> None:
    with pytest.raises(ValueError, match="`C`"):
        fit_logistic(FEATURES[:20], LABELS[:20], C, 10)


def test_non_finite_or_empty_features_raise() -> None:
    broken = FEATURES[:20].clone()
    broken[3, 4] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        fit_logistic(broken, LABELS[:20], 1.0, 10)
    with pytest.raises(ValueError, match="finite"):
        fit_logistic(FEATURES[:0], LABELS[:0], 1.0, 10)


def transcribed_sweep(x: Tensor, y: Tensor, val_x: Tensor, val_y: Tensor) -> tuple[float, dict[float, float]]:
    """Run the published search with scikit-learn on windows of a list of C; ties go to the smaller C."""
    known = {}

    def accuracy(C: float) -> float:
        if C not in known:
            known[C] = float(np.mean(reference(x, y, C).predict(val_x.tolist()) == val_y.numpy()))
        return known[C]

    coarse = [10.0**e for e in range(-6, 7, 2)]
    scores = [accuracy(C) for C in coarse]
    center = round(np.log10(coarse[scores.index(max(scores))]) * 8)
    window = [10.0 ** (e / 8) for e in range(center - 16, center + 17) if abs(e) <= 48]
    while len(window) > 1:
        size = len(window)
        quarter, half, three = window[size // 4], window[size // 2], window[-size // 4]
        best = max(accuracy(quarter), accuracy(half), accuracy(three))
        if best == accuracy(quarter):
            window = window[: size // 2]
        elif best == accuracy(half) and half != three:
            window = window[size // 4 : -size // 4]
        else:
            window = window[size // 2 :]
    best = max(known.values())
    return min(C for C in known if known[C] == best), known


def test_sweep_selects_the_c_of_scikit_learn() -> None:
    # Accuracy on pixels without noise saturates; with noise, the best C is inside the grid.
    noise = torch.randn(len(FEATURES), 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = FEATURES + noise * 0.4
    train, val, test = slice(0, 500), slice(500, 1100), slice(1100, None)
    expected, known = transcribed_sweep(x[train], LABELS[train], x[val], LABELS[val])
    seen = {}
    probe = LinearProbe.fit(
        Split(x[train], LABELS[train]),
        Split(x[val], LABELS[val]),
        LinearProbeConfig(tolerance=1e-8),
        num_classes=10,
        callback=seen.__setitem__,
    )
    assert expected == probe.C
    assert 1e-6 < expected < 1e6
    assert list(probe.sweep) == sorted(known)
    # With C of 1e6, scikit-learn stops before one or two images have their final prediction.
    assert probe.sweep == pytest.approx(known, abs=2 / 600)
    assert probe.sweep == seen
    assert probe.val_accuracy == max(probe.sweep.values())
    refit = reference(x[:1100], LABELS[:1100], expected).predict(x[test].tolist())
    np.testing.assert_array_equal(probe.predict(x[test]), refit)
    assert probe.converged


@given(st.lists(st.integers(0, 5), min_size=97, max_size=97))
def test_search_visits_the_coarse_grid_and_ends_in_a_local_maximum(values: list[int]) -> None:
    scores = search_grid(lambda step: float(values[step + 48]))
    assert set(range(-48, 49, 16)) <= set(scores)
    assert len(scores) <= 15
    best = max(scores, key=lambda step: (scores[step], -step))
    assert all(abs(step) <= 48 for step in scores)
    if abs(best) < 48 and best % 16:
        assert {best - 1, best + 1} <= set(scores)


def test_search_finds_the_maximum_of_a_concave_score() -> None:
    for peak in range(-48, 49):
        scores = search_grid(lambda step, peak=peak: -float(abs(step - peak)))
        assert max(scores, key=scores.__getitem__) == peak
    flat = search_grid(lambda _: 0.5)
    assert set(flat) == {*range(-48, 49, 16), -40, -44, -46, -47}


def test_ties_select_the_smaller_c() -> None:
    # Three separate clusters and a few wrong training labels: a range of C is perfect on validation.
    x = torch.eye(3, dtype=torch.float64).repeat(30, 1)
    x += torch.randn(90, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    y = torch.arange(3).repeat(30)
    y[:6] = 0
    probe = LinearProbe.fit(Split(x, y), Split(x[6:], y[6:]), num_classes=3)
    assert probe.val_accuracy == 1
    assert min(C for C, accuracy in probe.sweep.items() if accuracy == 1) == probe.C
    assert probe.sweep[1e-6] < 1
    assert sum(accuracy == 1 for accuracy in probe.sweep.values()) > 2


def test_mean_class_accuracy_weights_classes_equally() -> None:
    rare = torch.cat([torch.arange(0, 400), torch.arange(400, 1200)[LABELS[400:1200] < 5]])
    train, val = Split(FEATURES[rare], LABELS[rare]), Split(FEATURES[1300:], LABELS[1300:])
    config = LinearProbeConfig(mean_class_accuracy=True, sweep_tolerance=1e-7, max_iterations=1000)
    probe = LinearProbe.fit(train, val, config, num_classes=10)
    weight, bias, _ = fit_logistic(train.x, train.y, probe.C, 10, tolerance=1e-7)
    predictions = (val.x @ weight.T + bias).argmax(dim=1)
    expected = np.mean([(predictions[val.y == label] == label).double().mean() for label in range(10)])
    assert probe.val_accuracy == pytest.approx(expected)
    score = accuracy_score(predictions, val.y, config)
    assert score.metric == "mean per-class accuracy"
    assert score.estimate.value == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.floats(0.01, 0.99), st.integers(0, 3))
def test_validation_split_is_stratified_and_leaves_every_class_in_train(
    labels: list[int], val_fraction: float, seed: int
) -> None:
    y = torch.tensor(labels)
    counts = y.bincount()
    if counts.max() < 2:
        with pytest.raises(InvalidInputError, match="no class has two"):
            stratified_split(y, val_fraction, seed)
        return
    train_indices, val_indices = stratified_split(y, val_fraction, seed)
    assert sorted([*train_indices.tolist(), *val_indices.tolist()]) == list(range(len(labels)))
    for label in y.unique():
        class_size = int(counts[label])
        num_val = int((y[val_indices] == label).sum())
        assert num_val == min(max(int(class_size * val_fraction), 1), class_size - 1)
    repeated = stratified_split(y, val_fraction, seed)
    assert torch.equal(train_indices, repeated[0]) and torch.equal(val_indices, repeated[1])


@pytest.mark.parametrize("val_fraction", [0.0, 1.0, -0.2])
def test_invalid_val_fraction_raises(val_fraction: float) -> None:
    with pytest.raises(InvalidInputError) as excinfo:
        stratified_split(LABELS, val_fraction, 0)
    assert excinfo.value.field == "val_fraction"
    with pytest.raises(InvalidInputError) as excinfo:
        LinearProbeConfig(val_fraction=val_fraction)
    assert excinfo.value.field == "val_fraction"


def test_validation_split_is_random() -> None:
    val_a, val_b = (stratified_split(LABELS, 0.2, seed)[1] for seed in (0, 1))
    assert not torch.equal(val_a, val_b)
    assert val_a.max() > 1500


def test_validation_images_are_held_out_of_train_and_used_in_the_refit() -> None:
    train, test_x = Split(FEATURES[:400], LABELS[:400]), FEATURES[1500:]
    config = LinearProbeConfig(tolerance=1e-6)
    probe = LinearProbe.fit(train, config=config, num_classes=10)
    train_indices, val_indices = stratified_split(train.y, 0.2, 0)
    explicit = LinearProbe.fit(train.subset(train_indices), train.subset(val_indices), config, num_classes=10)
    assert probe.sweep == explicit.sweep
    weight, bias, _ = fit_logistic(train.x, train.y, probe.C, 10, tolerance=1e-6)
    assert torch.equal(probe.predict(test_x), (test_x @ weight.T + bias).argmax(dim=1))


def test_split_with_too_few_labels_raises() -> None:
    with pytest.raises(TypeCheckError):
        Split(X0, Y0[:3])


def test_probe_of_fewer_images_than_features_converges() -> None:
    """With few images and correlated features, an unfinished fit at a large C is far from the optimum."""
    generator = torch.Generator().manual_seed(2)
    spectrum = torch.arange(1, 801) ** -0.7
    centers = torch.randn(60, 800, generator=generator) * spectrum
    y = torch.arange(500) % 60
    x = (centers[y] * 0.6 + torch.randn(500, 800, generator=generator) * spectrum) * 2 + 1
    probe = LinearProbe.fit(Split(x[:400], y[:400]), num_classes=60)
    assert probe.converged
    exact = fit_logistic(x[:400].double(), y[:400], probe.C, 60, tolerance=1e-7, max_iterations=20_000)
    assert exact[2]
    expected = (x[400:].double() @ exact[0].T + exact[1]).argmax(dim=1)
    np.testing.assert_array_equal(probe.predict(x[400:]), expected)
