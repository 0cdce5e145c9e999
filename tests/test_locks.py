"""Locks: one process at a time writes a directory; a killed process holds nothing."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from likewise.artifacts import Artifact
from likewise.errors import ArtifactError
from likewise.locks import HOST, LOCK_NAME, lock_directory


@contextmanager
def locked_elsewhere(path: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock of a directory."""
    code = (
        "import sys, pathlib; from likewise.locks import lock_directory\n"
        "with lock_directory(pathlib.Path(sys.argv[1]), 'run'): print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        try:
            yield process
        finally:
            process.kill()


def test_second_process_fails_with_the_lock_and_the_process(tmp_path: Path) -> None:
    with locked_elsewhere(tmp_path / "run") as process:
        with pytest.raises(ArtifactError) as caught, lock_directory(tmp_path / "run", "run", wait=False):
            pass
        assert str(caught.value).startswith(f"process {process.pid} on {HOST} is writing the run {tmp_path}")
        assert str(tmp_path / "run" / LOCK_NAME) in str(caught.value)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lock_directory(tmp_path / "run", "run", wait=False):  # the kill released it
            assert f"process {os.getpid()} on" in (tmp_path / "run" / LOCK_NAME).read_text()


def test_second_training_of_a_run_fails_at_once(tmp_path: Path) -> None:
    from likewise import train

    with (
        locked_elsewhere(tmp_path / "run") as process,
        pytest.raises(ArtifactError, match=f"process {process.pid} .* is writing the run"),
    ):
        train(tmp_path / "no dataset", tmp_path / "run")
    with pytest.raises(ArtifactError, match="no dataset"):
        train(tmp_path / "no dataset", tmp_path / "run")
    assert not [path for path in tmp_path.rglob("*") if path.name != LOCK_NAME and path.is_file()]


def test_second_process_waits_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "likewise")
    with locked_elsewhere(tmp_path / "a") as process:
        timer = threading.Timer(0.5, process.kill)
        timer.start()
        with Artifact.exclusive(tmp_path / "a", "thing", {}, {}) as artifact:
            assert process.poll() is not None or process.wait(5) is not None
            artifact.finish({})
    lock = tmp_path / "a" / LOCK_NAME
    message = f"waiting: process {process.pid} on {HOST} is writing the thing {lock.parent} (lock {lock})"
    assert caplog.messages == [message]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["artifact.json"]


def test_threads_take_turns(tmp_path: Path) -> None:
    inside, overlaps = [], []

    def work() -> None:
        for _ in range(5):
            with lock_directory(tmp_path / "a" / "b", "thing"):
                overlaps.append(len(inside))
                inside.append(1)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == [0] * 15


def test_folders_that_only_the_lock_made_are_removed(tmp_path: Path) -> None:
    with lock_directory(tmp_path / "a" / "b", "thing"):
        pass
    assert not list(tmp_path.iterdir())
    with lock_directory(tmp_path / "a" / "b", "thing"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_other_ranks_and_read_only_places_need_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked_elsewhere(tmp_path / "run"):
        monkeypatch.setenv("RANK", "1")
        with lock_directory(tmp_path / "run", "run", wait=False):
            pass
    monkeypatch.delenv("RANK")
    (tmp_path / "file").touch()
    with lock_directory(tmp_path / "file", "run"):
        pass
    artifact = Artifact.exclusive(tmp_path / "file", "run", {}, {})
    with pytest.raises(ArtifactError, match="is a file"), artifact:
        pass


def test_file_systems_without_locks_warn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with lock_directory(tmp_path / "a", "thing"):
        (tmp_path / "a" / "file").touch()
    assert caplog.messages == [
        f"{tmp_path / 'a'} cannot be locked (No locks available): let no other process write it"
    ]
