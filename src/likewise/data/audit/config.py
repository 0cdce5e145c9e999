"""Where the audit draws its lines."""

from dataclasses import dataclass

from likewise.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """What counts as tiny, as stretched, and as a near-duplicate.

    Attributes:
        min_side: Images with a shorter side in pixels are told as tiny.
        max_aspect: Images whose sides differ more than so many to 1 are told as stretched.
        max_hamming: Bits of 64 in which the hashes of near-duplicate images may differ.
    """

    min_side: int = 64
    max_aspect: float = 4.0
    max_hamming: int = 3

    def validate(self) -> None:
        """Raise InputError for a line that cannot be drawn."""
        if self.min_side < 0:
            raise InvalidInputError(f"--min-side is {self.min_side}; it must be 0 or more pixels")
        if not self.max_aspect >= 1:
            raise InvalidInputError(f"--max-aspect is {self.max_aspect}; it must be 1 or more")
