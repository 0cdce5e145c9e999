"""Augmentation: random crops on the host, color augmentation on the device.

Every random number is a function of (seed, epoch, image, view), from `likewise.rng`, so views depend neither
on the number of workers nor on the step from which a run resumed. Color augmentation runs on whole batches,
with separate parameters per image.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as tv

from likewise.data.config import IMAGENET_MEAN, IMAGENET_STD
from likewise.errors import InvalidInputError, did_you_mean
from likewise.rng import uniform

_MAX_ATTEMPTS = 10
_NUM_CROP_PARAMS = 4 * _MAX_ATTEMPTS + 1
NUM_COLOR_PARAMS = 9
_BLUR_REFERENCE_SIZE = 224
_FLOAT32_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Parameters of an augmentation."""

    crop_scale: tuple[float, float]
    """Range of the area of a crop as a fraction of the image; the aspect ratio is 3:4 to 4:3."""
    flip_prob: float = 0.0
    """Probability of a horizontal flip."""
    jitter_strength: tuple[float, float, float, float] | None = None
    """Maximum change of brightness, contrast and saturation (relative) and of hue (turns); None for none."""
    jitter_prob: float = 0.8
    """Probability of color jitter."""
    grayscale_prob: float = 0.0
    """Probability of grayscale."""
    blur_prob: float = 0.0
    """Probability of a Gaussian blur, with sigma 0.1 to 2 pixels and a 15x15 kernel at 224 pixels, in
    proportion at other sizes."""


# As in the LGSSL code.
AUGMENTATIONS = {
    "crop": AugmentationConfig(crop_scale=(0.5, 1.0)),
    "simclr": AugmentationConfig(
        crop_scale=(0.2, 1.0),
        flip_prob=0.5,
        jitter_strength=(0.4, 0.4, 0.4, 0.1),
        grayscale_prob=0.2,
        blur_prob=0.5,
    ),
}


def get_augmentation(name: str, crop_scale: tuple[float, float] | None = None) -> AugmentationConfig:
    """Return an augmentation by name.

    Args:
        name: `crop` or `simclr`.
        crop_scale: Replaces the range of the area of a crop.

    Raises:
        InvalidInputError: if the name is unknown.
    """
    if name not in AUGMENTATIONS:
        raise InvalidInputError(
            f"unknown augmentation {name!r}; known: "
            f"{', '.join(AUGMENTATIONS)}.{did_you_mean(name, list(AUGMENTATIONS))}",
            field="augmentation",
        )
    return AUGMENTATIONS[name] if crop_scale is None else replace(AUGMENTATIONS[name], crop_scale=crop_scale)


@dataclass(frozen=True)
class ViewParams:
    """The random numbers of one view of b images: `crop` (b, 41) and `color` (b, 9) float64 in [0, 1)."""

    crop: np.ndarray
    color: np.ndarray


def sample_view_params(positions: np.ndarray, view: int, *, seed: int, epoch: int) -> ViewParams:
    """Sample the random numbers of one view of images (b,) int64."""
    u = uniform(positions, _NUM_CROP_PARAMS + NUM_COLOR_PARAMS, seed=seed, epoch=epoch, stream=view)
    return ViewParams(u[:, :_NUM_CROP_PARAMS], u[:, _NUM_CROP_PARAMS:])


def compute_crop_boxes(shapes: np.ndarray, params: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Sample crops as torchvision's RandomResizedCrop does (Szegedy et al. 2015).

    Up to ten attempts with a random area and an aspect ratio of 3:4 to 4:3; if none fits, the largest
    centered crop within those bounds.

    Args:
        shapes: (b, 2), heights and widths.
        params: (b, 41) in [0, 1): four numbers per attempt (area, aspect, top, left) and one for the flip.
        scale: Range of the area as a fraction of the image.

    Returns:
        (b, 4) int64: top, left, height, width.
    """
    heights, widths = (shapes[:, i, None].astype(np.float64) for i in (0, 1))
    u_area, u_aspect, u_top, u_left = (params[:, i : 4 * _MAX_ATTEMPTS : 4] for i in range(4))
    target_area = heights * widths * (scale[0] + (scale[1] - scale[0]) * u_area)
    aspect_ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * u_aspect)
    w, h = np.rint(np.sqrt(target_area * aspect_ratio)), np.rint(np.sqrt(target_area / aspect_ratio))
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
    boxes = np.stack([u_top * (heights - h + 1), u_left * (widths - w + 1), h, w], axis=-1)
    first_fit = boxes[np.arange(len(shapes)), fits.argmax(axis=1)]
    return np.where(
        fits.any(axis=1)[:, None], first_fit, _center_crop_boxes(heights[:, 0], widths[:, 0])
    ).astype(np.int64)


def _center_crop_boxes(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    w = np.minimum(widths, np.rint(heights * 4 / 3))
    h = np.minimum(heights, np.rint(widths / (3 / 4)))
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=-1)


def crop_resize(
    pixels: np.ndarray, box: np.ndarray, image_size: int, *, flip: bool, interpolation: str = "bilinear"
) -> Tensor:
    """Crop and resize: (h, w, 3) uint8 and (top, left, height, width) -> (3, size, size) uint8."""
    top, left, height, width = box.tolist()
    # A copy, because torch does not support read-only memory; of the crop only, not of the image.
    crop = torch.from_numpy(pixels[top : top + height, left : left + width].copy()).permute(2, 0, 1)
    mode = tv.InterpolationMode(interpolation)
    view = tv.resize(crop, [image_size, image_size], interpolation=mode, antialias=True)
    return view.flip(-1) if flip else view


def color_augment(
    images: Float[Tensor, "b 3 h w"], params: np.ndarray, config: AugmentationConfig
) -> Float[Tensor, "b 3 h w"]:
    """Apply color jitter, grayscale and blur to images in [0, 1].

    The operations and the distributions of their parameters are those of torchvision's ColorJitter (in a
    random order per image), RandomGrayscale and GaussianBlur.

    Args:
        images: Images in [0, 1].
        params: (b, 9) float64 in [0, 1), the random numbers of each image.
        config: The augmentation.
    """
    if config.jitter_strength is not None:
        images = _jitter(images, params, config.jitter_strength, config.jitter_prob)
    if config.grayscale_prob > 0:
        mask = torch.from_numpy(params[:, 6] < config.grayscale_prob).to(images.device)
        images = torch.where(mask[:, None, None, None], _grayscale(images), images)
    if config.blur_prob > 0:
        images = _blur(images, params[:, 7] < config.blur_prob, 0.1 + 1.9 * params[:, 8])
    return images


def normalize(
    images: Float[Tensor, "b 3 h w"],
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Float[Tensor, "b 3 h w"]:
    """Normalize each channel by its mean and standard deviation, by default those of ImageNet."""
    means, stds = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images - means).div_(stds)


def denormalize(
    views: Float[Tensor, "... 3 h w"],
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Float[Tensor, "... 3 h w"]:
    """Invert `normalize`; the result is clamped to [0, 1]."""
    means, stds = (torch.tensor(values, device=views.device).view(3, 1, 1) for values in (mean, std))
    return (views * stds + means).clamp(0, 1)


def _jitter(
    images: Tensor, params: np.ndarray, strength: tuple[float, float, float, float], prob: float
) -> Tensor:
    images = images.clone()
    factors = np.array([1, 1, 1, 0]) + np.array(strength) * (2 * params[:, 1:5] - 1)
    orders = _JITTER_ORDERS[(params[:, 5] * len(_JITTER_ORDERS)).astype(np.int64)]
    mask = params[:, 0] < prob
    for position in range(4):
        for op_index, op in enumerate((_brightness, _contrast, _saturation, _hue)):
            indices = torch.from_numpy(np.flatnonzero(mask & (orders[:, position] == op_index))).to(
                images.device
            )
            if len(indices):
                factor = torch.from_numpy(factors[:, op_index]).to(images)[indices].view(-1, 1, 1, 1)
                images.index_copy_(0, indices, op(images.index_select(0, indices), factor))
    return images


_JITTER_ORDERS = np.array([(a, b, c, 6 - a - b - c) for a in range(4) for b in range(4) for c in range(4)
                    if len({a, b, c}) == 3])  # fmt: skip


def _grayscale(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1).expand_as(images)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _grayscale(images)[:, :1].mean(dim=(1, 2, 3), keepdim=True)
    return (factor * images + (1 - factor) * mean).clamp(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return (factor * images + (1 - factor) * _grayscale(images)).clamp(0, 1)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue in HSV, h' = h + shift in turns; value and saturation are unchanged."""
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    red_is_max, green_is_max = value == red, value == green
    hue = torch.where(red_is_max, green - blue, torch.where(green_is_max, blue - red, red - green))
    hue /= chroma.clamp(min=_FLOAT32_TINY)
    hue += torch.where(red_is_max, 0.0, torch.where(green_is_max, 2.0, 4.0))
    hue += 6 * shift.squeeze(1)
    # Each channel is the value minus a fraction of the chroma that depends on its distance in hue
    # (the closed form of HSV to RGB: v - c * max(0, min(k, 4 - k, 1)), k = (n + 6h) mod 6).
    k = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1) + hue.unsqueeze(1)
    k -= (k / 6).floor_().mul_(6)
    weight = k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
    return weight.mul_(chroma.unsqueeze(1)).neg_().add_(value.unsqueeze(1)).clamp_(0, 1)


def _blur(images: Tensor, mask: np.ndarray, sigma: np.ndarray) -> Tensor:
    indices = torch.from_numpy(np.flatnonzero(mask)).to(images.device)
    if not len(indices):
        return images
    image_size = images.shape[-1]
    radius = max(1, round(7 * image_size / _BLUR_REFERENCE_SIZE))
    sigma_pixels = torch.from_numpy(sigma[mask] * image_size / _BLUR_REFERENCE_SIZE).to(images)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernels = torch.exp(-0.5 * (offsets / sigma_pixels[:, None]) ** 2)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    blurred = images.index_select(0, indices)
    for dim, padding in ((-2, (0, 0, radius, radius)), (-1, (radius, radius, 0, 0))):
        padded = pad(blurred, padding, "reflect")
        # A sum of shifted images: kernels are short, and their weights differ per image.
        blurred = torch.zeros_like(blurred)
        for i, weight in enumerate(kernels.unbind(1)):
            blurred.addcmul_(padded.narrow(dim, i, image_size), weight.view(-1, 1, 1, 1))
    return images.index_copy(0, indices, blurred)
