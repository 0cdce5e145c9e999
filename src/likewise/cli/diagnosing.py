"""Who would be shown with whom, before anything is trained: `diagnose`."""

from pathlib import Path

from likewise.cli.app import COMMON, app, listed
from likewise.terminal import Common


@app.command(
    help_epilogue="Example: `likewise diagnose photos.likewise --encoder all-MiniLM-L6-v2,tfidf --rule paper "
    "--rule k=3 --rule mutual=10,hubs=csls`"
)
def diagnose(
    collection: Path,
    /,
    *,
    encoder: str | None = None,
    rule: list[str] | None = None,
    out: Path | None = None,
    common: Common = COMMON,
) -> None:
    """Judge pairs without training: encoders and rules side by side, as a table and as a page with pictures.

    Args:
        collection: A collection with embeddings.
        encoder: Whose embeddings to compare, with commas between; `image:…` for those of images. All that
            the collection has by default.
        rule: Settings of a rule with commas between, such as `k=3,mutual=10`, or `paper` for the nearest
            caption; may be given several times. The usual ones by default.
        out: The HTML file, its data beside it; by default `diagnosis.html` in the collection.
    """
    from likewise.collection.records import Collection
    from likewise.neighbors.diagnose import diagnose as diagnose_pairs
    from likewise.report.pairs_page import write_pairs_page
    from likewise.report.pairs_table import text_lines

    source = Collection.open(collection)
    encoders = None if encoder is None else listed(encoder)
    found = diagnose_pairs(source, encoders, rule, progress=common.progress())
    page = write_pairs_page(found, source, out or source.path / "diagnosis.html")
    common.tell({"page": str(page), **found.told()}, "\n".join([*text_lines(found), f"page: {page}"]))
