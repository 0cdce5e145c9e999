"""The embeddings artifact: what it counts, how it resumes, how it is found again, and images in it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from likewise.artifacts import MANIFEST
from likewise.data.dataset import CaptionDataset
from likewise.data.images import decode_image, read_image_bytes
from likewise.data.importing import import_dataset
from likewise.data.readers.base import ImportOptions
from likewise.embeddings.base import l2_normalize
from likewise.embeddings.config import EncoderOptions
from likewise.embeddings.embed import embed
from likewise.embeddings.offline import offline_model_path
from likewise.embeddings.store import Embeddings, find_embeddings
from likewise.errors import ArtifactError, InvalidInputError, ModelError
from likewise.models.encoders import load_encoder
from support import MINILM

LOOKS = "image:random:test_resnet"


@pytest.fixture
def copied(collection: CaptionDataset, tmp_path: Path) -> CaptionDataset:
    """A collection of its own, without embeddings."""
    path = shutil.copytree(collection.path, tmp_path / "c")
    shutil.rmtree(path / "embeddings")
    return CaptionDataset(path)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def interrupt(embeddings: Embeddings, shard: int) -> None:
    """Leave the folder as a kill before this shard's end does."""
    manifest = json.loads((embeddings.path / MANIFEST).read_text())
    fresh = manifest | {"complete": False, "counts": {}, "skipped": {}}
    (embeddings.path / MANIFEST).write_text(json.dumps(fresh))
    (embeddings.path / f"ids-{shard:05d}.npy").unlink()


def static_model(folder: Path, *, broken: int = 0) -> Path:
    """A model2vec folder with MiniLM's real token vectors, some made of what is no number."""
    from model2vec import StaticModel
    from tokenizers import Tokenizer

    minilm = offline_model_path(MINILM)
    vectors = load_file(minilm / "model.safetensors")["embeddings.word_embeddings.weight"][:, :64].copy()
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    for word in ("cat", "face")[:broken]:
        vectors[tokenizer.get_vocab()[word]] = np.nan
    StaticModel(vectors, tokenizer).save_pretrained(folder)
    return folder


def test_fitted_encoder_resumes_to_the_same_bytes(copied: CaptionDataset) -> None:
    made = embed(copied, "tfidf")
    assert made.num_shards > 2
    assert (made.dim, made.modality, made.num_zero_vectors) == (4096, "captions", 0)
    whole = snapshot(made.path)
    interrupt(made, 1)
    assert snapshot(embed(copied, "tfidf").path) == whole


def test_captions_of_unknown_words_keep_a_zero_row_and_are_counted(
    copied: CaptionDataset, tmp_path: Path
) -> None:
    (tmp_path / "two.txt").write_text("face 1 0 0\ncat 0 1 0\n")
    made = embed(copied, f"words:{tmp_path / 'two.txt'}")
    captions = [text.lower() for record in copied for text in record.captions]
    known = np.array([bool({"face", "cat"} & set(text.replace(":", " ").split())) for text in captions])
    rows = np.concatenate([made.load_shard(i)[0] for i in range(made.num_shards)])
    assert known.any()
    assert (rows.any(axis=1) == known).all()
    assert made.num_zero_vectors == (~known).sum()
    assert len(made) == len(captions)
    positions = np.concatenate([made.load_mean_vectors(i)[1] for i in range(made.num_shards)])
    assert 0 < len(positions) < len(copied)
    told = (made.path / MANIFEST).read_text()
    interrupt(made, 0)
    assert (embed(copied, f"words:{tmp_path / 'two.txt'}").path / MANIFEST).read_text() == told


def test_vectors_that_are_no_numbers_are_counted_and_not_kept(copied: CaptionDataset, tmp_path: Path) -> None:
    folder = static_model(tmp_path / "m", broken=2)
    with pytest.raises(ArtifactError, match=r"not numbers for [1-9]\d* of \d+ captions of a shard"):
        embed(copied, f"model2vec:{folder}")
    assert not list((copied.path / "embeddings").glob("*/ids-00000.npy"))
    assert len(embed(copied, f"model2vec:{static_model(tmp_path / 'm')}")) == len(
        [text for record in copied for text in record.captions]
    )


def test_model_of_another_size_is_not_mixed_in(copied: CaptionDataset) -> None:
    made = embed(copied, "tfidf")
    interrupt(made, 2)
    # As a hub model leaves it that was replaced between two runs under the same name.
    file = made.path / "vectors-00000.npy"
    np.save(file, np.load(file)[:, :100])
    with pytest.raises(
        ArtifactError, match="holds vectors of length 100 .* now gives 4096.*delete that folder"
    ):
        embed(copied, "tfidf")


def test_changed_weights_and_options_have_folders_of_their_own(
    copied: CaptionDataset, tmp_path: Path
) -> None:
    folder = static_model(tmp_path / "m")
    first = embed(copied, f"model2vec:{folder}")
    weights = load_file(folder / "model.safetensors")
    save_file({name: values[:, :32].copy() for name, values in weights.items()}, folder / "model.safetensors")
    second = embed(copied, f"model2vec:{folder}")
    assert (first.dim, second.dim) == (64, 32)
    assert find_embeddings(copied, f"model2vec:{folder}").path == second.path
    with pytest.raises(
        ArtifactError, match=rf"several encoders \({first.path.name}, {second.path.name}|{second.path.name}, "
    ):
        find_embeddings(copied, None)
    assert find_embeddings(copied, first.path.name).path == first.path


def test_options_are_told_apart_by_name(copied: CaptionDataset) -> None:
    name = f"hf:{offline_model_path(MINILM)}"
    mean, cls = (embed(copied, name, options=EncoderOptions(pooling=p)) for p in ("mean", "cls"))
    assert mean.path != cls.path
    assert find_embeddings(copied, name).path == mean.path
    assert find_embeddings(copied, "hf:model+cls").path == cls.path
    shutil.rmtree(mean.path)
    assert find_embeddings(copied, name).path == cls.path
    with pytest.raises(ArtifactError, match="no finished embeddings by tfidf; run: likewise embed"):
        find_embeddings(copied, "tfidf")


def test_images_are_embedded_as_the_encoder_sees_them(
    collection: CaptionDataset, copied: CaptionDataset
) -> None:
    made = embed(copied, LOOKS, batch_size=7)
    encoder = load_encoder("random:test_resnet")
    picked = [0, 63, 64, len(collection) - 1]
    crops = [
        encoder.transform.center_crop(
            decode_image(
                read_image_bytes(collection[i].image, collection.root), encoder.transform.resize_size
            )
        )
        for i in picked
    ]
    with torch.inference_mode():
        expected = encoder.model(encoder.transform.normalize(torch.from_numpy(np.stack(crops)))).numpy()
    rows = np.concatenate([made.load_shard(i)[0] for i in range(made.num_shards)])
    ids = np.concatenate([made.load_shard(i)[1] for i in range(made.num_shards)])
    assert ids.tolist() == list(range(len(collection)))
    np.testing.assert_allclose(rows[picked], l2_normalize(expected), atol=2e-3)
    assert made.modality == "images"
    assert len(made) == len(collection)


def test_images_and_captions_are_never_mistaken(copied: CaptionDataset) -> None:
    looks = embed(copied, LOOKS)
    with pytest.raises(ArtifactError, match="no finished embeddings; run"):
        find_embeddings(copied, None)
    words = embed(copied, "bow")
    assert find_embeddings(copied, None).path == words.path
    assert find_embeddings(copied, None, modality="images").path == looks.path
    assert find_embeddings(copied, LOOKS, modality="images").path == looks.path
    with pytest.raises(ArtifactError, match="no finished embeddings"):
        find_embeddings(copied, LOOKS)
    shutil.rmtree(looks.path)
    with pytest.raises(ArtifactError, match="embeddings of images; run: likewise embed .* --encoder image:"):
        find_embeddings(copied, None, modality="images")


def test_unreadable_images_are_left_out_and_counted(emoji: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(emoji.parent, tmp_path / "pictures")
    made = import_dataset(folder / emoji.name, tmp_path / "c", ImportOptions(), shard_rows=64)
    files = [folder / (record.image.path or "") for record in made]
    whole = embed(made, LOOKS)
    rows = np.concatenate([whole.load_shard(i)[0] for i in range(whole.num_shards)])
    files[3].unlink()
    files[70].write_bytes(files[70].read_bytes()[:200])
    shutil.rmtree(whole.path)
    found = embed(made, LOOKS)
    ids = np.concatenate([found.load_shard(i)[1] for i in range(found.num_shards)])
    assert ids.tolist() == [i for i in range(len(made)) if i not in (3, 70)]
    np.testing.assert_allclose(
        np.concatenate([found.load_shard(i)[0] for i in range(found.num_shards)]), rows[ids], atol=1e-3
    )
    assert found.artifact.manifest.skipped == {"damaged": 1, "file is missing": 1}
    told = snapshot(found.path)
    interrupt(found, 0)
    assert snapshot(embed(made, LOOKS).path) == told
    shutil.rmtree(found.path)
    for file in files:
        file.unlink(missing_ok=True)
    with pytest.raises(InvalidInputError, match="no image of .* can be read: .* file is missing"):
        embed(made, LOOKS)
    shutil.copytree(emoji.parent, folder, dirs_exist_ok=True)
    assert len(embed(made, LOOKS)) == len(made)


def test_encoder_that_cannot_be_loaded_leaves_nothing_behind(copied: CaptionDataset, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("zzyzx 1 0 0\n")
    with pytest.raises(ModelError, match="a vector for no word"):
        embed(copied, f"words:{tmp_path / 'two.txt'}")
    assert not (copied.path / "embeddings").exists()


def test_images_need_no_captions(emoji: Path, tmp_path: Path) -> None:
    folder = emoji.parent / json.loads(json.dumps(emoji.read_text().splitlines()[1].split(",")[0]))
    silent = tmp_path / "pictures"
    silent.mkdir()
    shutil.copy(folder, silent)
    made = import_dataset(silent, tmp_path / "c", ImportOptions())
    with pytest.raises(InvalidInputError, match="no image of .* has a caption.*--encoder image:"):
        embed(made, "tfidf")
    assert len(embed(made, LOOKS)) == 1
