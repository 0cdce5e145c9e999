"""Transformers run by ONNX Runtime on the CPU instead of torch."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from likewise.embeddings.base import CaptionEncoder, EncoderChoice, unit_rows
from likewise.embeddings.sentence import SentenceEncoder, batches_by_tokens, first_line
from likewise.errors import DependencyError, InputError, ModelError

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
