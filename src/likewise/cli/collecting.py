"""From a source of images and captions to a collection: `import`."""

from pathlib import Path

from likewise.cli.app import COMMON, app, listed
from likewise.terminal import Common, import_lines


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
