"""Use likewise's pairs and losses in your own training loop with torch and timm.

python examples/custom_pairs.py photos/ out/
"""

import sys
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

import likewise

photos, out = sys.argv[1], Path(sys.argv[2])
dataset = likewise.import_dataset(photos, out / "dataset")
likewise.embed(dataset, encoder="all-MiniLM-L6-v2")

pairs = likewise.build_pairs(dataset, likewise.PairConfig(source="language", k=3, mutual_k=20))
pair_dataset = likewise.PairDataset(dataset, pairs, image_size=32)  # a map-style dataset of torch
loader = DataLoader(pair_dataset, batch_size=32, shuffle=True, drop_last=True)

backbone = timm.create_model("resnet10t", num_classes=0)
model = nn.Sequential(backbone, nn.Linear(512, 64))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(2):
    pair_dataset.set_epoch(epoch)  # new partners and views
    for view1, view2, _ in loader:
        z1, z2 = model(torch.cat([view1, view2])).chunk(2)
        loss = likewise.losses.nt_xent_loss(z1, z2, temperature=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
torch.save(backbone.state_dict(), out / "backbone.pt")
