"""Is a killed step resumed to the same bytes? And what do two processes do that run one step at once?

    python -m benchmarks.kill WORK --instants 200 --pairs 20

Each step (import, embed, neighbors, cache, audit, train, evaluate) runs in a child process that is killed
with SIGKILL at random instants, uniform over the duration of the step, and is repeated until it completes.
All files must then equal those of an uninterrupted run, except for TensorBoard logs and the rates in
`metrics.jsonl`, which hold times. The children are forks of a process that has imported everything, so that
the instants fall into the step itself. With `--pairs`, two processes run each step at once.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from likewise import ImportOptions, audit_dataset, embed, find_neighbors, import_dataset
from likewise.data.dataset import CaptionDataset
from likewise.data.image_cache import build_image_cache
from likewise.errors import LikewiseError

_MAX_KILLS = 3
_RATES = ("images_per_second", "data_time_fraction")
_WORDS = [
    "red",
    "blue",
    "green",
    "small",
    "large",
    "old",
    "new",
    "round",
    "square",
    "bright",
    "dark",
    "cat",
    "dog",
    "car",
    "tree",
    "house",
]


@dataclass(frozen=True)
class Folders:
    """The source and the output of all steps."""

    source: Path
    work: Path

    @property
    def scratch(self) -> Path:
        """Where logs and copies are kept."""
        return self.source.parent

    @property
    def dataset(self) -> Path:
        """The imported dataset."""
        return self.work / "dataset"


def make_source(folder: Path, num_images: int = 96) -> None:
    """Write captioned images, and a few damaged ones."""
    rng = np.random.default_rng(0)
    for index in range(num_images):
        label = f"class{index % 5}"
        path = folder / ("train" if index % 3 else "test") / label / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 48, 3), np.uint8) // 4 + np.uint8(30 * (index % 5))
        Image.fromarray(pixels).save(path)
        words = rng.choice(_WORDS, 4)
        path.with_suffix(".txt").write_text(f"{' '.join(words)} {label}\n")
        if index % 40 == 7:
            path.write_bytes(path.read_bytes()[:100])


def run_import(folders: Folders) -> None:
    """Import the images in small shards."""
    import_dataset(folders.source, folders.dataset, ImportOptions(), shard_rows=12, num_workers=2)


def run_embed(folders: Folders) -> None:
    """Embed the captions by word counts, which need no model."""
    embed(folders.dataset, "tfidf")


def run_neighbors(folders: Folders) -> None:
    """Search for neighbors among captions, without near-duplicates."""
    find_neighbors(folders.dataset, k=5, device="cpu")


def run_cache(folders: Folders) -> None:
    """Cache the images in the size of the training step."""
    build_image_cache(CaptionDataset(folders.dataset), 48, num_workers=2)


def run_audit(folders: Folders) -> None:
    """Audit captions and images."""
    audit_dataset(folders.dataset, num_workers=2)


def run_train(folders: Folders) -> None:
    """Train for a few steps with validation and a checkpoint after each step."""
    from likewise import train
    from likewise.training.config import parse_train_config

    settings = {"backbone": "resnet10t", "image_size": 32, "batch_size": 16, "max_steps": 6}
    config = parse_train_config(settings | {"num_val_pairs": 12})
    train(folders.dataset, folders.work / "run", config, num_workers=1, device="cpu", checkpoint_minutes=0)


def run_evaluate(folders: Folders) -> None:
    """Evaluate an untrained encoder with two protocols."""
    from likewise import evaluate
    from likewise.models.encoders import load_encoder

    encoder = load_encoder("random:resnet10t", image_size=32, device="cpu")
    evaluate(
        encoder,
        folders.source,
        ("knn", "linear"),
        out=folders.work / "evaluation",
        num_workers=1,
        device="cpu",
    )


STEPS: dict[str, Callable[[Folders], None]] = {
    "import": run_import,
    "embed": run_embed,
    "neighbors": run_neighbors,
    "cache": run_cache,
    "audit": run_audit,
    "train": run_train,
    "evaluate": run_evaluate,
}
# Steps that write into the dataset come in this order; the last two write folders of their own.
_NEEDS = {
    "import": (),
    "embed": ("import",),
    "neighbors": ("import", "embed"),
    "cache": ("import",),
    "audit": ("import",),
    "train": ("import", "embed", "neighbors", "cache"),
    "evaluate": (),
}


def start(step: str, folders: Folders, log_path: Path) -> int:
    """Start a step in a child process and return its process id; it exits with 0, or 1 with an error."""
    child = os.fork()
    if child:
        return child
    exit_code = 2
    try:
        os.setpgid(0, 0)
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        STEPS[step](folders)
        exit_code = 0
    except LikewiseError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        exit_code = 1
    except BaseException:  # noqa: BLE001  # it must not return into the code of the parent
        traceback.print_exc()
    os._exit(exit_code)


def wait_for(child: int) -> int:
    """Wait for a child and return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> int:
    """Kill a child with SIGKILL unless it ends before; return its exit code."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(0.001, max(0.0, deadline - time.monotonic())))
    os.kill(child, signal.SIGKILL)
    return wait_for(child)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files without times."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and "tensorboard" not in path.parts:
            files[name] = _without_rates(path) if path.name == "metrics.jsonl" else path.read_bytes()
    return files


def _without_rates(path: Path) -> bytes:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return json.dumps([{k: v for k, v in row.items() if k not in _RATES} for row in rows]).encode()


def differences(actual: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Return the names of the files that differ, with the kind of difference."""
    return [
        f"{name} {'is missing' if name not in actual else 'is new' if name not in expected else 'differs'}"
        for name in sorted(actual.keys() | expected.keys())
        if actual.get(name) != expected.get(name)
    ]


def is_clear_error(exit_code: int, log_path: Path) -> bool:
    """Return whether a step ended with one error of one line."""
    lines = log_path.read_text().splitlines()
    return exit_code == 1 and sum(line.startswith(("error: ", "Traceback")) for line in lines) == 1


class StepTest:
    """One step with its input and the result of an uninterrupted run."""

    def __init__(self, step: str, folders: Folders) -> None:
        """Run the steps that come before it, then the step itself.

        Raises:
            RuntimeError: if a step fails.
        """
        self.step, self.folders = step, folders
        self.log_path = folders.scratch / f"{step}.log"
        self.input = folders.scratch / f"{step}-input"
        shutil.rmtree(folders.work, ignore_errors=True)
        for needed in _NEEDS[step]:
            self._run(needed)
        shutil.rmtree(self.input, ignore_errors=True)
        folders.work.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folders.work, self.input)
        self._run(step)
        self.reset()
        started = time.monotonic()
        self._run(step)
        self.duration = time.monotonic() - started
        self.expected = read_files(folders.work)
        self.output_bytes = sum(map(len, self.expected.values()))

    def _run(self, step: str) -> None:
        exit_code = wait_for(start(step, self.folders, self.log_path))
        if exit_code:
            raise RuntimeError(f"{step} ended with {exit_code}: {self.log_path.read_text()}")

    def reset(self) -> None:
        """Restore the state before the step."""
        self.log_path.unlink(missing_ok=True)
        shutil.rmtree(self.folders.work)
        shutil.copytree(self.input, self.folders.work)

    def kill(self, rng: random.Random) -> tuple[int, list[str]]:
        """Kill the step at random instants until it completes.

        Returns:
            The number of kills that hit the running step, and the failures.
        """
        self.reset()
        num_kills = 0
        for _ in range(_MAX_KILLS):
            child = start(self.step, self.folders, self.log_path)
            if kill_after(child, rng.uniform(0, self.duration)) != -signal.SIGKILL:
                break
            num_kills += 1
        return num_kills, self.resume()

    def resume(self) -> list[str]:
        """Repeat the step without an interruption; return the failures."""
        exit_code = wait_for(start(self.step, self.folders, self.log_path))
        failures = [] if exit_code == 0 else [f"ended with {exit_code}: {self.log_path.read_text()}"]
        return failures + differences(read_files(self.folders.work), self.expected)

    def run_pair(self) -> tuple[list[int], list[str]]:
        """Run the step in two processes at once; return their exit codes, and the failures."""
        self.reset()
        log_paths = [self.log_path.with_suffix(f".{i}.log") for i in range(2)]
        for log_path in log_paths:
            log_path.unlink(missing_ok=True)
        children = [start(self.step, self.folders, log_path) for log_path in log_paths]
        exit_codes = [wait_for(child) for child in children]
        failures = []
        for exit_code, log_path in zip(exit_codes, log_paths, strict=True):
            if exit_code != 0 and not is_clear_error(exit_code, log_path):
                failures.append(f"ended with {exit_code}: {log_path.read_text()}")
        if 0 not in exit_codes:
            failures.append("no process succeeded")
        return exit_codes, failures + differences(read_files(self.folders.work), self.expected)


def import_before_forks(steps: Sequence[str]) -> None:
    """Import what the steps import later, so that their duration is that of their work."""
    modules = ["sklearn.feature_extraction.text", "torch"]
    modules += ["likewise.training.train", "torch.utils.tensorboard"] * ("train" in steps)
    modules += ["likewise.evaluation.evaluate", "likewise.models.encoders"] * ("evaluate" in steps)
    modules += ["py3langid"] * ("audit" in steps)
    for module in modules:
        importlib.import_module(module)


def main() -> int:
    """Test the steps and print a line for each; return 1 if any result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=list(STEPS))
    parser.add_argument("--instants", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=None, help="stop a step after this time")
    args = parser.parse_args()
    folders = Folders(source=args.work.resolve() / "source", work=args.work.resolve() / "work")
    import_before_forks(args.steps)
    make_source(folders.source)
    failed = False
    for step in args.steps:
        rng, started = random.Random(f"{args.seed} {step}"), time.monotonic()
        test = StepTest(step, folders)
        num_kills, trials, failures = 0, 0, []
        while num_kills < args.instants and (
            args.seconds is None or time.monotonic() - started < args.seconds
        ):
            kills, trial_failures = test.kill(rng)
            num_kills, trials = num_kills + kills, trials + 1
            failures += trial_failures
        pair_codes = []
        for _ in range(args.pairs):
            codes, pair_failures = test.run_pair()
            pair_codes.append(codes)
            failures += pair_failures
        num_errors = sum(1 in codes for codes in pair_codes)
        print(
            f"{step}: {test.duration:.2f} s, {num_kills} kills in {trials} runs, {len(pair_codes)} pairs "
            f"({num_errors} with an error), {len(failures)} failures",
            flush=True,
        )
        for failure in failures[:10]:
            print(f"  {failure}", flush=True)
        failed = failed or bool(failures)
    return int(failed)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
