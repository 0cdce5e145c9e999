"""What each method makes of its losses: outputs of a batch to one figure, against the papers' formulas."""

from collections.abc import Sequence

import lightly.loss
import numpy as np
import open_clip.loss
import pytest
import torch
from lightly.models.modules import NNMemoryBankModule
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

import ranks
from likewise.training.methods.base import Batch, LossOutput, Method
from likewise.training.methods.contrastive import NNCLR, MoCo
from likewise.training.methods.image_text import DeCLIP
from likewise.training.methods.non_contrastive import SwAV
from likewise.training.methods.registry import build_method

WIDTH = 8


def build(name: str) -> Method:
    torch.manual_seed(0)
    return build_method(
        ranks.VARIANTS[name], nn.Linear(4, WIDTH), WIDTH, memory_bank_size=16, caption_embedding_dim=6
    ).train()


def rows(count: int, width: int = 12, b: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(b, width, generator=generator) for _ in range(count)]


def judge(method: Method, outputs: Sequence[Tensor], **shown: object) -> LossOutput:
    batch = {"views": [], "sizes": (len(outputs[0]),)} | shown
    return method.compute_loss(outputs, Batch(**batch))  # pyrefly: ignore[bad-argument-type]


def test_simsiam_and_byol() -> None:
    said_1, said_2, first, second = rows(4)
    expected = -(cosine_similarity(said_1, second) + cosine_similarity(said_2, first)).mean() / 2
    torch.testing.assert_close(judge(build("simsiam"), [said_1, said_2, first, second]).loss, expected)
    unit = [normalize(each, dim=1) for each in (said_1, said_2, first, second)]
    squares = (unit[0] - unit[3]).square().sum(dim=1) + (unit[1] - unit[2]).square().sum(dim=1)
    torch.testing.assert_close(judge(build("byol"), [said_1, said_2, first, second]).loss, squares.mean())


def test_nnclr_is_lightlys_on_the_neighbors_that_lightly_finds() -> None:
    method, (first, second, said_1, said_2) = build("nnclr"), rows(4)
    assert isinstance(method, NNCLR)
    bank = NNMemoryBankModule(size=(16, 12))
    bank.bank = method.memory_bank.bank.clone()  # pyrefly: ignore[bad-assignment]
    near_1, near_2 = (bank(each, update=False) for each in (first, second))
    own = torch.arange(7)
    expected = sum(
        cross_entropy(normalize(said, dim=1) @ normalize(near, dim=1).T / 0.1, own) / 2
        for said, near in ((said_2, near_1), (said_1, near_2))
    )
    torch.testing.assert_close(judge(method, [first, second, said_1, said_2]).loss, expected)
    torch.testing.assert_close(method.memory_bank.bank[:7], normalize(second, dim=1))


def test_moco_takes_negatives_from_the_queue_as_it_was_and_fills_it() -> None:
    method, (queries, keys) = build("moco"), rows(2)
    assert isinstance(method, MoCo)
    before = method.memory_bank.bank.clone()
    expected = []
    q, k = (normalize(each, dim=1) for each in (queries, keys))
    for i in range(7):
        scores = torch.cat([(q[i] @ k[i]).view(1), before @ q[i]]) / 0.2
        expected.append(cross_entropy(scores[None], torch.zeros(1, dtype=torch.long)))
    torch.testing.assert_close(judge(method, [queries, keys]).loss, torch.stack(expected).mean())
    torch.testing.assert_close(method.memory_bank.bank[:7], k)
    torch.testing.assert_close(method.memory_bank.bank[7:], before[7:])


def test_moco_v3_sums_both_directions() -> None:
    queries_1, queries_2, keys_1, keys_2 = rows(4)
    own = torch.arange(7)
    both = sum(
        cross_entropy(normalize(q, dim=1) @ normalize(k, dim=1).T / 0.2, own)
        for q, k in ((queries_1, keys_2), (queries_2, keys_1))
    )
    outputs = [queries_1, queries_2, keys_1, keys_2]
    torch.testing.assert_close(judge(build("moco-v3"), outputs).loss, 2 * 0.2 * both)


@pytest.mark.parametrize("progress", [0.1, 0.5])
def test_swav_is_lightlys_with_the_queue_from_its_share_on(progress: float) -> None:
    method, outputs = build("swav"), [normalize(each, dim=1) for each in rows(3)]
    assert isinstance(method, SwAV)
    assert method.memory_bank_1 is not None
    assert method.memory_bank_2 is not None
    scores = [each @ normalize(method.prototypes, dim=1).T for each in outputs]
    remembered = [
        q.bank @ normalize(method.prototypes, dim=1).T for q in (method.memory_bank_1, method.memory_bank_2)
    ]
    expected = lightly.loss.SwaVLoss()(scores[:2], scores[2:], remembered if progress > 0.15 else None)
    loss = judge(method, outputs, progress=progress).loss
    torch.testing.assert_close(loss, expected.reshape(()), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(method.memory_bank_2.bank[:7], outputs[1])


def test_prototypes_stand_still_in_the_beginning() -> None:
    for progress, still in ((0.0, True), (0.5, False)):
        method = build("swav")
        assert isinstance(method, SwAV)
        judge(method, [normalize(each, dim=1) for each in rows(3)], progress=progress).loss.backward()
        assert method.prototypes.grad is not None
        assert bool((method.prototypes.grad == 0).all()) == still


def test_supcon_takes_labels_where_there_are_some() -> None:
    outputs = rows(2)
    alone = judge(build("supcon"), outputs)
    expected = lightly.loss.NTXentLoss(temperature=0.1)(*outputs)
    torch.testing.assert_close(alone.loss, expected)
    # Images without label are positives of nobody but their own partner.
    unlabelled = judge(build("supcon"), outputs, groups=torch.full((7,), -1))
    torch.testing.assert_close(unlabelled.loss, expected)
    # The unlabelled one is a class of its own, here 3.
    labels, classes = torch.tensor([0, 0, 1, 1, 1, 2, -1]), torch.tensor([0, 0, 1, 1, 1, 2, 3]).repeat(2)
    views = normalize(torch.cat(outputs), dim=1)
    logits = (views @ views.T / 0.1).fill_diagonal_(-torch.inf)
    said = logits.log_softmax(dim=1)
    means = [said[i][(classes == classes[i]) & (torch.arange(14) != i)].mean() for i in range(14)]
    loss = judge(build("supcon"), outputs, groups=labels).loss
    torch.testing.assert_close(loss, -torch.stack(means).mean())


def test_clip_learns_its_scale_and_holds_it_below_a_hundred() -> None:
    method, (images, texts) = build("clip"), rows(2)
    scale = torch.tensor(1 / 0.07)
    peer = open_clip.loss.ClipLoss()
    unit = normalize(images, dim=1), normalize(texts, dim=1)
    torch.testing.assert_close(judge(method, [images, texts]).loss, peer(*unit, scale))
    with torch.no_grad():
        method.get_parameter("scale").fill_(99.0)
    torch.testing.assert_close(judge(method, [images, texts]).loss, peer(*unit, torch.tensor(100.0)))


def test_declip_adds_a_fifth_of_the_nearest_captions_in_the_queue() -> None:
    method, (images, texts) = build("declip"), rows(2)
    assert isinstance(method, DeCLIP)
    i, t, queue = normalize(images, dim=1), normalize(texts, dim=1), method.memory_bank.bank.clone()
    nearest = queue[(t @ queue.T).argmax(dim=1)]
    scale = torch.tensor(1 / 0.07)
    clip = open_clip.loss.ClipLoss()(i, t, scale)
    neighbors = cross_entropy(scale * i @ nearest.T, torch.arange(7))
    torch.testing.assert_close(judge(method, [images, texts]).loss, 0.8 * clip + 0.2 * neighbors)
    torch.testing.assert_close(method.memory_bank.bank[:7], t)


def test_slip_is_the_sum_of_clip_and_simclr() -> None:
    first, second, images, texts = rows(4)
    expected = lightly.loss.NTXentLoss(temperature=0.1)(first, second) + open_clip.loss.ClipLoss()(
        normalize(images, dim=1), normalize(texts, dim=1), torch.tensor(1 / 0.07)
    )
    torch.testing.assert_close(judge(build("slip"), [first, second, images, texts]).loss, expected)


def test_frozen_texts_are_the_partners_or_ones_own_where_the_partner_has_none() -> None:
    method = build("clip, frozen")
    captions = normalize(torch.randn(2, 7, 6), dim=-1)
    captions[1, 3] = 0
    meant = captions[1].clone()
    meant[3] = captions[0, 3]
    texts = meant @ method.get_parameter("texts.projection.weight").T
    (images,) = rows(1)
    expected = open_clip.loss.ClipLoss()(
        normalize(images, dim=1), normalize(texts, dim=1), torch.tensor(1 / 0.07)
    )
    torch.testing.assert_close(judge(method, [images], captions=captions).loss, expected)
    with pytest.raises(TypeError, match="need the vectors of captions"):
        judge(method, [images])


def test_vectors_of_slip_are_ones_own() -> None:
    from dataclasses import replace

    settings = replace(ranks.VARIANTS["slip"], text_tower="frozen", text_width=512, text_layers=12)
    method = build_method(settings, nn.Linear(4, WIDTH), WIDTH, caption_embedding_dim=6)
    captions = normalize(torch.randn(2, 7, 6), dim=-1)
    outputs = [*rows(2), rows(1, 512)[0]]
    other = captions.clone()
    other[1] = normalize(torch.randn(7, 6), dim=-1)
    losses = [float(judge(method, outputs, captions=each).loss.detach()) for each in (captions, other)]
    assert np.isfinite(losses).all()
    assert losses[0] == losses[1]
