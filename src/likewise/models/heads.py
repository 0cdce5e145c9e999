"""Heads that stand on a backbone during training and are thrown away after it."""

from collections.abc import Sequence

from torch import nn


def projector(width: int, layers: Sequence[int]) -> nn.Sequential:
    """Build the projection MLP of SimCLR as the paper uses it: features (b, width) -> (b, layers[-1]).

    Linear without bias, BatchNorm and ReLU for each layer, the last one linear alone (Chen et al. 2020,
    section 2.1; widths 2048-2048-128 in El Banani et al. 2023).
    """
    modules: list[nn.Module] = []
    for after in layers[:-1]:
        modules += [nn.Linear(width, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        width = after
    return nn.Sequential(*modules, nn.Linear(width, layers[-1], bias=False))
