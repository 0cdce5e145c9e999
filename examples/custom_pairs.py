"""Use likewise's pairs and losses in your own training loop with torch, torchvision and timm.

python examples/custom_pairs.py photos/ out/
"""

import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import likewise
from likewise.data.images import decode_image, read_image_bytes
from likewise.training.losses import nt_xent_loss

CROP = v2.Compose(
    [v2.RandomResizedCrop(32, scale=(0.5, 1.0)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
)


class PairDataset(Dataset):
    """Pairs of images with similar captions; the partner is a function of seed, epoch and image."""

    def __init__(self, dataset: likewise.CaptionDataset, pair_config: likewise.PairConfig) -> None:
        self.dataset, self.pairs, self.epoch = dataset, likewise.build_pairs(dataset, pair_config), 0

    def __len__(self) -> int:
        return len(self.pairs.anchors)

    def __getitem__(self, index: int) -> list[Tensor]:
        anchor = self.pairs.anchors[[index]]
        partner = self.pairs.sample_partners(anchor, seed=0, epoch=self.epoch)
        images = [self.dataset[int(position)].image for position in (anchor[0], partner[0])]
        pixels = [decode_image(read_image_bytes(image, self.dataset.root)) for image in images]
        return [CROP(Image.fromarray(array)) for array in pixels]  # two of (3, 32, 32)


photos, out = sys.argv[1], Path(sys.argv[2])
dataset = likewise.import_dataset(photos, out / "dataset")
likewise.embed(dataset, encoder="all-MiniLM-L6-v2")
pair_dataset = PairDataset(dataset, likewise.PairConfig(source="language", k=3))

backbone = timm.create_model("resnet10t", num_classes=0)
model = nn.Sequential(backbone, nn.Linear(512, 64))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(2):
    pair_dataset.epoch = epoch
    for anchors, partners in DataLoader(pair_dataset, batch_size=32, shuffle=True, drop_last=True):
        z1, z2 = model(torch.cat([anchors, partners])).chunk(2)
        loss = nt_xent_loss(z1, z2, temperature=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
torch.save(backbone.state_dict(), out / "backbone.pt")
