"""From captions to pairs: `embed` and `neighbors`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from likewise.cli.app import COMMON, app
from likewise.terminal import Common


@app.command(help_epilogue="Example: `likewise embed photos.likewise --encoder all-MiniLM-L6-v2`")
def embed(
    collection: Path,
    /,
    *,
    encoder: str | None = None,
    batch_size: int = 64,
    device: str | None = None,
    common: Common = COMMON,
) -> None:
    """Embed the captions of a collection with a pretrained language model.

    Args:
        collection: A collection.
        encoder: A sentence-transformers model by hub name or folder; by default the paper's,
            all-mpnet-base-v2.
        batch_size: Captions a forward pass.
        device: `cpu`, `cuda`, …; chosen by itself.
    """
    from likewise.embeddings.embed import embed as embed_captions
    from likewise.embeddings.encoders import PAPER_ENCODER

    made = embed_captions(
        collection, encoder or PAPER_ENCODER, batch_size=batch_size, device=device, progress=common.progress()
    )
    result = {"embeddings": str(made.path), "captions": len(made), "dimension": made.dimension}
    common.tell(result, f"{len(made):,} captions in {made.dimension} dimensions: {made.path}")


@app.command(help_epilogue="Example: `likewise neighbors photos.likewise -k 10`")
def neighbors(
    collection: Path,
    /,
    *,
    encoder: str | None = None,
    k: Annotated[int, Parameter(name=["-k", "--k"])] = 10,
    memory: int = 512,
    device: str = "cpu",
    common: Common = COMMON,
) -> None:
    """Find for each image those described most alike.

    Args:
        collection: A collection with embeddings.
        encoder: Whose embeddings to use; may be left out where there is only one.
        k: Neighbors an image.
        memory: MiB that a block of similarities may take.
        device: Where blocks are compared.
    """
    from likewise.neighbors.neighbors import find_neighbors

    made = find_neighbors(
        collection, encoder, k=k, memory_mb=memory, device=device, progress=common.progress()
    )
    counts = made.artifact.manifest.counts
    result = {"neighbors": str(made.path), "k": made.k, **counts}
    common.tell(
        result, f"{made.k} neighbors for {counts['with_neighbors']:,} of {len(made):,} images: {made.path}"
    )
