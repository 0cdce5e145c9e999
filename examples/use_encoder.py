"""Find the images that are most similar to a query image.

python examples/use_encoder.py ENCODER photos/ query.jpg

ENCODER is a run or any encoder that likewise loads, such as timm:resnet50 or clip:ViT-B-32/openai.
"""

import argparse
from pathlib import Path

from torch.nn.functional import normalize

import likewise

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def main() -> None:
    """Encode a folder and a query, and print the nearest images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encoder")
    parser.add_argument("photos", type=Path)
    parser.add_argument("query", type=Path)
    parser.add_argument("-k", type=int, default=5)
    args = parser.parse_args()

    encoder = likewise.load_encoder(args.encoder)
    paths = sorted(path for path in args.photos.rglob("*") if path.suffix.lower() in SUFFIXES)
    gallery = normalize(encoder.encode(paths), dim=1)  # (n, d)
    query = normalize(encoder.encode([args.query]), dim=1)  # (1, d)
    similarity, nearest = (gallery @ query[0]).topk(min(args.k, len(paths)))
    for value, index in zip(similarity.tolist(), nearest.tolist(), strict=True):
        print(f"{value:.3f}  {paths[index]}")


if __name__ == "__main__":
    main()
