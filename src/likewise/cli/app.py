"""The application that every verb belongs to, and what verbs share."""

from cyclopts import App, Parameter

from likewise.terminal import Common

app = App(
    name="likewise",
    help="Learn image encoders from captioned images: pictures that are described alike, learn alike.",
    help_epilogue="Start here: `likewise demo --quick`",
    help_format="markdown",
    default_parameter=Parameter(negative=()),
)

COMMON = Common()


def listed(text: str | None) -> tuple[str, ...]:
    """Split a list with commas between."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
