"""From a source of images and captions to a collection, and what is wrong with it: `import`, `audit`."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from likewise.cli.common import COMMON, Common, app, import_lines, listed
from likewise.data.audit.config import AuditSettings
from likewise.embeddings.config import DEFAULT_OPTIONS, EncoderOptions
from likewise.neighbors.config import TABLE_DEPTH, SearchRule

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
    from likewise.embeddings.registry import PAPER_ENCODER

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
    from likewise.neighbors.index import find_neighbors

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


_AUDIT = AuditSettings()
AuditFlags = Annotated[AuditSettings, Parameter(name="*", group="Where lines are drawn")]


@app.command(name="import", help_epilogue="Example: `likewise import photos/ photos.likewise`")
def import_(
    source: str,
    collection: Path,
    /,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    id_column: str | None = None,
    where: list[str] | None = None,
    images: Path | None = None,
    limit: int | None = None,
    workers: int | None = None,
    common: Common = COMMON,
) -> None:
    """Make a collection of captioned images; the images stay where they are.

    Args:
        source: A folder of images with `.json` or `.txt` beside them, a CSV, TSV, JSON Lines or Parquet
            table, WebDataset tars, COCO captions JSON, a Flickr8k/30k token file, or a Hugging Face set (a
            folder, or `hf:NAME`).
        collection: The folder to make.
        image_column: Column of image paths; guessed where its name is usual.
        caption_column: Column of captions, or several with commas between; guessed where the name is usual.
        label_column: Column of labels, for judging pairs later; never used in training.
        group_column: Column of groups (subreddit, year, product line).
        id_column: Column of identifiers; the image path by default.
        where: Keep only rows with COLUMN=VALUE; may be given several times.
        images: Folder that image paths are relative to; the source's own by default.
        limit: Take the first so many images only.
        workers: Threads that decode images.
    """
    from likewise.data.importing import import_collection
    from likewise.data.readers.base import ImportOptions

    options = ImportOptions(
        image_column=image_column,
        caption_column=listed(caption_column),
        label_column=label_column,
        group_column=group_column,
        id_column=id_column,
        where=tuple(where or ()),
        images=images,
        limit=limit,
    )
    made = import_collection(source, collection, options, workers=workers, progress=common.progress())
    summary = made.summary()
    common.tell({"collection": str(collection), **summary}, "\n".join(import_lines(collection, summary)))


@app.command(help_epilogue="Example: `likewise audit photos.likewise`")
def audit(
    collection: Path,
    /,
    *,
    lines: AuditFlags = _AUDIT,
    workers: int | None = None,
    common: Common = COMMON,
) -> None:
    """Tell what is wrong with the captions and images of a collection; nothing is deleted.

    Writes a page with pictures and a filter, a table of what says nothing and should take no part, for
    `--filter` of `neighbors` and `train`.

    Args:
        collection: A collection.
        workers: Threads that decode images.
    """
    from likewise.data.audit.audit import audit as look_for_faults
    from likewise.data.dataset import Collection
    from likewise.report.audit_report import audit_lines, write_audit_page

    opened = Collection(collection)
    made = look_for_faults(opened, lines, workers=workers, progress=common.progress())
    page = write_audit_page(opened, made)
    places = {"filter": str(made.filter), "page": str(page)}
    common.tell(
        made.summary() | places, "\n".join([str(collection), *audit_lines(made.report), *_places(places)])
    )


def _places(places: dict[str, Any]) -> list[str]:
    return [f"{name}: {path}" for name, path in places.items()]
