"""Heads that stand on a backbone during training and are thrown away after it."""

from collections.abc import Sequence

from torch import nn


def projector(width: int, layers: Sequence[int], *, final_norm: bool = False) -> nn.Sequential:
    """Build the projection MLP of SimCLR as the paper uses it: features (b, width) -> (b, layers[-1]).

    Linear without bias, BatchNorm and ReLU for each layer, the last one linear alone (Chen et al. 2020,
    section 2.1; widths 2048-2048-128 in El Banani et al. 2023). `final_norm` puts BatchNorm without gain and
    shift behind it, as SimSiam does.
    """
    modules: list[nn.Module] = []
    for after in layers[:-1]:
        modules += [nn.Linear(width, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        width = after
    modules.append(nn.Linear(width, layers[-1], bias=False))
    return nn.Sequential(*modules, *[nn.BatchNorm1d(layers[-1], affine=False)] * final_norm)


def predictor(width: int, hidden: int) -> nn.Sequential:
    """Build a prediction MLP: (b, width) -> (b, width) through a hidden layer with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, width),
    )
