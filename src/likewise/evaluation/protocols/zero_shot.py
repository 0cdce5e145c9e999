"""Images and words in one space: classes by their names alone, and captions and images by each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from likewise.models.text_tower import TextAlignment

# Similarities held at a time: 64 MiB in float32, whatever the number of images.
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """Settings: the sentences that a class name is put into, at `{}`."""

    prompts: tuple[str, ...] = ("a photo of a {}.",)


def zero_shot_predict(
    config: ZeroShotConfig,
    features: Float[Tensor, "m d"],
    class_names: Sequence[str],
    text_alignment: TextAlignment,
) -> Int[Tensor, " m"]:
    """Give each image the class whose name, put into sentences, is nearest.

    As in Radford et al. 2021, section 3.1.4: a class is the mean of its sentences' unit vectors, scaled to
    unit length. Underscores in names are read as spaces.

    Raises:
        ValueError: a template without `{}`.
    """
    if not config.prompts or any("{}" not in prompt for prompt in config.prompts):
        raise ValueError(f"each template needs a {{}} for the class, got {config.prompts}")
    sentences = [
        prompt.replace("{}", name.replace("_", " ")) for name in class_names for prompt in config.prompts
    ]
    class_embeddings = (
        normalize(text_alignment.encode_text(sentences), dim=1)
        .unflatten(0, (len(class_names), -1))
        .mean(dim=1)
    )
    return (text_alignment.project_image(features) @ normalize(class_embeddings, dim=1).T).argmax(dim=1)


def match_captions(
    image_embeddings: Float[Tensor, "n j"],
    text_embeddings: Float[Tensor, "t j"],
    image_ids: Int[Tensor, " t"],
    ks: Sequence[int],
) -> tuple[Bool[np.ndarray, "n k"], Bool[np.ndarray, "t k"]]:
    """Look for each image among the captions, and for each caption among the images.

    Of equal similarities the smaller index comes first. An image is found where any of its captions is among
    the first k (the protocol of Karpathy and Fei-Fei 2015, as CLIP and its successors follow it).

    Args:
        image_embeddings: Images in the space of captions.
        text_embeddings: All captions.
        image_ids: The image of each caption.
        ks: The depths.

    Returns:
        Whether an image finds a caption of its own, and whether a caption finds its image, at each depth.

    Raises:
        ValueError: a depth below one, or captions of no image.
    """
    if min(ks, default=1) < 1 or len(image_ids) != len(text_embeddings) or not len(text_embeddings):
        raise ValueError(f"expected depths of at least 1 and an owner a caption, got {ks}, {len(image_ids)}")
    image_embeddings, text_embeddings = normalize(image_embeddings, dim=1), normalize(text_embeddings, dim=1)
    image_to_text = _recall_hits(
        image_embeddings, text_embeddings, torch.arange(len(image_embeddings)), image_ids, ks
    )
    text_to_image = _recall_hits(
        text_embeddings, image_embeddings, image_ids, torch.arange(len(image_embeddings)), ks
    )
    return image_to_text, text_to_image


def _recall_hits(
    query_embeddings: Float[Tensor, "q j"],
    gallery_embeddings: Float[Tensor, "g j"],
    query_ids: Int[Tensor, " q"],
    gallery_ids: Int[Tensor, " g"],
    ks: Sequence[int],
) -> Bool[np.ndarray, "q k"]:
    hits = []
    for block in torch.arange(len(query_embeddings)).split(
        max(1, _BLOCK_ELEMENTS // len(gallery_embeddings))
    ):
        ranking = (query_embeddings[block] @ gallery_embeddings.T).argsort(
            dim=1, descending=True, stable=True
        )[:, : max(ks)]
        is_match = gallery_ids[ranking] == query_ids[block, None]
        hits.append(torch.stack([is_match[:, :k].any(dim=1) for k in ks], dim=1))
    return torch.cat(hits).numpy()
