"""Caption and image embeddings on disk, and the search for them."""

from pathlib import Path

import numpy as np

from likewise.artifacts import MANIFEST, Artifact, load_array, mmap_array, shard_name
from likewise.data.dataset import CaptionDataset
from likewise.embeddings.config import Modality
from likewise.embeddings.registry import resolve_encoder
from likewise.errors import ArtifactError, LikewiseError


class Embeddings:
    """Finished embeddings: rows of unit vectors and, for each, the position of its record."""

    def __init__(self, path: str | Path) -> None:
        """Open embeddings; raises ArtifactError where there are none."""
        self.artifact = Artifact.open(Path(path), ARTIFACT_KIND)
        self.path = self.artifact.path
        self.dim: int = self.artifact.manifest.counts["dim"]

    def __len__(self) -> int:
        return self.artifact.manifest.counts[self.modality]

    @property
    def modality(self) -> Modality:
        """What was embedded: captions, with one row each, or images."""
        return self.artifact.manifest.settings.get("modality", "captions")

    @property
    def encoder_name(self) -> str:
        """The name of the encoder."""
        return self.artifact.manifest.settings["encoder"]

    @property
    def num_zero_vectors(self) -> int:
        """How many rows are zero, because the encoder knew nothing in them."""
        return self.artifact.manifest.counts.get("num_zero_vectors", 0)

    @property
    def num_shards(self) -> int:
        """The number of shards, equal to that of the collection."""
        return self.artifact.manifest.counts["shards"]

    def load_vectors(self, shard: int) -> np.ndarray:
        """Return the vectors of one shard, (n, d) float16, mapped from disk."""
        return mmap_array(self.path / shard_name("vectors", shard, "npy"))

    def load_image_ids(self, shard: int) -> np.ndarray:
        """Return the record positions of one shard's rows, (n,) int64, ascending."""
        return load_array(self.path / shard_name("ids", shard, "npy"))

    def load_shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the vectors and record positions of one shard."""
        return self.load_vectors(shard), self.load_image_ids(shard)

    def load_mean_vectors(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one row a record: the mean of its rows' vectors, of unit length again.

        Returns:
            Vectors (m, d) float32 and record positions (m,) int64; records whose rows have no direction (all
            zero, or cancelling out) are left out.
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
    """Return the finished embeddings of a collection by an encoder, or the only ones there are.

    Args:
        dataset: The collection.
        encoder: The encoder as it was named when embedding, the name that tables show (which tells options
            apart, as `hf:bert-base-uncased+cls`), or the name of the folder of its embeddings.
        modality: Whether embeddings of captions or of images are meant.

    Raises:
        ArtifactError: where there are none, or several and no encoder is named.
    """
    matches = []
    for path in sorted((dataset.path / "embeddings").glob(f"*/{MANIFEST}")):
        try:
            matches.append(Embeddings(path.parent))
        except ArtifactError:
            continue
    matches = [embeddings for embeddings in matches if embeddings.modality == modality]
    if encoder is not None:
        matches = _filter_by_encoder(matches, encoder)
    by_encoder = "" if encoder is None else f" by {encoder}"
    if not matches:
        modality_flag = {"captions": "", "images": " --encoder image:NAME"}[modality]
        raise ArtifactError(
            f"{dataset.path} has no finished embeddings{by_encoder}{' of images' * (modality == 'images')}; "
            f"run: likewise embed "
            f"{dataset.path}{modality_flag if encoder is None else f' --encoder {encoder}'}"
        )
    if len(matches) > 1:
        has_same_names = len({embeddings.encoder_name for embeddings in matches}) < len(matches)
        names = ", ".join(
            embeddings.path.name if has_same_names else embeddings.encoder_name for embeddings in matches
        )
        raise ArtifactError(
            f"{dataset.path} has embeddings by several encoders ({names}); name one with --encoder"
        )
    return matches[0]


def _filter_by_encoder(available: list[Embeddings], encoder: str) -> list[Embeddings]:
    """Keep those of an encoder: of the same weights, and where these differ in options, of the same name."""
    try:
        spec = resolve_encoder(encoder)
    except LikewiseError:
        # What it was made from may be gone; the embeddings still go by its name.
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


ARTIFACT_KIND = "embeddings"
