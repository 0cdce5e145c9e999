"""Config of pair sampling; imports no heavy library, because the command line reads it first."""

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
# Fields that apply to sources without neighbors; all fields apply to the other sources.
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
    """Pair sampling: which images become positive pairs. The default is the paper's: the nearest caption.

    ::

        PairConfig(source="language", k=3, mutual_k=10)
    """

    source: PairSource = "language"
    """Source of positive pairs: `self` (two views of one image), `language` (similar captions), `vision`
    (similar image embeddings), `hybrid` (both), `label` (same label, an oracle), or `file`."""
    caption_encoder: str | None = None
    """Name of the caption embeddings; may be omitted if there is only one."""
    image_encoder: str | None = None
    """Name of the image embeddings, for `vision`, `hybrid` and images without a caption."""
    k: int | None = None
    """The partner is one of the k nearest. Defaults to 1, the paper's, and to all partners of a file."""
    sampling_temperature: float | None = None
    """Sample one of the k in proportion to exp(similarity / temperature); uniformly by default."""
    min_similarity: float | None = None
    """Minimum cosine similarity of a partner."""
    ratio_threshold: float | None = None
    """Keep the nearest only if the second nearest is farther by this factor (in 1 - cosine)."""
    mutual_k: int | None = None
    """Keep only partners that are in each other's k nearest."""
    hubness_correction: HubnessCorrection = "none"
    """Re-ranking against hubs, images that are near to many others: `csls` or `mutual-proximity`."""
    fusion: Fusion = "rrf"
    """Combination of captions and images for `hybrid`: reciprocal rank fusion (`rrf`), or `weighted`
    similarity."""
    image_weight: float = 0.5
    """Weight of the image similarity for `hybrid`, from 0 to 1."""
    self_pair_prob: float = 0.0
    """Probability of pairing an image with itself although it has a partner, from 0 to 1."""
    fallback: Fallback = "self"
    """Treatment of images without an admissible partner: `self` pairs the image with itself, `drop`
    excludes it (as LGSSL does), `nearest` ignores the constraints."""
    missing_caption: MissingCaption = "self"
    """Treatment of images without a caption for `language`: `self`, `drop`, the nearest image by image
    embeddings (`visual`), or that image and its partners (`borrow`)."""
    pairs_file: Path | None = None
    """Table with columns anchor, partner and optionally similarity, for `file`."""

    def __post_init__(self) -> None:
        """Validate the config.

        Raises:
            InvalidInputError: if a value is out of range or fields contradict each other.
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
                f"`sampling_temperature` must be above 0, got {self.sampling_temperature}",
                field="sampling_temperature",
            )
        self._check_applicable()

    def _check_applicable(self) -> None:
        """Raise for fields that the source of pairs would ignore."""
        if (self.source == "file") != (self.pairs_file is not None):
            raise InvalidInputError("`source` 'file' and `pairs_file` require each other", field="pairs_file")
        for field in fields(self):
            allowed = _ALLOWED_FIELDS.get(self.source)
            if (
                allowed is not None
                and field.name not in allowed
                and getattr(self, field.name) != field.default
            ):
                raise InvalidInputError(
                    f"`{field.name}` does not apply to `source` {self.source!r}", field=field.name
                )
        if self.source == "label" and self.fallback == "nearest":
            raise InvalidInputError(
                "`fallback` must be 'self' or 'drop' for `source` 'label', which has no nearest image",
                field="fallback",
            )
        if self.caption_pooling != "mean" and (
            self.hubness_correction == "mutual-proximity" or self.source == "hybrid"
        ):
            raise InvalidInputError(
                "`caption_pooling` must be 'mean' for mutual proximity and for `source` 'hybrid', "
                "which compare one vector per image",
                field="caption_pooling",
            )
        if self.source == "hybrid" and self.hubness_correction == "mutual-proximity":
            raise InvalidInputError(
                "`hubness_correction` 'mutual-proximity' does not apply to `source` 'hybrid', whose "
                "similarity is that of no single embedding; 'csls' does",
                field="hubness_correction",
            )
        if self.caption_pooling == "sample" and (self.hubness_correction != "none" or self.mutual_k):
            raise InvalidInputError(
                "`caption_pooling` 'sample' compares single captions and excludes `mutual_k` and "
                "`hubness_correction`",
                field="caption_pooling",
            )

    @property
    def search_config(self) -> SearchConfig:
        """The fields that the neighbor search depends on."""
        return SearchConfig(**{field.name: getattr(self, field.name) for field in fields(SearchConfig)})

    @property
    def num_candidates(self) -> int:
        """Number of neighbors per image that partners are selected from."""
        num_required = max(
            1 if self.k is None else self.k, self.mutual_k or 1, 1 if self.ratio_threshold is None else 2
        )
        return (
            max(num_required, NUM_RERANK_CANDIDATES)
            if self.hubness_correction != "none" or self.source == "hybrid"
            else num_required
        )

    def summary(self) -> str:
        """Return the config in one sentence."""
        if self.source == "self":
            return "each image is paired with another view of itself"
        parts = [f"each image is paired with {self._describe_partner()}", *self._describe_constraints()]
        if self.self_pair_prob > 0:
            parts.append(f"with probability {self.self_pair_prob:.0%} with itself instead")
        return "; ".join(parts)

    def _describe_partner(self) -> str:
        if self.source == "label":
            return "another image of the same label"
        if self.source == "file":
            subset = "one of its partners" if self.k is None else f"one of its first {self.k} partners"
            return f"{subset} in {self.pairs_file}"
        criterion = {
            "language": "most similar captions",
            "vision": "most similar image embeddings",
            "hybrid": f"most similar captions and image embeddings ({self.fusion} fusion)",
        }[self.source]
        if self.k is None or self.k == 1:
            return f"the image with the {criterion}"
        weighting = "" if self.sampling_temperature is None else ", sampled by similarity"
        return f"one of the {self.k} images with the {criterion}{weighting}"

    def _describe_constraints(self) -> list[str]:
        """Return a phrase per constraint that is active."""
        return [
            phrase
            for is_active, phrase in (
                (self.caption_pooling == "max", "captions compared by their maximum similarity"),
                (self.caption_pooling == "sample", "by a caption sampled each epoch"),
                (self.group_scope == "same", "in the same group"),
                (self.group_scope == "different", "in a different group"),
                (self.exclude_identical_captions, "without identical captions"),
                (self.exclude_near_duplicates, "without near-duplicate images"),
                (self.filter is not None, f"without the exclusions of {self.filter}"),
                (self.hubness_correction != "none", f"hubness corrected by {self.hubness_correction}"),
                (self.min_similarity is not None, f"similarity at least {self.min_similarity}"),
                (
                    self.ratio_threshold is not None,
                    f"nearer than the next by a ratio of {self.ratio_threshold}",
                ),
                (self.mutual_k is not None, f"in each other's {self.mutual_k} nearest"),
            )
            if is_active
        ]


def parse_pair_config(text: str) -> PairConfig:
    """Parse a config such as `k=3,mutual_k=10`, or `default` for the paper's.

    Raises:
        InvalidInputError: if a field is unknown or repeated, or a value has another type.
    """
    hints, overrides = get_type_hints(PairConfig), {}
    for part in _split_fields(text, hints):
        name, _, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in hints:
            suggestion = did_you_mean(name, list(hints))
            raise InvalidInputError(
                f"unknown field {name!r} in the pair config {text!r}; known: {', '.join(hints)}.{suggestion}",
                field=name,
            )
        if name in overrides:
            raise InvalidInputError(f"`{name}` is given twice in the pair config {text!r}", field=name)
        overrides[name] = _parse_value(hints[name], value.strip(), text)
    return PairConfig(**overrides)


def _split_fields(text: str, hints: dict[str, Any]) -> list[str]:
    """Split at commas, except those in a path or a name, after which no field follows."""
    parts: list[str] = []
    for part in text.split(","):
        previous = hints.get(parts[-1].partition("=")[0].strip().replace("-", "_")) if parts else None
        is_field = "=" in part or part.strip().replace("-", "_") in hints
        if previous in (str | None, Path | None) and not is_field:
            parts[-1] += f",{part}"
        elif part.strip() not in ("", "default"):
            parts.append(part.strip())
    return parts


def _parse_value(hint: Any, value: str, config_text: str) -> Any:
    types = [type_ for type_ in (get_args(hint) or (hint,)) if type_ is not type(None)]
    if types[0] is bool:
        if value not in ("", "true", "false"):
            raise InvalidInputError(
                f"{value!r} in the pair config {config_text!r} must be true or false", field="pair_config"
            )
        return value != "false"
    try:
        return types[0](value) if types[0] in (int, float, Path) else value
    except ValueError as error:
        raise InvalidInputError(
            f"{value!r} in the pair config {config_text!r} is not a number", field="pair_config"
        ) from error
