"""Every method end to end, what each remembers from step to step, and what is refused beforehand."""

import re
from dataclasses import replace
from pathlib import Path

import open_clip.transformer
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import ranks
from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.data.readers.base import ImportOptions
from likewise.errors import InvalidInputError, ModelError, TrainingError
from likewise.models.backbones import BackboneConfig, build_backbone
from likewise.models.checkpoints import load_tensors
from likewise.models.text_tower import TextTower, tokenize
from likewise.pairs.build import build_pairs
from likewise.pairs.config import PairConfig
from likewise.pairs.sampling import Pairs
from likewise.training import checkpoint as state
from likewise.training import trainer as loop
from likewise.training.config import TrainConfig, build_schedule, build_view_specs, validate_combination
from likewise.training.loader import tokenize_captions
from likewise.training.methods.modules import EMAModel, MemoryBank, cosine_momentum
from likewise.training.methods.options import METHODS
from likewise.training.methods.registry import _BUILDERS, build_method
from likewise.training.train import train
from support import save_png


class StopAfterError(Exception):
    """Stands for a fault in the middle of training."""


def tiny(name: str) -> TrainConfig:
    """Return a variant's settings for a run of 6 steps on 207 images."""
    settings = ranks.VARIANTS[name]
    if settings.method_options.memory_bank_size is not None:
        settings = replace(settings, memory_bank_size=40)
    # Not 32, whose small views have 14: oneDNN's bf16 gradient of a 3x3 convolution on one pixel is garbage.
    size = 48 if name == "swav" else 32
    return replace(settings, batch_size=32, image_size=size, stem="default", max_steps=6, base_lr=0.01)


@pytest.mark.parametrize("name", ranks.VARIANTS)
def test_stopped_and_run_again_equals_uninterrupted_to_the_bit(
    name: str, collection: CaptionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(name)
    rule = PairConfig(source="self") if settings.mine_in_batch else PairConfig()
    train(collection, tmp_path / "whole", settings, rule)
    original = loop.save_checkpoint

    def save_then_fail(trainer, scaler, step, sums) -> None:  # noqa: ANN001
        original(trainer, scaler, step, sums)
        if step == 3:
            raise StopAfterError

    monkeypatch.setattr(loop, "save_checkpoint", save_then_fail)
    with pytest.raises(StopAfterError):
        train(collection, tmp_path / "run", settings, rule, checkpoint_minutes=0.0)
    monkeypatch.undo()
    train(collection, tmp_path / "run", settings, rule)
    kept = [load_tensors(tmp_path / run / "checkpoint-00000006.safetensors")[0] for run in ("whole", "run")]
    assert kept[0].keys() == kept[1].keys()
    # Queues, slow copies, prototypes, moments and sums are all in there.
    if settings.method_options.memory_bank_size:
        assert any("queue" in key for key in kept[0])
    if settings.method_options.ema_momentum:
        assert any("slow" in key for key in kept[0])
    for key, tensor in kept[0].items():
        assert torch.equal(tensor, kept[1][key]), key


class NothingLeaves(TorchDispatchMode):
    """Refuses every operation whose result the host must wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        assert str(func.overloadpacket) not in {"aten._local_scalar_dense", "aten.nonzero", "aten.item"}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ranks.VARIANTS)
def test_no_scalar_leaves_the_device_in_a_step(name: str) -> None:
    settings = ranks.VARIANTS[name]
    backbone, width = build_backbone(BackboneConfig(name="resnet10t", image_size=32))
    method = build_method(
        settings, backbone, width, memory_bank_size=16, caption_embedding_dim=ranks.WIDTH
    ).train()
    shown = ranks.whole_batch(settings)
    with NothingLeaves():
        step = method(shown)
        step.loss.backward()
        state.RunningTotals.zeros(torch.device("cpu")).add(step.loss.detach(), step.skip, 1)
    with pytest.raises(AssertionError), NothingLeaves():
        float(step.loss.detach())


def test_the_catalog_and_the_builders_know_the_same_methods() -> None:
    assert list(_BUILDERS) == list(METHODS)


def test_the_documentation_tells_what_the_catalog_tells() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    table, _, _ = text.partition("`likewise methods` prints this table")
    rows = re.findall(r"^\| `([a-z]+[a-z0-9-]*)` \| (.*) \|$", table, re.MULTILINE)
    assert [name for name, _ in rows] == list(METHODS)
    words = {
        "batch": "the batch",
        "queue": "a queue",
        "batch and queue": "the batch and a queue",
        "none": "nothing",
    }
    for name, cells in rows:
        _, _, told_from, besides = (cell.strip() for cell in cells.split("|"))
        assert told_from == words[METHODS[name].negatives], name
        assert besides == ", ".join(METHODS[name].requirements), name


def test_a_queue_forgets_the_oldest_and_finds_the_nearest() -> None:
    queue = MemoryBank(5, 3)
    rows = normalize(torch.randn(7, 3), dim=1)
    queue.enqueue(rows[:3])
    queue.enqueue(rows[3:6])
    # Places 3, 4 and 0 were written last; 1 and 2 are still of the first push.
    torch.testing.assert_close(queue.bank, torch.stack([rows[5], rows[1], rows[2], rows[3], rows[4]]))
    assert queue.ptr == 1
    torch.testing.assert_close(queue.nearest(7 * rows[[2, 4]]), rows[[2, 4]])


def test_a_slow_copy_is_a_moving_average_without_gradients() -> None:
    model = nn.Linear(2, 2)
    slow = EMAModel(model)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    slow.update(model, momentum=0.9)
    torch.testing.assert_close(slow.get_parameter("copies.0.weight"), before + 0.1)
    assert not any(p.requires_grad for p in slow.parameters())
    assert cosine_momentum(0.99, 0.0) == pytest.approx(0.99)
    assert cosine_momentum(0.99, 1.0) == pytest.approx(1.0)
    assert cosine_momentum(0.99, 0.5) == pytest.approx(0.995)


def test_the_text_tower_is_that_of_open_clip_however_a_batch_is_cut() -> None:
    torch.manual_seed(0)
    tower = TextTower(width=64, layers=2, embed_dim=16)
    theirs = open_clip.transformer.TextTransformer(width=64, heads=1, layers=2, output_dim=16)
    theirs.load_state_dict(tower.transformer.state_dict())
    tokens = tokenize(["a red panda", "two birds above the sea at night"])
    torch.testing.assert_close(tower(tokens[:, :9]), theirs(tokens), atol=1e-5, rtol=1e-4)


def test_tokens_are_those_of_the_captions(collection: CaptionDataset) -> None:
    tokens = tokenize_captions(collection)
    positions = torch.arange(0, 207, 40).numpy()
    first, second = (tokens.sample(positions, seed=0, epoch=epoch) for epoch in (0, 1))
    assert torch.equal(first, tokens.sample(positions, seed=0, epoch=0))
    drawn = []
    for row, position in zip(first, positions, strict=True):
        own = [tokenize([caption])[0] for caption in collection[int(position)].captions]
        length = len(row)
        assert any(torch.equal(row, each[:length]) for each in own)
        drawn.append(len(own) > 1)
    assert any(drawn), "some images have two captions"
    many = [tokens.sample(positions, seed=0, epoch=epoch)[:, 1:3].tolist() for epoch in range(12)]
    assert any(each != many[0] for each in many), "captions are drawn anew each epoch"
    assert second.shape[0] == len(positions)


def test_several_partners_differ_where_there_are_enough(collection: CaptionDataset) -> None:
    pairs: Pairs = build_pairs(collection, PairConfig(k=5, caption_encoder="all-MiniLM-L6-v2"))
    anchors = pairs.anchors
    for epoch in range(3):
        three = [pairs.sample_partners(anchors, seed=0, epoch=epoch, offset=turn / 3) for turn in range(3)]
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert (three[one] != three[other]).all()


def test_views_follow_from_method_and_pairs() -> None:
    language, itself = PairConfig(), PairConfig(source="self")

    def told(rule: PairConfig, **settings: object) -> list[tuple[int, str, int]]:
        chosen = TrainConfig(image_size=224, **settings)  # pyrefly: ignore[bad-argument-type]
        return [(each.source, each.augmentation, each.image_size) for each in build_view_specs(chosen, rule)]

    assert told(language) == [(0, "crop", 224), (1, "crop", 224)]
    assert told(itself) == [(0, "simclr", 224), (1, "simclr", 224)]
    assert told(itself, method="clip") == [(0, "crop", 224)]
    assert told(language, method="slip") == [(0, "crop", 224), (1, "crop", 224)]
    assert told(itself, method="slip")[2:] == [(0, "crop", 224)]
    assert told(itself, method="swav", small_views=3)[2:] == [(n % 2, "simclr", 96) for n in range(3)]
    assert [who for who, *_ in told(language, method="supcon", partners=3)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "simcrl"}, "unknown method 'simcrl'.*Did you mean simclr"),
        ({"method": "simsiam", "temperature": 0.2}, "--temperature means nothing to --method simsiam"),
        ({"queue": 600}, "--queue means nothing to --method simclr, only to nnclr, moco, swav, declip"),
        ({"method": "moco", "queue": 100}, "--queue is 100; it must hold a batch of 512"),
        ({"method": "vicreg", "negatives": "mask"}, "--negatives means nothing to --method vicreg"),
        ({"method": "dcl", "negatives": "soften"}, "no targets to soften"),
        ({"method": "clip", "text_width": 100}, "multiple of 64"),
        ({"method": "byol", "momentum": 1.5}, "momentum is 1.5; it must be between 0 and 1"),
        ({"head": (128, 0)}, "widths above 0"),
        ({"batch_size": 1}, "--batch-size is 1; .*batch norm.*at least 2"),
        ({"patience": 3}, "give --held-out too"),
        ({"score_every": 3}, "give --held-out too"),
        ({"held_out": 3}, "fewer than 10"),
        ({"in_batch": True}, "--in-batch means nothing to --method simclr, only to pair-classifier"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        TrainConfig(**settings)  # pyrefly: ignore[bad-argument-type]


def test_methods_and_pairs_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="--pairs self with it"):
        validate_combination(TrainConfig(method="pair-classifier", mine_in_batch=True), PairConfig())
    with pytest.raises(InvalidInputError, match="give -k 3 or more"):
        validate_combination(TrainConfig(method="supcon", num_positives=3), PairConfig(k=2))
    validate_combination(TrainConfig(method="supcon", num_positives=3), PairConfig(k=3))
    validate_combination(TrainConfig(method="supcon", num_positives=3), PairConfig(source="label"))


def test_a_queue_fits_the_data(collection: CaptionDataset, tmp_path: Path) -> None:
    chosen = replace(tiny("moco"), memory_bank_size=None)
    assert build_schedule(chosen, 207, tmp_path).memory_bank_size == 207 // 4
    assert build_schedule(chosen, 10**6, tmp_path).memory_bank_size == 65_536
    with pytest.raises(TrainingError, match="--queue 300 is longer than the 207 usable images"):
        train(collection, tmp_path / "run", replace(chosen, memory_bank_size=300))
    assert not (tmp_path / "run").exists()


def test_a_text_method_without_captions_is_refused(tmp_path: Path) -> None:
    for name in "abc":
        save_png(tmp_path / "images" / f"{name}.png")
    bare = import_dataset(tmp_path / "images", tmp_path / "c", ImportOptions())
    for text in ("clip", "slip"):
        with pytest.raises(
            InvalidInputError, match=f"--method {text} compares images with captions, and .* has none"
        ):
            train(bare, tmp_path / "run", replace(tiny(text), batch_size=2), PairConfig(source="self"))
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_takes_one_size_takes_no_small_views(
    collection: CaptionDataset, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="'vit_tiny_patch16_224' does not take 21x21 images"):
        train(collection, tmp_path / "run", replace(tiny("swav"), backbone="vit_tiny_patch16_224"))


def test_batches_that_teach_nothing_move_no_weight_and_are_counted(
    collection: CaptionDataset, tmp_path: Path
) -> None:
    # No two captions are as unlike as opposite directions.
    settings = replace(tiny("pair-classifier"), negative_threshold=-1.0, max_steps=3)
    run = train(collection, tmp_path / "run", settings)
    assert run.artifact.manifest.skipped == {"batches without a positive or a negative": 3}
    assert run.metrics()[-1]["skipped"] == 3
    one = train(collection, tmp_path / "one", replace(settings, max_steps=1))
    first, last = (load_tensors(each.encoder_path)[0] for each in (one, run))
    for name, tensor in first.items():
        if "running" not in name and tensor.is_floating_point():
            assert torch.equal(tensor, last[name]), name
