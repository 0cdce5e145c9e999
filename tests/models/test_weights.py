"""Weights of other programs: each wrapping gives the features of the model, or one sentence with a remedy."""

import argparse
import gzip
import io
import json
import logging
import shlex
import sys
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import likewise
from likewise.errors import ModelError
from likewise.models.encoders import ImageEncoder
from likewise.models.weights import load_weights
from likewise.training.initial import load_start
from support import load_cpu_encoder, save_png

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
State = dict[str, Tensor]


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: Any = timm.create_model("test_resnet", num_classes=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.uniform_(-1, 1)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build()


@pytest.fixture(scope="module")
def state(model: nn.Module) -> State:
    return model.state_dict()


@pytest.fixture(scope="module")
def other() -> State:
    return build(1).state_dict()


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO, logger="likewise")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def add(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def load(path: Path, **options: Any) -> ImageEncoder:
    return load_cpu_encoder(str(path), backbone="test_resnet", image_size=32, **options)


def assert_same(encoder: ImageEncoder, model: nn.Module, atol: float = 1e-5) -> None:
    with torch.no_grad():
        torch.testing.assert_close(encoder.model(IMAGES), model(IMAGES), atol=atol, rtol=1e-4)


WRAPPERS: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "ordered": OrderedDict,
    **{
        key: lambda s, key=key: {key: s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
        for key in ("model", "state_dict", "ema", "model_ema", "state_dict_ema", "params", "network", "net")
    },
    "ddp": lambda s: {"state_dict": add("module.", s)},
    "compiled": lambda s: add("_orig_mod.", s),
    "ddp compiled": lambda s: {"model": add("module._orig_mod.", s)},
    "fabric": lambda s: {"trainer": {"model": add("backbone.", s)}},
    **{
        f"lightning {prefix}": lambda s, prefix=prefix: {
            "state_dict": add(prefix, s) | {"loss.weight": torch.ones(3)},
            "hyper_parameters": {"lr": 0.1, "layers": [1, 2]},
            "pytorch-lightning_version": "2.5.0",
        }
        for prefix in ("model.", "backbone.", "encoder.", "model.backbone.")
    },
    "moco query only": lambda s: {
        "state_dict": add("module.encoder_q.", s) | {"module.queue": torch.ones(2)},
        "arch": "x",
    },
    "dino teacher only": lambda s: {"teacher": add("backbone.", s) | {"head.mlp.0.weight": torch.ones(2, 2)}},
    "equal copies": lambda s: {"student": add("module.", s), "teacher": dict(s)},
    "classifier": lambda s: {"model": s | {"fc.weight": torch.ones(3, 96), "fc.bias": torch.ones(3)}},
    "no batch counts": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_weights_give_the_features_of_the_model(
    wrapper: str, model: nn.Module, state: State, tmp_path: Path, messages: Callable[[], str]
) -> None:
    torch.save(WRAPPERS[wrapper](state), tmp_path / "w.pth")
    assert_same(load(tmp_path / "w.pth"), model)
    if wrapper == "classifier":
        assert "the classifier is dropped (fc.weight, fc.bias)" in messages()
    if wrapper == "no batch counts":
        assert "num_batches_tracked are absent" in messages()
    if wrapper == "lightning encoder.":
        assert "under state_dict.encoder. are used" in messages()
        assert "1 tensors outside state_dict.encoder. are ignored (state_dict.loss.weight)" in messages()
    if wrapper == "plain":
        assert not messages()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(
    dtype: torch.dtype, model: nn.Module, state: State, tmp_path: Path
) -> None:
    torch.save({k: v.to(dtype) for k, v in state.items()}, tmp_path / "w.pth")
    encoder = load(tmp_path / "w.pth")
    assert next(encoder.model.parameters()).dtype == torch.float32
    assert_same(encoder, model, atol=0.05)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin", "w"])
@pytest.mark.parametrize("save", [save_file, torch.save], ids=["safetensors", "torch"])
def test_the_content_decides_the_format(
    save: Callable[..., None], name: str, model: nn.Module, state: State, tmp_path: Path
) -> None:
    save({k: v.contiguous() for k, v in state.items()}, tmp_path / name)
    assert_same(load(tmp_path / name), model)


def test_files_of_old_torch_are_read(model: nn.Module, state: State, tmp_path: Path) -> None:
    torch.save({"state_dict": state}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert_same(load(tmp_path / "w.pth"), model)


def test_shards_are_read_by_their_index(model: nn.Module, state: State, tmp_path: Path) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [dict(list(state.items())[i::2]) for i in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert_same(load(index), model)
    with pytest.raises(ModelError, match=r"one of several shards: give the file \*\.index\.json"):
        load(tmp_path / names[0])
    (tmp_path / names[1]).unlink()
    with pytest.raises(ModelError, match=f"no weights at .*{names[1]}"):
        load(index)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match="not a file beside it"):
        load(index)
    for content in ("[]", "{}", '{"weight_map": 3}'):
        index.write_text(content)
        with pytest.raises(ModelError, match="lists no shards"):
            load(index)


@pytest.mark.parametrize(
    ("wrap", "prefixes"),
    [
        (
            lambda a, b: {"student": add("module.backbone.", a), "teacher": add("backbone.", b)},
            ("student.module.backbone.", "teacher.backbone."),
        ),
        (lambda a, b: {"model": a, "model_ema": b, "epoch": 1}, ("model.", "model_ema.")),
        (
            lambda a, b: {"state_dict": add("module.encoder_q.", a) | add("module.encoder_k.", b)},
            ("state_dict.module.encoder_q.", "state_dict.module.encoder_k."),
        ),
        (lambda a, b: add("net.", a) | add("ema_net.", b), ("net.", "ema_net.")),
    ],
)
def test_two_sets_of_weights_are_an_error_that_names_both(
    wrap: Callable[[State, State], Any],
    prefixes: tuple[str, str],
    model: nn.Module,
    state: State,
    other: State,
    tmp_path: Path,
) -> None:
    torch.save(wrap(state, other), tmp_path / "w.pth")
    with pytest.raises(ModelError) as error:
        load(tmp_path / "w.pth")
    assert f"2 different sets of weights that fit this model: {prefixes[0]} and {prefixes[1]};" in str(
        error.value
    )
    assert error.value.field == "weights_prefix"
    assert "set `weights_prefix` to one of them" in str(error.value)
    assert_same(load(tmp_path / "w.pth", weights_prefix=prefixes[0]), model)
    assert_same(load(tmp_path / "w.pth", weights_prefix=prefixes[1]), build(1))
    assert_same(load(tmp_path / "w.pth", weights_exclude=(prefixes[1],)), model)
    config = likewise.TrainConfig(backbone="test_resnet", image_size=96, init=str(tmp_path / "w.pth"))
    with pytest.raises(ModelError, match="give `init` a file that holds only one of them") as init_error:
        load_start(config)
    assert init_error.value.field == "init"


def test_weights_without_a_prefix_beside_prefixed_ones(
    model: nn.Module, state: State, other: State, tmp_path: Path
) -> None:
    torch.save(state | add("ema.", other), tmp_path / "w.pth")
    with pytest.raises(
        ModelError, match=r"names without a prefix and ema\.; .*or `weights_exclude` to ema\."
    ):
        load(tmp_path / "w.pth")
    assert_same(load(tmp_path / "w.pth", weights_exclude=("ema.",)), model)
    assert_same(load(tmp_path / "w.pth", weights_prefix="ema."), build(1))


def test_a_prefix_is_given_with_or_without_the_dictionary(
    model: nn.Module, state: State, other: State, tmp_path: Path
) -> None:
    moco = {"state_dict": add("module.encoder_q.", state) | add("module.encoder_k.", other)}
    torch.save(moco, tmp_path / "w.pth")
    for prefix in ("module.encoder_q.", "state_dict.module.encoder_q."):
        assert_same(load(tmp_path / "w.pth", weights_prefix=prefix), model)
    torch.save({"student": add("net.", state), "teacher": add("net.", other)}, tmp_path / "two.pth")
    with pytest.raises(ModelError, match=r"fit this model: student\.net\. and teacher\.net\."):
        load(tmp_path / "two.pth", weights_prefix="net.")
    torch.save(add("net.", state), tmp_path / "one.pth")
    for prefix in ("model.", "net"):
        with pytest.raises(ModelError, match=r"`weights_prefix` net\. fits"):
            load(tmp_path / "one.pth", weights_prefix=prefix)


def test_unexpected_and_missing_names_are_errors(state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    extra = {"extra.weight": torch.ones(3)}
    torch.save({"state_dict": add("module.", state | extra)}, path)
    with pytest.raises(ModelError, match=r"1 unexpected \(extra.weight\); set `weights_exclude`"):
        load(path)
    for name in ("extra.", "module.extra.", "state_dict.module.extra."):
        load(path, weights_exclude=(name,), weights_prefix="module.")
    load(path, weights_exclude=("module.extra.",))
    torch.save(add("module.", dict(list(state.items())[1:])), path)
    with pytest.raises(
        ModelError, match=r"under module\. do not fit this model: 1 missing \(conv1.0.weight\)"
    ):
        load(path)
    torch.save(state | {"bn1.bias": torch.ones(3)}, path)
    with pytest.raises(ModelError, match=r"1 with another shape \(bn1.bias \(3,\), not \(32,\)\)"):
        load(path)
    torch.save(add("vit.", {"a.weight": torch.ones(2)}), path)
    with pytest.raises(ModelError, match="is `backbone` the model that these weights are of"):
        load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(value: float, state: State, tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in state.items()}
    weights["layer1.0.conv1.weight"][0, 0, 0] = value
    weights["bn1.bias"] += value
    torch.save({"model": weights}, tmp_path / "w.pth")
    first = next(name for name in weights if name in ("layer1.0.conv1.weight", "bn1.bias"))
    count = 3 if first == "layer1.0.conv1.weight" else 32
    total = weights[first].numel()
    pattern = rf"NaN or infinity in 2 of \d+ tensors, the first {first} \({count} of {total:,} values\)"
    with pytest.raises(ModelError, match=pattern) as error:
        load(tmp_path / "w.pth")
    assert "weights_exclude" not in str(error.value)


def test_weights_that_are_no_floating_point_numbers_are_refused(state: State, tmp_path: Path) -> None:
    quantized = state | {"bn1.weight": torch.ones(32, dtype=torch.int8)}
    sparse = state | {"bn1.weight": torch.ones(32).to_sparse()}
    meta = state | {"bn1.weight": torch.ones(32, device="meta")}
    for weights, text in ((quantized, "torch.int8"), (sparse, "torch.float32"), (meta, "without values")):
        torch.save(weights, tmp_path / "w.pth")
        with pytest.raises(ModelError, match=f"bn1.weight in .* is stored as .*{text}"):
            load(tmp_path / "w.pth")


@pytest.mark.parametrize("is_zip", [True, False])
def test_objects_are_refused_with_a_command_that_converts(
    is_zip: bool, model: nn.Module, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {
        "argparse.Namespace": {"model": state, "args": argparse.Namespace(lr=1.0)},
        "multiarray.scalar": {"state_dict": {"net": state}, "accuracy": np.float64(1)},
        "timm.models.resnet.ResNet": model,
        "collections.Counter|timm": {"model": model, "args": argparse.Namespace()},
    }
    for i, (class_name, content) in enumerate(contents.items()):
        path = tmp_path / f"my weights {i}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(ModelError) as error:
            load(path)
        if "|" not in class_name:
            assert class_name in str(error.value)
        assert len(str(error.value).splitlines()) == 1
        _, _, code, *arguments = shlex.split(str(error.value).partition("to a new one: ")[2])
        monkeypatch.setattr(sys, "argv", ["-c", *arguments])
        exec(code, {})  # noqa: S102  # the command of the message, without another process
        assert_same(load(Path(arguments[-1])), model)


class Exploit:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(state: State, tmp_path: Path) -> None:
    import pickle

    target = tmp_path / "executed"
    torch.save({"model": state, "x": Exploit(target)}, tmp_path / "w.pth")
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": Exploit(target)}))
    for name in ("w.pth", "w.pkl"):
        with pytest.raises(ModelError, match="because that can run code"):
            load(tmp_path / name)
    assert not target.exists()


def write_broken_directory(path: Path, state: State) -> None:
    torch.save(state, path)
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x00"))


def write_truncated(path: Path, state: State, save: Callable[..., None], size: int) -> None:
    save({k: v.contiguous() for k, v in state.items()}, path)
    path.write_bytes(path.read_bytes()[:size])


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(3))
    return stream.getvalue()


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "w.py")


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda p, _: p.write_bytes(b""), r"is empty \(0 bytes\)"),
        (lambda p, _: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
         "Git LFS pointer, not the weights; run `git lfs pull`"),
        (lambda p, _: p.write_text("\n<!DOCTYPE html><html>404</html>"), "web page"),
        (lambda p, _: p.write_text("\ufeff<?xml version='1.0'?><Error>AccessDenied</Error>"), "web page"),
        (lambda p, _: p.write_text('{"error": "not found"}'), "is JSON text"),
        (lambda p, _: p.write_text("Not Found"), "neither of safetensors nor of torch.save"),
        (lambda p, _: p.write_bytes(bytes(9000)), "neither of safetensors nor of torch.save"),
        (lambda p, s: write_truncated(p, s, torch.save, 50_000), "is truncated"),
        (lambda p, s: write_truncated(p, s, torch.save, 200), "is truncated"),
        (write_broken_directory, "is damaged or truncated"),
        (lambda p, s: write_truncated(p, s, save_file, 50_000), "is not an intact safetensors file"),
        (lambda p, s: write_truncated(p, s, save_file, 100), "is not an intact safetensors file"),
        (lambda p, _: p.write_bytes(gzip.compress(b"weights")), "compressed by gzip; decompress it"),
        (lambda p, _: write_tar(p), "is a tar archive; extract"),
        (lambda p, _: p.write_bytes(npz()), "zip archive, but not of torch.save"),
        (lambda p, _: p.write_bytes(b"\x93NUMPY\x01\x00" + bytes(120)), "is a NumPy array"),
        (lambda p, _: torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), p), "TorchScript"),
        (lambda p, _: torch.save(torch.ones(3), p), "holds no state dict .* but a Tensor"),
        (lambda p, s: torch.save([s], p), "but a list"),
        (lambda p, _: torch.save({}, p), "but nothing"),
        (lambda p, _: torch.save({"epoch": 3, "lr": 0.1}, p), "keys without tensors: epoch, lr"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_other_files_are_refused_in_one_sentence(
    write: Callable[[Path, State], Any], text: str, state: State, tmp_path: Path
) -> None:
    for name in ("w.pth", "w.safetensors"):
        write(tmp_path / name, state)
        with pytest.raises(ModelError, match=text) as error:
            load(tmp_path / name)
        assert len(str(error.value).splitlines()) == 1
        assert error.value.path == tmp_path / name
        assert str(tmp_path / name) in str(error.value)


def test_files_that_do_not_name_their_backbone_ask_for_it(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        with pytest.raises(ModelError, match="does not name its backbone") as error:
            load_cpu_encoder(str(tmp_path / name))
        assert error.value.field == "backbone"


def test_initial_weights_are_read_by_the_same_rules(state: State, tmp_path: Path) -> None:
    torch.save(
        {"state_dict": add("module.", state) | {"module.fc.weight": torch.ones(3, 96)}}, tmp_path / "w.pth"
    )
    config = likewise.TrainConfig(backbone="test_resnet", image_size=96, init=str(tmp_path / "w.pth"))
    start, _ = load_start(config)
    for name, tensor in start.backbone.state_dict().items():
        torch.testing.assert_close(tensor, state[name])


def test_masks_of_a_model_may_be_infinite(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), -float("inf")))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")


def test_encoders_that_return_nan_are_not_unreadable_images(tmp_path: Path) -> None:
    images = [tmp_path / f"set/{split}/{label}/a.png" for split in ("train", "test") for label in "ab"]
    for path in images:
        save_png(path)
    encoder = load_cpu_encoder("random:test_resnet", image_size=32)
    nn.init.constant_(next(encoder.model.parameters()), float("nan"))
    with pytest.raises(ModelError, match="the encoder random:test_resnet returns NaN or infinity for 1 of 1"):
        encoder.encode(images[0])
    with pytest.raises(ModelError, match="the encoder random:test_resnet returns NaN"):
        likewise.evaluate(encoder, str(tmp_path / "set"), ["knn"], out=tmp_path / "out")
