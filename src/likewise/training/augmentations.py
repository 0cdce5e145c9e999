"""Views: what an image looks like each time it is shown.

Every random number is a function of (seed, epoch, image, view), drawn by `likewise.draws`, so views do not
depend on workers or on where a run was resumed. Crops are cut on the host; colours are changed on the
device, whole batches at a time with parameters of their own for each image.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as tv

from likewise.errors import InvalidInputError, did_you_mean
from likewise.models.backbones import IMAGENET_MEAN, IMAGENET_STD
from likewise.rng import uniform

_MAX_ATTEMPTS = 10
_NUM_CROP_PARAMS = 4 * _MAX_ATTEMPTS + 1
NUM_COLOR_PARAMS = 9
_BLUR_REFERENCE_SIZE = 224
_FLOAT32_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """How views are made.

    Attributes:
        crop_scale: Least and greatest share of the image's area that a crop covers (sides 3:4 to 4:3).
        flip_prob: Share of views that are mirrored.
        jitter_strength: Greatest change of brightness, contrast, saturation (relative) and hue (turns), or
            None.
        jitter_prob: Share of views that are jittered.
        grayscale_prob: Share of views without colour.
        blur_prob: Share of views that are blurred, by a Gaussian of sigma 0.1 to 2 pixels cut to 15x15 at 224
            pixels and in proportion at other sizes.
    """

    crop_scale: tuple[float, float]
    flip_prob: float = 0.0
    jitter_strength: tuple[float, float, float, float] | None = None
    jitter_prob: float = 0.8
    grayscale_prob: float = 0.0
    blur_prob: float = 0.0


# Both as in the LGSSL code.
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
    """Return a recipe by name, with other crops than its own where they are given.

    Raises:
        InputError: for an unknown name, listing the known ones.
    """
    if name not in AUGMENTATIONS:
        raise InvalidInputError(
            f"unknown views {name!r}; known: "
            f"{', '.join(AUGMENTATIONS)}.{did_you_mean(name, list(AUGMENTATIONS))}"
        )
    return AUGMENTATIONS[name] if crop_scale is None else replace(AUGMENTATIONS[name], crop_scale=crop_scale)


@dataclass(frozen=True)
class ViewParams:
    """The random numbers of one view of some images: `crop` (b, 41) and `color` (b, 9), in [0, 1)."""

    crop: np.ndarray
    color: np.ndarray


def sample_view_params(positions: np.ndarray, view: int, *, seed: int, epoch: int) -> ViewParams:
    """Draw one view's numbers for images (b,) int64."""
    u = uniform(positions, _NUM_CROP_PARAMS + NUM_COLOR_PARAMS, seed=seed, epoch=epoch, stream=view)
    return ViewParams(u[:, :_NUM_CROP_PARAMS], u[:, _NUM_CROP_PARAMS:])


def compute_crop_boxes(shapes: np.ndarray, params: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Choose crops as torchvision's RandomResizedCrop does (Szegedy et al. 2015).

    Ten tries of a random area and a random aspect between 3/4 and 4/3; the first that fits is taken, else
    the largest centred crop whose aspect is within those bounds.

    Args:
        shapes: (b, 2) heights and widths.
        params: (b, 41) in [0, 1): four numbers a try (area, aspect, top, left) and one for the flip.
        scale: Bounds of the share of the area.

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


def crop_resize(pixels: np.ndarray, box: np.ndarray, image_size: int, *, flip: bool) -> Tensor:
    """Cut one crop and resize it: (h, w, 3) uint8 and (top, left, height, width) -> (3, size, size) uint8."""
    top, left, height, width = box.tolist()
    # Copied because torch takes no read-only memory; only the crop is, not the image.
    crop = torch.from_numpy(pixels[top : top + height, left : left + width].copy()).permute(2, 0, 1)
    view = tv.resize(crop, [image_size, image_size], antialias=True)
    return view.flip(-1) if flip else view


def color_augment(
    images: Float[Tensor, "b 3 h w"], params: np.ndarray, config: AugmentationConfig
) -> Float[Tensor, "b 3 h w"]:
    """Jitter, grey and blur images in [0, 1], each by its own draws (b, 9).

    The operations and the distributions of their parameters are torchvision's ColorJitter (in a random order
    for each image), RandomGrayscale and GaussianBlur.
    """
    if config.jitter_strength is not None:
        images = _jitter(images, params, config.jitter_strength, config.jitter_prob)
    if config.grayscale_prob > 0:
        mask = torch.from_numpy(params[:, 6] < config.grayscale_prob).to(images.device)
        images = torch.where(mask[:, None, None, None], _grayscale(images), images)
    if config.blur_prob > 0:
        images = _blur(images, params[:, 7] < config.blur_prob, 0.1 + 1.9 * params[:, 8])
    return images


def normalize(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Subtract ImageNet's mean and divide by its deviation, channel by channel."""
    mean, std = (
        torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (images - mean).div_(std)


def denormalize(views: Float[Tensor, "... 3 h w"]) -> Float[Tensor, "... 3 h w"]:
    """Undo `standardise`, back to [0, 1], so that people can look at a view."""
    mean, std = (
        torch.tensor(values, device=views.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (views * std + mean).clamp(0, 1)


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
    """Turn the hue in HSV: h' = h + turn, with value and saturation as they are."""
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    red_is_max, green_is_max = value == red, value == green
    hue = torch.where(red_is_max, green - blue, torch.where(green_is_max, blue - red, red - green))
    hue /= chroma.clamp(min=_FLOAT32_TINY)
    hue += torch.where(red_is_max, 0.0, torch.where(green_is_max, 2.0, 4.0))
    hue += 6 * shift.squeeze(1)
    # Each channel is the value less a share of the spread that depends on its distance in hue
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
        # A sum of shifted images: kernels are short, and each image has its own weights.
        blurred = torch.zeros_like(blurred)
        for i, weight in enumerate(kernels.unbind(1)):
            blurred.addcmul_(padded.narrow(dim, i, image_size), weight.view(-1, 1, 1, 1))
    return images.index_copy(0, indices, blurred)
