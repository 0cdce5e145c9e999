"""How an image is fed to an encoder."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from likewise.models.backbones import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """How an image is fed: short side resized, centre cut out, channels standardised."""

    image_size: int
    resize_size: int
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def center_crop(self, pixels: np.ndarray) -> np.ndarray:
        """Return the centre: (h, w, 3) uint8 -> (size, size, 3) uint8."""
        image = Image.fromarray(pixels)
        scale = self.resize_size / min(image.size)
        new_size = [max(self.resize_size, round(side * scale)) for side in image.size]
        resized = image.resize((new_size[0], new_size[1]), Image.Resampling[self.interpolation.upper()])
        left, top = ((side - self.image_size) // 2 for side in resized.size)
        return np.asarray(resized.crop((left, top, left + self.image_size, top + self.image_size)))

    def normalize(self, crops: Tensor) -> Tensor:
        """Turn crops (b, size, size, 3) uint8 into what a model takes: (b, 3, size, size) float32."""
        images = crops.permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)
