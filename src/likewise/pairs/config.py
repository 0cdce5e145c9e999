"""Rules of pairing: settings alone, so that the command line can know them without loading anything."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from likewise.errors import InputError, close_matches
from likewise.neighbors.config import POOL_DEPTH, SearchRule, check_between, check_choices

PairSource = Literal["self", "language", "vision", "hybrid", "label", "file"]
HubCorrection = Literal["none", "csls", "mutual-proximity"]
Fusion = Literal["rank", "similarity"]
Fallback = Literal["self", "drop", "nearest"]
Uncaptioned = Literal["self", "drop", "vision", "borrow"]

RANKED: tuple[PairSource, ...] = ("language", "vision", "hybrid")
# What sources without neighbors can make something of; the others take every setting.
_ALWAYS = {"pairs", "filter", "encoder"}
_MEANT = {
    "self": _ALWAYS,
    "label": _ALWAYS | {"self_share", "fallback"},
    "file": _ALWAYS
    | {"pairs_file", "k", "draw_temperature", "min_similarity", "ratio", "mutual", "self_share", "fallback"},
}


@dataclass(frozen=True, kw_only=True)
class PairRule(SearchRule):
    """Who is shown with whom.

    Attributes:
        pairs: `self` (two views of one image), `language` (described alike), `vision` (looking alike to a
            given encoder), `hybrid` (both together), `label` (of one label: an oracle), or `file` (given).
        encoder: Whose embeddings of captions to use; may be left out where there is only one.
        image_encoder: Whose embeddings of images to use, for `vision`, `hybrid` and images without caption.
        k: The partner is one of the k nearest; 1, the nearest, is the paper's. With `file`, all by default.
        draw_temperature: Draw the nearer of the k more often, in proportion to exp(similarity /
            temperature); evenly where not given.
        min_similarity: Only partners at least so alike (cosine).
        ratio: Only where the second nearest is farther than the nearest by this factor (1 - cosine).
        mutual: Only partners that are among each other's nearest so many.
        hubs: Correct the order for images that are near to everything: `csls` or `mutual-proximity`.
        fusion: How `hybrid` combines: by reciprocal `rank`, or by weighted `similarity`.
        image_weight: The weight of looks in `hybrid`, from 0 to 1.
        self_share: How often an image is paired with itself although it has a partner, from 0 to 1.
        fallback: Whom an image without admissible partner gets: itself (`self`), nobody (`drop`: it is no
            anchor), or the `nearest` in spite of the rules.
        uncaptioned: Whom an image without caption gets with `language`: itself (`self`), nobody (`drop`), its
            visual neighbor (`vision`), or that one and its partners (`borrow`: the caption of its visual
            neighbor; the same for k of 1). With `hybrid` such images go by their looks.
        pairs_file: For `file`: a table with columns anchor, partner and, if wanted, similarity.
    """

    pairs: PairSource = "language"
    encoder: str | None = None
    image_encoder: str | None = None
    k: int | None = None
    draw_temperature: float | None = None
    min_similarity: float | None = None
    ratio: float | None = None
    mutual: int | None = None
    hubs: HubCorrection = "none"
    fusion: Fusion = "rank"
    image_weight: float = 0.5
    self_share: float = 0.0
    fallback: Fallback = "self"
    uncaptioned: Uncaptioned = "self"
    pairs_file: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what no rule can mean.

        Raises:
            InputError: naming the setting and what it may be.
        """
        check_choices(self)
        for name, low, high in (
            ("index_recall", 0, 1),
            ("k", 1, None),
            ("mutual", 1, None),
            ("ratio", 1, None),
            ("min_similarity", -1, 1),
            ("image_weight", 0, 1),
            ("self_share", 0, 1),
        ):
            check_between(name, getattr(self, name), low, high)
        if self.draw_temperature is not None and not self.draw_temperature > 0:
            raise InputError(f"the temperature of the draw is {self.draw_temperature}; it must be above 0")
        self._check_meaning()

    def _check_meaning(self) -> None:
        """Refuse settings that the source of pairs would pass over in silence."""
        if (self.pairs == "file") != (self.pairs_file is not None):
            raise InputError("--pairs file and --pairs-file FILE go together: give both or neither")
        for field in fields(self):
            meant = _MEANT.get(self.pairs)
            if meant is not None and field.name not in meant and getattr(self, field.name) != field.default:
                flag = field.name.replace("_", "-")
                raise InputError(f"--{flag} means nothing for pairs from {self.pairs}; leave it out")
        if self.pairs == "label" and self.fallback == "nearest":
            raise InputError("among images of one label none is the nearest: use --fallback self or drop")
        if self.captions != "mean" and (self.hubs == "mutual-proximity" or self.pairs == "hybrid"):
            raise InputError(
                "mutual proximity and hybrid pairs compare one vector an image: use them with --captions mean"
            )
        if self.captions == "draw" and (self.hubs != "none" or self.mutual):
            raise InputError(
                "--captions draw compares single captions: it goes without --mutual and correction of hubs"
            )

    @property
    def search(self) -> SearchRule:
        """The part that decides what is searched for."""
        return SearchRule(**{field.name: getattr(self, field.name) for field in fields(SearchRule)})

    @property
    def depth(self) -> int:
        """How many neighbors an image the rule looks at."""
        asked = max(1 if self.k is None else self.k, self.mutual or 1, 1 if self.ratio is None else 2)
        return max(asked, POOL_DEPTH) if self.hubs != "none" or self.pairs == "hybrid" else asked

    def summary(self) -> str:
        """Say the rule in plain words, without the counts that only a collection gives."""
        if self.pairs == "self":
            return "each image is paired with another view of itself"
        parts = [f"each image is paired with {self._whom()}", *self._limits()]
        if self.self_share > 0:
            parts.append(f"in {self.self_share:.0%} of the draws with itself instead")
        return "; ".join(parts)

    def _whom(self) -> str:
        if self.pairs == "label":
            return "another image of the same label"
        if self.pairs == "file":
            few = "one of the partners" if self.k is None else f"one of the first {self.k} partners"
            return f"{few} that {self.pairs_file} gives it"
        how = {
            "language": "described most like it",
            "vision": "that look most like it",
            "hybrid": f"most like it in words and looks together ({self.fusion} fusion)",
        }[self.pairs]
        if self.k is None or self.k == 1:
            return f"the image {how.replace('that look', 'that looks')}"
        drawn = "" if self.draw_temperature is None else ", the nearer the more often"
        return f"one of the {self.k} images {how}{drawn}"

    def _limits(self) -> list[str]:
        """Each limit that differs from none, as a phrase."""
        return [
            phrase
            for given, phrase in (
                (self.captions == "best", "captions compared by their best match"),
                (self.captions == "draw", "by a caption drawn anew each epoch"),
                (self.scope == "same", "within its own group"),
                (self.scope == "other", "from another group"),
                (self.distinct_captions, "never of the same caption"),
                (self.distinct_images, "never a near-duplicate image"),
                (self.filter is not None, f"without what {self.filter} leaves out"),
                (self.hubs != "none", f"hubs corrected by {self.hubs}"),
                (self.min_similarity is not None, f"at least {self.min_similarity} alike"),
                (self.ratio is not None, f"clearly nearer than the next (ratio {self.ratio})"),
                (self.mutual is not None, f"both among each other's {self.mutual} nearest"),
            )
            if given
        ]


def parse_rule(text: str) -> PairRule:
    """Read a rule as it is typed: `k=3,mutual=10`, or `paper` for the paper's.

    Raises:
        InputError: for an unknown setting or a value that is not of its kind.
    """
    hints, given = get_type_hints(PairRule), {}
    for part in (part.strip() for part in text.split(",") if part.strip() not in ("", "paper")):
        name, _, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in hints:
            near = close_matches(name, list(hints))
            raise InputError(
                f"unknown setting {name!r} in the rule {text!r}; known: {', '.join(hints)}.{near}"
            )
        if name in given:
            raise InputError(f"{name} stands twice in the rule {text!r}")
        given[name] = _value(hints[name], value.strip(), text)
    return PairRule(**given)


def _value(hint: Any, value: str, rule: str) -> Any:
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    if kinds[0] is bool:
        if value not in ("", "true", "false"):
            raise InputError(f"{value!r} in the rule {rule!r} should be true or false")
        return value != "false"
    try:
        return kinds[0](value) if kinds[0] in (int, float, Path) else value
    except ValueError as fault:
        raise InputError(f"{value!r} in the rule {rule!r} is not a number") from fault
