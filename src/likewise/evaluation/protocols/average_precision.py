"""Average precision of boxes as COCO counts it, with an interval over images.

The rules are those of pycocotools for all areas and at most 100 detections an image and class: greedy
matching by score, boxes of crowds neither right nor wrong, precision made monotone and read at 101 recalls,
the mean over ten overlaps and all classes that occur. Written anew because an interval needs the curve of
thousands of drawn test sets, and matching, the costly part, is the same for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_MOST = 100


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Boxes of one image, found or true.

    Attributes:
        corners: x0 y0 x1 y1.
        labels: The class of each.
        scores: How sure each is; of true boxes nothing is read.
        crowd: Which true boxes stand for many things at once.
    """

    corners: Float[np.ndarray, "k 4"]
    labels: Int[np.ndarray, " k"]
    scores: Float[np.ndarray, " k"]
    crowd: Bool[np.ndarray, " k"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Average precision of a drawn or the given test set.

    Attributes:
        each: (classes, 10) by class and overlap, NaN for classes that do not occur.
    """

    each: Float[np.ndarray, "c 10"]

    @property
    def ap(self) -> float:
        """The mean over overlaps and classes."""
        return float(np.nanmean(self.each)) if np.isfinite(self.each).any() else 0.0

    @property
    def ap50(self) -> float:
        """The mean over classes at an overlap of 0.5."""
        return float(np.nanmean(self.each[:, 0])) if np.isfinite(self.each).any() else 0.0

    @property
    def ap75(self) -> float:
        """The mean over classes at an overlap of 0.75."""
        return float(np.nanmean(self.each[:, 5])) if np.isfinite(self.each).any() else 0.0


@dataclass(frozen=True, kw_only=True)
class _Matched:
    """All detections of one class, by falling score, and how many true boxes each image has."""

    image: Int[np.ndarray, " d"]
    right: Bool[np.ndarray, "10 d"]
    wrong: Bool[np.ndarray, "10 d"]
    truths: Int[np.ndarray, " n"]


def match(found: Sequence[Boxes], true: Sequence[Boxes], classes: int) -> list[_Matched]:
    """Match what was found in each image with what is there, class by class.

    Raises:
        ValueError: lists of different lengths.
    """
    if len(found) != len(true):
        raise ValueError(f"expected boxes of the same images, got {len(found)} and {len(true)}")
    return [_match_class(found, true, c) for c in range(classes)]


def precision(matched: Sequence[_Matched], counts: Int[np.ndarray, " n"] | None = None) -> Precision:
    """Return average precision, each image counted as often as `counts` says, once where not given."""
    return Precision(each=np.stack([_class_precision(each, counts) for each in matched]))


def bootstrap_precision(
    matched: Sequence[_Matched], resamples: int, seed: int = 0
) -> Float[np.ndarray, "r 3"]:
    """Return AP, AP50 and AP75 of test sets drawn with replacement from the images.

    For the same number of images and seed the same images are drawn, so that two detectors can be compared
    draw by draw.
    """
    images = len(matched[0].truths)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(images, np.full(images, 1 / images), size=resamples)
    found = (precision(matched, counts) for counts in drawn)
    return np.array([(each.ap, each.ap50, each.ap75) for each in found])


def _match_class(found: Sequence[Boxes], true: Sequence[Boxes], label: int) -> _Matched:
    scores, images, right, wrong, truths = [], [], [], [], []
    for number, (shown, there) in enumerate(zip(found, true, strict=True)):
        chosen = np.flatnonzero(shown.labels == label)
        chosen = chosen[np.argsort(-shown.scores[chosen], kind="stable")][:_MOST]
        wanted = np.flatnonzero(there.labels == label)
        wanted = wanted[np.argsort(there.crowd[wanted], kind="stable")]
        crowd = there.crowd[wanted]
        hits, ignored = _match_image(shown.corners[chosen], there.corners[wanted], crowd)
        scores.append(shown.scores[chosen])
        images.append(np.full(len(chosen), number))
        right.append(hits & ~ignored)
        wrong.append(~hits & ~ignored)
        truths.append(int((~crowd).sum()))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return _Matched(
        image=np.concatenate(images)[order],
        right=np.concatenate(right, axis=1)[:, order],
        wrong=np.concatenate(wrong, axis=1)[:, order],
        truths=np.array(truths),
    )


def _match_image(
    found: Float[np.ndarray, "d 4"], true: Float[np.ndarray, "g 4"], crowd: Bool[np.ndarray, " g"]
) -> tuple[Bool[np.ndarray, "10 d"], Bool[np.ndarray, "10 d"]]:
    """Say for each overlap which boxes, the surest first, hit a true one, and which of these hit a crowd."""
    overlap = _overlap(found, true, crowd)
    hits, ignored = (np.zeros((len(THRESHOLDS), len(found)), bool) for _ in range(2))
    for row, threshold in enumerate(THRESHOLDS):
        free = np.ones(len(true), bool)
        for place, line in enumerate(overlap):
            able = (line >= min(threshold, 1 - 1e-10)) & (free | crowd)
            # A true box goes before a crowd; of equal ones the last, as in pycocotools.
            for group in (~crowd, crowd):
                fit = np.flatnonzero(able & group)
                if len(fit):
                    best = fit[len(fit) - 1 - np.argmax(line[fit][::-1])]
                    free[best] = False
                    hits[row, place], ignored[row, place] = True, crowd[best]
                    break
    return hits, ignored


def _overlap(
    found: Float[np.ndarray, "d 4"], true: Float[np.ndarray, "g 4"], crowd: Bool[np.ndarray, " g"]
) -> Float[np.ndarray, "d g"]:
    """Intersection over union; with a crowd, over the area of what was found."""
    low = np.maximum(found[:, None, :2], true[None, :, :2])
    sides = (np.minimum(found[:, None, 2:], true[None, :, 2:]) - low).clip(min=0)
    shared = sides.prod(axis=2)
    own, other = ((box[:, 2:] - box[:, :2]).prod(axis=1) for box in (found, true))
    union = np.where(crowd[None], own[:, None], own[:, None] + other[None] - shared)
    return shared / np.maximum(union, 1e-30)


def _class_precision(matched: _Matched, counts: Int[np.ndarray, " n"] | None) -> Float[np.ndarray, " 10"]:
    weight = np.ones(len(matched.truths)) if counts is None else counts.astype(np.float64)
    wanted = float(weight @ matched.truths)
    if not wanted:
        return np.full(len(THRESHOLDS), np.nan)
    each = weight[matched.image]
    right, wrong = (np.cumsum(part * each, axis=1) for part in (matched.right, matched.wrong))
    recall, share = right / wanted, right / np.maximum(right + wrong, np.spacing(1))
    share = np.maximum.accumulate(share[:, ::-1], axis=1)[:, ::-1]
    found = np.zeros(len(THRESHOLDS))
    for row in range(len(THRESHOLDS)):
        places = np.searchsorted(recall[row], _RECALLS - (1e-12 if counts is not None else 0), side="left")
        reached = places[places < recall.shape[1]]
        found[row] = share[row, reached].sum() / len(_RECALLS)
    return found
