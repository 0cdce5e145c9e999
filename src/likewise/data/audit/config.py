"""Thresholds of the audit."""

from dataclasses import dataclass

from likewise.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Thresholds of an audit."""

    min_side: int = 64
    """Images with a shorter side, in pixels, are reported as tiny."""
    max_aspect: float = 4.0
    """Images with a larger aspect ratio are reported as stretched."""
    max_hamming: int = 3
    """Maximum Hamming distance between the 64-bit hashes of near-duplicate images."""

    def validate(self) -> None:
        """Validate the fields.

        Raises:
            InvalidInputError: if a threshold is out of range.
        """
        if self.min_side < 0:
            raise InvalidInputError(f"`min_side` must be at least 0, got {self.min_side}", field="min_side")
        if not self.max_aspect >= 1:
            raise InvalidInputError(
                f"`max_aspect` must be at least 1, got {self.max_aspect}", field="max_aspect"
            )
