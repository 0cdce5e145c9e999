"""Caption and image embeddings on disk, and the search for them."""

from pathlib import Path

import numpy as np

from likewise.artifacts import Artifact, load_array, mmap_array, shard_name
from likewise.data.dataset import CaptionDataset
from likewise.embeddings.config import Modality
from likewise.embeddings.registry import resolve_encoder
from likewise.errors import ArtifactError, LikewiseError

ARTIFACT_KIND = "embeddings"


class Embeddings:
    """Embeddings of a dataset on disk, memory-mapped shard by shard.

    Attributes:
        dim: Dimension of the embeddings.
    """

    def __init__(self, path: str | Path) -> None:
        """Open embeddings.

        Raises:
            ArtifactError: if the path holds no complete embeddings.
        """
        self.artifact = Artifact.open(Path(path), ARTIFACT_KIND)
        self.path = self.artifact.path
        self.dim: int = self.artifact.manifest.counts["dim"]

    def __len__(self) -> int:
        return self.artifact.manifest.counts[self.modality]

    @property
    def modality(self) -> Modality:
        """Modality of the rows: captions or images."""
        return self.artifact.manifest.settings.get("modality", "captions")

    @property
    def encoder_name(self) -> str:
        """Display name of the encoder."""
        return self.artifact.manifest.settings["encoder"]

    @property
    def num_zero_vectors(self) -> int:
        """Number of zero rows: captions without known words."""
        return self.artifact.manifest.counts.get("num_zero_vectors", 0)

    @property
    def num_shards(self) -> int:
        """Number of shards, equal to that of the dataset."""
        return self.artifact.manifest.counts["shards"]

    def load_vectors(self, shard: int) -> np.ndarray:
        """Return the embeddings of one shard, (n, d) float16, memory-mapped."""
        return mmap_array(self.path / shard_name("vectors", shard, "npy"))

    def load_image_ids(self, shard: int) -> np.ndarray:
        """Return the sample index of each row of one shard, (n,) int64, ascending."""
        return load_array(self.path / shard_name("ids", shard, "npy"))

    def load_shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the embeddings and sample indices of one shard."""
        return self.load_vectors(shard), self.load_image_ids(shard)

    def load_mean_vectors(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the normalized mean embedding of each sample of one shard.

        Returns:
            Unit vectors, (m, d) float32, and sample indices, (m,) int64, without samples of zero mean.
        """
        vectors, row_image_ids = self.load_shard(shard)
        image_ids, starts = np.unique(row_image_ids, return_index=True)
        if not len(image_ids):
            return np.empty((0, self.dim), np.float32), image_ids
        sums = np.add.reduceat(vectors.astype(np.float32), starts, axis=0)
        norms = np.linalg.norm(sums, axis=1)
        is_nonzero = norms > 1e-6
        return sums[is_nonzero] / norms[is_nonzero, None], image_ids[is_nonzero]


def find_embeddings(
    dataset: CaptionDataset, encoder: str | None, *, modality: Modality = "captions"
) -> Embeddings:
    """Find the complete embeddings of a dataset.

    Args:
        dataset: The dataset.
        encoder: Name of the encoder as passed to `embed`, its display name (which contains the options, such
            as `hf:bert-base-uncased+cls`), or the folder name of the embeddings; defaults to the only
            embeddings.
        modality: Modality of the embeddings.

    Raises:
        ArtifactError: if there are no embeddings, or several and `encoder` is None.
    """
    artifacts = Artifact.find(dataset.path / "embeddings", ARTIFACT_KIND)
    matches = [e for e in (Embeddings(artifact.path) for artifact in artifacts) if e.modality == modality]
    if encoder is not None:
        matches = _filter_by_encoder(matches, encoder)
    if not matches:
        by_encoder = "" if encoder is None else f" by {encoder}"
        raise ArtifactError(
            f"{dataset.path} has no embeddings of {modality}{by_encoder}; embed the dataset first",
            field="encoder",
            path=dataset.path,
        )
    if len(matches) > 1:
        has_same_names = len({embeddings.encoder_name for embeddings in matches}) < len(matches)
        names = ", ".join(
            embeddings.path.name if has_same_names else embeddings.encoder_name for embeddings in matches
        )
        raise ArtifactError(
            f"{dataset.path} has embeddings by several encoders ({names}); set `encoder` to one of them",
            field="encoder",
            path=dataset.path,
        )
    return matches[0]


def embedding_names(dataset: CaptionDataset) -> set[str]:
    """Return the encoder names and folder names of the embeddings of a dataset."""
    artifacts = Artifact.find(dataset.path / "embeddings", ARTIFACT_KIND)
    return {
        name
        for item in map(Embeddings, (a.path for a in artifacts))
        for name in (item.encoder_name, item.path.name)
    }


def _filter_by_encoder(available: list[Embeddings], encoder: str) -> list[Embeddings]:
    """Return the embeddings with the same weights; if several options were used, those of the same name."""
    try:
        spec = resolve_encoder(encoder)
    except LikewiseError:
        # The files of the encoder may have been deleted; match by name.
        same_name = [
            embeddings
            for embeddings in available
            if encoder in (embeddings.encoder_name, embeddings.path.name)
        ]
        if same_name:
            return same_name
        raise
    same_weights = [
        embeddings
        for embeddings in available
        if embeddings.artifact.manifest.inputs["encoder"] == spec.weights_id
    ]
    same_name = [
        embeddings
        for embeddings in available
        if {embeddings.encoder_name, embeddings.path.name} & {encoder, spec.name}
    ]
    same_both = [embeddings for embeddings in same_weights if embeddings in same_name]
    return same_both or same_weights or same_name
