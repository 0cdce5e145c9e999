"""What a loss asks of a pair: one final class a method."""

from collections.abc import Callable

from torch import nn

from likewise.errors import InputError, close_matches
from likewise.pretraining.methods.base import Method
from likewise.pretraining.methods.contrastive import SimCLR
from likewise.pretraining.methods.pair_classifier import PairClassifier
from likewise.pretraining.settings import HEAD, TrainSettings


def _simclr(settings: TrainSettings, backbone: nn.Module, width: int) -> Method:
    return SimCLR(
        backbone,
        width,
        temperature=settings.temperature,
        head=HEAD,
        negatives=settings.negatives,
        alike=settings.alike,
    )


def _pair_classifier(settings: TrainSettings, backbone: nn.Module, width: int) -> Method:
    return PairClassifier(
        backbone,
        width,
        unlike=settings.unlike,
        ratio=settings.negative_ratio,
        margin=settings.margin,
    )


METHODS: dict[str, Callable[[TrainSettings, nn.Module, int], Method]] = {
    "simclr": _simclr,
    "pair-classifier": _pair_classifier,
}


def needs_captions(settings: TrainSettings) -> bool:
    """Tell whether the method must know how alike the captions of a batch are."""
    return settings.method == "pair-classifier" or settings.negatives != "all"


def check_method(name: str) -> None:
    """Refuse an unknown method.

    Raises:
        InputError: listing the known ones.
    """
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise InputError(f"unknown method {name!r}; known: {known}.{close_matches(name, list(METHODS))}")


def build_method(settings: TrainSettings, backbone: nn.Module, width: int) -> Method:
    """Put the settings' method on a backbone of `width` features."""
    check_method(settings.method)
    return METHODS[settings.method](settings, backbone, width)
