"""The protocols of evaluation in plain words, for people who have never heard of them."""

from collections.abc import Callable
from dataclasses import dataclass

from likewise.evaluation.compare import Row


@dataclass(frozen=True, kw_only=True)
class Words:
    """How to speak of a protocol.

    Attributes:
        title: What it is called.
        explain: One line on what is done, with its settings.
        items: What one item of its test is called, once and several times.
        doing: What an encoder does when it is right, as after `can`.
    """

    title: str
    explain: Callable[[Row], str]
    items: tuple[str, str]
    doing: Callable[[Row], str] = lambda _: "name the right class"

    def metric(self, row: Row) -> str:
        """Return what a figure is called in a table."""
        return f"{self.title} {row.metric}"


def _linear(_: Row) -> str:
    return (
        "A linear classifier is fitted to the frozen features of the training images and names the class of "
        "every test image. How strongly it is regularised is chosen on images held out of training."
    )


def _fewshot(row: Row) -> str:
    told = row.settings
    return (
        f"{row.n:,} small exams: {told['ways']} classes are drawn, {told['shots']} labelled training images "
        "of each are given, and test images go to the class whose mean is nearest. Guessing is right "
        f"{100 / told['ways']:.0f} % of the time. The interval covers which exams are drawn from these "
        "images, not how another test set would come out, so it is narrower than the others."
    )


def _knn(row: Row) -> str:
    return (
        f"The {row.settings['k']} most similar training images vote on the class of a test image; nothing is "
        "fitted."
    )


def _retrieval(_: Row) -> str:
    return (
        "Every test image is a query: which other test images (of other sources, where the set names "
        "sources) look most like it to the encoder? Recall@k is the share of queries with the same concept "
        "among the first k answers; mean average precision also asks how far ahead of the rest all of them "
        "come."
    )


def _finding(row: Row) -> str:
    depth = row.metric.removeprefix("recall@")
    place = {"1": " at the first try"}.get(depth, f" among the first {depth}" if depth.isdigit() else "")
    return f"find another picture of the same concept{place}"


PROTOCOLS = {
    "linear": Words(title="Linear probe", explain=_linear, items=("test image", "test images")),
    "fewshot": Words(title="Few-shot", explain=_fewshot, items=("episode", "episodes")),
    "knn": Words(title="kNN", explain=_knn, items=("test image", "test images")),
    "retrieval": Words(
        title="Retrieval",
        explain=_retrieval,
        items=("query", "queries"),
        doing=_finding,
    ),
}


def protocol(row: Row) -> Words:
    """Return the words for a row's protocol; an unknown one is called by its own name."""
    known = PROTOCOLS.get(row.protocol)
    if known is not None:
        return known
    return Words(title=row.protocol, explain=lambda _: "", items=("item", "items"))
