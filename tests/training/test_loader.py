"""`PairDataset` and `PairLoader` in plain PyTorch code."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import likewise
from likewise.data.dataset import CaptionDataset


@pytest.fixture(scope="module")
def pair_dataset(dataset: CaptionDataset) -> likewise.PairDataset:
    pairs = likewise.build_pairs(dataset, likewise.PairConfig(source="language", k=3))
    return likewise.PairDataset(dataset, pairs, image_size=32, augmentation="simclr")


def test_loader_yields_two_views_and_the_index_of_each_anchor_once(
    pair_dataset: likewise.PairDataset,
) -> None:
    """Iterate over two views of each pair, one by one and in batches."""
    view1, view2, index = pair_dataset[0]
    assert view1.shape == view2.shape == (3, 32, 32)
    assert index == pair_dataset.anchors[0]
    loader = likewise.PairLoader(pair_dataset, batch_size=32, num_workers=2)
    assert len(loader) == 207 // 32
    positions = []
    for view1, view2, index in loader:
        assert view1.shape == view2.shape == (32, 3, 32, 32)
        assert view1.dtype == torch.float32
        positions += index.tolist()
    assert len(set(positions)) == len(positions) == 32 * len(loader)


def test_items_equal_rows_of_batches(pair_dataset: likewise.PairDataset) -> None:
    view1, view2, index = next(iter(likewise.PairLoader(pair_dataset, batch_size=16)))
    for row, position in enumerate(index.tolist()):
        item = pair_dataset[int(np.flatnonzero(pair_dataset.anchors == position)[0])]
        torch.testing.assert_close(item[0], view1[row])
        torch.testing.assert_close(item[1], view2[row])
        assert item[2] == position


def test_batches_are_a_function_of_the_epoch(pair_dataset: likewise.PairDataset) -> None:
    loader = likewise.PairLoader(pair_dataset, batch_size=16)
    batches = []
    for epoch in (0, 1, 0):
        pair_dataset.set_epoch(epoch)
        batches.append(next(iter(loader)))
    pair_dataset.set_epoch(0)
    assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[2], strict=True))
    assert not torch.equal(batches[0][2], batches[1][2])


def test_torch_data_loader_collates_items(pair_dataset: likewise.PairDataset) -> None:
    view1, view2, index = next(iter(DataLoader(pair_dataset, batch_size=4)))
    assert view1.shape == view2.shape == (4, 3, 32, 32)
    assert index.tolist() == pair_dataset.anchors[:4].tolist()
