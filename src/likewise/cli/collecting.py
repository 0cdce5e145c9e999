"""From a source of images and captions to a collection, and what is wrong with it: `import`, `audit`."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from likewise.cli.app import COMMON, app, listed
from likewise.collection.audit.settings import AuditSettings
from likewise.terminal import Common, import_lines

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
    from likewise.collection.importing import import_collection
    from likewise.collection.sources.candidates import ImportOptions

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
    from likewise.collection.audit.audit import audit as look_for_faults
    from likewise.collection.records import Collection
    from likewise.report.audit import audit_lines, write_audit_page

    opened = Collection(collection)
    made = look_for_faults(opened, lines, workers=workers, progress=common.progress())
    page = write_audit_page(opened, made)
    places = {"filter": str(made.filter), "page": str(page)}
    common.tell(
        made.summary() | places, "\n".join([str(collection), *audit_lines(made.report), *_places(places)])
    )


def _places(places: dict[str, Any]) -> list[str]:
    return [f"{name}: {path}" for name, path in places.items()]
