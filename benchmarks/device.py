"""The whole training loop on one device: images a second, share of its product rate, data wait, memory.

    python -m benchmarks.device [--device cuda] [--backbone resnet50] [--size 224] [--batch-size 512]

Pairs of photographs come from a packed cache; the peer is the same backbone, head, loss and optimizer on one
batch of random images that lies on the device. The rate is that of a product of square matrices, measured,
not a data sheet's. Both are in bfloat16 where the device multiplies it, as `--precision auto` chooses. On a
processor give a small shape: it is the same code.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.loading import make_photos
from benchmarks.step import bare_steps, make_trainer, train
from benchmarks.timing import alternate, product_rate, wait
from likewise.data.config import ImportOptions
from likewise.data.importing import import_dataset
from likewise.parallel import default_num_workers, resolve_device
from likewise.training.config import TrainConfig
from likewise.training.methods.base import Batch
from likewise.training.trainer import choose_dtype


def run(device: torch.device, name: str, size: int, batch: int, steps: int, rounds: int) -> Iterator[str]:
    """Yield what was measured, a line each."""
    dtype = choose_dtype("auto", device)
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        table = make_photos(folder / "photos", 2 * batch)
        collection = import_dataset(table, folder / "c", ImportOptions())
        config = TrainConfig(
            backbone=name, image_size=size, batch_size=batch, max_steps=steps, augmentation="simclr"
        )
        num_workers = max(1, default_num_workers() - 1)
        trainer = make_trainer(collection, folder / "run", config, device=device, num_workers=num_workers)
        ready = Batch(
            views=[torch.randn(batch, 3, size, size, device=device) for _ in range(2)], rank_sizes=(batch,)
        )

        def bare() -> None:
            bare_steps(trainer, ready, steps)
            wait(device)

        with FlopCounterMode(display=False) as counter:
            bare_steps(trainer, ready, 1)
        seconds, plain, ratio = alternate(lambda: train(trainer), bare, rounds)
        waited = train(trainer)[-1]["data_time_fraction"]
        side = 16384 if device.type == "cuda" else 2048
        rate, peak = counter.get_total_flops() * steps / seconds, product_rate(device, dtype, side)
        shown = 2 * batch * steps
        yield f"{name}, {size} px, batch {batch} pairs, {dtype}, {steps} steps, on {told(device)}"
        yield f"images a second: {shown / seconds:,.0f}; bare steps {shown / plain:,.0f}"
        yield f"the loop's share of the bare steps' rate: {ratio:.3f}"
        yield f"arithmetic: {rate / 1e12:.3g} TFLOP/s, {rate / peak:.1%} of a product's {peak / 1e12:.3g}"
        yield f"waited for data: {waited:.1%} of the time"
        if device.type == "cuda":
            yield f"memory: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB at most"


def told(device: torch.device) -> str:
    """Return what a device is called."""
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{default_num_workers()} processors"
    )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=None)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    device = torch.device(resolve_device(asked.device))
    for line in run(device, asked.backbone, asked.size, asked.batch_size, asked.steps, asked.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
