"""Embedding a collection into files against sentence-transformers' plain `encode` of all its captions."""

import sys
import tempfile
from pathlib import Path

from benchmarks.timing import alternate, told
from likewise.artifacts import shard_name, write_array
from likewise.data.config import ImportOptions
from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.demo import make_emoji_dataset
from likewise.embeddings.config import Backend, EncoderOptions
from likewise.embeddings.embed import CaptionEmbedder
from likewise.embeddings.registry import load_text_encoder, resolve_encoder
from likewise.embeddings.text_encoders import SentenceTransformerEncoder
from likewise.progress import NULL_PROGRESS

BATCH = 64


def run(table: Path | None = None, encoder: str = "all-MiniLM-L6-v2", rounds: int = 3) -> list[str]:
    """Compare on the captions of a table, by default those of the demo's emoji, with each backend.

    Models are loaded before; ours writes its shards, the peer only returns its vectors.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if table is None:
            source = make_emoji_dataset(folder / "emoji")
            options = ImportOptions(caption_column=("caption", "alias"))
        else:
            source, options = table, ImportOptions()
        collection = import_dataset(source, folder / "c", options)
        return [_compare(collection, encoder, backend, folder, rounds) for backend in ("torch", "onnx")]


def _compare(collection: CaptionDataset, name: str, backend: Backend, folder: Path, rounds: int) -> str:
    choice = resolve_encoder(name, EncoderOptions(backend=backend))
    loaded = load_text_encoder(choice, "cpu", lambda: iter([]))
    plain = SentenceTransformerEncoder(resolve_encoder(name), "cpu").model
    captions = [text for record in collection for text in record.captions]

    def ours() -> None:
        rows = CaptionEmbedder(collection, loaded, BATCH)
        with NULL_PROGRESS.task("embedding", len(captions), "captions") as task:
            for shard in range(len(collection.shard_paths)):
                made = rows.embed_shard(shard, task)
                write_array(folder / shard_name("vectors", shard, "npy"), made.vectors)
                write_array(folder / shard_name("ids", shard, "npy"), made.image_ids)

    def peer() -> object:
        return plain.encode(captions, batch_size=BATCH, show_progress_bar=False)

    return told(
        f"embed, {len(captions):,} captions ({len(set(captions)):,} distinct), {backend}",
        "SentenceTransformer.encode",
        alternate(ours, peer, rounds),
    )


if __name__ == "__main__":
    for line in run(Path(sys.argv[1]) if len(sys.argv) > 1 else None):
        print(line)
