"""One process of a distributed step of every method: `python distributed_worker.py OUT`.

Rank and world size come from the environment, as under torchrun. Rank 0 writes the losses, gradients and
buffers to OUT.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.methods import VARIANTS, train_step
from likewise.distributed import init_distributed


def main() -> None:
    """Take one step of each method."""
    torch.set_num_threads(1)
    with init_distributed(torch.device("cpu")) as dist:
        results = {}
        for name in VARIANTS:
            results |= train_step(name, dist)
        if dist.is_main_process:
            save_file({k: v.contiguous() for k, v in results.items()}, Path(sys.argv[1]))
        dist.barrier()


if __name__ == "__main__":
    main()
