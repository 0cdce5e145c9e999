"""Scaling of time and memory of each stage with the number of images.

    python -m benchmarks.scaling [--max-images 100000] [--captions 10]

Every stage runs as a separate command on 1,000, 10,000, ... images: copies of the emoji images with
distinct captions. Printed are the seconds and the peak memory of the process, the slope of log time over log
images between the two largest sizes (1: linear, 2: quadratic), and the hours that it predicts for more images
on this machine. Peak memory includes resident memory-mapped files, which the system can reclaim; anonymous
memory does not (sampled 50 times per second, on Linux).
"""

import argparse
import csv
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter, sleep

from likewise.demo import make_emoji_dataset

_BUILD_CACHE = (
    "import sys; from likewise.data.image_cache import build_image_cache; "
    "from likewise.data.dataset import CaptionDataset; build_image_cache(CaptionDataset(sys.argv[1]), 48)"
)


def stages(table: Path, out: Path) -> dict[str, list[str]]:
    """Return the Python arguments of each stage, in order."""
    likewise, dataset = ["-m", "likewise.cli"], str(out / "c")
    return {
        "import": [*likewise, "import", str(table), dataset, "--quiet"],
        "embed": [*likewise, "embed", dataset, "--encoder", "bow", "--quiet"],
        "cache": ["-c", _BUILD_CACHE, dataset],
        "train, 10 steps": [
            *likewise, "train", dataset, "--out", str(out / "run"), "--pairs", "self", "--max-steps", "10",
            "--image-size", "32", "--batch-size", "64", "--backbone", "resnet10t", "--quiet",
        ],
        # Last, because it takes longest.
        "neighbors": [*likewise, "neighbors", dataset, "--encoder", "bow", "--quiet"],
    }  # fmt: skip


def measure(arguments: list[str]) -> tuple[float, int, int]:
    """Run Python as a child; return seconds, peak memory and peak anonymous memory in bytes."""
    start, anonymous = perf_counter(), 0
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    while True:
        anonymous = max(anonymous, _anonymous_memory(child.pid))
        ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        if ended:
            break
        sleep(0.02)
    if status:
        raise RuntimeError(f"failed: {' '.join(arguments)}")
    return perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), anonymous


def _anonymous_memory(process: int) -> int:
    """Return the resident bytes that are not memory-mapped files; 0 if unknown."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def make_table(emoji: Path, n: int, captions: int) -> Path:
    """Write a table of n images with several captions each; every image is a hard link."""
    with emoji.open(encoding="utf-8", newline="") as file:
        rows = [(emoji.parent / row["file"], row["caption"]) for row in csv.DictReader(file)]
    folder = emoji.parent.with_name(f"images-{n}")
    folder.mkdir()
    table = folder / "images.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "caption"))
        for number, (image, text) in enumerate(islice(cycle(rows), n)):
            (folder / f"{number}.png").hardlink_to(image)
            for i in range(captions):
                writer.writerow((f"{number}.png", f"{text} {number} {i}"))
    return table


def run(max_images: int, captions: int) -> Iterator[str]:
    """Yield one line per stage and size, then one per stage with its slope and predictions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        emoji = make_emoji_dataset(folder / "emoji")
        sizes = [10**power for power in range(3, 1 + round(math.log10(max_images)))]
        seconds: dict[str, list[float]] = {}
        for n in sizes:
            out = folder / str(n)
            out.mkdir()
            for stage, arguments in stages(make_table(emoji, n, captions), out).items():
                elapsed, memory, anonymous = measure(arguments)
                seconds.setdefault(stage, []).append(elapsed)
                yield (
                    f"{stage:<16} {n:>9,} images {elapsed:9.1f} s {memory / 2**20:8.0f} MiB, "
                    f"{anonymous / 2**20:.0f} anonymous"
                )
        for stage, times in seconds.items() if len(sizes) > 1 else ():
            slope = math.log(times[-1] / times[-2]) / math.log(sizes[-1] / sizes[-2])
            hours = [times[-1] * (n / sizes[-1]) ** slope / 3600 for n in (10**7, 10**8, 10**9)]
            prediction = ", ".join(
                f"10^{7 + i}: {h:,.1f} h ({math.ceil(h / 24):,} machines for a day)"
                for i, h in enumerate(hours)
            )
            yield f"{stage:<16} slope {slope:.2f}; predicts {prediction}"


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-images", type=int, default=100_000, help="images of the largest dataset")
    parser.add_argument("--captions", type=int, default=10, help="captions per image")
    args = parser.parse_args()
    for line in run(args.max_images, args.captions):
        print(line, flush=True)


if __name__ == "__main__":
    main()
