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

from likewise.errors import InputError, close_matches
from likewise.models.backbones import IMAGENET_MEAN, IMAGENET_STD
from likewise.rng import uniforms

_ATTEMPTS = 10
_CROP_DRAWS = 4 * _ATTEMPTS + 1
COLOUR_DRAWS = 9
_REFERENCE_SIDE = 224
_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """How views are made.

    Attributes:
        crop: Least and greatest share of the image's area that a crop covers (sides 3:4 to 4:3).
        flip: Share of views that are mirrored.
        jitter: Greatest change of brightness, contrast, saturation (relative) and hue (turns), or None.
        jitter_share: Share of views that are jittered.
        grey: Share of views without colour.
        blur: Share of views that are blurred, by a Gaussian of sigma 0.1 to 2 pixels cut to 15x15 at 224
            pixels and in proportion at other sizes.
    """

    crop: tuple[float, float]
    flip: float = 0.0
    jitter: tuple[float, float, float, float] | None = None
    jitter_share: float = 0.8
    grey: float = 0.0
    blur: float = 0.0


# Both as in the LGSSL code.
RECIPES = {
    "crop": ViewRecipe(crop=(0.5, 1.0)),
    "simclr": ViewRecipe(crop=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5),
}


def view_recipe(name: str, crop: tuple[float, float] | None = None) -> ViewRecipe:
    """Return a recipe by name, with other crops than its own where they are given.

    Raises:
        InputError: for an unknown name, listing the known ones.
    """
    if name not in RECIPES:
        raise InputError(
            f"unknown views {name!r}; known: {', '.join(RECIPES)}.{close_matches(name, list(RECIPES))}"
        )
    return RECIPES[name] if crop is None else replace(RECIPES[name], crop=crop)


@dataclass(frozen=True)
class ViewDraws:
    """The random numbers of one view of some images: `crop` (b, 41) and `colour` (b, 9), in [0, 1)."""

    crop: np.ndarray
    colour: np.ndarray


def draw_view(positions: np.ndarray, view: int, *, seed: int, epoch: int) -> ViewDraws:
    """Draw one view's numbers for images (b,) int64."""
    draws = uniforms(positions, _CROP_DRAWS + COLOUR_DRAWS, seed=seed, epoch=epoch, stream=view)
    return ViewDraws(draws[:, :_CROP_DRAWS], draws[:, _CROP_DRAWS:])


def crop_boxes(shapes: np.ndarray, draws: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Choose crops as torchvision's RandomResizedCrop does (Szegedy et al. 2015).

    Ten tries of a random area and a random aspect between 3/4 and 4/3; the first that fits is taken, else
    the largest centred crop whose aspect is within those bounds.

    Args:
        shapes: (b, 2) heights and widths.
        draws: (b, 41) in [0, 1): four numbers a try (area, aspect, top, left) and one for the flip.
        scale: Bounds of the share of the area.

    Returns:
        (b, 4) int64: top, left, height, width.
    """
    heights, widths = (shapes[:, i, None].astype(np.float64) for i in (0, 1))
    area, aspect, top, left = (draws[:, i : 4 * _ATTEMPTS : 4] for i in range(4))
    wanted = heights * widths * (scale[0] + (scale[1] - scale[0]) * area)
    ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * aspect)
    w, h = np.rint(np.sqrt(wanted * ratio)), np.rint(np.sqrt(wanted / ratio))
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
    boxes = np.stack([top * (heights - h + 1), left * (widths - w + 1), h, w], axis=-1)
    first = boxes[np.arange(len(shapes)), fits.argmax(axis=1)]
    return np.where(fits.any(axis=1)[:, None], first, _centred(heights[:, 0], widths[:, 0])).astype(np.int64)


def _centred(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    w = np.minimum(widths, np.rint(heights * 4 / 3))
    h = np.minimum(heights, np.rint(widths / (3 / 4)))
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=-1)


def cut(pixels: np.ndarray, box: np.ndarray, size: int, *, mirrored: bool) -> Tensor:
    """Cut one crop and resize it: (h, w, 3) uint8 and (top, left, height, width) -> (3, size, size) uint8."""
    top, left, height, width = box.tolist()
    # Copied because torch takes no read-only memory; only the crop is, not the image.
    crop = torch.from_numpy(pixels[top : top + height, left : left + width].copy()).permute(2, 0, 1)
    view = tv.resize(crop, [size, size], antialias=True)
    return view.flip(-1) if mirrored else view


def change_colours(
    images: Float[Tensor, "b 3 h w"], draws: np.ndarray, recipe: ViewRecipe
) -> Float[Tensor, "b 3 h w"]:
    """Jitter, grey and blur images in [0, 1], each by its own draws (b, 9).

    The operations and the distributions of their parameters are torchvision's ColorJitter (in a random order
    for each image), RandomGrayscale and GaussianBlur.
    """
    if recipe.jitter is not None:
        images = _jitter(images, draws, recipe.jitter, recipe.jitter_share)
    if recipe.grey > 0:
        chosen = torch.from_numpy(draws[:, 6] < recipe.grey).to(images.device)
        images = torch.where(chosen[:, None, None, None], _grey(images), images)
    if recipe.blur > 0:
        images = _blur(images, draws[:, 7] < recipe.blur, 0.1 + 1.9 * draws[:, 8])
    return images


def standardise(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Subtract ImageNet's mean and divide by its deviation, channel by channel."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean).div_(std)


def restore(views: Float[Tensor, "... 3 h w"]) -> Float[Tensor, "... 3 h w"]:
    """Undo `standardise`, back to [0, 1], so that people can look at a view."""
    mean, std = (torch.tensor(v, device=views.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (views * std + mean).clamp(0, 1)


def _jitter(
    images: Tensor, draws: np.ndarray, strength: tuple[float, float, float, float], share: float
) -> Tensor:
    images = images.clone()
    bounds = np.array([1, 1, 1, 0]) + np.array(strength) * (2 * draws[:, 1:5] - 1)
    orders = _ORDERS[(draws[:, 5] * len(_ORDERS)).astype(np.int64)]
    chosen = draws[:, 0] < share
    for place in range(4):
        for which, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            rows = torch.from_numpy(np.flatnonzero(chosen & (orders[:, place] == which))).to(images.device)
            if len(rows):
                amount = torch.from_numpy(bounds[:, which]).to(images)[rows].view(-1, 1, 1, 1)
                images.index_copy_(0, rows, change(images.index_select(0, rows), amount))
    return images


_ORDERS = np.array([(a, b, c, 6 - a - b - c) for a in range(4) for b in range(4) for c in range(4)
                    if len({a, b, c}) == 3])  # fmt: skip


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1).expand_as(images)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    level = _grey(images)[:, :1].mean(dim=(1, 2, 3), keepdim=True)
    return (factor * images + (1 - factor) * level).clamp(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return (factor * images + (1 - factor) * _grey(images)).clamp(0, 1)


def _hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue in HSV: h' = h + turn, with value and saturation as they are."""
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    reddest, greenest = value == red, value == green
    sector = torch.where(reddest, green - blue, torch.where(greenest, blue - red, red - green))
    sector /= spread.clamp(min=_SMALLEST)
    sector += torch.where(reddest, 0.0, torch.where(greenest, 2.0, 4.0))
    sector += 6 * turn.squeeze(1)
    # Each channel is the value less a share of the spread that depends on its distance in hue
    # (the closed form of HSV to RGB: v - c * max(0, min(k, 4 - k, 1)), k = (n + 6h) mod 6).
    at = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1) + sector.unsqueeze(1)
    at -= (at / 6).floor_().mul_(6)
    share = at.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
    return share.mul_(spread.unsqueeze(1)).neg_().add_(value.unsqueeze(1)).clamp_(0, 1)


def _blur(images: Tensor, chosen: np.ndarray, sigma: np.ndarray) -> Tensor:
    rows = torch.from_numpy(np.flatnonzero(chosen)).to(images.device)
    if not len(rows):
        return images
    side = images.shape[-1]
    reach = max(1, round(7 * side / _REFERENCE_SIDE))
    widths = torch.from_numpy(sigma[chosen] * side / _REFERENCE_SIDE).to(images)
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets / widths[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)
    blurred = images.index_select(0, rows)
    for dim, border in ((-2, (0, 0, reach, reach)), (-1, (reach, reach, 0, 0))):
        padded = pad(blurred, border, "reflect")
        # A sum of shifted images: kernels are short, and each image has its own weights.
        blurred = torch.zeros_like(blurred)
        for i, weight in enumerate(weights.unbind(1)):
            blurred.addcmul_(padded.narrow(dim, i, side), weight.view(-1, 1, 1, 1))
    return images.index_copy(0, rows, blurred)
