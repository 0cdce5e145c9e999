"""What an audit finds: a count, a share and examples, in a form that goes to a file and comes back."""

from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 6


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that may be wrong.

    Attributes:
        name: What it is called in files.
        title: What it is called on pages.
        count: How many images, captions or groups it is true of.
        total: Of how many.
        unit: What is counted: `images`, `captions` or `groups`.
        filtered: How many of them the filter leaves out.
        note: A sentence on how it was told.
        examples: Positions, ids and captions, at most `EXAMPLES`.
    """

    name: str
    title: str
    count: int
    total: int
    unit: str
    filtered: int = 0
    note: str = ""
    examples: tuple[dict[str, Any], ...] = ()

    @property
    def share(self) -> float:
        """The count as a share of the total; 0 where there is nothing to count."""
        return self.count / self.total if self.total else 0.0

    def told(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return vars(self) | {"share": self.share, "examples": list(self.examples)}


def example(position: int, identifier: str, caption: str | None) -> dict[str, Any]:
    """Return an example of a finding: where the record stands, its id, and the caption that is meant."""
    return {"position": int(position), "id": identifier, "caption": caption}


@dataclass
class Tally:
    """Counts by name, with the first examples of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, name: str, position: int, identifier: str, caption: str | None = None) -> None:
        """Count one."""
        self.counts[name] = self.counts.get(name, 0) + 1
        shown = self.examples.setdefault(name, [])
        if len(shown) < EXAMPLES:
            shown.append(example(position, identifier, caption))

    def finding(self, name: str, title: str, total: int, unit: str, **more: Any) -> Finding:
        """Return the finding of a name."""
        count, shown = self.counts.get(name, 0), tuple(self.examples.get(name, ()))
        return Finding(
            name=name.replace(" ", "_"),
            title=title,
            count=count,
            total=total,
            unit=unit,
            examples=shown,
            **more,
        )
