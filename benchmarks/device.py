"""Training loop on one device: images per second, matmul utilization, data wait and memory.

    python -m benchmarks.device [--device cuda] [--backbone resnet50] [--image-size 224] [--batch-size 512]

Pairs of photographs come from an image cache. The baseline takes bare steps: the same backbone, projection
head, loss and optimizer on one batch of random images on the device. Utilization is relative to the measured
rate of a product of square matrices. Both use the precision that `--precision auto` selects. On a CPU, use a
small image size and batch size.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.loading import make_photos
from benchmarks.step import bare_steps, make_trainer, train
from benchmarks.timing import alternate, matmul_flops, synchronize
from likewise.data.importing import import_dataset
from likewise.parallel import default_num_workers, resolve_device
from likewise.training.config import TrainConfig
from likewise.training.methods.base import Batch
from likewise.training.trainer import choose_dtype


def run(device: torch.device, config: TrainConfig, rounds: int) -> Iterator[str]:
    """Yield one line per measurement."""
    dtype = choose_dtype("auto", device)
    batch_size, image_size, steps = config.batch_size, config.image_size or 224, config.max_steps or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = import_dataset(make_photos(folder / "photos", 2 * batch_size), folder / "dataset")
        num_workers = max(1, default_num_workers() - 1)
        trainer = make_trainer(dataset, folder / "run", config, device=device, num_workers=num_workers)
        shape = (batch_size, 3, image_size, image_size)
        batch = Batch(views=[torch.randn(shape, device=device) for _ in range(2)], rank_sizes=(batch_size,))

        def baseline() -> None:
            bare_steps(trainer, batch, steps)
            synchronize(device)

        with FlopCounterMode(display=False) as counter:
            bare_steps(trainer, batch, 1)
        seconds, bare_seconds, ratio = alternate(lambda: train(trainer), baseline, rounds)
        data_time_fraction = train(trainer)[-1]["data_time_fraction"]
        side = 16384 if device.type == "cuda" else 2048
        rate, peak = counter.get_total_flops() * steps / seconds, matmul_flops(device, dtype, side)
        num_images = 2 * batch_size * steps
        yield f"{config.backbone}, {image_size} px, batch {batch_size} pairs, {dtype}, {steps} steps"
        yield f"device: {device_name(device)}"
        yield f"images per second: {num_images / seconds:,.0f}; bare steps {num_images / bare_seconds:,.0f}"
        yield f"throughput relative to bare steps: {ratio:.3f}"
        yield f"arithmetic: {rate / 1e12:.3g} TFLOP/s, {rate / peak:.1%} of the matmul's {peak / 1e12:.3g}"
        yield f"data wait: {data_time_fraction:.1%} of the time"
        if device.type == "cuda":
            yield f"peak memory: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the number of CPU cores."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{default_num_workers()} cores"


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=None)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    config = TrainConfig(
        backbone=args.backbone,
        image_size=args.image_size,
        batch_size=args.batch_size,
        max_steps=args.steps,
        augmentation="simclr",
    )
    for line in run(torch.device(resolve_device(args.device)), config, args.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
