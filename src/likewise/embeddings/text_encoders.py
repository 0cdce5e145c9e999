"""Transformers as caption encoders: sentence-transformers models, and any Hugging Face text model pooled."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from likewise.artifacts import fingerprint
from likewise.embeddings.base import CaptionEncoder, EncoderChoice, unit_rows
from likewise.embeddings.offline import PACKAGED, packaged_folder
from likewise.errors import DependencyError, InputError, ModelError
from likewise.parallel import resolve_device


@final
class ClipText(CaptionEncoder):
    """An open_clip text tower; longer captions are cut to its context (77 tokens) with the end token kept."""

    def __init__(self, choice: EncoderChoice, device: str | None) -> None:
        """Load the model and its tokenizer; raises ModelError where one of them cannot be had."""
        from likewise.models.encoders import load_clip

        model = load_clip(choice.source)
        import open_clip

        try:
            self._tokenize = open_clip.get_tokenizer(choice.source.partition("/")[0])
        except Exception as fault:  # tokenizers that lie on a hub fail in many ways
            raise ModelError(f"cannot load the tokenizer of {choice.name}: {fault}") from fault
        del model.visual  # only the text tower is used
        self._device = resolve_device(device)
        self._model: Any = model.to(self._device)
        self.dimension = self.encode([""], 1).shape[1]

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 of unit length."""
        import torch

        rows = []
        with torch.inference_mode():
            for start in range(0, len(captions), batch_size):
                tokens = self._tokenize(list(captions[start : start + batch_size])).to(self._device)
                rows.append(self._model.encode_text(tokens).float().cpu().numpy())
        return unit_rows(np.concatenate(rows))


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


@final
class StaticTokens(CaptionEncoder):
    """A model2vec model: the mean of a caption's token vectors; no transformer runs."""

    def __init__(self, choice: EncoderChoice) -> None:
        """Load the model; raises ModelError where it is not found here or on the hub."""
        try:
            from model2vec import StaticModel
        except ImportError as fault:
            raise DependencyError("model2vec:… needs model2vec: pip install 'likewise[model2vec]'") from fault
        try:
            self._model = StaticModel.from_pretrained(choice.source, force_download=False)
        except Exception as fault:  # hub and file faults come in a dozen types
            raise ModelError(
                f"cannot load {choice.name} ({type(fault).__name__}: {first_line(fault)}); "
                "give a model2vec folder or a name on the Hugging Face hub (needs a network)"
            ) from fault
        self.dimension = self._model.dim

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 of unit length, zero for one without tokens."""
        return unit_rows(self._model.encode(list(captions), batch_size=batch_size, use_multiprocessing=False))


if TYPE_CHECKING:
    import torch
    from onnxruntime import InferenceSession
    from sentence_transformers import SentenceTransformer

_OUTPUT = "token_embeddings"
_EXAMPLES = ["a cat on a sofa", "a dog"]


@final
class OnnxEncoder(CaptionEncoder):
    """A model's transformer as an ONNX graph, exported when it is loaded; its pooling stays in torch.

    Whether that is faster depends on model and machine; `benchmarks/embed.py` tells.
    """

    def __init__(self, choice: EncoderChoice, device: str | None) -> None:
        """Load the model and export it; raises ModelError where that fails, InputError off the CPU."""
        if device not in (None, "cpu"):
            raise InputError(f"--backend onnx runs on the CPU, not on {device}")
        encoder = SentenceEncoder(choice, "cpu")
        self._model = encoder.model.float()  # weights may be stored in half precision
        self._session = _export(encoder.model, choice.name)
        self._names = [each.name for each in self._session.get_inputs()]
        self.dimension = encoder.dimension

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 of unit length (zero where a model gives zero)."""
        vectors = np.empty((len(captions), self.dimension), np.float32)
        for part in batches_by_tokens(self._model, captions, batch_size):
            vectors[part] = self._batch([captions[i] for i in part])
        return unit_rows(vectors)

    def _batch(self, captions: list[str]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            features = _features(self._model, captions)
            fed = {name: features[name].numpy() for name in self._names}
            features[_OUTPUT] = torch.from_numpy(np.asarray(self._session.run([_OUTPUT], fed)[0]))
            for module in list(self._model)[1:]:
                features = module(features)
            return features["sentence_embedding"].numpy()


def _features(model: "SentenceTransformer", captions: list[str]) -> dict[str, Any]:
    """Tokenize as the model's own `encode` does."""
    name = model.default_prompt_name
    return dict(model.preprocess(captions, prompt=None if name is None else model.prompts.get(name)))


def _export(model: "SentenceTransformer", name: str) -> "InferenceSession":
    import torch

    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter asks for it only when it is half-way through
    except ImportError as fault:
        raise DependencyError("--backend onnx needs more packages: pip install 'likewise[onnx]'") from fault
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"
        try:
            _write(model, graph)
            return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as fault:  # tracing somebody else's model fails in many ways
            raise ModelError(
                f"{name} cannot be turned into an ONNX graph ({type(fault).__name__}: {first_line(fault)}); "
                "leave out --backend onnx"
            ) from fault


def _write(model: "SentenceTransformer", path: Path) -> None:
    """Trace the transformer on two captions of different length, batch and length being free."""
    import torch

    features = _features(model, _EXAMPLES)
    transformer: Any = model[0]
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in features]
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        _last_hidden_state(transformer.auto_model, names),
        tuple(features[name] for name in names),
        path,
        dynamo=True,
        input_names=names,
        output_names=[_OUTPUT],
        dynamic_shapes=(tuple(free for _ in names),),
        verbose=False,
    )


def _last_hidden_state(body: Any, names: list[str]) -> "torch.nn.Module":
    """Wrap a transformer so that it takes these inputs in order and gives one tensor."""
    import torch

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            return self.body(**dict(zip(names, values, strict=True))).last_hidden_state

    return LastHiddenState().eval()
