"""Locks: one process at a time writes into a directory."""

import contextlib
import errno
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from likewise.errors import ArtifactError

if TYPE_CHECKING:
    from filelock import BaseFileLock

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:64] or "localhost"
"""Name of this machine, safe in file names."""
_POLL_SECONDS = 0.2
# Nothing can be written here, so nothing needs a lock; the step itself reports what it cannot write.
_UNWRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EEXIST,
}


@contextmanager
def lock_directory(path: Path, description: str, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a directory, which is created; the operating system releases it if the process dies.

    Under torchrun only rank 0 takes locks. A directory that the lock created and that is still empty at the
    end is removed.

    Args:
        path: The directory.
        description: What the directory holds, such as `run`, for messages.
        wait: Wait for a process that holds the lock, and say so, instead of raising an error.

    Raises:
        ArtifactError: if another process holds the lock and `wait` is False.
    """
    from filelock import FileLock  # `--help` needs no locks

    if os.environ.get("RANK", "0") != "0":
        yield
        return
    # The soft locks of filelock would survive the death of a process on another machine.
    lock = FileLock(path / LOCK_NAME, fallback_to_soft=False)
    created_dirs: list[Path] = []
    try:
        _acquire(lock, path, description, created_dirs, wait=wait)
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                # filelock of a waiting process notices that the file is gone, and creates it again.
                (path / LOCK_NAME).unlink()
            lock.release()
        for folder in created_dirs:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _acquire(
    lock: "BaseFileLock", path: Path, description: str, created_dirs: list[Path], *, wait: bool
) -> None:
    """Acquire a lock, or warn that the file system has no locks; adds the directories that are created."""
    from filelock import Timeout

    has_waited = False
    while not lock.is_locked:
        try:
            _create_dirs(path, created_dirs)
            lock.acquire(blocking=False)
            _write_holder(path / LOCK_NAME)
        except Timeout:
            holder = _holder(path / LOCK_NAME)
            message = f"{holder} is writing the {description} {path} (lock {path / LOCK_NAME})"
            if not wait:
                raise ArtifactError(f"{message}; repeat the call after it has ended", path=path) from None
            if not has_waited:
                logger.info("waiting: %s", message)
            has_waited = True
            time.sleep(_POLL_SECONDS)
        except FileNotFoundError:  # the process that held the lock removed the directory
            continue
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                logger.warning(
                    "%s cannot be locked (%s): let no other process write it", path, error.strerror or error
                )
            return


def _create_dirs(path: Path, created_dirs: list[Path]) -> None:
    """Create a directory and its parents; adds those that did not exist, innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    created_dirs += [folder for folder in missing if folder not in created_dirs]


def _write_holder(lock_path: Path) -> None:
    with contextlib.suppress(OSError):  # it is only for messages
        lock_path.write_text(f"process {os.getpid()} on {HOST}", encoding="utf-8")


def _holder(lock_path: Path) -> str:
    """Return the process that holds a lock, such as `process 12 on node3`."""
    try:
        return lock_path.read_text(encoding="utf-8") or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"
