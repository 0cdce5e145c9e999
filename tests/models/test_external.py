"""Models of other libraries, built locally: features and preprocessing equal the library's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

from likewise.errors import ModelError
from support import load_cpu_encoder as load_encoder

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def save_vit(folder: Path) -> Path:
    """Save a tiny ViT in the format of Hugging Face, with its own preprocessing."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=64,
        patch_size=16,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 64, "width": 64},
            "resample": 2,
            "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.2, 0.3, 0.4],
        })
    )  # fmt: skip
    return folder


def test_hugging_face_folder_defines_its_preprocessing(tmp_path: Path) -> None:
    from transformers import ViTModel

    encoder = load_encoder(f"hf:{save_vit(tmp_path)}")
    assert (encoder.transform.image_size, encoder.transform.resize_size) == (64, 64)
    assert encoder.transform.interpolation == "bilinear"
    assert (encoder.transform.mean, encoder.transform.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert encoder.feature_dim == 32
    reference = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    with torch.no_grad():
        # A pooling layer without weights in the folder must not be initialized at random.
        torch.testing.assert_close(
            encoder.model(IMAGES), reference(pixel_values=IMAGES).last_hidden_state[:, 0]
        )
    weights = load_file(tmp_path / "model.safetensors")
    save_file(dict(sorted(weights.items())[1:]), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights"):
        load_encoder(f"hf:{tmp_path}")


def test_hugging_face_model_with_two_towers_has_a_text_alignment(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99,
        max_position_embeddings=16, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
        patch_size=8,
    )  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    processor_config = {
        "size": {"shortest_edge": 36},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "resample": 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_config))
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "a": 3, "cat": 4, "dog": 5, "<unk>": 6}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(  # noqa: S106
        tmp_path
    )
    encoder = load_encoder(f"hf:{tmp_path}")
    assert (encoder.transform.resize_size, encoder.transform.image_size, encoder.feature_dim) == (36, 32, 12)
    assert encoder.text_alignment is not None
    embeddings = encoder.text_alignment.encode_text(["a cat", "a dog"])
    assert embeddings.shape == (2, 12)
    assert not torch.allclose(embeddings[0], embeddings[1])


def test_torchvision_models_have_no_classifier_and_the_preprocessing_of_their_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = torchvision.models.resnet18(weights=None).eval()
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    encoder = load_encoder(str(tmp_path / "weights.pth"), backbone="torchvision:resnet18")
    assert (encoder.feature_dim, encoder.transform.image_size, encoder.transform.resize_size) == (
        512,
        224,
        256,
    )
    with torch.no_grad():
        torch.testing.assert_close(classifier.fc(encoder.model(IMAGES)), classifier(IMAGES))
    preprocess = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 300, 3), np.uint8))
    normalized = encoder.transform.normalize(
        torch.from_numpy(encoder.transform.center_crop(np.array(image)))[None]
    )
    torch.testing.assert_close(normalized[0], preprocess(image), atol=0.05, rtol=0)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "convnext_tiny", "vit_b_32", "densenet121", "swin_t"])
def test_torchvision_families_return_one_vector_per_image(name: str, tmp_path: Path) -> None:
    classifier = torchvision.models.get_model(name, weights=None)
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    encoder = load_encoder(str(tmp_path / "weights.pth"), backbone=f"torchvision:{name}")
    with torch.no_grad():
        images = torch.randn(1, 3, 224, 224)
        assert encoder.model(images).shape == (1, encoder.feature_dim)


def test_torch_hub_entries_load_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "hubconf.py").write_text(
        "import torch\n"
        "def tiny(pretrained=False):\n"
        "    torch.manual_seed(3)\n"
        "    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()\n"
        "    return torch.nn.Sequential(*layers)\n"
        "def text():\n    return 'not a model'\n"
    )
    encoder = load_encoder(f"hub:{tmp_path}/tiny", image_size=64)
    assert encoder.feature_dim == 4
    assert (encoder.transform.image_size, encoder.transform.resize_size) == (64, 73)
    with pytest.raises(ModelError, match="not a torch module"):
        load_encoder(f"hub:{tmp_path}/text")
    with pytest.raises(ModelError, match="cannot load 'absent'"):
        load_encoder(f"hub:{tmp_path}/absent")


def test_unknown_names_raise_with_close_matches(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="resnet18"):
        load_encoder("torchvision:resnet81")
    with pytest.raises(ModelError, match="cannot load hf:"):
        load_encoder(f"hf:{tmp_path}")
    with pytest.raises(ModelError, match="hf:NAME"):
        load_encoder(str(tmp_path / "absent"))
