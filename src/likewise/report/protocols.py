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


def _knn_grid(row: Row) -> str:
    told = row.details
    return (
        "The most similar training images vote on the class of a test image. How many, and how fast a vote "
        f"fades with distance, was chosen on held-out images: {told['k']} and {told['temperature']:g}."
    )


def _clustering(row: Row) -> str:
    return (
        "The test images are sorted into as many groups as there are classes without a look at labels, "
        f"{row.n} times from other starts. 100 % is full agreement with the classes; for ARI, 0 % is chance. "
        "The interval covers the starts, not how another test set would come out."
    )


def _finetune(row: Row) -> str:
    return (
        f"Encoder and classifier are trained together on the labelled images for {row.settings['epochs']} "
        "epochs; the classifier then names the class of every test image."
    )


def _localisation(_: Row) -> str:
    return (
        "A linear map from the frozen features predicts the box around the subject. Overlap is the shared "
        "area over the area of both boxes together."
    )


def _zeroshot(row: Row) -> str:
    sentences = ", ".join(f"“{each}”" for each in row.settings["templates"])
    return f"No image is learned from: one gets the class whose name, put into {sentences}, is nearest."


def _image_text(_: Row) -> str:
    return (
        "Each test image looks for its caption among all, and each caption for its image. Recall@k is the "
        "share that finds it among the first k answers."
    )


def _detection(row: Row) -> str:
    how = "as it is" if row.settings["backbone"] == "frozen" else "trained with it"
    return (
        f"A Faster R-CNN on the encoder, which is {how}, learns to box objects for {row.settings['epochs']} "
        "epochs. AP is COCO's average precision over overlaps of 50 to 95 %, AP50 and AP75 those at one."
    )


def _segmentation(row: Row) -> str:
    head = (
        "one linear layer on its maps"
        if row.settings["backbone"] == "frozen"
        else "a network trained with it"
    )
    return (
        f"Every pixel gets a class, from the encoder and {head}. IoU is the overlap of given and true areas."
    )


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
    "knn-grid": Words(title="kNN, tuned", explain=_knn_grid, items=("test image", "test images")),
    "clustering": Words(
        title="Clustering", explain=_clustering, items=("start", "starts"), doing=lambda _: "be sorted"
    ),
    "finetune": Words(title="Fine-tuned", explain=_finetune, items=("test image", "test images")),
    "localisation": Words(
        title="Localisation",
        explain=_localisation,
        items=("test image", "test images"),
        doing=lambda _: "box the subject",
    ),
    "zeroshot": Words(title="Zero-shot", explain=_zeroshot, items=("test image", "test images")),
    "image-text": Words(
        title="Image and text",
        explain=_image_text,
        items=("query", "queries"),
        doing=lambda _: "find the other half",
    ),
    "detection": Words(
        title="Detection",
        explain=_detection,
        items=("test image", "test images"),
        doing=lambda _: "box the objects",
    ),
    "segmentation": Words(
        title="Segmentation",
        explain=_segmentation,
        items=("test image", "test images"),
        doing=lambda _: "name the pixels",
    ),
}


def protocol(row: Row) -> Words:
    """Return the words for a row's protocol; an unknown one is called by its own name."""
    known = PROTOCOLS.get(row.protocol)
    if known is not None:
        return known
    return Words(title=row.protocol, explain=lambda _: "", items=("item", "items"))
