"""Augmentation against torchvision: exact for given parameters, equal in distribution for random ones."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_images
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as tv

from likewise.data.dataset import CaptionDataset
from likewise.data.image_cache import build_image_cache
from likewise.errors import InvalidInputError
from likewise.pairs.build import build_pairs
from likewise.pairs.config import PairConfig
from likewise.rng import epoch_permutation, uniform
from likewise.training import augmentations
from likewise.training.augmentations import (
    AUGMENTATIONS,
    NUM_COLOR_PARAMS,
    AugmentationConfig,
    color_augment,
    compute_crop_boxes,
    crop_resize,
    denormalize,
    get_augmentation,
    normalize,
    sample_view_params,
)
from likewise.training.loader import PairDataset

IMAGES = torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))


def test_random_numbers_are_uniform_independent_and_reproducible() -> None:
    u = uniform(np.arange(50_000), 3, seed=4, epoch=9, stream=1)
    counts, _ = np.histogram(u[:, 1], bins=20, range=(0, 1))
    assert abs(counts - 2500).max() < 6 * 2500**0.5
    streams = [
        uniform(np.arange(50_000), 1, seed=4, epoch=e, stream=s)[:, 0] for e, s in ((9, 0), (8, 1), (9, 1))
    ]
    assert abs(np.corrcoef([*u.T, *streams[:2]]) - np.eye(5)).max() < 0.03
    np.testing.assert_array_equal(streams[2], u[:, 0])
    np.testing.assert_array_equal(uniform(np.array([77]), 3, seed=4, epoch=9, stream=1), u[77:78])
    assert sorted(epoch_permutation(50, seed=0, epoch=1)) == list(range(50))


@pytest.mark.parametrize(("height", "width"), [(72, 72), (40, 200), (200, 30)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.5, 1.0)])
def test_crops_have_the_distribution_of_torchvision(
    height: int, width: int, scale: tuple[float, float]
) -> None:
    n = 4000
    params = sample_view_params(np.arange(n), 0, seed=0, epoch=0).crop
    boxes = compute_crop_boxes(np.tile([height, width], (n, 1)), params, scale)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    expected = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()
    for column in range(4):
        assert ks_2samp(boxes[:, column], expected[:, column]).pvalue > 1e-4, column


def test_crop_equals_torchvisions_resized_crop() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    crop = crop_resize(pixels, np.array([3, 10, 31, 42]), 24, flip=False)
    torch.testing.assert_close(crop, tv.resized_crop(image, 3, 10, 31, 42, [24, 24], antialias=True))
    torch.testing.assert_close(crop_resize(pixels, np.array([3, 10, 31, 42]), 24, flip=True), crop.flip(-1))


@pytest.mark.parametrize(
    ("op", "reference", "factors"),
    [
        (augmentations._brightness, tv.adjust_brightness, [0.6, 1.0, 1.4]),
        (augmentations._contrast, tv.adjust_contrast, [0.6, 1.0, 1.4]),
        (augmentations._saturation, tv.adjust_saturation, [0.6, 1.0, 1.4]),
        (augmentations._hue, tv.adjust_hue, [-0.5, -0.1, 0.0, 0.07, 0.4]),
    ],
)
def test_color_operations_equal_torchvision(op, reference, factors) -> None:  # noqa: ANN001
    images = torch.cat([IMAGES, torch.ones(1, 3, 20, 20) * 0.5])  # gray has no hue
    for factor in factors:
        augmented = op(images, torch.full((7, 1, 1, 1), factor))
        torch.testing.assert_close(augmented, reference(images, factor), atol=2e-4, rtol=0)


def test_blur_equals_torchvision() -> None:
    sigma = np.array([0.1, 0.5, 1.0, 1.5, 2.0, 2.0])
    images = torch.rand(6, 3, 96, 96)
    blurred = augmentations._blur(images, np.array([True] * 5 + [False]), sigma)
    radius = round(7 * 96 / 224)
    for i in range(5):
        expected = tv.gaussian_blur(images[i], [2 * radius + 1] * 2, [sigma[i] * 96 / 224] * 2)
        torch.testing.assert_close(blurred[i], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(blurred[5], images[5])


def test_images_of_a_batch_are_independent() -> None:
    params = uniform(np.arange(6), NUM_COLOR_PARAMS, seed=0, epoch=0, stream=0)
    batch = color_augment(IMAGES, params, AUGMENTATIONS["simclr"])
    for i in range(6):
        single = color_augment(IMAGES[i : i + 1], params[i : i + 1], AUGMENTATIONS["simclr"])
        torch.testing.assert_close(single[0], batch[i])
    assert not torch.equal(batch, IMAGES)
    torch.testing.assert_close(color_augment(IMAGES, params, AUGMENTATIONS["crop"]), IMAGES)


def test_grayscale_and_jitter_have_the_configured_probability_and_strength() -> None:
    n = 4000
    gray = torch.full((n, 3, 16, 16), 0.0)
    gray[:, 0] = 0.8
    params = uniform(np.arange(n), NUM_COLOR_PARAMS, seed=1, epoch=0, stream=0)
    grayscale = color_augment(gray, params, AugmentationConfig(crop_scale=(1.0, 1.0), grayscale_prob=0.2))
    fraction = (grayscale[:, 0] == grayscale[:, 1]).flatten(1).all(dim=1).float().mean()
    assert fraction.item() == pytest.approx(0.2, abs=0.03)
    jittered = color_augment(
        gray, params, AugmentationConfig(crop_scale=(1.0, 1.0), jitter_strength=(0.4, 0.0, 0.0, 0.0))
    )
    factor = jittered[:, 0, 0, 0] / 0.8
    assert (factor == 1).float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert factor.min().item() == pytest.approx(0.6, abs=0.01)
    assert factor.max().item() <= 1.25 + 1e-6  # clipped at white


def statistics(images: torch.Tensor) -> dict[str, np.ndarray]:
    """Return statistics that the augmentation changes: (n, 3, h, w) -> name to (n,)."""
    gray = images.mean(dim=1)
    values = {
        "red": images[:, 0].mean(dim=(1, 2)),
        "blue": images[:, 2].mean(dim=(1, 2)),
        "contrast": gray.std(dim=(1, 2)),
        "color": (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2)),
        "red over blue": (images[:, 0] - images[:, 2]).std(dim=(1, 2)),
        "sharpness": (gray[:, :, 1:] - gray[:, :, :-1]).abs().mean(dim=(1, 2)) / gray.std(dim=(1, 2)),
        "left over right": (gray[:, :, :36] - gray[:, :, 36:]).mean(dim=(1, 2)),
        "top over bottom": (gray[:, :36] - gray[:, 36:]).mean(dim=(1, 2)),
    }
    return {name: value.numpy() for name, value in values.items()}


def test_views_have_the_distribution_of_torchvision() -> None:
    photo = torch.tensor(load_sample_images().images[1]).permute(2, 0, 1)
    photo = tv.resize(photo, [96], antialias=True)
    pixels, n, config = photo.permute(1, 2, 0).contiguous().numpy(), 2500, AUGMENTATIONS["simclr"]
    params = sample_view_params(np.arange(n), 0, seed=0, epoch=0)
    boxes = compute_crop_boxes(np.tile(pixels.shape[:2], (n, 1)), params.crop, config.crop_scale)
    crops = [
        crop_resize(pixels, boxes[i], 72, flip=bool(params.crop[i, -1] < config.flip_prob)) for i in range(n)
    ]
    views = statistics(color_augment(torch.stack(crops) / 255, params.color, config))
    # Kernel size and sigma of the blur are in proportion to the image size.
    blur = v2.GaussianBlur(5, (0.1 * 72 / 224, 2.0 * 72 / 224))
    transform = v2.Compose([
        v2.RandomResizedCrop(72, scale=(0.2, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([blur], 0.5),
    ])  # fmt: skip
    torch.manual_seed(0)
    expected = statistics(torch.stack([transform(photo) for _ in range(n)]))
    for name, values in views.items():
        assert ks_2samp(values, expected[name]).pvalue > 1e-3, name


def test_an_image_is_decoded_once_per_pair(dataset: CaptionDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    image_cache = build_image_cache(dataset, 36)
    pairs = build_pairs(dataset, PairConfig(source="self"), allowed=image_cache.readable_mask)
    pair_dataset = PairDataset(image_cache, pairs, image_size=24, augmentation="simclr", seed=3)
    decoded: list[int] = []
    pixels = image_cache.pixels
    monkeypatch.setattr(
        image_cache, "pixels", lambda position: (decoded.append(position), pixels(position))[1]
    )
    anchors = np.array([5, 9, 2, 30])
    for partners, num_decoded in ((anchors, 4), (np.array([5, 40, 9, 30]), 6)):
        decoded.clear()
        batch = pair_dataset.collate(anchors, [partners], epoch=0)
        assert len(decoded) == num_decoded
        for view, positions in enumerate((anchors, partners)):
            params = sample_view_params(anchors, view, seed=3, epoch=0).crop
            boxes = compute_crop_boxes(
                image_cache.shapes(positions), params, AUGMENTATIONS["simclr"].crop_scale
            )
            for row, position in enumerate(positions.tolist()):
                crop = crop_resize(pixels(position), boxes[row], 24, flip=bool(params[row, -1] < 0.5))
                assert torch.equal(batch.crops[view][row], crop)


def test_normalize_equals_torchvision_and_denormalize_inverts_it() -> None:
    torch.testing.assert_close(denormalize(normalize(IMAGES)), IMAGES)
    torch.testing.assert_close(
        normalize(IMAGES), tv.normalize(IMAGES, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )


def test_unknown_augmentation_raises() -> None:
    with pytest.raises(InvalidInputError, match="'simcrl'.*Did you mean simclr"):
        get_augmentation("simcrl")
