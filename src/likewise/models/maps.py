"""An encoder's feature maps, for tasks that ask where."""

from typing import Any

import torch
from torch import Tensor, nn

from likewise.errors import ModelError

# A side that every usual stride divides, so that strides can be read off the maps.
_SIDE = 224


class FeatureMaps(nn.Module):
    """The maps of an encoder's stages, from fine to coarse, a map for each stride.

    Attributes:
        widths: Channels of each map.
        strides: Pixels of the image a cell of each map.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        """Wrap a timm model, which is not copied.

        Raises:
            ModelError: where it gives no maps.
        """
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise ModelError(
                f"{name} gives no feature maps: detection and segmentation need a run or a timm model"
            )
        self.model: Any = model
        self._kept: list[int] = []
        try:
            with torch.no_grad():
                shown = self.every(torch.zeros(1, 3, _SIDE, _SIDE))
        except Exception as fault:  # shape faults deep in somebody else's forward
            raise ModelError(f"{name} gives no feature maps of {_SIDE} px images: {fault}") from fault
        # Of maps at one stride the last has seen the most.
        last = {_SIDE // each.shape[-1]: place for place, each in enumerate(shown)}
        self.strides = tuple(sorted(last))
        self._kept = [last[stride] for stride in self.strides]
        self.widths = tuple(shown[place].shape[1] for place in self._kept)

    def every(self, images: Tensor) -> list[Tensor]:
        """Return the maps of all stages, (b, c, h, w) each."""
        return self.model.forward_intermediates(images, intermediates_only=True)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (b, 3, h, w) -> maps (b, width, h / stride, w / stride)."""
        found = self.every(images)
        return [found[place] for place in self._kept]
