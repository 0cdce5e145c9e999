"""Zero-shot classification: class names embedded by the text tower serve as the classifier."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from likewise.errors import InvalidInputError
from likewise.evaluation.protocols.base import (
    ClassificationConfig,
    EvalContext,
    Protocol,
    Score,
    accuracy_score,
)
from likewise.evaluation.results import ResultRow
from likewise.models.text_tower import TextAlignment


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig(ClassificationConfig):
    """Options of zero-shot classification."""

    prompts: tuple[str, ...] = ("a photo of a {}.",)
    """Prompt templates; `{}` is replaced by the class name."""

    def __post_init__(self) -> None:
        """Check the templates."""
        if not self.prompts or any("{}" not in prompt for prompt in self.prompts):
            raise InvalidInputError(
                f"every template in `prompts` needs {{}} for the class name, got {self.prompts}",
                field="prompts",
            )


def zero_shot_predict(
    config: ZeroShotConfig,
    features: Float[Tensor, "m d"],
    class_names: Sequence[str],
    text_alignment: TextAlignment,
) -> Int[Tensor, " m"]:
    """Assign each image to the class with the most similar text embedding.

    As in Radford et al. 2021, section 3.1.4: a class embedding is the normalized mean of the normalized
    embeddings of its prompts. Underscores in class names are replaced by spaces.

    Returns:
        (m,) int64.
    """
    sentences = [
        prompt.replace("{}", name.replace("_", " ")) for name in class_names for prompt in config.prompts
    ]
    class_embeddings = (
        normalize(text_alignment.encode_text(sentences), dim=1)
        .unflatten(0, (len(class_names), -1))
        .mean(dim=1)
    )
    return (text_alignment.project_image(features) @ normalize(class_embeddings, dim=1).T).argmax(dim=1)


class ZeroShot(Protocol):
    """Zero-shot classification of the test images."""

    name = "zeroshot"
    title = "Zero-shot"
    summary = "classification by class names, with a text tower"
    config: ZeroShotConfig

    def run(self, context: EvalContext) -> list[Score]:
        """Classify the test images by the class names."""
        test = context.split("test")
        predictions = zero_shot_predict(
            self.config, test.x, context.labeled_dataset.classes, context.text_alignment
        )
        return [accuracy_score(predictions, test.y, self.config)]

    @classmethod
    def explain(cls, row: ResultRow) -> str:
        """Describe the classifier and its prompts."""
        prompts = ", ".join(f"“{prompt}”" for prompt in row.config["prompts"])
        return (
            "No labeled image is used: each test image gets the class with the most similar text embedding. "
            f"Prompts: {prompts}."
        )
