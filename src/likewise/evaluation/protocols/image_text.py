"""Image-text retrieval: recall at k from images to captions and from captions to images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.captioned import CaptionedDataset
from likewise.evaluation.protocols.base import EvalContext, Protocol, Score
from likewise.evaluation.protocols.retrieval import check_recall_ks
from likewise.evaluation.results import ResultRow
from likewise.evaluation.statistics import bootstrap

# Similarities per block: 64 MiB in float32, independent of the number of images.
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True, kw_only=True)
class ImageTextConfig:
    """Options of image-text retrieval."""

    recall_ks: tuple[int, ...] = (1, 5, 10)
    """Values of k at which recall is reported."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_recall_ks(self.recall_ks)


def image_text_hits(
    image_embeddings: Float[Tensor, "n j"],
    text_embeddings: Float[Tensor, "t j"],
    image_ids: Int[Tensor, " t"],
    ks: Sequence[int],
) -> tuple[Bool[np.ndarray, "n k"], Bool[np.ndarray, "t k"]]:
    """Retrieve captions for each image and images for each caption, by cosine similarity.

    Ties go to the smaller index. An image is a hit if any of its captions is among the top k (the protocol of
    Karpathy and Fei-Fei 2015, as used by CLIP and its successors).

    Args:
        image_embeddings: (n, j) images in the joint embedding space.
        text_embeddings: (t, j) captions in the joint embedding space.
        image_ids: (t,) int64, the image of each caption.
        ks: Values of k.

    Returns:
        Hits of image-to-text retrieval (n, k) and of text-to-image retrieval (t, k), bool.

    Raises:
        InvalidInputError: A k is below 1.
        ValueError: There is no caption, or the number of captions and image ids differ.
    """
    check_recall_ks(ks)
    if len(image_ids) != len(text_embeddings) or not len(text_embeddings):
        raise ValueError(f"expected one image id per caption, got {len(image_ids)}, {len(text_embeddings)}")
    image_embeddings, text_embeddings = normalize(image_embeddings, dim=1), normalize(text_embeddings, dim=1)
    all_images = torch.arange(len(image_embeddings))
    image_to_text = _recall_hits(image_embeddings, text_embeddings, all_images, image_ids, ks)
    text_to_image = _recall_hits(text_embeddings, image_embeddings, image_ids, all_images, ks)
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


class ImageText(Protocol):
    """Image-text retrieval on a captioned dataset."""

    name = "image-text"
    title = "Image-text retrieval"
    summary = "retrieve captions by images and images by captions, with a text tower"
    requires = "captions"
    item_nouns = ("query", "queries")
    config: ImageTextConfig

    def run(self, context: EvalContext) -> list[Score]:
        """Use every image and every caption as a query."""
        dataset, text_alignment = context.dataset, context.text_alignment
        if not isinstance(dataset, CaptionedDataset):
            raise InvalidInputError(f"{dataset.path} has no captions", path=dataset.path)
        indices, ks = context.features.indices, self.config.recall_ks
        captions = [dataset.captions[index] for index in indices]
        image_ids = np.repeat(np.arange(len(indices)), [len(image_captions) for image_captions in captions])
        image_to_text, text_to_image = image_text_hits(
            text_alignment.project_image(torch.from_numpy(context.features.vectors[indices])),
            text_alignment.encode_text([c for image_captions in captions for c in image_captions]),
            torch.from_numpy(image_ids),
            ks,
        )
        scores = []
        for direction, hits, groups in (
            ("image to text", image_to_text, None),
            ("text to image", text_to_image, image_ids),
        ):
            for k, per_item in zip(ks, hits.T.astype(np.float64), strict=True):
                estimate, metric = bootstrap(per_item, groups), f"{direction} recall@{k}"
                scores.append(Score(metric=metric, estimate=estimate, per_item=per_item, groups=groups))
        return scores

    @classmethod
    def explain(cls, row: ResultRow) -> str:
        """Describe the two directions."""
        return (
            "Each test image retrieves its captions among all captions, and each caption its image. Recall@k "
            "is the fraction of queries with a hit among the top k."
        )

    @classmethod
    def success_phrase(cls, row: ResultRow) -> str:
        """Return the phrase for one query."""
        return "retrieve the match"
