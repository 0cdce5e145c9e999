"""The loss of each method on given outputs, against the formulas of the papers and other libraries."""

from collections.abc import Sequence
from dataclasses import replace

import lightly.loss
import numpy as np
import open_clip.loss
import pytest
import torch
from lightly.models.modules import NNMemoryBankModule
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from helpers.methods import CAPTION_DIM, VARIANTS, small_bank
from likewise.training.methods.base import Batch, Method, StepOutput
from likewise.training.methods.build import build_method
from likewise.training.methods.contrastive import NNCLR, MoCo, SimCLR
from likewise.training.methods.image_text import DeCLIP
from likewise.training.methods.non_contrastive import SwAV
from likewise.training.methods.options import MethodOptions, SimCLROptions, SLIPOptions

FEATURE_DIM = 8


def test_a_method_is_a_module_that_returns_a_loss() -> None:
    """Use a method in a plain training step."""
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, FEATURE_DIM))
    method = SimCLR(backbone, FEATURE_DIM, SimCLROptions(projector_dims=(16, 8), temperature=0.1))
    views = [torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)]
    output = method(Batch(views=views, rank_sizes=(5,)))
    output.loss.backward()
    assert output.features.shape == (10, FEATURE_DIM)
    z1, z2 = method.encode(Batch(views=views, rank_sizes=(5,)))[1]
    torch.testing.assert_close(output.loss, lightly.loss.NTXentLoss(temperature=0.1)(z1, z2))


def build(name: str) -> Method:
    return build_from(VARIANTS[name].method_options)


def build_from(options: MethodOptions) -> Method:
    torch.manual_seed(0)
    backbone = nn.Linear(4, FEATURE_DIM)
    return build_method(small_bank(options), backbone, FEATURE_DIM, caption_embedding_dim=CAPTION_DIM).train()


def random_outputs(count: int, dim: int = 12, b: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(b, dim, generator=generator) for _ in range(count)]


def compute_loss(method: Method, outputs: Sequence[Tensor], **fields: object) -> StepOutput:
    batch = Batch(views=[], rank_sizes=(len(outputs[0]),))
    return method.compute_loss(outputs, replace(batch, **fields))  # pyrefly: ignore[bad-argument-type]


def test_simsiam_and_byol_losses_equal_their_formulas() -> None:
    outputs = random_outputs(4)
    pred_1, pred_2, z1, z2 = outputs
    expected = -(cosine_similarity(pred_1, z2) + cosine_similarity(pred_2, z1)).mean() / 2
    torch.testing.assert_close(compute_loss(build("simsiam"), outputs).loss, expected)
    pred_1, pred_2, z1, z2 = (normalize(x, dim=1) for x in outputs)
    squares = (pred_1 - z2).square().sum(dim=1) + (pred_2 - z1).square().sum(dim=1)
    torch.testing.assert_close(compute_loss(build("byol"), outputs).loss, squares.mean())


def test_nnclr_loss_equals_cross_entropy_with_the_neighbors_of_lightly() -> None:
    method, (z1, z2, pred_1, pred_2) = build("nnclr"), random_outputs(4)
    assert isinstance(method, NNCLR)
    bank = NNMemoryBankModule(size=(16, 12))
    bank.bank = method.memory_bank.bank.clone()  # pyrefly: ignore[bad-assignment]
    neighbors_1, neighbors_2 = (bank(z, update=False) for z in (z1, z2))
    labels = torch.arange(7)
    expected = sum(
        cross_entropy(normalize(pred, dim=1) @ normalize(neighbors, dim=1).T / 0.1, labels) / 2
        for pred, neighbors in ((pred_2, neighbors_1), (pred_1, neighbors_2))
    )
    torch.testing.assert_close(compute_loss(method, [z1, z2, pred_1, pred_2]).loss, expected)
    torch.testing.assert_close(method.memory_bank.bank[:7], normalize(z2, dim=1))


def test_moco_compares_with_the_previous_memory_bank_and_enqueues_the_keys() -> None:
    method, (queries, keys) = build("moco"), random_outputs(2)
    assert isinstance(method, MoCo)
    previous_bank = method.memory_bank.bank.clone()
    expected = []
    q, k = (normalize(x, dim=1) for x in (queries, keys))
    for i in range(7):
        logits = torch.cat([(q[i] @ k[i]).view(1), previous_bank @ q[i]]) / 0.2
        expected.append(cross_entropy(logits[None], torch.zeros(1, dtype=torch.long)))
    torch.testing.assert_close(compute_loss(method, [queries, keys]).loss, torch.stack(expected).mean())
    torch.testing.assert_close(method.memory_bank.bank[:7], k)
    torch.testing.assert_close(method.memory_bank.bank[7:], previous_bank[7:])


def test_moco_v3_sums_both_directions() -> None:
    queries_1, queries_2, keys_1, keys_2 = random_outputs(4)
    labels = torch.arange(7)
    expected = sum(
        cross_entropy(normalize(q, dim=1) @ normalize(k, dim=1).T / 0.2, labels)
        for q, k in ((queries_1, keys_2), (queries_2, keys_1))
    )
    outputs = [queries_1, queries_2, keys_1, keys_2]
    torch.testing.assert_close(compute_loss(build("moco-v3"), outputs).loss, 2 * 0.2 * expected)


@pytest.mark.parametrize("train_fraction", [0.1, 0.5])
def test_swav_equals_lightly_and_uses_the_memory_bank_after_its_start(train_fraction: float) -> None:
    method, outputs = build("swav"), [normalize(z, dim=1) for z in random_outputs(3)]
    assert isinstance(method, SwAV)
    assert method.memory_bank_1 is not None
    assert method.memory_bank_2 is not None
    prototypes = normalize(method.prototypes, dim=1)
    scores = [z @ prototypes.T for z in outputs]
    bank_scores = [bank.bank @ prototypes.T for bank in (method.memory_bank_1, method.memory_bank_2)]
    expected = lightly.loss.SwaVLoss()(scores[:2], scores[2:], bank_scores if train_fraction > 0.15 else None)
    loss = compute_loss(method, outputs, train_fraction=train_fraction).loss
    torch.testing.assert_close(loss, expected.reshape(()), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(method.memory_bank_2.bank[:7], outputs[1])


def test_prototypes_are_frozen_at_the_start() -> None:
    for train_fraction, is_frozen in ((0.0, True), (0.5, False)):
        method = build("swav")
        assert isinstance(method, SwAV)
        outputs = [normalize(z, dim=1) for z in random_outputs(3)]
        compute_loss(method, outputs, train_fraction=train_fraction).loss.backward()
        assert method.prototypes.grad is not None
        assert bool((method.prototypes.grad == 0).all()) == is_frozen


def test_supcon_uses_labels_if_there_are_any() -> None:
    outputs = random_outputs(2)
    expected = lightly.loss.NTXentLoss(temperature=0.1)(*outputs)
    torch.testing.assert_close(compute_loss(build("supcon"), outputs).loss, expected)
    # Images without a label are positives of their partners only.
    unlabeled = compute_loss(build("supcon"), outputs, labels=torch.full((7,), -1))
    torch.testing.assert_close(unlabeled.loss, expected)
    # The unlabeled image is a class of its own, here 3.
    labels, classes = torch.tensor([0, 0, 1, 1, 1, 2, -1]), torch.tensor([0, 0, 1, 1, 1, 2, 3]).repeat(2)
    views = normalize(torch.cat(outputs), dim=1)
    log_probs = (views @ views.T / 0.1).fill_diagonal_(-torch.inf).log_softmax(dim=1)
    means = [log_probs[i][(classes == classes[i]) & (torch.arange(14) != i)].mean() for i in range(14)]
    loss = compute_loss(build("supcon"), outputs, labels=labels).loss
    torch.testing.assert_close(loss, -torch.stack(means).mean())


def test_clip_learns_its_logit_scale_and_clamps_it_to_100() -> None:
    method, (images, texts) = build("clip"), random_outputs(2)
    logit_scale = torch.tensor(1 / 0.07)
    reference_loss = open_clip.loss.ClipLoss()
    features = normalize(images, dim=1), normalize(texts, dim=1)
    torch.testing.assert_close(
        compute_loss(method, [images, texts]).loss, reference_loss(*features, logit_scale)
    )
    with torch.no_grad():
        method.get_parameter("logit_scale").fill_(99.0)
    output = compute_loss(method, [images, texts])
    torch.testing.assert_close(output.loss, reference_loss(*features, torch.tensor(100.0)))
    assert output.logs["logit_scale"] == pytest.approx(100.0)


def test_siglip_loss_equals_open_clip_at_the_initial_scale_and_bias() -> None:
    images, texts = random_outputs(2)
    expected = open_clip.loss.SigLipLoss()(
        normalize(images, dim=1), normalize(texts, dim=1), torch.tensor(10.0), torch.tensor(-10.0)
    )
    torch.testing.assert_close(compute_loss(build("siglip"), [images, texts]).loss, expected)


def test_declip_adds_a_fifth_of_the_loss_with_the_nearest_captions() -> None:
    method, (images, texts) = build("declip"), random_outputs(2)
    assert isinstance(method, DeCLIP)
    i, t, bank = normalize(images, dim=1), normalize(texts, dim=1), method.memory_bank.bank.clone()
    nearest = bank[(t @ bank.T).argmax(dim=1)]
    logit_scale = torch.tensor(1 / 0.07)
    clip_loss = open_clip.loss.ClipLoss()(i, t, logit_scale)
    neighbor_loss = cross_entropy(logit_scale * i @ nearest.T, torch.arange(7))
    loss = compute_loss(method, [images, texts]).loss
    torch.testing.assert_close(loss, 0.8 * clip_loss + 0.2 * neighbor_loss)
    torch.testing.assert_close(method.memory_bank.bank[:7], t)


def test_slip_is_the_sum_of_clip_and_simclr() -> None:
    z1, z2, images, texts = random_outputs(4)
    expected = lightly.loss.NTXentLoss(temperature=0.1)(z1, z2) + open_clip.loss.ClipLoss()(
        normalize(images, dim=1), normalize(texts, dim=1), torch.tensor(1 / 0.07)
    )
    torch.testing.assert_close(compute_loss(build("slip"), [z1, z2, images, texts]).loss, expected)


def test_frozen_text_is_the_caption_of_the_partner_or_else_of_the_anchor() -> None:
    method = build("clip, frozen")
    captions = normalize(torch.randn(2, 7, CAPTION_DIM), dim=-1)
    captions[1, 3] = 0
    expected_captions = captions[1].clone()
    expected_captions[3] = captions[0, 3]
    texts = expected_captions @ method.get_parameter("text_branch.projection.weight").T
    (images,) = random_outputs(1)
    expected = open_clip.loss.ClipLoss()(
        normalize(images, dim=1), normalize(texts, dim=1), torch.tensor(1 / 0.07)
    )
    torch.testing.assert_close(compute_loss(method, [images], caption_embeddings=captions).loss, expected)
    with pytest.raises(TypeError, match="caption_embeddings"):
        compute_loss(method, [images])


def test_frozen_text_of_slip_is_the_caption_of_the_anchor() -> None:
    method = build_from(SLIPOptions(text_tower="frozen", projector_dims=(24, 12)))
    captions = normalize(torch.randn(2, 7, CAPTION_DIM), dim=-1)
    outputs = [*random_outputs(2), random_outputs(1, 512)[0]]
    other_partners = captions.clone()
    other_partners[1] = normalize(torch.randn(7, CAPTION_DIM), dim=-1)
    losses = [
        float(compute_loss(method, outputs, caption_embeddings=embeddings).loss.detach())
        for embeddings in (captions, other_partners)
    ]
    assert np.isfinite(losses).all()
    assert losses[0] == losses[1]
