"""Images and words in one space: classes by their names alone, and captions and images by each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from likewise.models.text_tower import Language

# Similarities held at a time: 64 MiB in float32, whatever the number of images.
_CELLS = 2**24


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Settings: the sentences that a class name is put into, at `{}`."""

    templates: tuple[str, ...] = ("a photo of a {}.",)


def zero_shot(
    settings: ZeroShot, features: Float[Tensor, "m d"], classes: Sequence[str], language: Language
) -> Int[Tensor, " m"]:
    """Give each image the class whose name, put into sentences, is nearest.

    As in Radford et al. 2021, section 3.1.4: a class is the mean of its sentences' unit vectors, scaled to
    unit length. Underscores in names are read as spaces.

    Raises:
        ValueError: a template without `{}`.
    """
    if not settings.templates or any("{}" not in template for template in settings.templates):
        raise ValueError(f"each template needs a {{}} for the class, got {settings.templates}")
    sentences = [t.replace("{}", name.replace("_", " ")) for name in classes for t in settings.templates]
    texts = normalize(language.embed(sentences), dim=1).unflatten(0, (len(classes), -1)).mean(dim=1)
    return (language.project(features) @ normalize(texts, dim=1).T).argmax(dim=1)


def match_captions(
    images: Float[Tensor, "n j"], texts: Float[Tensor, "t j"], owners: Int[Tensor, " t"], ks: Sequence[int]
) -> tuple[Bool[np.ndarray, "n k"], Bool[np.ndarray, "t k"]]:
    """Look for each image among the captions, and for each caption among the images.

    Of equal similarities the smaller index comes first. An image is found where any of its captions is among
    the first k (the protocol of Karpathy and Fei-Fei 2015, as CLIP and its successors follow it).

    Args:
        images: Images in the space of captions.
        texts: All captions.
        owners: The image of each caption.
        ks: The depths.

    Returns:
        Whether an image finds a caption of its own, and whether a caption finds its image, at each depth.

    Raises:
        ValueError: a depth below one, or captions of no image.
    """
    if min(ks, default=1) < 1 or len(owners) != len(texts) or not len(texts):
        raise ValueError(f"expected depths of at least 1 and an owner a caption, got {ks}, {len(owners)}")
    images, texts = normalize(images, dim=1), normalize(texts, dim=1)
    by_image = _search(images, texts, torch.arange(len(images)), owners, ks)
    by_text = _search(texts, images, owners, torch.arange(len(images)), ks)
    return by_image, by_text


def _search(
    queries: Float[Tensor, "q j"],
    gallery: Float[Tensor, "g j"],
    wanted: Int[Tensor, " q"],
    owners: Int[Tensor, " g"],
    ks: Sequence[int],
) -> Bool[np.ndarray, "q k"]:
    found = []
    for rows in torch.arange(len(queries)).split(max(1, _CELLS // len(gallery))):
        order = (queries[rows] @ gallery.T).argsort(dim=1, descending=True, stable=True)[:, : max(ks)]
        right = owners[order] == wanted[rows, None]
        found.append(torch.stack([right[:, :k].any(dim=1) for k in ks], dim=1))
    return torch.cat(found).numpy()
