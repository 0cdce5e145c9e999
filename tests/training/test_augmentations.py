"""Views against torchvision: exact where a parameter is given, alike in distribution where it is drawn."""

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
from likewise.training import augmentations as views
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
from likewise.training.config import ViewSpec
from likewise.training.loader import PairLoader

PICTURES = torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))


def test_draws_are_even_independent_and_a_function_of_their_place() -> None:
    draws = uniform(np.arange(50_000), 3, seed=4, epoch=9, stream=1)
    counts, _ = np.histogram(draws[:, 1], bins=20, range=(0, 1))
    assert abs(counts - 2500).max() < 6 * 2500**0.5
    streams = [
        uniform(np.arange(50_000), 1, seed=4, epoch=e, stream=s)[:, 0] for e, s in ((9, 0), (8, 1), (9, 1))
    ]
    assert abs(np.corrcoef([*draws.T, *streams[:2]]) - np.eye(5)).max() < 0.03
    np.testing.assert_array_equal(streams[2], draws[:, 0])
    np.testing.assert_array_equal(uniform(np.array([77]), 3, seed=4, epoch=9, stream=1), draws[77:78])
    assert sorted(epoch_permutation(50, seed=0, epoch=1)) == list(range(50))


@pytest.mark.parametrize(("height", "width"), [(72, 72), (40, 200), (200, 30)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.5, 1.0)])
def test_crops_are_distributed_as_torchvision_draws_them(
    height: int, width: int, scale: tuple[float, float]
) -> None:
    n = 4000
    draws = sample_view_params(np.arange(n), 0, seed=0, epoch=0).crop
    ours = compute_crop_boxes(np.tile([height, width], (n, 1)), draws, scale)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-4, column


def test_a_cut_is_torchvisions_resized_crop() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    ours = crop_resize(pixels, np.array([3, 10, 31, 42]), 24, flip=False)
    torch.testing.assert_close(ours, tv.resized_crop(image, 3, 10, 31, 42, [24, 24], antialias=True))
    torch.testing.assert_close(crop_resize(pixels, np.array([3, 10, 31, 42]), 24, flip=True), ours.flip(-1))


@pytest.mark.parametrize(
    ("ours", "theirs", "amounts"),
    [
        (views._brightness, tv.adjust_brightness, [0.6, 1.0, 1.4]),
        (views._contrast, tv.adjust_contrast, [0.6, 1.0, 1.4]),
        (views._saturation, tv.adjust_saturation, [0.6, 1.0, 1.4]),
        (views._hue, tv.adjust_hue, [-0.5, -0.1, 0.0, 0.07, 0.4]),
    ],
)
def test_each_change_of_colour_is_torchvisions(ours, theirs, amounts) -> None:  # noqa: ANN001
    pictures = torch.cat([PICTURES, torch.ones(1, 3, 20, 20) * 0.5])  # grey has no hue to turn
    for amount in amounts:
        changed = ours(pictures, torch.full((7, 1, 1, 1), amount))
        torch.testing.assert_close(changed, theirs(pictures, amount), atol=2e-4, rtol=0)


def test_blur_is_torchvisions_gaussian() -> None:
    sigma = np.array([0.1, 0.5, 1.0, 1.5, 2.0, 2.0])
    pictures = torch.rand(6, 3, 96, 96)
    blurred = views._blur(pictures, np.array([True] * 5 + [False]), sigma)
    reach = round(7 * 96 / 224)
    for i in range(5):
        expected = tv.gaussian_blur(pictures[i], [2 * reach + 1] * 2, [sigma[i] * 96 / 224] * 2)
        torch.testing.assert_close(blurred[i], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(blurred[5], pictures[5])


def test_each_image_is_changed_by_its_own_draws_alone() -> None:
    draws = uniform(np.arange(6), NUM_COLOR_PARAMS, seed=0, epoch=0, stream=0)
    together = color_augment(PICTURES, draws, AUGMENTATIONS["simclr"])
    for i in range(6):
        alone = color_augment(PICTURES[i : i + 1], draws[i : i + 1], AUGMENTATIONS["simclr"])
        torch.testing.assert_close(alone[0], together[i])
    assert not torch.equal(together, PICTURES)
    torch.testing.assert_close(color_augment(PICTURES, draws, AUGMENTATIONS["crop"]), PICTURES)


def test_shares_and_strengths_are_as_the_recipe_says() -> None:
    n = 4000
    grey = torch.full((n, 3, 16, 16), 0.0)
    grey[:, 0] = 0.8
    draws = uniform(np.arange(n), NUM_COLOR_PARAMS, seed=1, epoch=0, stream=0)
    only_grey = color_augment(grey, draws, AugmentationConfig(crop_scale=(1.0, 1.0), grayscale_prob=0.2))
    share = (only_grey[:, 0] == only_grey[:, 1]).flatten(1).all(dim=1).float().mean()
    assert share.item() == pytest.approx(0.2, abs=0.03)
    jittered = color_augment(
        grey, draws, AugmentationConfig(crop_scale=(1.0, 1.0), jitter_strength=(0.4, 0.0, 0.0, 0.0))
    )
    factor = jittered[:, 0, 0, 0] / 0.8
    assert (factor == 1).float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert factor.min().item() == pytest.approx(0.6, abs=0.01)
    assert factor.max().item() <= 1.25 + 1e-6  # clipped at white


def moments(shown: torch.Tensor) -> dict[str, np.ndarray]:
    """Describe each view by what its changes move: (n, 3, h, w) -> name to (n,)."""
    grey = shown.mean(dim=1)
    each = {
        "red": shown[:, 0].mean(dim=(1, 2)),
        "blue": shown[:, 2].mean(dim=(1, 2)),
        "contrast": grey.std(dim=(1, 2)),
        "colour": (shown.amax(dim=1) - shown.amin(dim=1)).mean(dim=(1, 2)),
        "red over blue": (shown[:, 0] - shown[:, 2]).std(dim=(1, 2)),
        "sharpness": (grey[:, :, 1:] - grey[:, :, :-1]).abs().mean(dim=(1, 2)) / grey.std(dim=(1, 2)),
        "left over right": (grey[:, :, :36] - grey[:, :, 36:]).mean(dim=(1, 2)),
        "top over bottom": (grey[:, :36] - grey[:, 36:]).mean(dim=(1, 2)),
    }
    return {name: value.numpy() for name, value in each.items()}


def test_whole_views_are_distributed_as_torchvision_makes_them() -> None:
    photo = torch.tensor(load_sample_images().images[1]).permute(2, 0, 1)
    photo = tv.resize(photo, [96], antialias=True)
    pixels, n, recipe = photo.permute(1, 2, 0).contiguous().numpy(), 2500, AUGMENTATIONS["simclr"]
    draws = sample_view_params(np.arange(n), 0, seed=0, epoch=0)
    boxes = compute_crop_boxes(np.tile(pixels.shape[:2], (n, 1)), draws.crop, recipe.crop_scale)
    crops = [
        crop_resize(pixels, boxes[i], 72, flip=bool(draws.crop[i, -1] < recipe.flip_prob)) for i in range(n)
    ]
    ours = moments(color_augment(torch.stack(crops) / 255, draws.color, recipe))
    # The blur's kernel and width are in proportion to the side.
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
    theirs = moments(torch.stack([transform(photo) for _ in range(n)]))
    for name, values in ours.items():
        assert ks_2samp(values, theirs[name]).pvalue > 1e-3, name


def test_a_pair_of_one_image_is_decoded_once_and_cut_as_if_twice(
    collection: CaptionDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = build_image_cache(collection, 36)
    twice = tuple(ViewSpec(source=n, augmentation="simclr", image_size=24) for n in (0, 1))
    rule = PairConfig(source="self")
    batches = PairLoader(images, build_pairs(collection, rule, images.readable), twice, batch_size=8, seed=3)
    read: list[int] = []
    pixels = images.pixels
    monkeypatch.setattr(images, "pixels", lambda position: (read.append(position), pixels(position))[1])
    anchors = np.array([5, 9, 2, 30])
    for partners, decoded in ((anchors, 4), (np.array([5, 40, 9, 30]), 6)):
        read.clear()
        made = batches.batch_of(anchors, partners)
        assert len(read) == decoded
        for view, positions in enumerate((anchors, partners)):
            draws = sample_view_params(anchors, view, seed=3, epoch=0).crop
            boxes = compute_crop_boxes(images.shapes(positions), draws, AUGMENTATIONS["simclr"].crop_scale)
            for row, position in enumerate(positions.tolist()):
                plain = crop_resize(pixels(position), boxes[row], 24, flip=bool(draws[row, -1] < 0.5))
                assert torch.equal(made.crops[view][row], plain)


def test_standardise_and_back() -> None:
    torch.testing.assert_close(denormalize(normalize(PICTURES)), PICTURES)
    torch.testing.assert_close(
        normalize(PICTURES), tv.normalize(PICTURES, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )


def test_unknown_views_are_refused() -> None:
    with pytest.raises(
        InvalidInputError, match="unknown views 'simcrl'; known: crop, simclr. Did you mean simclr"
    ):
        get_augmentation("simcrl")
