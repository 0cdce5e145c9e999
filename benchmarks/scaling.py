"""How time and memory of each stage grow with the collection, and what that predicts.

    python -m benchmarks.scaling [--most 100000] [--captions 10]

Every stage is a command of its own, as users run it, on 1,000, 10,000, … images: the emoji pictures, shown
again and again, each with some captions that numbers make different. Printed are seconds and peak memory of
the process, the slope of the time between the two largest sizes (1: linear, 2: quadratic), and the hours that
this slope predicts for more images, on this machine, with how many like it would need a day.
Peak memory counts files that are mapped as long as they are resident, which the system takes back when it is
short; what stands after it is the process's own, which it cannot (looked at 50 times a second, on Linux).
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

_PACK = (
    "import sys; from likewise.data.image_cache import build_image_cache; "
    "from likewise.data.dataset import CaptionDataset; build_image_cache(CaptionDataset(sys.argv[1]), 48)"
)


def stages(table: Path, out: Path) -> dict[str, list[str]]:
    """Return the arguments of Python by which each stage is run, in order."""
    likewise, collection = ["-m", "likewise.cli"], str(out / "c")
    return {
        "import": [*likewise, "import", str(table), collection, "--quiet"],
        "embed": [*likewise, "embed", collection, "--encoder", "bow", "--quiet"],
        "pack": ["-c", _PACK, collection],
        "train, 10 steps": [
            *likewise, "train", collection, "--out", str(out / "run"), "--pairs", "self", "--steps", "10",
            "--image-size", "32", "--batch-size", "64", "--backbone", "resnet10t", "--quiet",
        ],
        # Last, as it takes longest.
        "neighbors": [*likewise, "neighbors", collection, "--encoder", "bow", "--quiet"],
    }  # fmt: skip


def spent(arguments: list[str]) -> tuple[float, int, int]:
    """Run Python as a child; return seconds, peak memory and how much of that is its own, in bytes."""
    start, own = perf_counter(), 0
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    while True:
        own = max(own, _own_memory(child.pid))
        ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        if ended:
            break
        sleep(0.02)
    if status:
        raise RuntimeError(f"failed: {' '.join(arguments)}")
    return perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), own


def _own_memory(process: int) -> int:
    """Return the resident bytes that no file stands behind; 0 where the system does not tell."""
    told = Path(f"/proc/{process}/status")
    lines = told.read_text().splitlines() if told.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def make_table(emoji: Path, n: int, captions: int) -> Path:
    """Write a table of n images with so many rows each, every image a file of its own: a link."""
    with emoji.open(encoding="utf-8", newline="") as file:
        rows = [(emoji.parent / row["file"], row["caption"]) for row in csv.DictReader(file)]
    folder = emoji.parent.with_name(f"pictures-{n}")
    folder.mkdir()
    table = folder / "pictures.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "caption"))
        for number, (picture, text) in enumerate(islice(cycle(rows), n)):
            (folder / f"{number}.png").hardlink_to(picture)
            for nth in range(captions):
                writer.writerow((f"{number}.png", f"{text} {number} {nth}"))
    return table


def run(most: int, captions: int) -> Iterator[str]:
    """Yield a line for each stage and size, then one a stage with its slope and predictions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        emoji = make_emoji_dataset(folder / "emoji")
        sizes = [10**power for power in range(3, 1 + round(math.log10(most)))]
        seconds: dict[str, list[float]] = {}
        for n in sizes:
            out = folder / str(n)
            out.mkdir()
            for stage, arguments in stages(make_table(emoji, n, captions), out).items():
                took, memory, own = spent(arguments)
                seconds.setdefault(stage, []).append(took)
                yield (
                    f"{stage:<16} {n:>9,} images {took:9.1f} s {memory / 2**20:8.0f} MiB, "
                    f"{own / 2**20:.0f} its own"
                )
        for stage, each in seconds.items() if len(sizes) > 1 else ():
            slope = math.log(each[-1] / each[-2]) / math.log(sizes[-1] / sizes[-2])
            hours = [each[-1] * (n / sizes[-1]) ** slope / 3600 for n in (10**7, 10**8, 10**9)]
            foretold = ", ".join(
                f"10^{7 + i}: {h:,.1f} h ({math.ceil(h / 24):,} for a day)" for i, h in enumerate(hours)
            )
            yield f"{stage:<16} slope {slope:.2f}; predicts {foretold}"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=100_000, help="images in the largest collection")
    parser.add_argument("--captions", type=int, default=10, help="captions an image")
    asked = parser.parse_args()
    for line in run(asked.most, asked.captions):
        print(line, flush=True)


if __name__ == "__main__":
    main()
