"""Search constraints: which rows may be neighbors of each other, as integer codes per row."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from likewise.data.dataset import CaptionDataset
from likewise.data.filters import DatasetView
from likewise.data.perceptual_hash import compute_perceptual_hashes, find_near_duplicate_clusters
from likewise.errors import InvalidInputError
from likewise.neighbors.config import SearchConfig
from likewise.progress import NULL_PROGRESS, Progress

_NON_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchConstraints:
    """Which of n rows may be neighbors of each other; all of them by default.

    Attributes:
        exclude: (n, m) int64; rows with an equal code >= 0 in any column are no neighbors.
        require: (n,) int64; only rows with an equal code >= 0 are neighbors.
        image_ids: (n,) int64 >= 0, the image of each row; rows of one image are no neighbors, and of another
            image only the nearest row is one.
    """

    exclude: np.ndarray | None = None
    require: np.ndarray | None = None
    image_ids: np.ndarray | None = None

    def validate(self, num_rows: int) -> None:
        """Check the shapes.

        Raises:
            InvalidInputError: if an array does not have one code per row.
        """
        for name, ndim in (("exclude", 2), ("require", 1), ("image_ids", 1)):
            codes = getattr(self, name)
            if codes is not None and (len(codes) != num_rows or codes.ndim != ndim):
                raise InvalidInputError(
                    f"`{name}` has the shape {codes.shape}, for {num_rows} vectors", field=name
                )

    def exclusion_columns(self) -> Iterator[np.ndarray]:
        """Yield the codes that must differ, (n,) int64 each: the columns of `exclude`, and `image_ids`."""
        if self.exclude is not None:
            yield from self.exclude.T
        if self.image_ids is not None:
            yield self.image_ids

    @property
    def is_trivial(self) -> bool:
        """Return whether all rows may be neighbors."""
        return self.require is None and next(self.exclusion_columns(), None) is None

    def admissible(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return which pairs are admissible: (p,), (p,) -> (p,) bool."""
        mask = np.ones(len(rows), bool)
        for ids in self.exclusion_columns():
            row_ids = ids[rows]
            mask &= (row_ids != ids[columns]) | (row_ids < 0)
        if self.require is not None:
            row_ids = self.require[rows]
            mask &= (row_ids == self.require[columns]) & (row_ids >= 0)
        return mask

    def mask_scores(self, scores: Tensor, rows: np.ndarray, columns: np.ndarray) -> None:
        """Set the inadmissible scores of a block to -inf: (m, c), of rows (m,) and columns (c,)."""
        for ids in self.exclusion_columns():
            row_ids = np.where(ids[rows] < 0, -2, ids[rows])
            scores.masked_fill_(_pairwise_equal(row_ids, ids[columns], scores.device), -torch.inf)
        if self.require is not None:
            is_equal = _pairwise_equal(
                np.where(self.require[rows] < 0, -2, self.require[rows]), self.require[columns], scores.device
            )
            scores.masked_fill_(is_equal.logical_not_(), -torch.inf)


def _pairwise_equal(rows: np.ndarray, columns: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(rows).to(device)[:, None] == torch.from_numpy(columns).to(device)


def corpus_constraints(
    view: DatasetView,
    search_config: SearchConfig,
    image_ids: np.ndarray,
    caption_ids: np.ndarray | None = None,
    *,
    progress: Progress = NULL_PROGRESS,
) -> SearchConstraints:
    """Return the constraints of a search config for the rows of a search.

    Args:
        view: The dataset and what its filter leaves.
        search_config: The search.
        image_ids: The image of each row, (m,) int64.
        caption_ids: The caption of each row, (m,) int64, if rows are captions.
        progress: Progress reporter.

    Raises:
        InvalidInputError: if `group_scope` requires groups and the dataset has none.
    """
    exclude, require = [], None
    if search_config.exclude_near_duplicates:
        hashes = compute_perceptual_hashes(view.dataset, progress=progress)
        exclude.append(find_near_duplicate_clusters(hashes)[image_ids])
    if search_config.group_scope != "any":
        group_ids = _encode_groups(view.dataset, search_config)[image_ids]
        # An image without a group has no neighbors, in a different group neither.
        require = group_ids if search_config.group_scope == "same" else np.where(group_ids >= 0, 0, -1)
        if search_config.group_scope == "different":
            exclude.append(group_ids)
    if search_config.exclude_identical_captions:
        hashes = caption_hashes(view, per_caption=caption_ids is not None)
        exclude.append(hashes[image_ids if caption_ids is None else caption_ids])
    return SearchConstraints(
        exclude=np.column_stack(exclude) if exclude else None,
        require=require,
        image_ids=None if caption_ids is None else image_ids,
    )


def _encode_groups(dataset: CaptionDataset, search_config: SearchConfig) -> np.ndarray:
    group_ids = encode_column(dataset, "group")
    if (group_ids < 0).all():
        raise InvalidInputError(
            f"no image of {dataset.path} has a group, which `group_scope` {search_config.group_scope!r} "
            "requires; import the dataset with `group_column`",
            field="group_scope",
        )
    return group_ids


def encode_column(dataset: CaptionDataset, column: str) -> np.ndarray:
    """Return the values of `group` or `label` as integer codes: (n,) int64, -1 for images without one."""
    id_of: dict[str, int] = {}
    ids = [
        -1 if value is None else id_of.setdefault(value, len(id_of))
        for shard in range(len(dataset.shard_paths))
        for value in dataset.read_columns(shard, [column])[column]
    ]
    return np.array(ids, np.int64)


def caption_hashes(view: DatasetView, *, per_caption: bool) -> np.ndarray:
    """Return 63-bit hashes of captions that ignore case, spaces and punctuation.

    With `per_caption`, one hash per caption, (num_captions,) int64; otherwise one per image over its captions
    that the view includes, (n,) int64, -1 for images without any.
    """
    hashes: list[int] = []
    dataset = view.dataset
    for shard, start in enumerate(dataset.shard_offsets[:-1]):
        for position, captions in enumerate(dataset.read_columns(shard, ["captions"])["captions"], start):
            if per_caption:
                hashes += [_hash_text(normalize_text(caption)) for caption in captions]
                continue
            included = [caption for caption in captions if not view.excludes_caption(position, caption)]
            hashes.append(_hash_text("\n".join(sorted(map(normalize_text, included)))) if included else -1)
    return np.array(hashes, np.int64)


def normalize_text(caption: str) -> str:
    """Return a caption in lower case, reduced to words and single spaces."""
    return _NON_WORD.sub(" ", caption.casefold()).strip()


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
