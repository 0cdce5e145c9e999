"""Rules of pairing: settings alone, so that the command line can know them without loading anything."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from likewise.errors import InvalidInputError, did_you_mean
from likewise.neighbors.config import NUM_RERANK_CANDIDATES, SearchConfig, check_choices, check_range

PairSource = Literal["self", "language", "vision", "hybrid", "label", "file"]
HubnessCorrection = Literal["none", "csls", "mutual-proximity"]
Fusion = Literal["rrf", "weighted"]
Fallback = Literal["self", "drop", "nearest"]
MissingCaption = Literal["self", "drop", "visual", "borrow"]

NEIGHBOR_SOURCES: tuple[PairSource, ...] = ("language", "vision", "hybrid")
# What sources without neighbors can make something of; the others take every setting.
_COMMON_FIELDS = {"source", "filter", "caption_encoder"}
_ALLOWED_FIELDS = {
    "self": _COMMON_FIELDS,
    "label": _COMMON_FIELDS | {"self_pair_prob", "fallback"},
    "file": _COMMON_FIELDS
    | {
        "pairs_file",
        "k",
        "sampling_temperature",
        "min_similarity",
        "ratio_threshold",
        "mutual_k",
        "self_pair_prob",
        "fallback",
    },
}


@dataclass(frozen=True, kw_only=True)
class PairConfig(SearchConfig):
    """Who is shown with whom.

    Attributes:
        source: `self` (two views of one image), `language` (described alike), `vision` (looking alike to a
            given encoder), `hybrid` (both together), `label` (of one label: an oracle), or `file` (given).
        caption_encoder: Whose embeddings of captions to use; may be left out where there is only one.
        image_encoder: Whose embeddings of images to use, for `vision`, `hybrid` and images without caption.
        k: The partner is one of the k nearest; 1, the nearest, is the paper's. With `file`, all by default.
        sampling_temperature: Draw the nearer of the k more often, in proportion to exp(similarity /
            temperature); evenly where not given.
        min_similarity: Only partners at least so alike (cosine).
        ratio_threshold: Only where the second nearest is farther than the nearest by this factor (1 -
            cosine).
        mutual_k: Only partners that are among each other's nearest so many.
        hubness_correction: Correct the order for images that are near to everything: `csls` or
            `mutual-proximity`.
        fusion: How `hybrid` combines: by reciprocal `rank`, or by weighted `similarity`.
        image_weight: The weight of looks in `hybrid`, from 0 to 1.
        self_pair_prob: How often an image is paired with itself although it has a partner, from 0 to 1.
        fallback: Whom an image without admissible partner gets: itself (`self`), nobody (`drop`: it is no
            anchor), or the `nearest` in spite of the rules.
        missing_caption: Whom an image without caption gets with `language`: itself (`self`), nobody
            (`drop`), its
            visual neighbor (`vision`), or that one and its partners (`borrow`: the caption of its visual
            neighbor; the same for k of 1). With `hybrid` such images go by their looks.
        pairs_file: For `file`: a table with columns anchor, partner and, if wanted, similarity.
    """

    source: PairSource = "language"
    caption_encoder: str | None = None
    image_encoder: str | None = None
    k: int | None = None
    sampling_temperature: float | None = None
    min_similarity: float | None = None
    ratio_threshold: float | None = None
    mutual_k: int | None = None
    hubness_correction: HubnessCorrection = "none"
    fusion: Fusion = "rrf"
    image_weight: float = 0.5
    self_pair_prob: float = 0.0
    fallback: Fallback = "self"
    missing_caption: MissingCaption = "self"
    pairs_file: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what no rule can mean.

        Raises:
            InputError: naming the setting and what it may be.
        """
        check_choices(self)
        for name, low, high in (
            ("target_recall", 0, 1),
            ("k", 1, None),
            ("mutual_k", 1, None),
            ("ratio_threshold", 1, None),
            ("min_similarity", -1, 1),
            ("image_weight", 0, 1),
            ("self_pair_prob", 0, 1),
        ):
            check_range(name, getattr(self, name), low, high)
        if self.sampling_temperature is not None and not self.sampling_temperature > 0:
            raise InvalidInputError(
                f"the temperature of the draw is {self.sampling_temperature}; it must be above 0"
            )
        self._check_applicable()

    def _check_applicable(self) -> None:
        """Refuse settings that the source of pairs would pass over in silence."""
        if (self.source == "file") != (self.pairs_file is not None):
            raise InvalidInputError("--pairs file and --pairs-file FILE go together: give both or neither")
        for field in fields(self):
            allowed = _ALLOWED_FIELDS.get(self.source)
            if (
                allowed is not None
                and field.name not in allowed
                and getattr(self, field.name) != field.default
            ):
                flag = field.name.replace("_", "-")
                raise InvalidInputError(f"--{flag} means nothing for pairs from {self.source}; leave it out")
        if self.source == "label" and self.fallback == "nearest":
            raise InvalidInputError(
                "among images of one label none is the nearest: use --fallback self or drop"
            )
        if self.caption_pooling != "mean" and (
            self.hubness_correction == "mutual-proximity" or self.source == "hybrid"
        ):
            raise InvalidInputError(
                "mutual proximity and hybrid pairs compare one vector an image: use them with --captions mean"
            )
        if self.caption_pooling == "sample" and (self.hubness_correction != "none" or self.mutual_k):
            raise InvalidInputError(
                "--captions draw compares single captions: it goes without --mutual and correction of hubs"
            )

    @property
    def search_config(self) -> SearchConfig:
        """The part that decides what is searched for."""
        return SearchConfig(**{field.name: getattr(self, field.name) for field in fields(SearchConfig)})

    @property
    def num_candidates(self) -> int:
        """How many neighbors an image the rule looks at."""
        num_required = max(
            1 if self.k is None else self.k, self.mutual_k or 1, 1 if self.ratio_threshold is None else 2
        )
        return (
            max(num_required, NUM_RERANK_CANDIDATES)
            if self.hubness_correction != "none" or self.source == "hybrid"
            else num_required
        )

    def summary(self) -> str:
        """Say the rule in plain words, without the counts that only a collection gives."""
        if self.source == "self":
            return "each image is paired with another view of itself"
        parts = [f"each image is paired with {self._describe_partner()}", *self._describe_constraints()]
        if self.self_pair_prob > 0:
            parts.append(f"in {self.self_pair_prob:.0%} of the draws with itself instead")
        return "; ".join(parts)

    def _describe_partner(self) -> str:
        if self.source == "label":
            return "another image of the same label"
        if self.source == "file":
            choice_phrase = "one of the partners" if self.k is None else f"one of the first {self.k} partners"
            return f"{choice_phrase} that {self.pairs_file} gives it"
        criterion = {
            "language": "described most like it",
            "vision": "that look most like it",
            "hybrid": f"most like it in words and looks together ({self.fusion} fusion)",
        }[self.source]
        if self.k is None or self.k == 1:
            return f"the image {criterion.replace('that look', 'that looks')}"
        weighting = "" if self.sampling_temperature is None else ", the nearer the more often"
        return f"one of the {self.k} images {criterion}{weighting}"

    def _describe_constraints(self) -> list[str]:
        """Each limit that differs from none, as a phrase."""
        return [
            phrase
            for is_active, phrase in (
                (self.caption_pooling == "max", "captions compared by their best match"),
                (self.caption_pooling == "sample", "by a caption drawn anew each epoch"),
                (self.group_scope == "same", "within its own group"),
                (self.group_scope == "different", "from another group"),
                (self.exclude_identical_captions, "never of the same caption"),
                (self.exclude_near_duplicates, "never a near-duplicate image"),
                (self.filter is not None, f"without what {self.filter} leaves out"),
                (self.hubness_correction != "none", f"hubs corrected by {self.hubness_correction}"),
                (self.min_similarity is not None, f"at least {self.min_similarity} alike"),
                (
                    self.ratio_threshold is not None,
                    f"clearly nearer than the next (ratio {self.ratio_threshold})",
                ),
                (self.mutual_k is not None, f"both among each other's {self.mutual_k} nearest"),
            )
            if is_active
        ]


def parse_pair_config(text: str) -> PairConfig:
    """Read a rule as it is typed: `k=3,mutual=10`, or `default` for the paper's.

    Raises:
        InputError: for an unknown setting or a value that is not of its kind.
    """
    hints, overrides = get_type_hints(PairConfig), {}
    for part in (part.strip() for part in text.split(",") if part.strip() not in ("", "default")):
        name, _, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in hints:
            suggestion = did_you_mean(name, list(hints))
            raise InvalidInputError(
                f"unknown setting {name!r} in the rule {text!r}; known: {', '.join(hints)}.{suggestion}"
            )
        if name in overrides:
            raise InvalidInputError(f"{name} stands twice in the rule {text!r}")
        overrides[name] = _parse_value(hints[name], value.strip(), text)
    return PairConfig(**overrides)


def _parse_value(hint: Any, value: str, config_text: str) -> Any:
    types = [type_ for type_ in (get_args(hint) or (hint,)) if type_ is not type(None)]
    if types[0] is bool:
        if value not in ("", "true", "false"):
            raise InvalidInputError(f"{value!r} in the rule {config_text!r} should be true or false")
        return value != "false"
    try:
        return types[0](value) if types[0] in (int, float, Path) else value
    except ValueError as error:
        raise InvalidInputError(f"{value!r} in the rule {config_text!r} is not a number") from error
