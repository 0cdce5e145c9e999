"""How to make the same again: commands with every setting spelled out, whatever later defaults are."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from likewise.collection.records import Collection
from likewise.report.guidance import Found, Guidance
from likewise.report.sources import Entry, Trained

_IMPORT_FLAGS = (
    "image_column",
    "caption_column",
    "label_column",
    "group_column",
    "id_column",
    "where",
    "images",
    "limit",
)


class Commands:
    """Writes commands with paths relative to a folder that holds all of them."""

    def __init__(self, entries: Sequence[Entry], found: Found) -> None:
        """Choose the folder."""
        self.entries, self.found = entries, found
        collections = [] if found.collection is None else [found.collection.path.resolve()]
        common = os.path.commonpath([e.path.parent for e in entries] + [c.parent for c in collections])
        self.base = Path(common)

    def lines(self) -> list[str]:
        """Return the chain from images to this page, one command a line."""
        told = [f"cd {shlex.quote(str(self.base))}"]
        if self.found.collection is not None:
            told.append(self._import(self.found.collection))
        told += [line for guidance in self.found.guidance for line in self._search(guidance)]
        for entry in self.entries:
            if entry.trained is not None:
                told.append(self._train(entry, entry.trained))
            told += [self._evaluate(entry, result) for result in entry.results]
        return [*told, _line("report", *(self._short(e.path) for e in self.entries), out="report.html")]

    def _short(self, path: Path) -> str:
        return str(path.relative_to(self.base)) if path.is_relative_to(self.base) else str(path)

    def _import(self, collection: Collection) -> str:
        settings = collection.artifact.manifest.settings
        given = {name: settings.get(name) for name in _IMPORT_FLAGS}
        columns = given["caption_column"]
        given["caption_column"] = ",".join(columns) if columns else None
        source = _source(str(settings.get("source")), collection.root)
        place = self._short(Path(source)) if Path(source).is_absolute() else source
        return _line("import", place, self._short(collection.path.resolve()), **given)

    def _search(self, guidance: Guidance) -> list[str]:
        collection = self._short(guidance.collection.path.resolve())
        found = guidance.neighbors
        return [
            _line("embed", collection, encoder=found.encoder),
            _line("neighbors", collection, encoder=found.encoder, k=found.k),
        ]

    def _train(self, entry: Entry, trained: Trained) -> str:
        collection = self._short(Path(str(trained.derived.get("collection"))))
        asked = trained.derived.get("asked", trained.settings)
        return _line("train", collection, out=self._short(entry.path), **asked)

    def _evaluate(self, entry: Entry, result: dict[str, Any]) -> str:
        protocols = result["protocols"]
        few = protocols.get("fewshot", {}).get("settings", {})
        given = {name: few.get(name) for name in ("ways", "shots", "episodes")}
        given["mean_per_class"] = any(p["settings"].get("mean_per_class") for p in protocols.values()) or None
        about, asked = result["set"], result["asked"]
        for name, usual in (("label_column", "label"), ("split_column", "split")):
            given[name] = None if about.get(name, usual) == usual else about[name]
        given["caption_column"] = about.get("caption_column")
        epochs = [p["settings"]["epochs"] for p in protocols.values() if "epochs" in p["settings"]]
        given["epochs"] = epochs[0] if len(set(epochs)) == 1 else None
        tuned = [p for p in protocols.values() if p["settings"].get("backbone") == "tuned"]
        given["tune"] = bool(tuned) or None
        given |= {name: asked[name] or None for name in ("backbone", "prefix", "drop", "size")}
        how = {"on": self._short(Path(about["path"])), "protocol": ",".join(protocols), **given}
        if entry.trained is not None:
            return _line("evaluate", self._short(entry.path), **how)
        target = asked["target"] if ":" in asked["target"] else self._short(Path(asked["target"]).resolve())
        return _line("evaluate", target, **how, out=self._short(entry.path))


def _source(told: str, root: Path) -> str:
    """Return the source as an absolute path where it was told as a relative one and can be found again."""
    if Path(told).is_absolute():
        return told
    for guess in (root / Path(told).name, root):
        if guess.name == Path(told).name and guess.exists():
            return str(guess)
    return told


def _line(verb: str, *places: str, **flags: Any) -> str:
    words = ["likewise", verb, *places]
    for name, value in flags.items():
        if value is None:
            continue
        flag = "-k" if verb == "neighbors" and name == "k" else f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
            continue
        for each in value if isinstance(value, list) else [value]:
            words += [flag, str(each)]
    return shlex.join(words)
