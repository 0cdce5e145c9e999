"""Residual adapter on the features of a frozen encoder."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from likewise.models.checkpoints import ADAPTER_PREFIX, load_state_dict_strict


class FeatureAdapter(nn.Module):
    """Residual MLP with one hidden layer on features: x + s * W2 gelu(W1 (x - m) / s).

    m and s are the mean and standard deviation of each feature over the training images. W2 is zero at the
    start, so that training starts from the features themselves (as in adapters, Houlsby et al. 2019, section
    2.1).
    """

    def __init__(self, feature_dim: int, hidden_dim: int) -> None:
        """Initialize the identity.

        Args:
            feature_dim: Features per image, d.
            hidden_dim: Width of the hidden layer.
        """
        super().__init__()
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("std", torch.ones(feature_dim))
        self.mean: Tensor
        self.std: Tensor
        self.down = nn.Linear(feature_dim, hidden_dim)
        self.up = nn.Linear(hidden_dim, feature_dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Adapt features, in their own units."""
        hidden = gelu(self.down((features - self.mean) / self.std))
        return features + self.std * self.up(hidden)

    @torch.no_grad()
    def scale_residual_(self, blend: float) -> "FeatureAdapter":
        """Blend the adapted features with the original ones: 0 restores the originals, 1 changes nothing.

        The blend (1 - t) x + t adapter(x) equals the adapter whose last layer is multiplied by t.
        """
        self.up.weight.mul_(blend)
        self.up.bias.mul_(blend)
        return self


class AdaptedModel(nn.Module):
    """A frozen model followed by an adapter of its features."""

    def __init__(self, start: nn.Module, adapter: FeatureAdapter) -> None:
        """Combine both.

        Args:
            start: Images (b, 3, h, w) -> features (b, d).
            adapter: Features (b, d) -> features (b, d).
        """
        super().__init__()
        self.start, self.adapter = start, adapter

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return the adapted features of images."""
        return self.adapter(self.start(images).float())


def load_adapter(tensors: dict[str, Tensor], metadata: dict[str, Any], path: Path) -> FeatureAdapter | None:
    """Return the adapter in the tensors and metadata of an encoder file, or None if there is none.

    Raises:
        ModelError: if its weights are incomplete.
    """
    if metadata.get("adapter") is None:
        return None
    adapter = FeatureAdapter(**metadata["adapter"])
    state_dict = {
        name.removeprefix(ADAPTER_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(ADAPTER_PREFIX)
    }
    load_state_dict_strict(adapter, state_dict, str(path))
    return adapter
