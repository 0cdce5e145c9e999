"""Artifacts: directories that one step writes and the next reads; keyed, atomic, resumable, safe to open.

An artifact is a directory with a manifest, `artifact.json`, and data files in open formats. The manifest is
written first, with `"complete": false`; a data file gets its final name only when it is complete; the
manifest is replaced last. A step that was killed finds its own manifest, skips the files that exist, and ends
with the same bytes as an uninterrupted run (therefore a manifest contains no times). Files are flushed to the
disk before they get their names, so that a power failure leaves no complete manifest with missing data. One
process at a time writes into an artifact.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

from likewise.errors import ArtifactError, InvalidInputError, LikewiseError, describe_error
from likewise.hashing import hash_strings
from likewise.locks import HOST, LOCK_NAME, lock_directory

FORMAT_VERSION = 3
_SECTION_TYPES: dict[str, Any] = {
    "settings": object,
    "inputs": str,
    "counts": int,
    "skipped": int,
    "ignored": int,
    "ignored_examples": str,
    "versions": str,
}
MANIFEST = "artifact.json"
_TMP_NAME = re.compile(r"\..+\.(?P<host>[A-Za-z0-9-]+)\.(?P<pid>[0-9]+)\.tmp", re.DOTALL)
_DISK_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file exceeds a size limit",
}
_NO_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF}
_RECORDED_PACKAGES = (
    "likewise",
    "numpy",
    "torch",
    "timm",
    "sentence-transformers",
    "scikit-learn",
    "pillow",
    "simplejpeg",
    "pyarrow",
)


class ManifestValues(dict[str, Any]):
    """Values of a manifest by name; a name that a damaged file lacks is an ArtifactError."""

    path: Path | None = None

    def __missing__(self, name: str) -> Any:
        raise ArtifactError(
            f"{self.path} is damaged: it lacks {name!r}; delete the folder and create it again",
            path=self.path,
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Kind, settings, inputs, counts and skipped items of an artifact, as in `artifact.json`."""

    kind: str
    key: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    complete: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    """Files that were no candidates, such as hidden files and other file types, by reason."""
    ignored_examples: dict[str, str] = field(default_factory=dict)
    """The first ignored file of each reason."""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT_VERSION


@dataclass(frozen=True)
class Artifact:
    """A directory and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def create_or_resume(
        cls,
        path: Path,
        kind: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        non_hashed: tuple[str, ...] = (),
    ) -> "Artifact":
        """Create an artifact, or open the incomplete or complete one that has the same key.

        Args:
            path: The directory; it must not exist, be empty, or hold the same artifact.
            kind: The kind of artifact, such as `dataset`.
            settings: All settings of the step.
            inputs: Fingerprints of the inputs by name.
            non_hashed: Settings that are recorded but do not change the result, such as a root folder.

        Raises:
            ArtifactError: if the directory holds something else, or the same kind with other settings.
        """
        hashed = {name: value for name, value in settings.items() if name not in non_hashed}
        key = config_hash(kind, hashed, inputs)
        if (path / MANIFEST).is_file():
            existing = _read_manifest(path)
            if existing.kind != kind:
                raise ArtifactError(
                    f"{path} already holds a {existing.kind}, not a {kind}; choose another folder", path=path
                )
            if existing.key != key:
                raise ArtifactError(
                    f"{path} already holds a {kind} with other settings "
                    f"({_describe_mismatch(existing, hashed, inputs)}); "
                    "choose another folder, or delete this one to recreate it",
                    path=path,
                )
            _remove_stale_tmp(path.rglob(".*.tmp"))
            return cls(path, existing)
        if path.is_file():
            raise ArtifactError(f"{path} is a file; a {kind} needs a folder", path=path)
        if path.is_dir() and not all(map(_is_own_file, path.iterdir())):
            raise ArtifactError(
                f"{path} is not empty and holds no {kind}; choose a new or empty folder", path=path
            )
        _remove_stale_tmp(path.glob(".*.tmp"))
        manifest = Manifest(
            kind=kind, key=key, settings=dict(settings), inputs=dict(inputs), versions=installed_versions()
        )
        with disk_full_as_error(path):
            path.mkdir(parents=True, exist_ok=True)
        write_json(path / MANIFEST, asdict(manifest))
        _flush(path.parent)
        return cls(path, manifest)

    @classmethod
    @contextmanager
    def exclusive(
        cls,
        path: Path,
        kind: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        non_hashed: tuple[str, ...] = (),
    ) -> "Iterator[Artifact]":
        """Yield the artifact of `create_or_resume`; other processes wait until the block ends."""
        with lock_directory(path, kind):
            yield cls.create_or_resume(path, kind, settings, inputs, non_hashed)

    @classmethod
    def open(cls, path: Path, kind: str) -> "Artifact":
        """Open a complete artifact.

        Raises:
            ArtifactError: if the directory is missing, of another kind or format, or incomplete.
        """
        if not path.exists():
            raise ArtifactError(f"there is no {kind} at {path}: the folder does not exist", path=path)
        if not (path / MANIFEST).is_file():
            raise ArtifactError(f"{path} is not a {kind}: it has no {MANIFEST}", path=path)
        manifest = _read_manifest(path)
        if manifest.kind != kind:
            raise ArtifactError(f"{path} holds a {manifest.kind}, not a {kind}", path=path)
        if not manifest.complete:
            raise ArtifactError(
                f"the {kind} at {path} is incomplete; run the step that creates it again", path=path
            )
        return cls(path, manifest)

    @classmethod
    def find(cls, folder: Path, kind: str) -> "list[Artifact]":
        """Return the complete artifacts of a kind in the subdirectories of a folder, sorted by name."""
        artifacts = []
        for path in sorted(folder.glob(f"*/{MANIFEST}")):
            try:
                artifacts.append(cls.open(path.parent, kind))
            except ArtifactError:
                continue
        return artifacts

    @property
    def is_complete(self) -> bool:
        """Whether the step that creates it has finished."""
        return self.manifest.complete

    def finish(
        self,
        counts: Mapping[str, int],
        skipped: Mapping[str, int] | None = None,
        ignored: Mapping[str, int] | None = None,
        ignored_examples: Mapping[str, str] | None = None,
    ) -> "Artifact":
        """Mark the artifact as complete; record its counts, and skipped items and ignored files by reason."""
        manifest = replace(
            self.manifest,
            complete=True,
            counts=dict(counts),
            skipped=dict(skipped or {}),
            ignored=dict(ignored or {}),
            ignored_examples=dict(ignored_examples or {}),
        )
        write_json(self.path / MANIFEST, asdict(manifest))
        return replace(self, manifest=manifest)


def config_hash(kind: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hash everything that decides a result: 16 hexadecimal digits of BLAKE2b over sorted JSON."""
    payload = json.dumps([kind, FORMAT_VERSION, dict(settings), dict(inputs)], sort_keys=True, default=str)
    return hashlib.blake2b(payload.encode(), digest_size=8).hexdigest()


def fingerprint(path: Path) -> str:
    """Return 16 hexadecimal digits of BLAKE2b over a file, or over all files below a folder, by content."""
    digest = hashlib.blake2b(digest_size=8)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        digest.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def installed_versions() -> dict[str, str]:
    """Return the versions of the libraries that affect results."""
    versions = {}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads((path / MANIFEST).read_bytes())
        if content.get("format", 0) > FORMAT_VERSION:
            raise ArtifactError(f"{path} was written by a newer likewise; upgrade to open it", path=path)
        if content.get("format", 0) < FORMAT_VERSION:
            raise ArtifactError(
                f"{path} was written by an older likewise, whose format this version does not read; "
                "delete the folder and create it again",
                path=path,
            )
        return _parse_manifest(path / MANIFEST, content)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{path / MANIFEST} is damaged ({error}); delete the folder and create it again", path=path
        ) from error


def _parse_manifest(file: Path, content: dict[str, Any]) -> Manifest:
    """Return the manifest of a file.

    Raises:
        TypeError: if a field is missing, unknown or of another type.
    """
    manifest = Manifest(**content)
    sections: dict[str, Any] = {}
    for name, types in _SECTION_TYPES.items():
        values = getattr(manifest, name)
        if not isinstance(values, dict) or not all(isinstance(value, types) for value in values.values()):
            raise TypeError(f"{name!r} has values of another type")
        sections[name] = ManifestValues(values)
        sections[name].path = file
    if not (isinstance(manifest.kind, str) and isinstance(manifest.key, str)):
        raise TypeError("'kind' and 'key' must be texts")
    if min([*manifest.counts.values(), 0]) < 0:
        raise ValueError("a count is below 0")
    return replace(manifest, complete=manifest.complete is True, **sections)


def _describe_mismatch(existing: Manifest, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return a short list of the settings that differ."""
    requested = json.loads(json.dumps(dict(settings), default=str))
    changed = [name for name in sorted(requested) if requested[name] != existing.settings.get(name)]
    differences = [
        f"{name} was {existing.settings.get(name)}, is {requested.get(name)}" for name in changed[:3]
    ]
    if existing.inputs != dict(inputs):
        differences.append("its inputs have changed")
    return "; ".join(differences) or "another version of the format"


def tmp_path(path: Path) -> Path:
    """Return the temporary name of a file in this process, `.NAME.HOST.PID.tmp`."""
    # A long name must leave room for the host and the process: file systems allow 255 bytes.
    name = path.name if len(os.fsencode(path.name)) <= 128 else hash_strings([path.name])
    return path.with_name(f".{name}.{HOST}.{os.getpid()}.tmp")


def _is_own_file(path: Path) -> bool:
    """Return whether a file may lie in an artifact without a manifest: a lock or a temporary file."""
    return path.name == LOCK_NAME or _tmp_owner(path) is not None


def _tmp_owner(path: Path) -> tuple[str, int] | None:
    """Return the host and the process that a temporary file belongs to, or None for another file."""
    match = _TMP_NAME.fullmatch(path.name)
    return (match["host"], int(match["pid"])) if match else None


def _remove_stale_tmp(candidates: Iterable[Path]) -> None:
    """Remove the temporary files of processes of this machine that no longer run."""
    for candidate in candidates:
        owner = _tmp_owner(candidate)
        if owner is not None and owner[0] == HOST and not _is_running(owner[1]):
            candidate.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def atomic_write(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary name beside `path`; it takes the final name only if the block succeeds.

    Args:
        path: The file.
        flush: Write the content to the disk before the file gets its name. Without it a power failure may
            leave an empty file; it saves time where many small files are written and flushed together later.

    Raises:
        ArtifactError: if the disk is full.
    """
    temporary = tmp_path(path)
    try:
        with disk_full_as_error(path):
            yield temporary
            if flush:
                _flush(temporary)
            temporary.replace(path)
            if flush:
                _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_disks() -> None:
    """Write all files to the disk, such as many small ones, before a file says that they are complete."""
    if hasattr(os, "sync"):
        os.sync()


def _flush(path: Path) -> None:
    """Write a file, or the names in a directory, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no directories
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems have no flush, but a full disk or a broken one must not pass as success.
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def disk_full_as_error(path: Path) -> Iterator[None]:
    """Turn a full disk into an error that names the file and the free space.

    Raises:
        ArtifactError: if the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        folder = next(folder for folder in path.parents if folder.exists())
        free_mib = shutil.disk_usage(folder).free // 2**20
        raise ArtifactError(
            f"no space left to write {path}: {_DISK_FULL[error.errno]} ({free_mib} MiB free); "
            "free some space and repeat the same call, which resumes",
            path=path,
        ) from error


@contextmanager
def damaged_as_error(path: Path) -> Iterator[None]:
    """Turn the errors of libraries that read a file of an artifact into one that names the file.

    Raises:
        ArtifactError: if the file is damaged.
    """
    try:
        yield
    except LikewiseError:
        raise
    except Exception as error:  # libraries raise many types of errors on damaged input
        is_missing = isinstance(error, FileNotFoundError)
        if isinstance(error, OSError) and error.errno is not None and not is_missing:  # of the system
            raise
        raise ArtifactError(
            f"{path} is damaged ({describe_error(error)}); delete the folder {path.parent} and create it "
            "again",
            path=path,
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON atomically."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InvalidInputError: if the file is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path} is not valid JSON: {error}", path=path) from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON Lines; skip a line that a kill truncated, and return no rows for a missing file."""
    rows = []
    # Bytes, because a kill may truncate a character, and a text may contain other line separators.
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file atomically."""
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        # Given a real file, NumPy writes it itself and hides the cause of an error, such as a full disk.
        np.save(SimpleNamespace(write=stream.write), array, allow_pickle=False)


def load_array(path: Path) -> np.ndarray:
    """Read a `.npy` file into memory.

    Raises:
        ArtifactError: if the file is damaged or holds pickled objects.
    """
    with damaged_as_error(path):
        return np.load(path, allow_pickle=False)


def mmap_array(path: Path) -> np.ndarray:
    """Map a `.npy` file into memory, read-only.

    Raises:
        ArtifactError: if the file is damaged or holds pickled objects.
    """
    with damaged_as_error(path):
        return np.load(path, mmap_mode="r" if path.stat().st_size > 4096 else None, allow_pickle=False)


def shard_name(stem: str, index: int, suffix: str) -> str:
    """Return the name of a shard, such as `records-00003.parquet`."""
    return f"{stem}-{index:05d}.{suffix}"


def slugify(name: str) -> str:
    """Return the last part of a path or hub name, with unsafe characters replaced."""
    tail = name.rstrip("/").rsplit("/", maxsplit=1)[-1]
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in tail).strip(".-") or "unnamed"


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write a mapping as YAML, in its order."""
    write_text(path, yaml.safe_dump(values, sort_keys=False))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        InvalidInputError: if the file is missing, is not valid YAML, or is not a mapping.
    """
    if not path.is_file():
        raise InvalidInputError(f"{path} does not exist", path=path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2025-99-99
        raise InvalidInputError(
            f"{path} is not valid YAML: {' '.join(str(error).split())}", path=path
        ) from error
    if not isinstance(values, dict):
        raise InvalidInputError(
            f"{path} holds no settings: a mapping of names to values is required", path=path
        )
    return values
