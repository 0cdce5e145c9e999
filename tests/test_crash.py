"""Steps that are killed, run twice at once, or out of space end with the bytes of an undisturbed run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from likewise.artifacts import MANIFEST, Artifact, write_array

ROOT = Path(__file__).parent.parent
CHEAP_STEPS = ("import", "embed", "neighbors", "cache")


@pytest.mark.parametrize(
    "command", [("kill", "--instants", "5", "--pairs", "1"), ("fill_disk", "--trials", "2")]
)
def test_steps_end_with_the_bytes_of_an_undisturbed_run(tmp_path: Path, command: tuple[str, ...]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{command[0]}", tmp_path, *command[1:], "--steps", *CHEAP_STEPS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()][-4:] == list(CHEAP_STEPS)
    assert result.stdout.count(" 0 failures") == 4


def test_data_is_on_the_disk_before_the_manifest_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        events.append(("flush", Path(f"/proc/self/fd/{descriptor}").resolve().name))
        fsync(descriptor)

    def record_replace(path: Path, target: Path) -> Path:
        events.append(("name", target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    artifact = Artifact.create_or_resume(tmp_path / "a", "thing", {}, {})
    assert ("flush", tmp_path.name) in events  # the folder's own name
    events.clear()
    write_array(tmp_path / "a" / "x.npy", np.arange(3))
    artifact.finish({})
    names = [
        (kind, MANIFEST if MANIFEST in name else "x.npy" if "x.npy" in name else name)
        for kind, name in events
    ]
    expected = [[("flush", name), ("name", name), ("flush", "a")] for name in ("x.npy", MANIFEST)]
    assert names == expected[0] + expected[1]
