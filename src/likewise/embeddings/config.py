"""Options of text encoders; this module imports no model library."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from likewise.errors import InvalidInputError

Pooling = Literal["cls", "mean", "last"]
Backend = Literal["torch", "onnx"]
Modality = Literal["captions", "images"]


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Options of a text encoder."""

    pooling: Pooling | None = None
    """Pooling of the token states of `hf:` models: first token, mean or last token; defaults to `mean`."""
    max_length: int | None = None
    """Maximum number of tokens per caption for transformers; defaults to the limit of the model."""
    backend: Backend = "torch"
    """Runtime of transformers: `torch`, or ONNX Runtime on the CPU."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            InvalidInputError: if `max_length` is below 1.
        """
        if self.max_length is not None and self.max_length < 1:
            raise InvalidInputError(
                f"`max_length` must be at least 1, got {self.max_length}", field="max_length"
            )

    @property
    def overrides(self) -> dict[str, Any]:
        """Options that differ from their defaults, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


DEFAULT_OPTIONS = EncoderOptions()
