"""The neighbors artifact: the nearest images of each image of a dataset."""

import logging
from dataclasses import fields
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from likewise.artifacts import (
    MANIFEST,
    Artifact,
    atomic_write,
    config_hash,
    damaged_as_error,
    shard_name,
    slugify,
)
from likewise.data.dataset import CaptionDataset
from likewise.data.filters import DatasetView, open_view
from likewise.data.perceptual_hash import MAX_HAMMING, MAX_THUMBNAIL_RMS
from likewise.embeddings.store import Embeddings, find_embeddings
from likewise.errors import ArtifactError, InvalidInputError
from likewise.neighbors.config import DEFAULT_K, SearchConfig
from likewise.neighbors.faiss_index import IVFIndex
from likewise.neighbors.search import ExactIndex, Index
from likewise.neighbors.vectors import ImageVectors, SearchCorpus, build_search_corpus
from likewise.parallel import resolve_device
from likewise.progress import NULL_PROGRESS, Progress

logger = logging.getLogger(__name__)

ARTIFACT_KIND = "neighbors"
MAX_EXACT_ROWS = 1_000_000  # rows up to which `auto` is exact
_QUERY_BATCH_SIZE = 4096  # each call to an index reads all vectors

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("neighbors", pa.list_(pa.int64()), nullable=False),
        pa.field("similarity", pa.list_(pa.float32()), nullable=False),
    ]
)


class Neighbors:
    """Neighbors on disk: one row per image, or per caption with `caption_pooling` 'sample'.

    Attributes:
        k: Maximum number of neighbors per row.
        encoder: Display name of the encoder of the embeddings.
        embeddings_key: Key of the embeddings.
    """

    def __init__(self, path: str | Path) -> None:
        """Open neighbors.

        Raises:
            ArtifactError: if the path holds no complete neighbors.
        """
        self.artifact = Artifact.open(Path(path), ARTIFACT_KIND)
        self.path = self.artifact.path
        with damaged_as_error(self.path / MANIFEST):
            self.k: int = index(self.artifact.manifest.settings["k"])
        self.encoder: str = self.artifact.manifest.settings["encoder"]
        self.embeddings_key: str = self.artifact.manifest.inputs["embeddings"]

    @property
    def order_key(self) -> str:
        """Hash of the order of neighbors; that of an exact search does not depend on k."""
        manifest = self.artifact.manifest
        if manifest.settings["index"] != "exact":
            return manifest.key
        settings = {name: value for name, value in manifest.settings.items() if name != "k"}
        return config_hash(ARTIFACT_KIND, settings, manifest.inputs)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.artifact.manifest.counts["rows"]

    def topk(self, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the first k neighbors of each row, all by default.

        Returns:
            Positions (n, k) int64, nearest first, padded with -1; and similarities (n, k) float32, padded
            with -inf.

        Raises:
            ArtifactError: if there are fewer than k neighbors per row.
        """
        width = self.k if k is None else k
        if not 1 <= width <= self.k:
            raise ArtifactError(
                f"{self.path} has {self.k} neighbors per row, not {width}; search with a larger `k`",
                field="k",
                path=self.path,
            )
        self._check_rows()
        with damaged_as_error(self.path / MANIFEST):  # a damaged `k` may exceed the memory
            positions = np.full((len(self), width), -1, np.int64)
            similarity = np.full((len(self), width), -np.inf, np.float32)
        row_start = 0
        for shard in range(self.artifact.manifest.counts["shards"]):
            path = self.path / shard_name("neighbors", shard, "parquet")
            with damaged_as_error(path):
                table = pq.read_table(path)
                neighbor_lists = table["neighbors"].combine_chunks()
                lengths = neighbor_lists.value_lengths().to_numpy()
                rank = _ranks_in_lists(lengths)
                mask = rank < width
                row_index = row_start + np.repeat(np.arange(len(lengths)), lengths)[mask]
                positions[row_index, rank[mask]] = neighbor_lists.flatten().to_numpy()[mask]
                similarity[row_index, rank[mask]] = (
                    table["similarity"].combine_chunks().flatten().to_numpy()[mask]
                )
            row_start += len(lengths)
        return positions, similarity

    def _check_rows(self) -> None:
        """Raise ArtifactError if the shards do not hold the rows of the manifest."""
        num_rows = 0
        for shard in range(self.artifact.manifest.counts["shards"]):
            path = self.path / shard_name("neighbors", shard, "parquet")
            with damaged_as_error(path):
                num_rows += pq.read_metadata(path).num_rows
        if num_rows != len(self):
            raise ArtifactError(
                f"{self.path} is damaged: it has {num_rows:,} rows instead of {len(self):,}; delete the "
                "folder and search again",
                path=self.path,
            )


def _ranks_in_lists(lengths: np.ndarray) -> np.ndarray:
    """Return the index of each entry within its list, for concatenated lists of these lengths."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def find_neighbors(
    dataset: CaptionDataset | str | Path,
    encoder: str | None = None,
    *,
    k: int = DEFAULT_K,
    search_config: SearchConfig | None = None,
    use_image_embeddings: bool = False,
    memory_mb: int = 512,
    device: str | None = None,
    progress: Progress = NULL_PROGRESS,
) -> Neighbors:
    """Find the k nearest images of each image; writes `DATASET/neighbors/…`.

    Images without a caption are no neighbors and have none.

    Args:
        dataset: A dataset or its path.
        encoder: Name of the embeddings; may be omitted if there is only one.
        k: Neighbors per image.
        search_config: Which images are compared, and how.
        use_image_embeddings: Compare images by image embeddings instead of captions; implied by an `encoder`
            that starts with `image:`.
        memory_mb: Memory of blocks of similarities in MiB; the vectors are memory-mapped.
        device: Device of the search; chosen automatically by default.
        progress: Progress reporter.

    Raises:
        InvalidInputError: if `k` is below 1 or the dataset has too few images.
        ArtifactError: if embeddings are missing.
    """
    dataset, search_config = CaptionDataset.open(dataset), search_config or SearchConfig()
    use_image_embeddings = use_image_embeddings or (encoder or "").startswith("image:")
    embeddings = find_embeddings(dataset, encoder, modality="images" if use_image_embeddings else "captions")
    if k < 1:
        raise InvalidInputError(f"`k` must be at least 1, got {k}", field="k")
    view = open_view(dataset, search_config.filter)
    num_comparable = _num_comparable(view, embeddings)
    if num_comparable <= k:
        description = _describe_corpus(view, embeddings, search_config, num_comparable)
        raise InvalidInputError(f"{description}; `k` {k} requires at least {k + 1}", field="k")
    return _compute_neighbors(view, embeddings, search_config, k, memory_mb * 2**20, device, progress)


def _compute_neighbors(
    view: DatasetView,
    embeddings: Embeddings,
    search_config: SearchConfig,
    k: int,
    memory_bytes: int,
    device: str | None,
    progress: Progress,
) -> Neighbors:
    dataset, device = view.dataset, resolve_device(device)
    settings, inputs = _settings_and_inputs(view, embeddings, search_config)
    settings["k"] = k
    folder_name = f"{slugify(settings['encoder'])}-k{k}-{config_hash(ARTIFACT_KIND, settings, inputs)[:8]}"
    path = dataset.path / "neighbors" / folder_name
    with Artifact.exclusive(path, ARTIFACT_KIND, settings, inputs) as artifact:
        if artifact.is_complete:
            logger.info(f"neighbors by {settings['encoder']} already exist: {path}")
        else:
            _search(view, embeddings, search_config, artifact, memory_bytes, device, progress)
    return Neighbors(path)


def _search(
    view: DatasetView,
    embeddings: Embeddings,
    search_config: SearchConfig,
    artifact: Artifact,
    memory_bytes: int,
    device: str,
    progress: Progress,
) -> None:
    """Write the missing shards and finish the artifact."""
    dataset, settings = view.dataset, artifact.manifest.settings
    with build_search_corpus(view, embeddings, search_config, artifact.path, progress=progress) as corpus:
        index = _build_index(corpus, settings, memory_bytes, device)
        num_with_neighbors = _search_missing_shards(dataset, artifact, corpus, index, progress)
        num_rows = len(corpus.all_image_ids) if settings["caption_pooling"] == "sample" else len(dataset)
    counts = {
        "images": len(dataset),
        "rows": num_rows,
        "shards": len(dataset.shard_paths),
        "with_neighbors": num_with_neighbors,
    }
    if isinstance(index, IVFIndex):
        counts["recall_permille"] = round(1000 * index.recall)
    artifact.finish(counts)


def _num_comparable(view: DatasetView, embeddings: Embeddings) -> int:
    """Return the number of images of the view that have a vector."""
    caption_mask = None if embeddings.modality == "images" else view.caption_mask
    has_vector = ImageVectors(embeddings, len(view.dataset), caption_mask).captions_per_image > 0
    return int((has_vector & view.image_mask).sum())


def _describe_corpus(
    view: DatasetView, embeddings: Embeddings, search_config: SearchConfig, num_comparable: int
) -> str:
    unit = "a vector" if embeddings.modality == "images" else "a caption"
    filter_phrase = "" if search_config.filter is None else f" after {search_config.filter}"
    return f"{num_comparable} images of {view.dataset.path} have {unit} to compare{filter_phrase}"


def find_or_compute_neighbors(
    view: DatasetView,
    embeddings: Embeddings,
    search_config: SearchConfig,
    k: int,
    *,
    device: str | None = None,
    progress: Progress = NULL_PROGRESS,
) -> Neighbors:
    """Return at least k neighbors per image: existing ones, or the result of a new search.

    In a dataset with fewer than k other images, rows hold as many neighbors as there are.

    Raises:
        InvalidInputError: if fewer than two images can be compared.
    """
    dataset = view.dataset
    settings, inputs = _settings_and_inputs(view, embeddings, search_config)
    matches = []
    for artifact in Artifact.find(dataset.path / "neighbors", ARTIFACT_KIND):
        neighbors = Neighbors(artifact.path)
        other_settings = {
            name: value for name, value in neighbors.artifact.manifest.settings.items() if name != "k"
        }
        if other_settings == settings and neighbors.artifact.manifest.inputs == inputs and neighbors.k >= k:
            matches.append(neighbors)
    if matches:
        return min(matches, key=lambda n: n.k)
    num_comparable = _num_comparable(view, embeddings)
    if num_comparable < 2:
        description = _describe_corpus(view, embeddings, search_config, num_comparable)
        raise InvalidInputError(f"{description}; pairs require at least 2", path=view.dataset.path)
    return _compute_neighbors(
        view, embeddings, search_config, max(k, DEFAULT_K), 512 * 2**20, device, progress
    )


def _settings_and_inputs(
    view: DatasetView, embeddings: Embeddings, search_config: SearchConfig
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings of a search, except k, and its inputs."""
    use_image_embeddings = embeddings.modality == "images"
    num_rows = (
        len(embeddings)
        if search_config.caption_pooling != "mean" and not use_image_embeddings
        else len(view.dataset)
    )
    index_type = (
        ("exact" if num_rows <= MAX_EXACT_ROWS else "ivf")
        if search_config.index == "auto"
        else search_config.index
    )
    settings: dict[str, Any] = {"encoder": embeddings.encoder_name, "metric": "cosine"}
    # `search_config` may be a PairConfig, whose other fields do not change the search.
    settings |= {field.name: getattr(search_config, field.name) for field in fields(SearchConfig)}
    settings |= {
        "index": index_type,
        "caption_pooling": "none" if use_image_embeddings else search_config.caption_pooling,
    }
    del settings["filter"]
    if index_type == "exact":
        del settings["target_recall"]
    if search_config.exclude_near_duplicates:
        settings["near_duplicates"] = [MAX_HAMMING, MAX_THUMBNAIL_RMS]
    inputs = {"embeddings": embeddings.artifact.manifest.key}
    if view.filter is not None:
        inputs["filter"] = view.filter.key
    return settings, inputs


def _build_index(corpus: SearchCorpus, settings: dict[str, Any], memory_bytes: int, device: str) -> Index:
    if settings["index"] == "exact":
        return ExactIndex(corpus.vectors, corpus.constraints, memory_bytes=memory_bytes, device=device)
    index = IVFIndex(
        corpus.vectors,
        corpus.constraints,
        memory_bytes=memory_bytes,
        target_recall=settings["target_recall"],
    )
    logger.info(
        f"approximate index: nprobe {index.nprobe:,} of {index.nlist:,} lists; "
        f"recall@10 {index.recall:.3f} on {index.sample_size:,} images"
    )
    return index


def _search_missing_shards(
    dataset: CaptionDataset, artifact: Artifact, corpus: SearchCorpus, index: Index, progress: Progress
) -> int:
    """Write the missing shards and return the number of rows with a neighbor."""
    settings = artifact.manifest.settings
    paths = [artifact.path / shard_name("neighbors", i, "parquet") for i in range(len(dataset.shard_paths))]
    row_bounds = np.searchsorted(corpus.image_ids, dataset.shard_offsets)
    num_done = sum(int(row_bounds[i + 1] - row_bounds[i]) for i, path in enumerate(paths) if path.is_file())
    num_with_neighbors = 0
    with progress.task("neighbors", len(corpus.image_ids), "rows", num_done) as bar:
        for shard, path in enumerate(paths):
            if not path.is_file():
                rows = np.arange(row_bounds[shard], row_bounds[shard + 1])
                results = []
                for start in range(0, len(rows), _QUERY_BATCH_SIZE):
                    batch = rows[start : start + _QUERY_BATCH_SIZE]
                    results.append(index.search(batch, settings["k"]))
                    bar.update(len(batch))
                _write_shard(path, dataset, shard, corpus, settings, rows, results)
            lengths = pq.read_table(path, columns=["neighbors"])["neighbors"].combine_chunks().value_lengths()
            num_with_neighbors += int((lengths.to_numpy() > 0).sum())
    return num_with_neighbors


def _write_shard(
    path: Path,
    dataset: CaptionDataset,
    shard: int,
    corpus: SearchCorpus,
    settings: dict[str, Any],
    rows: np.ndarray,
    results: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    """Write one shard: one row per image, or per included caption with `caption_pooling` 'sample'."""
    k = settings["k"]
    neighbors = np.concatenate([n for n, _ in results]) if results else np.empty((0, k), np.int64)
    similarity = np.concatenate([s for _, s in results]) if results else np.empty((0, k), np.float32)
    neighbors = np.append(corpus.image_ids, -1)[neighbors]
    start, stop = dataset.shard_offsets[shard], dataset.shard_offsets[shard + 1]
    ids = np.array(dataset.read_columns(shard, ["id"])["id"], object)
    if settings["caption_pooling"] == "sample":
        table_rows, image_index = _caption_rows(corpus, start, stop, rows)
    elif settings["caption_pooling"] == "max":
        neighbors, similarity, image_ids = _max_pool_captions(
            neighbors, similarity, corpus.image_ids[rows], k
        )
        table_rows, image_index = image_ids - start, np.arange(stop - start)
    else:
        table_rows, image_index = corpus.image_ids[rows] - start, np.arange(stop - start)
    lengths = np.zeros(len(image_index), np.int64)
    lengths[table_rows] = (neighbors >= 0).sum(axis=1)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    neighbor_lists = pa.ListArray.from_arrays(offsets, pa.array(neighbors[neighbors >= 0]))
    similarity_lists = pa.ListArray.from_arrays(offsets, pa.array(similarity[neighbors >= 0]))
    table = pa.table(
        {"id": ids[image_index], "neighbors": neighbor_lists, "similarity": similarity_lists}, schema=SCHEMA
    )
    with atomic_write(path) as tmp_path:
        pq.write_table(table, tmp_path)


def _caption_rows(
    corpus: SearchCorpus, first_image: int, last_image: int, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of each searched caption in the table of a shard, and the image of each table row."""
    start, stop = np.searchsorted(corpus.all_image_ids, [first_image, last_image])
    return corpus.row_ids[rows] - start, corpus.all_image_ids[start:stop] - first_image


def _max_pool_captions(
    neighbors: np.ndarray, similarity: np.ndarray, image_ids: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge the rows of the captions of each image: the top k images by maximum similarity.

    Ties are broken round-robin, as in `expand_duplicates`.
    """
    query = np.repeat(image_ids, neighbors.shape[1])
    neighbor, score = neighbors.ravel(), similarity.ravel()
    order = np.lexsort((-score, neighbor, query))
    order = order[neighbor[order] >= 0]
    query, neighbor, score = query[order], neighbor[order], score[order]
    is_first = np.ones(len(neighbor), bool)
    is_first[1:] = (query[1:] != query[:-1]) | (neighbor[1:] != neighbor[:-1])
    query, neighbor, score = query[is_first], neighbor[is_first], score[is_first]
    wraps_around = np.where(neighbor > query, 0, 1)
    order = np.lexsort((neighbor, wraps_around, -score, query))
    query, neighbor, score = query[order], neighbor[order], score[order]
    unique_queries, starts = np.unique(query, return_index=True)
    rank = np.arange(len(query)) - np.repeat(starts, np.diff(np.append(starts, len(query))))
    mask = rank < k
    row = np.searchsorted(unique_queries, query[mask])
    topk_neighbors = np.full((len(unique_queries), k), -1, np.int64)
    topk_similarity = np.full((len(unique_queries), k), -np.inf, np.float32)
    topk_neighbors[row, rank[mask]], topk_similarity[row, rank[mask]] = neighbor[mask], score[mask]
    return topk_neighbors, topk_similarity, unique_queries
