"""Preprocessing of images for a frozen encoder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from likewise.data.config import IMAGENET_MEAN, IMAGENET_STD, BandSelection, select_bands


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """Preprocessing: resize of the short side, center crop, normalization of the channels."""

    image_size: int
    """Side of the crop in pixels."""
    resize_size: int
    """Short side before the crop in pixels."""
    interpolation: str = "bicubic"
    """Interpolation of the resize: `bicubic` or `bilinear`."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, in [0, 1]."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each channel."""
    bands: BandSelection | None = None
    """Choice of the bands of TIFF images of several bands: that of the images of training."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EvalTransform":
        """Return the transform that `dataclasses.asdict` wrote to JSON."""
        options: dict[str, Any] = dict(values)
        options["mean"], options["std"] = tuple(values["mean"]), tuple(values["std"])
        if values["bands"] is not None:
            options["bands"] = select_bands(*map(tuple, values["bands"].values()))
        return cls(**options)

    def resize_to(self, image_size: int) -> "EvalTransform":
        """Return the transform for another image size, with the same ratio of crop and short side."""
        resize_size = round(image_size * self.resize_size / self.image_size)
        return replace(self, image_size=image_size, resize_size=resize_size)

    def center_crop(self, pixels: np.ndarray) -> np.ndarray:
        """Resize and crop the center: (h, w, 3) uint8 -> (image_size, image_size, 3) uint8."""
        image = Image.fromarray(pixels)
        scale = self.resize_size / min(image.size)
        new_size = [max(self.resize_size, round(side * scale)) for side in image.size]
        resized = image.resize((new_size[0], new_size[1]), Image.Resampling[self.interpolation.upper()])
        left, top = ((side - self.image_size) // 2 for side in resized.size)
        return np.asarray(resized.crop((left, top, left + self.image_size, top + self.image_size)))

    def normalize(self, crops: Tensor) -> Tensor:
        """Normalize crops (b, s, s, 3) uint8 for a model: (b, 3, s, s) float32."""
        images = crops.permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)
