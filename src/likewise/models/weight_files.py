"""Files of weights: recognized by their first bytes, and never unpickled beyond tensors."""

import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import torch

from likewise.errors import ModelError, describe_error

_PAGE_OR_POINTER = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights; run `git lfs pull` in its repository",
    b"<": "is a web page (HTML or XML), not weights; the download was refused, so download it again",
    b"{": "is JSON text, not weights; a list of shards must be named *.index.json",
}
_OTHER_FORMATS = {
    b"\x1f\x8b": "is compressed by gzip; decompress it first",
    b"BZh": "is compressed by bzip2; decompress it first",
    b"\xfd7zXZ\x00": "is compressed by xz; decompress it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; decompress it first",
    b"\x89HDF\r\n": "is an HDF5 file (Keras or TensorFlow); save its weights by safetensors or torch.save",
    b"\x93NUMPY": "is a NumPy array; save named weights by safetensors or torch.save",
    b"GGUF": "is a GGUF file; save its weights by safetensors or torch.save",
}
_ZIP = b"PK\x03\x04"
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number before torch 1.6
_PICKLE = b"\x80"
# Keeps the tensors of nested dictionaries and of modules, and nothing else.
_CONVERT = (
    "import sys, torch; "
    "f = lambda v: v if torch.is_tensor(v) else {k: f(x) for k, x in "
    "(v.state_dict() if isinstance(v, torch.nn.Module) else v).items() "
    "if isinstance(x, (dict, torch.Tensor, torch.nn.Module))}; "
    "torch.save(f(torch.load(sys.argv[1], map_location='cpu', weights_only=False)), sys.argv[2])"
)


def check_weights_file(path: Path) -> bytes:
    """Return the first bytes of a file that may hold weights.

    Raises:
        ModelError: if the file is missing, empty, truncated or of a format that holds no weights; the message
            says what it is and what to do.
    """
    if not path.is_file():
        raise ModelError(f"there are no weights at {path}", path=path)
    with path.open("rb") as stream:
        head = stream.read(512)
    if not head:
        raise ModelError(f"{path} is empty (0 bytes); copy or download it again", path=path)
    if is_safetensors(head):
        return head
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, signatures in ((text, _PAGE_OR_POINTER), (head, _OTHER_FORMATS)):
        for signature, reason in signatures.items():
            if start.startswith(signature):
                raise ModelError(f"{path} {reason}", path=path)
    if head[257:262] == b"ustar":
        raise ModelError(f"{path} is a tar archive; extract the weights first", path=path)
    if head.startswith(_ZIP) and not zipfile.is_zipfile(path):
        raise ModelError(
            f"{path} is truncated ({path.stat().st_size:,} bytes, without the end of the archive); copy or "
            "download it again",
            path=path,
        )
    return head


def is_safetensors(head: bytes) -> bool:
    """Return whether a file starts as safetensors do: the length of a JSON header below 4 GiB, then JSON."""
    return head[4:9] == b"\0\0\0\0{"


def read_pickled(path: Path) -> Any:
    """Read a file of `torch.save` that holds tensors and plain Python values only.

    Raises:
        ModelError: if the file is not of `torch.save`, is damaged, or holds objects of other classes.
    """
    head = check_weights_file(path)
    if not head.startswith((_ZIP, _TORCH_LEGACY)):
        kind = "a pickle, which is never loaded because that can run code" if head[:1] == _PICKLE else ""
        raise ModelError(
            f"{path} is {kind or 'neither of safetensors nor of torch.save'}; save its weights by "
            "safetensors or torch.save",
            path=path,
        )
    if head.startswith(_ZIP):
        _check_archive(path)
    try:
        # A stream, because torch chooses the format of a path by its suffix.
        with path.open("rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # unpickling raises many types
        unsafe_class = re.search(
            r"Unsupported (?:global|class|operand).*?(?:GLOBAL )?([\w.]+\.\w+)", str(error)
        )
        if unsafe_class is not None:
            target = path.with_name(f"{path.name.partition('.')[0]}-tensors.pth")
            message = (
                f"{path} holds objects besides tensors ({unsafe_class[1]}), which are never loaded because "
                "that can run code; if you trust the file, write its tensors to a new one: "
                f'python -c "{_CONVERT}" {shlex.quote(str(path))} {shlex.quote(str(target))}'
            )
        else:
            message = (
                f"{path} is damaged or truncated, or no file of torch.save ({describe_error(error)}); copy "
                "or download it again"
            )
        raise ModelError(message, path=path) from error


def _check_archive(path: Path) -> None:
    """Raise ModelError for a zip archive that is not of `torch.save`."""
    with zipfile.ZipFile(path) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in names:
        raise ModelError(
            f"{path} is a TorchScript program, which is never loaded; save its state_dict() by torch.save",
            path=path,
        )
    if "data.pkl" not in names:
        raise ModelError(
            f"{path} is a zip archive, but not of torch.save; extract it, or save its weights by safetensors "
            "or torch.save",
            path=path,
        )
