"""From captions to pairs: `embed` and `neighbors`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from likewise.cli.app import COMMON, app
from likewise.embeddings.options import DEFAULT_OPTIONS, EncoderOptions
from likewise.neighbors.rules import TABLE_DEPTH, SearchRule
from likewise.terminal import Common

_SEARCH = SearchRule()
EncoderFlags = Annotated[EncoderOptions, Parameter(name="*", group="How the encoder is used")]
SearchFlags = Annotated[SearchRule, Parameter(name="*", group="Who may be found")]


_ENCODER_KINDS = """Encoders, by example:

- `all-mpnet-base-v2` (the paper's), `./folder`: a sentence-transformers model by hub name or folder
- `hf:bert-base-uncased`, `hf:./folder`: any Hugging Face text model, with `--pooling`
- `clip:ViT-B-32/openai`, `clip:ViT-B-32/./weights.pt`: the text tower of an open_clip model
- `model2vec:minishlab/potion-base-8M`: static token embeddings
- `words:glove.6B.300d.txt`: word vectors (GloVe, fastText `.vec`; also `.gz`), averaged
- `tfidf`, `bow`: word counts, the free baselines (8 KB a caption on disk)
- `image:timm:resnet50`, `image:RUN`, `image:clip:ViT-B-32/openai`: looks instead of words

Example: `likewise embed photos.likewise --encoder all-MiniLM-L6-v2`"""


@app.command(help_epilogue=_ENCODER_KINDS)
def embed(
    collection: Path,
    /,
    *,
    encoder: str | None = None,
    options: EncoderFlags = DEFAULT_OPTIONS,
    batch_size: int = 64,
    device: str | None = None,
    common: Common = COMMON,
) -> None:
    """Embed the captions of a collection with a pretrained language model, or its images.

    Args:
        collection: A collection.
        encoder: What turns captions into vectors (see below); by default the paper's, all-mpnet-base-v2.
        batch_size: Captions or images a forward pass, at most.
        device: `cpu`, `cuda`, …; chosen by itself.
    """
    from likewise.embeddings.embed import embed as embed_all
    from likewise.embeddings.encoders import PAPER_ENCODER

    made = embed_all(
        collection,
        encoder or PAPER_ENCODER,
        options=options,
        batch_size=batch_size,
        device=device,
        progress=common.progress(),
    )
    skipped = made.artifact.manifest.skipped
    result = {"embeddings": str(made.path), made.modality: len(made), "dimension": made.dimension}
    result |= {"without_direction": made.without_direction, "skipped": skipped}
    notes = [f"{count:,} skipped ({reason})" for reason, count in skipped.items()]
    if made.without_direction:
        notes.insert(0, f"{made.without_direction:,} without direction (nothing in them is known)")
    sentence = f"{len(made):,} {made.modality} in {made.dimension} dimensions: {made.path}"
    common.tell(result, "\n  ".join([sentence, *notes]))


@app.command(help_epilogue="Example: `likewise neighbors photos.likewise -k 10 --distinct-captions`")
def neighbors(
    collection: Path,
    /,
    *,
    encoder: str | None = None,
    k: Annotated[int, Parameter(name=["-k", "--k"])] = TABLE_DEPTH,
    rule: SearchFlags = _SEARCH,
    memory: int = 512,
    device: str = "cpu",
    common: Common = COMMON,
) -> None:
    """Find for each image those described most alike; training does so itself where it needs more.

    Args:
        collection: A collection with embeddings.
        encoder: Whose embeddings to use; may be left out where there is only one. `image:…` compares looks.
        k: Neighbors an image.
        memory: MiB that a block of similarities may take.
        device: Where blocks are compared.
    """
    from likewise.neighbors.neighbors import find_neighbors

    made = find_neighbors(
        collection, encoder, k=k, rule=rule, memory_mb=memory, device=device, progress=common.progress()
    )
    counts = made.artifact.manifest.counts
    result = {"neighbors": str(made.path), "k": made.k, **counts}
    what = "captions" if rule.captions == "draw" else "images"
    common.tell(
        result,
        f"up to {made.k} neighbors for {counts['with_neighbors']:,} of {len(made):,} {what}: {made.path}",
    )
