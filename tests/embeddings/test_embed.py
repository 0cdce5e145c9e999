"""Embeddings of captions and images: counts, resuming, lookup, unreadable images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from likewise.artifacts import MANIFEST
from likewise.data.config import ImportOptions
from likewise.data.dataset import CaptionDataset
from likewise.data.images import decode_image, read_image_bytes
from likewise.data.importing import import_dataset
from likewise.embeddings.base import l2_normalize
from likewise.embeddings.config import EncoderOptions
from likewise.embeddings.embed import embed
from likewise.embeddings.store import Embeddings, find_embeddings
from likewise.embeddings.text_encoders import offline_model_path
from likewise.errors import ArtifactError, InvalidInputError, ModelError
from likewise.models.encoders import load_encoder
from support import MINILM

IMAGE_ENCODER = "image:random:test_resnet"


@pytest.fixture
def unembedded(dataset: CaptionDataset, tmp_path: Path) -> CaptionDataset:
    """A copy of the emoji dataset without embeddings."""
    path = shutil.copytree(dataset.path, tmp_path / "c")
    shutil.rmtree(path / "embeddings")
    return CaptionDataset(path)


def test_captions_are_embedded_as_unit_vectors(unembedded: CaptionDataset) -> None:
    """Read this first: embed the captions of a dataset and load a shard of vectors."""
    embeddings = embed(unembedded, encoder=MINILM)
    assert len(embeddings) == sum(len(sample.captions) for sample in unembedded)
    assert embeddings.dim == 384
    vectors, image_ids = embeddings.load_shard(0)
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=1e-3)
    assert image_ids[0] == 0  # row 0 is the first caption of sample 0
    assert find_embeddings(unembedded, None).path == embeddings.path
    assert embed(unembedded, encoder=MINILM).path == embeddings.path  # a complete artifact is reused


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def interrupt(embeddings: Embeddings, shard: int) -> None:
    """Reset the folder to the state after a kill before this shard was complete."""
    manifest = json.loads((embeddings.path / MANIFEST).read_text())
    fresh = manifest | {"complete": False, "counts": {}, "skipped": {}}
    (embeddings.path / MANIFEST).write_text(json.dumps(fresh))
    (embeddings.path / f"ids-{shard:05d}.npy").unlink()


def save_model2vec(folder: Path, *, num_broken: int = 0) -> Path:
    """Write a model2vec folder with MiniLM's token vectors, of which `num_broken` are NaN."""
    from model2vec import StaticModel
    from tokenizers import Tokenizer

    minilm = offline_model_path(MINILM)
    vectors = load_file(minilm / "model.safetensors")["embeddings.word_embeddings.weight"][:, :64].copy()
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    for word in ("cat", "face")[:num_broken]:
        vectors[tokenizer.get_vocab()[word]] = np.nan
    StaticModel(vectors, tokenizer).save_pretrained(folder)
    return folder


def test_fitted_encoder_resumes_to_the_same_bytes(unembedded: CaptionDataset) -> None:
    embeddings = embed(unembedded, "tfidf")
    assert embeddings.num_shards > 2
    assert (embeddings.dim, embeddings.modality, embeddings.num_zero_vectors) == (4096, "captions", 0)
    expected = snapshot(embeddings.path)
    interrupt(embeddings, 1)
    assert snapshot(embed(unembedded, "tfidf").path) == expected


def test_captions_without_known_words_have_zero_vectors(unembedded: CaptionDataset, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("face 1 0 0\ncat 0 1 0\n")
    embeddings = embed(unembedded, f"words:{tmp_path / 'two.txt'}")
    captions = [text.lower() for sample in unembedded for text in sample.captions]
    known = np.array([bool({"face", "cat"} & set(text.replace(":", " ").split())) for text in captions])
    rows = np.concatenate([embeddings.load_shard(i)[0] for i in range(embeddings.num_shards)])
    assert known.any()
    assert (rows.any(axis=1) == known).all()
    assert embeddings.num_zero_vectors == (~known).sum()
    assert len(embeddings) == len(captions)
    positions = np.concatenate([embeddings.load_mean_vectors(i)[1] for i in range(embeddings.num_shards)])
    assert 0 < len(positions) < len(unembedded)
    manifest = (embeddings.path / MANIFEST).read_text()
    interrupt(embeddings, 0)
    assert (embed(unembedded, f"words:{tmp_path / 'two.txt'}").path / MANIFEST).read_text() == manifest


def test_non_finite_embeddings_raise_and_are_not_saved(unembedded: CaptionDataset, tmp_path: Path) -> None:
    folder = save_model2vec(tmp_path / "m", num_broken=2)
    with pytest.raises(ArtifactError, match=r"NaN or infinity for [1-9]\d* of \d+ captions of a shard"):
        embed(unembedded, f"model2vec:{folder}")
    assert not list((unembedded.path / "embeddings").glob("*/ids-00000.npy"))
    assert len(embed(unembedded, f"model2vec:{save_model2vec(tmp_path / 'm')}")) == len(
        [text for sample in unembedded for text in sample.captions]
    )


def test_resuming_with_another_dimension_raises(unembedded: CaptionDataset) -> None:
    embeddings = embed(unembedded, "tfidf")
    interrupt(embeddings, 2)
    # As if a model on the hub had been replaced under the same name between two runs.
    file = embeddings.path / "vectors-00000.npy"
    np.save(file, np.load(file)[:, :100])
    with pytest.raises(ArtifactError, match="dimension 100 .*4096"):
        embed(unembedded, "tfidf")


def test_changed_weights_have_a_separate_folder(unembedded: CaptionDataset, tmp_path: Path) -> None:
    folder = save_model2vec(tmp_path / "m")
    first = embed(unembedded, f"model2vec:{folder}")
    weights = load_file(folder / "model.safetensors")
    save_file({name: values[:, :32].copy() for name, values in weights.items()}, folder / "model.safetensors")
    second = embed(unembedded, f"model2vec:{folder}")
    assert (first.dim, second.dim) == (64, 32)
    assert find_embeddings(unembedded, f"model2vec:{folder}").path == second.path
    with pytest.raises(
        ArtifactError, match=rf"{first.path.name}.*{second.path.name}|{second.path.name}.*{first.path.name}"
    ):
        find_embeddings(unembedded, None)
    assert find_embeddings(unembedded, first.path.name).path == first.path


def test_embeddings_with_different_options_are_found_by_name(unembedded: CaptionDataset) -> None:
    name = f"hf:{offline_model_path(MINILM)}"
    mean, cls = (embed(unembedded, name, options=EncoderOptions(pooling=p)) for p in ("mean", "cls"))
    assert mean.path != cls.path
    assert find_embeddings(unembedded, name).path == mean.path
    assert find_embeddings(unembedded, "hf:model+cls").path == cls.path
    shutil.rmtree(mean.path)
    assert find_embeddings(unembedded, name).path == cls.path
    with pytest.raises(ArtifactError, match="no embeddings of captions by tfidf"):
        find_embeddings(unembedded, "tfidf")


def test_image_embeddings_equal_the_encoder(dataset: CaptionDataset, unembedded: CaptionDataset) -> None:
    embeddings = embed(unembedded, IMAGE_ENCODER, batch_size=7)
    encoder = load_encoder("random:test_resnet")
    indices = [0, 63, 64, len(dataset) - 1]
    crops = [
        encoder.transform.center_crop(
            decode_image(read_image_bytes(dataset[i].image, dataset.root), encoder.transform.resize_size)
        )
        for i in indices
    ]
    with torch.inference_mode():
        expected = encoder.model(encoder.transform.normalize(torch.from_numpy(np.stack(crops)))).numpy()
    rows = np.concatenate([embeddings.load_shard(i)[0] for i in range(embeddings.num_shards)])
    ids = np.concatenate([embeddings.load_shard(i)[1] for i in range(embeddings.num_shards)])
    assert ids.tolist() == list(range(len(dataset)))
    np.testing.assert_allclose(rows[indices], l2_normalize(expected), atol=2e-3)
    assert embeddings.modality == "images"
    assert len(embeddings) == len(dataset)


def test_modalities_are_found_separately(unembedded: CaptionDataset) -> None:
    image_embeddings = embed(unembedded, IMAGE_ENCODER)
    with pytest.raises(ArtifactError, match="no embeddings of captions"):
        find_embeddings(unembedded, None)
    caption_embeddings = embed(unembedded, "bow")
    assert find_embeddings(unembedded, None).path == caption_embeddings.path
    assert find_embeddings(unembedded, None, modality="images").path == image_embeddings.path
    assert find_embeddings(unembedded, IMAGE_ENCODER, modality="images").path == image_embeddings.path
    with pytest.raises(ArtifactError, match="no embeddings of captions by image:"):
        find_embeddings(unembedded, IMAGE_ENCODER)
    shutil.rmtree(image_embeddings.path)
    with pytest.raises(ArtifactError, match="no embeddings of images"):
        find_embeddings(unembedded, None, modality="images")


def test_unreadable_images_are_skipped_and_counted(emoji: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(emoji.parent, tmp_path / "pictures")
    dataset = import_dataset(folder / emoji.name, tmp_path / "c", ImportOptions(), shard_rows=64)
    files = [folder / (sample.image.path or "") for sample in dataset]
    expected = embed(dataset, IMAGE_ENCODER)
    rows = np.concatenate([expected.load_shard(i)[0] for i in range(expected.num_shards)])
    files[3].unlink()
    files[70].write_bytes(files[70].read_bytes()[:200])
    shutil.rmtree(expected.path)
    partial = embed(dataset, IMAGE_ENCODER)
    ids = np.concatenate([partial.load_shard(i)[1] for i in range(partial.num_shards)])
    assert ids.tolist() == [i for i in range(len(dataset)) if i not in (3, 70)]
    np.testing.assert_allclose(
        np.concatenate([partial.load_shard(i)[0] for i in range(partial.num_shards)]), rows[ids], atol=1e-3
    )
    assert partial.artifact.manifest.skipped == {"truncated": 1, "file is missing": 1}
    manifest = snapshot(partial.path)
    interrupt(partial, 0)
    assert snapshot(embed(dataset, IMAGE_ENCODER).path) == manifest
    shutil.rmtree(partial.path)
    for file in files:
        file.unlink(missing_ok=True)
    with pytest.raises(InvalidInputError, match="file is missing"):
        embed(dataset, IMAGE_ENCODER)
    shutil.copytree(emoji.parent, folder, dirs_exist_ok=True)
    assert len(embed(dataset, IMAGE_ENCODER)) == len(dataset)


def test_failed_loading_leaves_no_folder(unembedded: CaptionDataset, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("zzyzx 1 0 0\n")
    with pytest.raises(ModelError, match="no vector"):
        embed(unembedded, f"words:{tmp_path / 'two.txt'}")
    assert not (unembedded.path / "embeddings").exists()


def test_uncaptioned_images_can_be_embedded(emoji: Path, tmp_path: Path) -> None:
    folder = emoji.parent / json.loads(json.dumps(emoji.read_text().splitlines()[1].split(",")[0]))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shutil.copy(folder, pictures)
    dataset = import_dataset(pictures, tmp_path / "c", ImportOptions())
    with pytest.raises(InvalidInputError, match="image:") as excinfo:
        embed(dataset, "tfidf")
    assert excinfo.value.field == "encoder"
    assert len(embed(dataset, IMAGE_ENCODER)) == 1
