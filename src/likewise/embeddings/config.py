"""Options of encoders: settings alone, so that the command line can know them without loading anything."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from likewise.errors import InvalidInputError

Pooling = Literal["cls", "mean", "last"]
Backend = Literal["torch", "onnx"]
Modality = Literal["captions", "images"]


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """How an encoder of captions is used, where its kind leaves a choice.

    Attributes:
        pooling: For `hf:` models, which token states become the vector: the first one's (`cls`), their
            `mean` (the default), or the `last` one's.
        max_length: Tokens a caption is cut to, fewer than the model's own limit; for transformers.
        backend: What runs a transformer: `torch`, or ONNX Runtime on the CPU (`onnx`), often faster there.
    """

    pooling: Pooling | None = None
    max_length: int | None = None
    backend: Backend = "torch"

    def __post_init__(self) -> None:
        """Refuse a length that leaves no token.

        Raises:
            InputError: where `max_length` is below 1.
        """
        if self.max_length is not None and self.max_length < 1:
            raise InvalidInputError(f"--max-length is {self.max_length}; at least 1 token is needed")

    @property
    def overrides(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


DEFAULT_OPTIONS = EncoderOptions()
