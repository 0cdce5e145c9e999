"""Caption and image embeddings on disk, and the search for them."""

from pathlib import Path

import numpy as np

from likewise.artifacts import MANIFEST, load_array, open_artifact, read_array, shard_name
from likewise.data.dataset import Collection
from likewise.embeddings.config import Modality
from likewise.embeddings.registry import choose_encoder
from likewise.errors import ArtifactError, LikewiseError


class Embeddings:
    """Finished embeddings: rows of unit vectors and, for each, the position of its record."""

    def __init__(self, path: str | Path) -> None:
        """Open embeddings; raises ArtifactError where there are none."""
        self.artifact = open_artifact(Path(path), KIND)
        self.path = self.artifact.path
        self.dimension: int = self.artifact.manifest.counts["dimension"]

    def __len__(self) -> int:
        return self.artifact.manifest.counts[self.modality]

    @property
    def modality(self) -> Modality:
        """What was embedded: captions, with one row each, or images."""
        return self.artifact.manifest.settings.get("modality", "captions")

    @property
    def encoder(self) -> str:
        """The name of the encoder."""
        return self.artifact.manifest.settings["encoder"]

    @property
    def without_direction(self) -> int:
        """How many rows are zero, because the encoder knew nothing in them."""
        return self.artifact.manifest.counts.get("without_direction", 0)

    @property
    def shards(self) -> int:
        """The number of shards, equal to that of the collection."""
        return self.artifact.manifest.counts["shards"]

    def vectors(self, index: int) -> np.ndarray:
        """Return the vectors of one shard, (n, d) float16, mapped from disk."""
        return read_array(self.path / shard_name("vectors", index, "npy"))

    def ids(self, index: int) -> np.ndarray:
        """Return the record positions of one shard's rows, (n,) int64, ascending."""
        return load_array(self.path / shard_name("ids", index, "npy"))

    def shard(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the vectors and record positions of one shard."""
        return self.vectors(index), self.ids(index)

    def pooled(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one row a record: the mean of its rows' vectors, of unit length again.

        Returns:
            Vectors (m, d) float32 and record positions (m,) int64; records whose rows have no direction (all
            zero, or cancelling out) are left out.
        """
        vectors, ids = self.shard(index)
        positions, starts = np.unique(ids, return_index=True)
        if not len(positions):
            return np.empty((0, self.dimension), np.float32), positions
        sums = np.add.reduceat(vectors.astype(np.float32), starts, axis=0)
        norms = np.linalg.norm(sums, axis=1)
        directed = norms > 1e-6
        return sums[directed] / norms[directed, None], positions[directed]


def look_up_embeddings(
    collection: Collection, encoder: str | None, *, modality: Modality = "captions"
) -> Embeddings:
    """Return the finished embeddings of a collection by an encoder, or the only ones there are.

    Args:
        collection: The collection.
        encoder: The encoder as it was named when embedding, the name that tables show (which tells options
            apart, as `hf:bert-base-uncased+cls`), or the name of the folder of its embeddings.
        modality: Whether embeddings of captions or of images are meant.

    Raises:
        ArtifactError: where there are none, or several and no encoder is named.
    """
    found = []
    for path in sorted((collection.path / "embeddings").glob(f"*/{MANIFEST}")):
        try:
            found.append(Embeddings(path.parent))
        except ArtifactError:
            continue
    found = [each for each in found if each.modality == modality]
    if encoder is not None:
        found = _by_encoder(found, encoder)
    wanted = "" if encoder is None else f" by {encoder}"
    if not found:
        hint = {"captions": "", "images": " --encoder image:NAME"}[modality]
        raise ArtifactError(
            f"{collection.path} has no finished embeddings{wanted}{' of images' * (modality == 'images')}; "
            f"run: likewise embed {collection.path}{hint if encoder is None else f' --encoder {encoder}'}"
        )
    if len(found) > 1:
        same = len({each.encoder for each in found}) < len(found)
        names = ", ".join(each.path.name if same else each.encoder for each in found)
        raise ArtifactError(
            f"{collection.path} has embeddings by several encoders ({names}); name one with --encoder"
        )
    return found[0]


def _by_encoder(found: list[Embeddings], encoder: str) -> list[Embeddings]:
    """Keep those of an encoder: of the same weights, and where these differ in options, of the same name."""
    try:
        choice = choose_encoder(encoder)
    except LikewiseError:
        # What it was made from may be gone; the embeddings still go by its name.
        named = [each for each in found if encoder in (each.encoder, each.path.name)]
        if named:
            return named
        raise
    same = [each for each in found if each.artifact.manifest.inputs["encoder"] == choice.identity]
    named = [each for each in found if {each.encoder, each.path.name} & {encoder, choice.name}]
    both = [each for each in same if each in named]
    return both or same or named


KIND = "embeddings"
