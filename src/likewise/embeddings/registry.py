"""Encoders by name: a scheme and what follows it in, a choice and then a loaded encoder out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from likewise.artifacts import fingerprint
from likewise.embeddings.base import CaptionEncoder, Corpus, EncoderChoice
from likewise.embeddings.config import DEFAULT_OPTIONS, EncoderOptions
from likewise.embeddings.image_encoders import choose_clip, choose_image
from likewise.embeddings.lexical import COLUMNS, HashedWords, WordVectors
from likewise.embeddings.text_encoders import (
    ClipText,
    OnnxEncoder,
    SentenceEncoder,
    StaticTokens,
    choose_folder_or_hub,
    choose_sentence,
)
from likewise.errors import InputError, ModelError, close_matches

PAPER_ENCODER = "all-mpnet-base-v2"


@dataclass(frozen=True)
class Scheme:
    """A kind of encoder.

    Attributes:
        example: How one is named.
        choose: What follows the scheme -> short name, source, identity; loads nothing.
        options: The options that mean something to it.
    """

    example: str
    choose: Callable[[str], tuple[str, str, str]]
    options: tuple[str, ...] = ()


def _file(name: str) -> tuple[str, str, str]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ModelError(f"there is no file of word vectors at {name}")
    return path.name, str(path), fingerprint(path)


def _hashed(name: str) -> tuple[str, str, str]:
    return name, name, f"{COLUMNS} columns"


SCHEMES = {
    "": Scheme(PAPER_ENCODER, choose_sentence, ("max_length", "backend")),
    "hf": Scheme("hf:bert-base-uncased", choose_folder_or_hub, ("pooling", "max_length", "backend")),
    "clip": Scheme("clip:ViT-B-32/openai", choose_clip),
    "model2vec": Scheme("model2vec:minishlab/potion-base-8M", choose_folder_or_hub),
    "words": Scheme("words:glove.6B.300d.txt", _file),
    "tfidf": Scheme("tfidf", _hashed),
    "bow": Scheme("bow", _hashed),
    "image": Scheme("image:timm:resnet50", choose_image),
}


def _transformer(choice: EncoderChoice, device: str | None) -> CaptionEncoder:
    encoders = {"torch": SentenceEncoder, "onnx": OnnxEncoder}
    return encoders[choice.options.backend](choice, device)


_ALONE = ("tfidf", "bow")

_LOADERS: dict[str, Callable[[EncoderChoice, str | None, Corpus], CaptionEncoder]] = {
    "": lambda choice, device, _: _transformer(choice, device),
    "hf": lambda choice, device, _: _transformer(choice, device),
    "clip": lambda choice, device, _: ClipText(choice, device),
    "model2vec": lambda choice, _, __: StaticTokens(choice),
    "words": lambda choice, _, corpus: WordVectors(choice, corpus),
    "tfidf": lambda _, __, corpus: HashedWords(corpus, weighted=True),
    "bow": lambda _, __, corpus: HashedWords(corpus, weighted=False),
}


def choose_encoder(name: str, options: EncoderOptions = DEFAULT_OPTIONS) -> EncoderChoice:
    """Resolve the name of an encoder, without loading it.

    Args:
        name: One of the kinds in `SCHEMES`; without a scheme, a sentence-transformers model by hub name or
            folder. A packaged model is used from its package where that is installed.
        options: How it is used.

    Raises:
        InputError: for an unknown scheme, or an option that means nothing to the kind.
        ModelError: for a folder or file that is none.
    """
    scheme, rest = _split(name)
    kind = SCHEMES[scheme]
    for option in options.given:
        if option not in kind.options:
            fitting = ", ".join(s.example for s in SCHEMES.values() if option in s.options)
            raise InputError(
                f"--{option.replace('_', '-')} means nothing to {name}; it goes with models such as {fitting}"
            )
    if scheme == "hf" and options.pooling is None:
        options = replace(options, pooling="mean")
    short, source, identity = kind.choose(rest)
    label = short if scheme in ("", *_ALONE) else f"{scheme}:{short}"
    told = [str(value) for key, value in options.given.items() if (key, value) != ("pooling", "mean")]
    return EncoderChoice(
        "+".join([label, *told]), source, identity if not scheme else f"{scheme}:{identity}", scheme, options
    )


def _split(name: str) -> tuple[str, str]:
    """Return the scheme, empty for sentence-transformers models, and what follows it."""
    if name in _ALONE:
        return name, name
    scheme, colon, rest = name.partition(":")
    if not colon or name.startswith((".", "/", "~")) or Path(name).is_dir():
        return "", name
    known = {key: kind for key, kind in SCHEMES.items() if key and key not in _ALONE}
    if scheme not in known:
        examples = ", ".join(kind.example for kind in SCHEMES.values())
        raise InputError(
            f"unknown kind of encoder {scheme + ':'!r} in {name!r}.{close_matches(scheme, list(known))} "
            f"Known are, by example: {examples}"
        )
    if not rest:
        raise InputError(f"{name} says no model; write it as in {known[scheme].example}")
    return scheme, rest


def load_encoder(choice: EncoderChoice, device: str | None, corpus: Corpus) -> CaptionEncoder:
    """Load an encoder of captions.

    Args:
        choice: Which one.
        device: Where it runs; chosen by itself where not given.
        corpus: All captions of the collection, for encoders that are fitted to them.

    Raises:
        ModelError: where it cannot be loaded.
        DependencyError: where a package that it needs is not installed.
    """
    return _LOADERS[choice.scheme](choice, device, corpus)
