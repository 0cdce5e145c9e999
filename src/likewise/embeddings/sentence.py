"""Transformers as caption encoders: sentence-transformers models, and any Hugging Face text model pooled."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from likewise.artifacts import fingerprint
from likewise.embeddings.base import CaptionEncoder, EncoderChoice, unit_rows
from likewise.embeddings.packaged import PACKAGED, packaged_folder
from likewise.errors import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# What sentence-transformers calls each way of pooling; all of them respect padding on either side.
_POOLED = {"cls": "cls", "mean": "mean", "last": "lasttoken"}


@final
class SentenceEncoder(CaptionEncoder):
    """A transformer and its pooling, run by sentence-transformers."""

    def __init__(self, choice: EncoderChoice, device: str | None = None) -> None:
        """Load the model; raises ModelError where it is not found here or on the hub."""
        self.model = _load(choice, _pooled if choice.scheme == "hf" else _own, device)
        _shorten(self.model, choice)
        self.dimension = int(self.model.get_embedding_dimension() or 0)

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 of unit length (zero where a model gives zero)."""
        vectors = np.empty((len(captions), self.dimension), np.float32)
        for part in batches_by_tokens(self.model, captions, batch_size):
            texts = [captions[i] for i in part]
            vectors[part] = self.model.encode(texts, batch_size=batch_size, show_progress_bar=False)
        return unit_rows(vectors)


def batches_by_tokens(
    model: "SentenceTransformer", captions: Sequence[str], batch_size: int
) -> Iterator[np.ndarray]:
    """Yield the places of captions a batch at a time, those of most tokens first.

    Batches by characters, as sentence-transformers makes them, are a fifth to a third padding.
    """
    from transformers import PreTrainedTokenizerBase

    tokenizer, lengths = model.tokenizer, [len(caption) for caption in captions]
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        lengths = [len(ids) for ids in tokenizer(list(captions), truncation=True)["input_ids"]]
    order = np.argsort(-np.array(lengths), kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _own(choice: EncoderChoice, device: str | None) -> "SentenceTransformer":
    """Load a sentence-transformers model with the pooling and truncation that it brings."""
    from sentence_transformers import SentenceTransformer

    packaged = choice.source in PACKAGED and choice.identity == PACKAGED[choice.source].identity
    source = str(packaged_folder(choice.source)) if packaged else choice.source
    return SentenceTransformer(source, device=device, trust_remote_code=False)


def _pooled(choice: EncoderChoice, device: str | None) -> "SentenceTransformer":
    """Load a text model and pool its last hidden states."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(choice.source)
    tokenizer: Any = transformer.tokenizer
    if tokenizer.pad_token is None:
        # Generators such as GPT-2 have none; which token it is does not matter, as it is masked.
        tokenizer.pad_token = tokenizer.eos_token
    # Padding on the left would shift learned positions, so that a vector depended on its batch.
    tokenizer.padding_side = "right"
    pooling = Pooling(transformer.get_embedding_dimension(), _POOLED[choice.options.pooling or "mean"])
    return SentenceTransformer(modules=[transformer, pooling], device=device)


def _load(
    choice: EncoderChoice,
    how: "Callable[[EncoderChoice, str | None], SentenceTransformer]",
    device: str | None,
) -> "SentenceTransformer":
    from transformers.utils.logging import disable_progress_bar

    # Its own bars and notices would run through ours.
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    try:
        return how(choice, device)
    except ModelError:
        raise
    except Exception as fault:  # hub and file faults come in a dozen types
        offline = "; ".join(f"{name} after {package.install}" for name, package in PACKAGED.items())
        raise ModelError(
            f"cannot load the caption encoder {choice.name!r} ({type(fault).__name__}: "
            f"{first_line(fault)}). Give a folder, a name on the Hugging Face hub (needs a network), or one "
            f"that works offline: {offline}"
        ) from fault


def _shorten(model: "SentenceTransformer", choice: EncoderChoice) -> None:
    asked, limit = choice.options.max_length, model.max_seq_length
    if asked is None:
        return
    if limit is not None and asked > limit:
        raise ModelError(f"--max-length is {asked}, but {choice.name} takes at most {limit} tokens")
    model.max_seq_length = asked


def first_line(fault: Exception) -> str:
    """Return the beginning of a foreign fault's message."""
    lines = str(fault).strip().splitlines()
    return lines[0][:160] if lines else "no message"


def choose_sentence(name: str) -> tuple[str, str, str]:
    """Return the short name, source and identity of a sentence-transformers model.

    Raises:
        ModelError: for a folder that is no model.
    """
    short = name.removeprefix("sentence-transformers/")
    if short in PACKAGED and PACKAGED[short].installed:
        return short, short, PACKAGED[short].identity
    return choose_folder_or_hub(name, ("modules.json", "config.json"))


def choose_folder_or_hub(name: str, marks: tuple[str, ...] = ("config.json",)) -> tuple[str, str, str]:
    """Return the short name, source and identity of a model folder, or of a name on the hub.

    Raises:
        ModelError: where a path holds no folder, or a folder none of the files by which a model is known.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / mark).is_file() for mark in marks):
            raise ModelError(f"{name} is no model folder: it has no {' or '.join(marks)}")
        return folder.resolve().name, str(folder), fingerprint(folder)
    if name.startswith((".", "/", "~")):
        raise ModelError(f"there is no model folder at {name}")
    return name, name, name
