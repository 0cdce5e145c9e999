"""What `likewise diagnose` finds, as plain data."""

from dataclasses import asdict, dataclass
from typing import Any

from likewise.neighbors.agreement import Agreement, Spread
from likewise.neighbors.quality import Chance, Figures


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rule with one encoder.

    Attributes:
        encoder: Whose embeddings; two names for a hybrid, none for labels and files.
        rule: The rule as it is typed.
        summary: The rule in words, with how many images have a partner.
        fault: Why there are no pairs, where there are none.
        figures: What its pairs are worth, where there are some.
    """

    encoder: str
    rule: str
    summary: str
    fault: str | None = None
    figures: Figures | None = None


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Whom a rule shows an image with in the first epoch of seed 0.

    Attributes:
        row: The place of the rule among the rows.
        position: The partner, or None where there is none.
        similarity: As the rule sees it, if it does.
    """

    row: int
    position: int | None = None
    similarity: float | None = None


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """An image picked by seed alone, with its partner under each rule that left pairs."""

    position: int
    partners: tuple[Shown, ...]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Encoders and rules of pairing side by side.

    Attributes:
        collection: The path of the collection.
        images: How many images it has.
        labelled: How many of them have a label.
        looks: The image encoder that tells how alike pairs look, if there is one.
        rows: One an encoder and rule.
        chance: The same for two images picked blindly.
        spreads: How alike the nearest are, one an encoder.
        agreements: How far each two encoders agree.
        anchors: A few images with their partners.
    """

    collection: str
    images: int
    labelled: int
    looks: str | None
    rows: tuple[Row, ...]
    chance: Chance
    spreads: tuple[Spread, ...]
    agreements: tuple[Agreement, ...]
    anchors: tuple[Anchor, ...]

    def told(self) -> dict[str, Any]:
        """Return everything as plain dictionaries, lists and numbers."""
        return asdict(self)
