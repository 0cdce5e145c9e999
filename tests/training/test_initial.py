"""Training from any start: preprocessing of views and encoder, strict weights, the stem of the start."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

import likewise
from likewise.artifacts import read_yaml
from likewise.data.dataset import CaptionDataset
from likewise.distributed import DistributedContext
from likewise.errors import InvalidInputError, ModelError
from likewise.models.checkpoints import load_tensors
from likewise.training.config import DEFAULT_PREPROCESSING, Preprocessing
from likewise.training.initial import load_start
from likewise.training.train import train
from likewise.training.trainer import Trainer
from support import load_cpu_encoder as load_encoder
from support import save_vit

TINY = likewise.TrainConfig(batch_size=16, max_steps=2, base_lr=0.01)


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the weights of a timm classifier whose mean and standard deviation are 0.5."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "classifier.safetensors"
    save_file(timm.create_model("test_efficientnet_gn", num_classes=7).state_dict(), path)
    return path


def test_train_from_a_hugging_face_model(dataset: CaptionDataset, tmp_path: Path) -> None:
    """Read this first: size, interpolation, mean and deviation are those of the start, also afterwards."""
    folder = save_vit(tmp_path / "vit")
    start = load_encoder(f"hf:{folder}")
    run = train(dataset, tmp_path / "run", replace(TINY, init=f"hf:{folder}"), device="cpu")
    encoder = load_encoder(str(run.path))
    assert encoder.transform == start.transform
    assert encoder.transform.mean == (0.5, 0.4, 0.3)
    assert encoder.feature_dim == 32
    image = [np.full((40, 40, 3), 100, np.uint8)]
    assert not torch.allclose(encoder.encode(image), start.encode(image))
    tensors, _ = load_tensors(run.encoder_path)
    assert tensors.keys() == encoder.model.state_dict().keys()
    for name, tensor in encoder.model.state_dict().items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0)
    settings = read_yaml(run.path / "config.yaml")
    assert settings["image_size"] == 32
    # A run of a run names the model that builds its structure, not the run in between.
    more = train(dataset, tmp_path / "more", replace(TINY, init=str(run.path)), device="cpu")
    _, metadata = load_tensors(more.encoder_path)
    assert metadata["start"]["load_args"]["encoder"] == f"hf:{folder}"
    assert load_encoder(str(more.path)).transform == start.transform


def test_views_have_the_preprocessing_of_the_start(
    classifier_file: Path, dataset: CaptionDataset, tmp_path: Path
) -> None:
    """The views equal those of random weights, cropped and normalized in another way."""
    config = replace(TINY, backbone="test_efficientnet_gn", image_size=48, num_val_pairs=10)
    loaders = {}
    for init in ("scratch", str(classifier_file)):
        trainer = Trainer.setup(
            dataset,
            tmp_path / Path(init).stem,
            replace(config, init=init),
            likewise.PairConfig(),
            dist_context=DistributedContext(),
            device=torch.device("cpu"),
        )
        loaders[init] = trainer
    scratch, started = loaders.values()
    assert scratch.start.preprocessing == DEFAULT_PREPROCESSING
    expected = Preprocessing(interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert started.start.preprocessing == expected
    views = [
        trainer.loader.batch_at(0).to_device(trainer.loader.dataset.augmentations, torch.device("cpu")).views
        for trainer in (scratch, started)
    ]
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (DEFAULT_PREPROCESSING.mean, DEFAULT_PREPROCESSING.std)
    )
    difference = (views[0][0] * std + mean) - (views[1][0] * 0.5 + 0.5)
    assert difference.abs().max() > 0  # another interpolation
    assert difference.abs().mean() < 0.02
    assert scratch.evaluator is not None
    assert started.evaluator is not None
    validation = started.evaluator._views[0] * 0.5 + 0.5
    assert (validation.min() > -0.1) & (validation.max() < 1.1)
    torch.testing.assert_close(validation, scratch.evaluator._views[0] * std + mean, atol=0.2, rtol=0)


def test_classifiers_are_dropped_and_named(
    classifier_file: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.INFO, "likewise"):
        start, config = load_start(replace(TINY, backbone="test_efficientnet_gn", init=str(classifier_file)))
        load_start(replace(TINY, init=f"hf:{save_vit(tmp_path / 'vit')}"))
    assert "the classifier is dropped (classifier.bias, classifier.weight)" in caplog.text
    assert "head are dropped (classifier.bias, classifier.weight)" in caplog.text
    pretrained_cfg = timm.get_pretrained_cfg("test_efficientnet_gn")
    assert pretrained_cfg is not None
    assert config.image_size == pretrained_cfg.input_size[-1]
    assert start.fingerprint is not None


def test_parameters_without_influence_on_the_features_are_not_trained(tmp_path: Path) -> None:
    start, _ = load_start(replace(TINY, init=f"hf:{save_vit(tmp_path)}"))
    again, _ = load_start(replace(TINY, init=f"hf:{tmp_path}"))
    assert again.fingerprint == start.fingerprint
    frozen = [name for name, p in start.backbone.named_parameters() if not p.requires_grad]
    assert all("pooler" in name for name in frozen)


def test_the_stem_of_a_run_stays(dataset: CaptionDataset, tmp_path: Path) -> None:
    config = replace(TINY, backbone="resnet10t", image_size=32, max_steps=1)
    run = train(dataset, tmp_path / "run", config, device="cpu")
    larger, resolved = load_start(replace(TINY, init=str(run.path), image_size=96))
    assert (larger.stem, resolved.image_size, resolved.backbone) == ("cifar", 96, "resnet10t")
    assert load_start(replace(TINY, init=str(run.path), stem="default"))[0].stem == "default"


def test_torchvision_weights_keep_their_stem_and_are_rebuilt(tmp_path: Path, dataset: CaptionDataset) -> None:
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "w.pth")
    config = replace(
        TINY, max_steps=1, init=str(tmp_path / "w.pth"), backbone="torchvision:resnet18", image_size=32
    )
    run = train(dataset, tmp_path / "run", config, device="cpu")
    encoder = load_encoder(str(run.path))
    assert (encoder.transform.image_size, encoder.transform.resize_size) == (32, 37)
    image = Image.fromarray(np.zeros((50, 40, 3), np.uint8))
    assert torch.isfinite(encoder.encode([image])).all()
    with pytest.raises(InvalidInputError) as error:
        load_start(replace(config, stem="cifar"))
    assert error.value.field == "stem"


def test_contradicting_and_unknown_starts(classifier_file: Path) -> None:
    with pytest.raises(ModelError) as error:
        load_start(replace(TINY, init="random:resnet10t", backbone="resnet18"))
    assert error.value.field == "backbone"
    with pytest.raises(ModelError) as error:
        load_start(replace(TINY, init="timm:resnet18x"))
    assert error.value.field == "init"
    with pytest.raises(ModelError) as error:
        load_start(replace(TINY, init=str(classifier_file)))
    assert error.value.field == "backbone"
    with pytest.raises(ModelError, match="do not fit"):
        load_start(replace(TINY, init=str(classifier_file), backbone="test_resnet"))
