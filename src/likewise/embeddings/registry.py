"""Registry of encoders: resolve names such as `hf:bert-base-uncased`, and load text encoders."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from likewise.artifacts import fingerprint
from likewise.embeddings.base import Corpus, EncoderSpec, TextEncoder
from likewise.embeddings.config import DEFAULT_OPTIONS, EncoderOptions
from likewise.embeddings.lexical import NUM_COLUMNS, BagOfWordsEncoder, WordVectorEncoder
from likewise.embeddings.text_encoders import (
    ClipTextEncoder,
    Model2VecEncoder,
    OnnxEncoder,
    SentenceTransformerEncoder,
    resolve_folder_or_hub,
    resolve_sentence_transformer,
)
from likewise.errors import InvalidInputError, ModelError, did_you_mean

DEFAULT_ENCODER = "all-mpnet-base-v2"


@dataclass(frozen=True)
class Scheme:
    """A kind of encoder."""

    example: str
    """Example of a name."""
    resolve: Callable[[str], tuple[str, str, str]]
    """Maps the name after the scheme to short name, name or path, and id of the weights; loads nothing."""
    options: tuple[str, ...] = ()
    """Names of the options that apply."""


def _resolve_word_vectors(name: str) -> tuple[str, str, str]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ModelError(f"there is no file of word vectors at {name}", path=path)
    return path.name, str(path), fingerprint(path)


def _resolve_lexical(name: str) -> tuple[str, str, str]:
    return name, name, f"{NUM_COLUMNS} columns"


def _resolve_clip(name: str) -> tuple[str, str, str]:
    """Resolve `ARCH/WEIGHTS`, where the weights are a pretrained tag or a file.

    Returns:
        Short name, name or path, and id of the weights.

    Raises:
        ModelError: if the architecture, the weights or the file is missing.
    """
    arch, _, weights = name.partition("/")
    if not arch or not weights:
        raise ModelError(
            f"expected clip:ARCH/WEIGHTS, such as clip:ViT-B-32/openai, got clip:{name}", field="encoder"
        )
    weights_path = Path(weights).expanduser()
    if weights_path.is_file():
        return f"{arch}/{weights_path.stem}", f"{arch}/{weights_path}", f"{arch}/{fingerprint(weights_path)}"
    if weights.startswith((".", "/", "~")):
        raise ModelError(f"there are no weights at {weights}", path=weights)
    return name, name, name


def _resolve_image(name: str) -> tuple[str, str, str]:
    """Resolve the name of an image encoder, as accepted by `likewise.load_encoder`.

    Returns:
        Short name, name or path, and id of the weights.

    Raises:
        ModelError: if there is no such run, file or kind of encoder.
    """
    scheme, _, rest = name.partition(":")
    if scheme == "clip" and rest:
        short_name, name_or_path, weights_id = _resolve_clip(rest)
        return f"clip:{short_name}", f"clip:{name_or_path}", f"clip:{weights_id}"
    path = Path(name).expanduser()
    weights_path = path / "encoder.safetensors" if path.is_dir() else path
    if weights_path.is_file():
        return path.resolve().name, str(path), fingerprint(weights_path)
    if not rest:
        raise ModelError(
            f"{name} is not a complete run, a weights file, timm:NAME, random:NAME or clip:ARCH/WEIGHTS",
            field="encoder",
        )
    return name, name, name


SCHEMES = {
    "": Scheme(DEFAULT_ENCODER, resolve_sentence_transformer, ("max_length", "backend")),
    "hf": Scheme("hf:bert-base-uncased", resolve_folder_or_hub, ("pooling", "max_length", "backend")),
    "clip": Scheme("clip:ViT-B-32/openai", _resolve_clip),
    "model2vec": Scheme("model2vec:minishlab/potion-base-8M", resolve_folder_or_hub),
    "words": Scheme("words:glove.6B.300d.txt", _resolve_word_vectors),
    "tfidf": Scheme("tfidf", _resolve_lexical),
    "bow": Scheme("bow", _resolve_lexical),
    "image": Scheme("image:timm:resnet50", _resolve_image),
}


def _load_transformer(spec: EncoderSpec, device: str | None) -> TextEncoder:
    encoder_types = {"torch": SentenceTransformerEncoder, "onnx": OnnxEncoder}
    return encoder_types[spec.options.backend](spec, device)


_BARE_SCHEMES = ("tfidf", "bow")

_LOADERS: dict[str, Callable[[EncoderSpec, str | None, Corpus], TextEncoder]] = {
    "": lambda spec, device, _: _load_transformer(spec, device),
    "hf": lambda spec, device, _: _load_transformer(spec, device),
    "clip": lambda spec, device, _: ClipTextEncoder(spec, device),
    "model2vec": lambda spec, _, __: Model2VecEncoder(spec),
    "words": lambda spec, _, corpus: WordVectorEncoder(spec, corpus),
    "tfidf": lambda _, __, corpus: BagOfWordsEncoder(corpus, use_idf=True),
    "bow": lambda _, __, corpus: BagOfWordsEncoder(corpus, use_idf=False),
}


def resolve_encoder(name: str, options: EncoderOptions = DEFAULT_OPTIONS) -> EncoderSpec:
    """Resolve the name of an encoder without loading it.

    Args:
        name: `SCHEME:MODEL` with a scheme of `SCHEMES`, or a sentence-transformers model by hub name or
            folder. A model whose PyPI package is installed is loaded from it.
        options: Options of the encoder.

    Raises:
        InvalidInputError: if the scheme is unknown, or an option does not apply to it.
        ModelError: if a folder or file is missing or invalid.
    """
    scheme, model_name = _split_scheme(name)
    scheme_spec = SCHEMES[scheme]
    for option in options.overrides:
        if option not in scheme_spec.options:
            examples = ", ".join(s.example for s in SCHEMES.values() if option in s.options)
            raise InvalidInputError(
                f"`{option}` is not an option of {name}; it applies to encoders such as {examples}",
                field=option,
            )
    if scheme == "hf" and options.pooling is None:
        options = replace(options, pooling="mean")
    short_name, name_or_path, weights_id = scheme_spec.resolve(model_name)
    label = short_name if scheme in ("", *_BARE_SCHEMES) else f"{scheme}:{short_name}"
    suffixes = [str(value) for key, value in options.overrides.items() if (key, value) != ("pooling", "mean")]
    return EncoderSpec(
        "+".join([label, *suffixes]),
        name_or_path,
        weights_id if not scheme else f"{scheme}:{weights_id}",
        scheme,
        options,
    )


def _split_scheme(name: str) -> tuple[str, str]:
    """Split a name into its scheme, empty for sentence-transformers models, and the model name."""
    if name in _BARE_SCHEMES:
        return name, name
    scheme, separator, model_name = name.partition(":")
    if not separator or name.startswith((".", "/", "~")) or Path(name).is_dir():
        return "", name
    named_schemes = {
        key: scheme_spec for key, scheme_spec in SCHEMES.items() if key and key not in _BARE_SCHEMES
    }
    if scheme not in named_schemes:
        examples = ", ".join(scheme_spec.example for scheme_spec in SCHEMES.values())
        raise InvalidInputError(
            f"unknown encoder scheme {scheme + ':'!r} in {name!r}."
            f"{did_you_mean(scheme, list(named_schemes))} Examples: {examples}",
            field="encoder",
        )
    if not model_name:
        raise InvalidInputError(
            f"`encoder` {name!r} has no model name; example: {named_schemes[scheme].example}", field="encoder"
        )
    return scheme, model_name


def load_text_encoder(spec: EncoderSpec, device: str | None, corpus: Corpus) -> TextEncoder:
    """Load a text encoder.

    Args:
        spec: The resolved encoder.
        device: Device of the model; selected automatically by default.
        corpus: All captions of the dataset, for encoders that are fitted to them.

    Raises:
        ModelError: if it cannot be loaded.
        DependencyError: if a required package is not installed.
    """
    return _LOADERS[spec.scheme](spec, device, corpus)
