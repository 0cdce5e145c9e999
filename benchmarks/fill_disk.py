"""Does a step on a full disk end with one error, and the repeated step with the bytes of an undisturbed run?

    python -m benchmarks.fill_disk WORK --trials 20

Each step writes into a small file system in memory, of which a random part is free. For a user who may not
mount it, the size of each file is limited instead (RLIMIT_FSIZE). Then the space is freed and the step is
repeated.
"""

import argparse
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.kill import (
    STEPS,
    Folders,
    StepTest,
    import_before_forks,
    is_clear_error,
    make_source,
    start,
    wait_for,
)

_DISK_MIB = 512


@contextmanager
def mount_small_disk(folder: Path) -> Iterator[bool]:
    """Mount a file system in memory; yields False if this is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607


@contextmanager
def limit_space(folder: Path, free_bytes: int, *, is_mounted: bool) -> Iterator[None]:
    """Leave some bytes free on a file system, or limit the size of each file."""
    if not is_mounted:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return
    filler, status = folder / "filler", os.statvfs(folder)
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(1, status.f_bavail * status.f_frsize - free_bytes))
    try:
        yield
    finally:
        filler.unlink()


def try_step(test: StepTest, rng: random.Random, *, is_mounted: bool) -> tuple[int, list[str]]:
    """Run a step with too little space, then again with enough.

    Returns:
        The exit code of the first run, 0 if the space sufficed, and the failures.
    """
    test.reset()
    free_bytes = int(rng.uniform(0, test.output_bytes)) if is_mounted else int(10 ** rng.uniform(3.3, 5))
    with limit_space(test.folders.work.parent, free_bytes, is_mounted=is_mounted):
        exit_code = wait_for(start(test.step, test.folders, test.log_path))
    failures = []
    if exit_code != 0 and not is_clear_error(exit_code, test.log_path):
        failures.append(f"{free_bytes} bytes free: ended with {exit_code}: {test.log_path.read_text()}")
    return exit_code, failures + test.resume()


def main() -> int:
    """Try the steps and print a line for each; return 1 if any trial failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=list(STEPS))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    disk = args.work.resolve() / "disk"
    folders = Folders(source=args.work.resolve() / "source", work=disk / "work")
    import_before_forks(args.steps)
    make_source(folders.source)
    failed = False
    with mount_small_disk(disk) as is_mounted:
        print("a file system in memory" if is_mounted else "a limit on the size of files", flush=True)
        for step in args.steps:
            rng, test = random.Random(f"{args.seed} {step}"), StepTest(step, folders)
            trials = [try_step(test, rng, is_mounted=is_mounted) for _ in range(args.trials)]
            failures = [failure for _, trial_failures in trials for failure in trial_failures]
            num_full = sum(exit_code != 0 for exit_code, _ in trials)
            print(
                f"{step}: {num_full} of {len(trials)} runs without space, {len(failures)} failures",
                flush=True,
            )
            for failure in failures[:10]:
                print(f"  {failure}", flush=True)
            failed = failed or bool(failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
