"""Does any damaged input make a reader raise another error, hang, exhaust the memory, or lose an entry?

    python -m benchmarks.fuzz --cases 10000 --seed 0 --readers images,tables

Each case mutates a small valid input of a reader (see `benchmarks.fuzz_readers`) and reads it. The only
errors allowed are those of likewise. Cases run in forked children, so that a crash or a hang ends only its
child; the next child continues after the case. The files of a failing case and its error are written to
`--failures`; `--replay INDEX` with the same seed and reader repeats it in this process.
"""

import argparse
import contextlib
import faulthandler
import importlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.fuzz_readers import READERS, ReaderTest, Source
from benchmarks.mutations import Files, mutate
from likewise.errors import LikewiseError

_CASE_SECONDS = 10
_BATCH_SIZE = 2000
_ADDRESS_SPACE = 16 * 2**30
_IMPORTED_LATER = (
    "filelock",
    "pandas",
    "safetensors.torch",
    "sklearn.feature_extraction.text",
    "tifffile",
    "timm",
)
_MEMORY_DISK = Path("/dev/shm")  # noqa: S108  # the many small files of the cases need no disk


@dataclass
class Outcome:
    """Result of a case."""

    index: int
    error: str | None = None
    """Why it failed; None if it passed."""
    result: str = ""
    """`read`, or the type of the error of likewise."""


@dataclass
class Report:
    """Results of the cases of one reader."""

    reader: str
    num_cases: int = 0
    results: Counter[str] = field(default_factory=Counter)
    failures: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count a case."""
        self.num_cases += 1
        self.results[outcome.result] += 1
        if outcome.error is not None:
            self.failures.append(outcome)

    def __str__(self) -> str:
        results = ", ".join(f"{count:,} {name}" for name, count in sorted(self.results.items()) if name)
        return (
            f"{self.reader}: {self.num_cases:,} cases ({results}) in {self.seconds:.0f} s, "
            f"{len(self.failures)} failures"
        )


def make_case(test: ReaderTest, sources: Sequence[Source], seed: int, index: int) -> tuple[Source, Files]:
    """Return the source of a case and its files, of which one or two are mutated."""
    rng = random.Random(f"{seed} {test.name} {index}")
    source = rng.choice(sources)
    files = dict(source.files)
    for name in rng.sample(source.mutable, min(len(source.mutable), rng.choice((1, 1, 1, 2)))):
        files[name] = mutate(files[name], rng, is_text=source.is_text(name))
    return source, files


def run_case(source: Source, files: Files, folder: Path) -> str:
    """Read the files of a case; return `read`, or the type of the error of likewise."""
    for old in (folder, folder.parent / "out"):
        shutil.rmtree(old, ignore_errors=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    try:
        source.check(folder, files)
    except LikewiseError as error:
        str(error).encode()
        return type(error).__name__
    return "read"


def find_failure(
    test: ReaderTest, source: Source, files: Files, folder: Path, stderr_file: IO[bytes]
) -> tuple[str, str | None]:
    """Run a case; return its result, and why it failed or None."""
    stderr_file.seek(0)
    stderr_file.truncate()
    result, error = "", None
    try:
        result = run_case(source, files, folder)
    except Exception:  # noqa: BLE001  # any other error is what this program looks for
        error = traceback.format_exc()
    sys.stderr.flush()
    written = os.pread(stderr_file.fileno(), 2000, 0)
    if error is None and written and test.is_silent:
        error = f"written to stderr: {written!r}"
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if error is None and peak_mib > test.max_mib:
        error = f"the process needed {peak_mib:,} MiB, more than {test.max_mib:,} MiB"
    return result, error


def _run_child(test: ReaderTest, seed: int, indices: range, stream: IO[str], work: Path) -> None:
    """Run cases and write an outcome per line; end after one that leaves the process in a bad state."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sources = test.make_sources(work / "seed")
    with (work / "stderr").open("w+b") as stderr_file, (work / "crash").open("w") as crash_file:
        os.dup2(stderr_file.fileno(), 2)
        faulthandler.enable(crash_file)
        for source in sources:
            run_case(source, source.files, work / "case")
        for index in indices:
            faulthandler.dump_traceback_later(_CASE_SECONDS, exit=True, file=crash_file)
            source, files = make_case(test, sources, seed, index)
            result, error = find_failure(test, source, files, work / "case", stderr_file)
            faulthandler.cancel_dump_traceback_later()
            stream.write(json.dumps([index, error, result]) + "\n")
            stream.flush()
            if error is not None and "MiB" in error:
                return  # the peak of the process would fail all later cases


def iter_outcomes(test: ReaderTest, seed: int, indices: range, work: Path) -> Iterator[Outcome]:
    """Run cases in children, one after the other, and yield their outcomes."""
    while indices:
        batch = indices[:_BATCH_SIZE]
        read_end, write_end = os.pipe()
        process_id = os.fork()
        if process_id == 0:
            exit_code = 1
            try:
                os.close(read_end)
                with os.fdopen(write_end, "w") as stream:
                    _run_child(test, seed, batch, stream, work)
                exit_code = 0
            except BaseException:  # noqa: BLE001  # a child never returns into the code of its parent
                (work / "crash").write_text(traceback.format_exc())
            finally:
                os._exit(exit_code)
        os.close(write_end)
        num_done = 0
        try:
            with os.fdopen(read_end) as stream:
                for line in stream:
                    yield Outcome(*json.loads(line))
                    num_done += 1
        except GeneratorExit:
            os.kill(process_id, signal.SIGKILL)
            raise
        finally:
            exit_code = os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])
        if exit_code != 0 and num_done < len(batch):
            crash = (work / "crash").read_text(errors="replace")
            yield Outcome(batch[num_done], f"hang or crash, exit code {exit_code}: {crash}")
            num_done += 1
        indices = indices[num_done:]


def write_failure(test: ReaderTest, seed: int, outcome: Outcome, failures: Path, work: Path) -> None:
    """Write the files of a failing case, and its error."""
    folder = failures / f"{test.name}-{seed}-{outcome.index}"
    shutil.rmtree(folder, ignore_errors=True)
    _, files = make_case(test, test.make_sources(work / "seed"), seed, outcome.index)
    for name, data in files.items():
        path = folder / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "error.txt").write_text(f"{outcome.error}\n", encoding="utf-8", errors="backslashreplace")


@contextmanager
def work_folder() -> Iterator[Path]:
    """Yield a temporary folder, in memory if there is such a disk."""
    with tempfile.TemporaryDirectory(dir=_MEMORY_DISK if _MEMORY_DISK.is_dir() else None) as folder:
        yield Path(folder)


def fuzz(
    name: str, num_cases: int, seed: int = 0, *, failures: Path | None = None, seconds: float | None = None
) -> Report:
    """Run the cases of a reader.

    Args:
        name: Name of the reader.
        num_cases: Number of cases.
        seed: Seed of the mutations.
        failures: Folder that receives the failing cases.
        seconds: Time after which no further case is run.
    """
    for module in _IMPORTED_LATER:  # the time of a case is that of its reader
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    test, report, started = READERS[name], Report(name), time.monotonic()
    with work_folder() as work:
        for outcome in iter_outcomes(test, seed, range(num_cases), work):
            report.add(outcome)
            if outcome.error is not None and failures is not None:
                write_failure(test, seed, outcome, failures, work)
            report.seconds = time.monotonic() - started
            if seconds is not None and report.seconds > seconds:
                break
    return report


def replay(name: str, seed: int, index: int) -> str:
    """Run one case in this process and return its result; its exception is not caught."""
    test = READERS[name]
    with work_folder() as work:
        source, files = make_case(test, test.make_sources(work / "seed"), seed, index)
        return run_case(source, files, work / "case")


def main() -> int:
    """Run the cases and print a line per reader; return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="cases per reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", default=",".join(READERS), help="names separated by commas")
    parser.add_argument("--seconds", type=float, default=None, help="stop a reader after this time")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--replay", type=int, default=None, metavar="INDEX")
    args = parser.parse_args()
    names = args.readers.split(",")
    unknown = sorted(set(names) - READERS.keys())
    if unknown:
        parser.error(f"unknown readers {', '.join(unknown)}; known: {', '.join(READERS)}")
    if args.replay is not None:
        for name in names:
            print(f"{name} {args.replay}: {replay(name, args.seed, args.replay)}")
        return 0
    reports = []
    for name in names:
        reports.append(fuzz(name, args.cases, args.seed, failures=args.failures, seconds=args.seconds))
        print(reports[-1], flush=True)
        for outcome in reports[-1].failures[:10]:
            print(f"  {outcome.index}: {str(outcome.error).strip().splitlines()[-1][:300]}", flush=True)
    return int(any(report.failures for report in reports))


if __name__ == "__main__":
    sys.exit(main())
