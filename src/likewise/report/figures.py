"""Numbers as people read them."""

MINUS = "−"
ABSENT = "–"


def percent(share: float, places: int = 1) -> str:
    """Return a share of one as a percentage without its sign, such as `36.6`."""
    return f"{100 * share:.{places}f}"


def points(share: float) -> str:
    """Return a difference of shares as signed percentage points, such as `+3.2` or `−0.4`."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def chance(p_value: float) -> str:
    """Return a p-value with what it is, such as `p = 0.034`."""
    if p_value < 0.001:
        return "p\u00a0<\u00a00.001"
    return f"p\u00a0=\u00a0{p_value:.3f}" if p_value < 0.1 else f"p\u00a0=\u00a0{p_value:.2f}"


def plain(value: object) -> str:
    """Return a setting as text: numbers short, nothing as a dash."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def listed(parts: list[str]) -> str:
    """Join with commas and a last `and`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun, such as `1 image` or `1,045 images`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
