"""Train with an objective of your own on likewise's pair loader, and evaluate the encoder.

The loss here is alignment and uniformity (Wang and Isola 2020, equations 4 and 5).

python examples/custom_method.py photos/ labeled/ out/
"""

import sys
from pathlib import Path

import timm
import torch
from torch import Tensor
from torch.nn.functional import normalize

import likewise


def align_uniform_loss(z1: Tensor, z2: Tensor) -> Tensor:
    """Alignment of partners plus uniformity of all; both inputs are (b, d) projections."""
    z1, z2 = normalize(z1, dim=1), normalize(z2, dim=1)
    alignment = (z1 - z2).square().sum(dim=1).mean()
    uniformity = torch.stack([torch.pdist(z).square().mul(-2).exp().mean().log() for z in (z1, z2)])
    return alignment + uniformity.mean()


photos, labeled, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
dataset = likewise.import_dataset(photos, out / "dataset")
likewise.embed(dataset, encoder="all-MiniLM-L6-v2")

pairs = likewise.build_pairs(dataset, likewise.PairConfig(source="language", k=3))
pair_dataset = likewise.PairDataset(dataset, pairs, image_size=32)
loader = likewise.PairLoader(pair_dataset, batch_size=32, num_workers=1)  # augments whole batches

backbone = timm.create_model("resnet10t", num_classes=0)
optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-3)
for epoch in range(2):
    pair_dataset.set_epoch(epoch)
    for view1, view2, _ in loader:
        z1, z2 = backbone(torch.cat([view1, view2])).chunk(2)
        loss = align_uniform_loss(z1, z2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")

torch.save(backbone.state_dict(), out / "backbone.pt")
encoder = likewise.load_encoder(out / "backbone.pt", backbone="resnet10t", image_size=32)
print(likewise.evaluate(encoder, datasets=[labeled], protocols=["knn"], out=out / "evaluation").table())
