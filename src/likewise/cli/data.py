"""Commands on datasets: `import`, `audit`, `embed`, `neighbors`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from likewise.cli.common import COMMON_OPTIONS, CommonOptions, app, check_skipped, import_summary
from likewise.cli.flags import FLATTEN, FLOATS, INTS, STRINGS, make_flags, to_config
from likewise.data.config import AuditConfig, ImportOptions
from likewise.embeddings.config import EncoderOptions
from likewise.neighbors.config import DEFAULT_K, SearchConfig

_ImportFlags = make_flags(
    ImportOptions,
    group="Columns",
    groups=dict.fromkeys(
        ("where", "images", "source_format", "caption_lines", "limit", "bands", "band_percentiles"),
        "Selection",
    ),
    parameters={"caption_column": STRINGS, "bands": INTS, "band_percentiles": FLOATS},
)
ImportFlags = Annotated[_ImportFlags, FLATTEN]
_AuditFlags = make_flags(AuditConfig, group="Thresholds")
AuditFlags = Annotated[_AuditFlags, FLATTEN]
_EncoderFlags = make_flags(EncoderOptions, group="Encoder options")
EncoderFlags = Annotated[_EncoderFlags, FLATTEN]
_SearchFlags = make_flags(SearchConfig, group="Neighbor search")
SearchFlags = Annotated[_SearchFlags, FLATTEN]


@app.command(
    name="import",
    help_epilogue="Example: `likewise import photos/ photos.likewise --caption-column title,alt`",
)
def import_(
    source: str,
    dataset: Path,
    /,
    *,
    flags: ImportFlags | None = None,
    strict: bool = False,
    num_workers: int | None = None,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Import captioned images as a dataset; the images stay where they are.

    Args:
        source: A folder of images with `.json` or `.txt` sidecars; a CSV, TSV, JSON Lines or Parquet table;
            WebDataset tars; COCO captions JSON; a Flickr8k/30k token file; or a Hugging Face dataset (a
            folder, or `hf:NAME`).
        dataset: The dataset to create.
        strict: Exit with code 1 if an entry was skipped; the dataset is complete nevertheless.
        num_workers: Threads that decode images; defaults to the number of CPU cores.
    """
    from likewise.data.importing import import_dataset

    options = to_config(ImportOptions, flags)
    imported = import_dataset(source, dataset, options, num_workers=num_workers, progress=common.progress())
    summary = imported.summary()
    common.print_result({"dataset": str(dataset), **summary}, import_summary(dataset, summary))
    check_skipped(summary["skipped"], f"the dataset {dataset}", strict=strict)


@app.command(help_epilogue="Example: `likewise audit photos.likewise --min-side 128`")
def audit(
    dataset: Path,
    /,
    *,
    flags: AuditFlags | None = None,
    num_workers: int | None = None,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Find problems of captions and images; nothing is deleted.

    Writes an HTML report with examples, and a filter of uninformative captions and duplicate images for
    `--filter` of `neighbors` and `train`.

    Args:
        dataset: A dataset.
        num_workers: Threads that decode images; defaults to the number of CPU cores.
    """
    from likewise.data.audit.audit import audit_dataset
    from likewise.data.dataset import CaptionDataset
    from likewise.report.audit_report import format_audit, write_audit_report

    caption_dataset = CaptionDataset.open(dataset)
    result = audit_dataset(
        caption_dataset, to_config(AuditConfig, flags), num_workers=num_workers, progress=common.progress()
    )
    page = write_audit_report(caption_dataset, result)
    common.print_result(
        result.summary() | {"filter": str(result.filter_path), "page": str(page)},
        str(dataset),
        *format_audit(result.report),
        f"filter: {result.filter_path}",
        f"page: {page}",
    )


_ENCODER_EXAMPLES = """Encoders:

- `all-mpnet-base-v2` (the paper's), `./folder`: a sentence-transformers model by hub name or folder
- `hf:bert-base-uncased`, `hf:./folder`: any Hugging Face text model, with `--pooling`
- `clip:ViT-B-32/openai`, `clip:ViT-B-32/./weights.pt`: the text tower of an open_clip model
- `model2vec:minishlab/potion-base-8M`: static token embeddings
- `words:glove.6B.300d.txt`: mean of word vectors (GloVe, fastText `.vec`; also `.gz`)
- `tfidf`, `bow`: word counts, the model-free baselines (8 KB per caption on disk)
- `image:timm:resnet50`, `image:RUN`, `image:clip:ViT-B-32/openai`: an image encoder; embeds the images

Example: `likewise embed photos.likewise --encoder all-MiniLM-L6-v2`"""


@app.command(help_epilogue=_ENCODER_EXAMPLES)
def embed(
    dataset: Path,
    /,
    *,
    encoder: str | None = None,
    flags: EncoderFlags | None = None,
    batch_size: int = 64,
    device: str | None = None,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Embed the captions of a dataset with a pretrained language model, or its images.

    Args:
        dataset: A dataset.
        encoder: The encoder (see below); defaults to the paper's, all-mpnet-base-v2.
        batch_size: Captions or images per forward pass.
        device: `cpu`, `cuda`, ...; defaults to a GPU if there is one.
    """
    from likewise.embeddings.embed import embed as embed_dataset
    from likewise.embeddings.registry import DEFAULT_ENCODER

    embeddings = embed_dataset(
        dataset,
        encoder or DEFAULT_ENCODER,
        options=to_config(EncoderOptions, flags),
        batch_size=batch_size,
        device=device,
        progress=common.progress(),
    )
    skipped = embeddings.artifact.manifest.skipped
    result = {
        "embeddings": str(embeddings.path),
        embeddings.modality: len(embeddings),
        "dim": embeddings.dim,
        "num_zero_vectors": embeddings.num_zero_vectors,
        "skipped": skipped,
    }
    notes = [f"  {count:,} skipped ({reason})" for reason, count in skipped.items()]
    if embeddings.num_zero_vectors:
        notes.insert(0, f"  {embeddings.num_zero_vectors:,} zero vectors (no known words)")
    summary = f"{len(embeddings):,} {embeddings.modality} in {embeddings.dim} dimensions: {embeddings.path}"
    common.print_result(result, summary, *notes)


@app.command(help_epilogue="Example: `likewise neighbors photos.likewise -k 10 --exclude-identical-captions`")
def neighbors(
    dataset: Path,
    /,
    *,
    encoder: str | None = None,
    k: Annotated[int, Parameter(name=["-k", "--k"])] = DEFAULT_K,
    flags: SearchFlags | None = None,
    memory_mb: int = 512,
    device: str = "cpu",
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Find the nearest neighbors of each image by caption similarity; `train` does it if it needs more.

    Args:
        dataset: A dataset with embeddings.
        encoder: Encoder of the embeddings; optional if there is only one. With `image:...`, neighbors are
            by image similarity.
        k: Neighbors per image.
        memory_mb: Memory limit for a block of similarities, in MiB.
        device: Device of the search.
    """
    from likewise.neighbors.index import find_neighbors

    search_config = to_config(SearchConfig, flags)
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
    unit = "captions" if search_config.caption_pooling == "sample" else "images"
    common.print_result(
        {"neighbors": str(neighbors.path), "k": neighbors.k, **counts},
        f"up to {neighbors.k} neighbors for {counts['with_neighbors']:,} of {len(neighbors):,} {unit}: "
        f"{neighbors.path}",
    )
