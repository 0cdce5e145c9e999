"""From a source of images and captions to a collection, and what is wrong with it: `import`, `audit`."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from likewise.cli.common import COMMON_OPTIONS, CommonOptions, app, import_summary, parse_list
from likewise.data.audit.config import AuditConfig
from likewise.embeddings.config import DEFAULT_OPTIONS, EncoderOptions
from likewise.neighbors.config import DEFAULT_K, SearchConfig

_DEFAULT_SEARCH_CONFIG = SearchConfig()
EncoderFlags = Annotated[EncoderOptions, Parameter(name="*", group="How the encoder is used")]
SearchFlags = Annotated[SearchConfig, Parameter(name="*", group="Who may be found")]


_ENCODER_EXAMPLES = """Encoders, by example:

- `all-mpnet-base-v2` (the paper's), `./folder`: a sentence-transformers model by hub name or folder
- `hf:bert-base-uncased`, `hf:./folder`: any Hugging Face text model, with `--pooling`
- `clip:ViT-B-32/openai`, `clip:ViT-B-32/./weights.pt`: the text tower of an open_clip model
- `model2vec:minishlab/potion-base-8M`: static token embeddings
- `words:glove.6B.300d.txt`: word vectors (GloVe, fastText `.vec`; also `.gz`), averaged
- `tfidf`, `bow`: word counts, the free baselines (8 KB a caption on disk)
- `image:timm:resnet50`, `image:RUN`, `image:clip:ViT-B-32/openai`: looks instead of words

Example: `likewise embed photos.likewise --encoder all-MiniLM-L6-v2`"""


@app.command(help_epilogue=_ENCODER_EXAMPLES)
def embed(
    dataset: Path,
    /,
    *,
    encoder: str | None = None,
    options: EncoderFlags = DEFAULT_OPTIONS,
    batch_size: int = 64,
    device: str | None = None,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Embed the captions of a collection with a pretrained language model, or its images.

    Args:
        dataset: A collection.
        encoder: What turns captions into vectors (see below); by default the paper's, all-mpnet-base-v2.
        batch_size: Captions or images a forward pass, at most.
        device: `cpu`, `cuda`, …; chosen by itself.
    """
    from likewise.embeddings.embed import embed as embed_all
    from likewise.embeddings.registry import DEFAULT_ENCODER

    embeddings = embed_all(
        dataset,
        encoder or DEFAULT_ENCODER,
        options=options,
        batch_size=batch_size,
        device=device,
        progress=common.progress(),
    )
    skipped = embeddings.artifact.manifest.skipped
    result = {
        "embeddings": str(embeddings.path),
        embeddings.modality: len(embeddings),
        "dim": embeddings.dim,
    }
    result |= {"num_zero_vectors": embeddings.num_zero_vectors, "skipped": skipped}
    notes = [f"{count:,} skipped ({reason})" for reason, count in skipped.items()]
    if embeddings.num_zero_vectors:
        notes.insert(0, f"{embeddings.num_zero_vectors:,} without direction (nothing in them is known)")
    summary = f"{len(embeddings):,} {embeddings.modality} in {embeddings.dim} dimensions: {embeddings.path}"
    common.print_result(result, "\n  ".join([summary, *notes]))


@app.command(help_epilogue="Example: `likewise neighbors photos.likewise -k 10 --distinct-captions`")
def neighbors(
    dataset: Path,
    /,
    *,
    encoder: str | None = None,
    k: Annotated[int, Parameter(name=["-k", "--k"])] = DEFAULT_K,
    search_config: SearchFlags = _DEFAULT_SEARCH_CONFIG,
    memory_mb: int = 512,
    device: str = "cpu",
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Find for each image those described most alike; training does so itself where it needs more.

    Args:
        dataset: A collection with embeddings.
        encoder: Whose embeddings to use; may be left out where there is only one. `image:…` compares looks.
        k: Neighbors an image.
        memory_mb: MiB that a block of similarities may take.
        device: Where blocks are compared.
    """
    from likewise.neighbors.index import find_neighbors

    neighbors = find_neighbors(
        dataset,
        encoder,
        k=k,
        search_config=search_config,
        memory_mb=memory_mb,
        device=device,
        progress=common.progress(),
    )
    counts = neighbors.artifact.manifest.counts
    result = {"neighbors": str(neighbors.path), "k": neighbors.k, **counts}
    unit = "captions" if search_config.caption_pooling == "sample" else "images"
    common.print_result(
        result,
        f"up to {neighbors.k} neighbors for {counts['with_neighbors']:,} of {len(neighbors):,} {unit}: "
        f"{neighbors.path}",
    )


_DEFAULT_AUDIT_CONFIG = AuditConfig()
AuditFlags = Annotated[AuditConfig, Parameter(name="*", group="Where lines are drawn")]


@app.command(name="import", help_epilogue="Example: `likewise import photos/ photos.likewise`")
def import_(
    source: str,
    dataset: Path,
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
    num_workers: int | None = None,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Make a collection of captioned images; the images stay where they are.

    Args:
        source: A folder of images with `.json` or `.txt` beside them, a CSV, TSV, JSON Lines or Parquet
            table, WebDataset tars, COCO captions JSON, a Flickr8k/30k token file, or a Hugging Face set (a
            folder, or `hf:NAME`).
        dataset: The folder to make.
        image_column: Column of image paths; guessed where its name is usual.
        caption_column: Column of captions, or several with commas between; guessed where the name is usual.
        label_column: Column of labels, for judging pairs later; never used in training.
        group_column: Column of groups (subreddit, year, product line).
        id_column: Column of identifiers; the image path by default.
        where: Keep only rows with COLUMN=VALUE; may be given several times.
        images: Folder that image paths are relative to; the source's own by default.
        limit: Take the first so many images only.
        num_workers: Threads that decode images.
    """
    from likewise.data.importing import import_dataset
    from likewise.data.readers.base import ImportOptions

    options = ImportOptions(
        image_column=image_column,
        caption_column=parse_list(caption_column),
        label_column=label_column,
        group_column=group_column,
        id_column=id_column,
        where=tuple(where or ()),
        images=images,
        limit=limit,
    )
    imported = import_dataset(source, dataset, options, num_workers=num_workers, progress=common.progress())
    summary = imported.summary()
    common.print_result({"dataset": str(dataset), **summary}, "\n".join(import_summary(dataset, summary)))


@app.command(help_epilogue="Example: `likewise audit photos.likewise`")
def audit(
    dataset: Path,
    /,
    *,
    config: AuditFlags = _DEFAULT_AUDIT_CONFIG,
    num_workers: int | None = None,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Tell what is wrong with the captions and images of a collection; nothing is deleted.

    Writes a page with pictures and a filter, a table of what says nothing and should take no part, for
    `--filter` of `neighbors` and `train`.

    Args:
        dataset: A collection.
        num_workers: Threads that decode images.
    """
    from likewise.data.audit.audit import audit_dataset as look_for_faults
    from likewise.data.dataset import CaptionDataset
    from likewise.report.audit_report import format_audit, write_audit_report

    caption_dataset = CaptionDataset(dataset)
    result = look_for_faults(caption_dataset, config, num_workers=num_workers, progress=common.progress())
    page = write_audit_report(caption_dataset, result)
    paths = {"filter": str(result.filter_path), "page": str(page)}
    common.print_result(
        result.summary() | paths, "\n".join([str(dataset), *format_audit(result.report), *_path_lines(paths)])
    )


def _path_lines(paths: dict[str, Any]) -> list[str]:
    return [f"{name}: {path}" for name, path in paths.items()]
