"""`likewise.embed` against `SentenceTransformer.encode` of all captions."""

import sys
import tempfile
from pathlib import Path

from benchmarks.timing import alternate, format_result
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

BATCH_SIZE = 64


def run(table: Path | None = None, encoder: str = "all-MiniLM-L6-v2", rounds: int = 3) -> list[str]:
    """Compare each backend on the captions of a table, by default those of the emoji dataset.

    Loading the model is not timed. likewise writes its shards, the peer only returns its vectors.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if table is None:
            source = make_emoji_dataset(folder / "emoji")
            options = ImportOptions(caption_column=("caption", "alias"))
        else:
            source, options = table, ImportOptions()
        dataset = import_dataset(source, folder / "dataset", options)
        return [_compare(dataset, encoder, backend, folder, rounds) for backend in ("torch", "onnx")]


def _compare(dataset: CaptionDataset, name: str, backend: Backend, folder: Path, rounds: int) -> str:
    spec = resolve_encoder(name, EncoderOptions(backend=backend))
    encoder = load_text_encoder(spec, "cpu", lambda: iter([]))
    model = SentenceTransformerEncoder(resolve_encoder(name), "cpu").model
    captions = [text for sample in dataset for text in sample.captions]

    def ours() -> None:
        embedder = CaptionEmbedder(dataset, encoder, BATCH_SIZE)
        with NULL_PROGRESS.task("embedding", len(captions), "captions") as bar:
            for shard in range(len(dataset.shard_paths)):
                embedded = embedder.embed_shard(shard, bar)
                write_array(folder / shard_name("vectors", shard, "npy"), embedded.vectors)
                write_array(folder / shard_name("ids", shard, "npy"), embedded.image_ids)

    def peer() -> object:
        return model.encode(captions, batch_size=BATCH_SIZE, show_progress_bar=False)

    return format_result(
        f"embed, {len(captions):,} captions ({len(set(captions)):,} distinct), {backend}",
        "SentenceTransformer.encode",
        alternate(ours, peer, rounds),
    )


if __name__ == "__main__":
    for line in run(Path(sys.argv[1]) if len(sys.argv) > 1 else None):
        print(line)
