"""The one interface of all methods."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """What a method makes of a batch.

    Attributes:
        loss: The scalar to descend.
        features: The backbone's features of all views, detached, for the watch on collapse.
        logs: Further scalars, left on the device until the loop writes them.
    """

    loss: Float[Tensor, ""]
    features: Float[Tensor, "n d"]
    logs: dict[str, Tensor]


class Method(nn.Module, ABC):
    """A loss together with the modules it trains; `backbone` is what is kept afterwards."""

    backbone: nn.Module

    @abstractmethod
    def step(self, views: Float[Tensor, "v b c h w"], captions: Float[Tensor, "v b d"] | None = None) -> Step:
        """Return the loss of a batch of v views of b pairs; `captions` are vectors of what describes them."""
