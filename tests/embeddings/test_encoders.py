"""Each type of encoder against a direct call of its library, or a direct computation."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from likewise.data.dataset import CaptionDataset
from likewise.demo import load_emoji
from likewise.embeddings.base import TextEncoder, l2_normalize
from likewise.embeddings.config import EncoderOptions
from likewise.embeddings.embed import embed
from likewise.embeddings.lexical import NUM_COLUMNS, BagOfWordsEncoder, count_hashed_words
from likewise.embeddings.registry import load_text_encoder, resolve_encoder
from likewise.embeddings.text_encoders import offline_model_path
from likewise.errors import InvalidInputError, ModelError
from likewise.strings import split_words
from support import MINILM

CAPTIONS = [
    "grinning face",
    "a",
    "flag: Åland Islands",
    "woman in a wheelchair, facing right, dark skin tone",
]
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def load(name: str, captions: list[str] | None = None, **options: Any) -> TextEncoder:
    return load_text_encoder(
        resolve_encoder(name, EncoderOptions(**options)), "cpu", lambda: iter([captions or []])
    )


def all_captions(dataset: CaptionDataset) -> list[str]:
    return [text for sample in dataset for text in sample.captions]


@pytest.fixture(scope="session")
def minilm() -> Path:
    return offline_model_path(MINILM)


@pytest.fixture(scope="session")
def tokens(minilm: Path) -> np.ndarray:
    """The real token vectors of MiniLM, (30522, 384)."""
    return load_file(minilm / "model.safetensors")["embeddings.word_embeddings.weight"].numpy()


def test_sentence_transformer_equals_its_library(dataset: CaptionDataset, minilm: Path) -> None:
    from sentence_transformers import SentenceTransformer

    captions = all_captions(dataset)
    plain = SentenceTransformer(str(minilm), device="cpu").encode(captions, normalize_embeddings=True)
    actual = embed(dataset, MINILM)
    rows = np.concatenate([actual.load_shard(i)[0] for i in range(actual.num_shards)])
    ids = np.concatenate([actual.load_shard(i)[1] for i in range(actual.num_shards)])
    # Each emoji is in the dataset twice: equal captions are encoded once and stored in several rows.
    assert len(set(captions)) < 0.8 * len(captions)
    np.testing.assert_allclose(rows, plain, atol=5e-4)
    assert ids.tolist() == [i for i, sample in enumerate(dataset) for _ in sample.captions]


def last_hidden_states(folder: Path, caption: str) -> np.ndarray:
    """Return the hidden states of one caption, hence without padding: (tokens, d)."""
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0].double().numpy()


def reference_embeddings(folder: Path, pooling: str) -> np.ndarray:
    states = [last_hidden_states(folder, caption) for caption in CAPTIONS]
    rows = {"cls": lambda h: h[0], "mean": lambda h: h.mean(axis=0), "last": lambda h: h[-1]}
    return l2_normalize(np.stack([rows[pooling](state) for state in states]))


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_pooling_of_a_hugging_face_model(minilm: Path, pooling: str) -> None:
    actual = load(f"hf:{minilm}", pooling=pooling).encode(CAPTIONS, 4)
    np.testing.assert_allclose(actual, reference_embeddings(minilm, pooling), atol=1e-5)
    assert actual.dtype == np.float32


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_token_pooling_without_a_padding_token(minilm: Path, tmp_path: Path, side: str) -> None:
    from tokenizers import Tokenizer
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    torch.manual_seed(0)
    # Padding on the left would shift its learned positions.
    GPT2Model(GPT2Config(vocab_size=30522, n_embd=32, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    special = {"eos_token": "[SEP]", "padding_side": side, "model_max_length": 64}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).pad_token is None
    actual = load(f"hf:{tmp_path}", pooling="last").encode(CAPTIONS, 4)
    np.testing.assert_allclose(actual, reference_embeddings(tmp_path, "last"), atol=1e-5)


@pytest.mark.parametrize("name", [MINILM, "hf"])
def test_max_length_truncates_captions(minilm: Path, name: str) -> None:
    name = f"hf:{minilm}" if name == "hf" else name
    caption = "red apple on a table in the garden of the old house"
    full, truncated = load(name), load(name, max_length=4)
    # Four tokens: [CLS], two words and [SEP].
    np.testing.assert_allclose(truncated.encode([caption], 1), full.encode(["red apple"], 1), atol=1e-5)
    assert np.abs(truncated.encode([caption], 1) - full.encode([caption], 1)).max() > 0.01
    with pytest.raises(ModelError, match="`max_length`"):
        load(name, max_length=100_000)


def test_onnx_equals_torch(minilm: Path) -> None:
    captions = [*CAPTIONS, " ".join(CAPTIONS)]
    # The last batch is a single caption, longer than those that the graph was traced with.
    actual = load(f"hf:{minilm}", pooling="cls", backend="onnx").encode(captions, 2)
    np.testing.assert_allclose(actual, load(f"hf:{minilm}", pooling="cls").encode(captions, 2), atol=1e-5)
    with pytest.raises(InvalidInputError, match="CPU only"):
        load_text_encoder(resolve_encoder(MINILM, EncoderOptions(backend="onnx")), "cuda", lambda: iter([]))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """Return the encoder name of a small open_clip model with random weights, and the model."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    (folder / "likewise-tiny.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("likewise-tiny").eval()
    torch.save(model.state_dict(), folder / "w.pt")
    return f"clip:likewise-tiny/{folder / 'w.pt'}", model


def test_clip_text_equals_open_clip(clip: tuple[str, Any]) -> None:
    import open_clip

    name, model = clip
    encoder = load(name)
    tokenize = open_clip.get_tokenizer("likewise-tiny")
    with torch.no_grad():
        expected = model.encode_text(tokenize(CAPTIONS), normalize=True).numpy()
    np.testing.assert_allclose(encoder.encode(CAPTIONS, 3), expected, atol=1e-5)
    assert encoder.dim == 24


def test_clip_truncation_keeps_the_end_token(clip: tuple[str, Any]) -> None:
    name, model = clip
    import open_clip

    words = [CAPTIONS[i % 4].split()[0] for i in range(200)]

    tokenizer: Any = open_clip.get_tokenizer("likewise-tiny")
    ids = tokenizer.encode(" ".join(words))
    start, end = 49406, 49407
    row = torch.tensor([[start, *ids[:75], end]])
    with torch.no_grad():
        expected = model.encode_text(row, normalize=True).numpy()
    np.testing.assert_allclose(load(name).encode([" ".join(words)], 1), expected, atol=1e-5)


@pytest.mark.usefixtures("clip")
def test_invalid_clip_names_raise(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'ViT-B-23'.*ViT-B-32"):
        load("clip:ViT-B-23/openai")
    with pytest.raises(ModelError, match="'opena'.*: openai"):
        load("clip:ViT-B-32/opena")
    with pytest.raises(ModelError, match="clip:ARCH/WEIGHTS"):
        resolve_encoder("clip:ViT-B-32")
    (tmp_path / "w.pt").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot load the CLIP model"):
        load(f"clip:likewise-tiny/{tmp_path / 'w.pt'}")


def test_model2vec_equals_the_mean_of_token_vectors(minilm: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    from model2vec import StaticModel
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    StaticModel(tokens, tokenizer).save_pretrained(tmp_path)
    encoder = load(f"model2vec:{tmp_path}")
    ids = [tokenizer.encode(caption, add_special_tokens=False).ids for caption in CAPTIONS]
    expected = l2_normalize(np.stack([tokens[i].astype(np.float64).mean(axis=0) for i in ids]))
    np.testing.assert_allclose(encoder.encode(CAPTIONS, 2), expected, atol=1e-5)


def word_lines(minilm: Path, tokens: np.ndarray, *, header: bool) -> str:
    """Return vectors of frequent words in the format of GloVe, or with the header and spaces of fastText."""
    names = (minilm / "vocab.txt").read_text().splitlines()
    rows = [(n, v) for n, v in zip(names, tokens[:, :50], strict=True) if n.isalpha()][:5000]
    lines = [
        " ".join([name, *(f"{x:.6f}" for x in values)]) + (" " if header else "") for name, values in rows
    ]
    return "\n".join([f"{len(rows)} 50"] * header + lines) + "\n"


def test_word_vectors_are_averaged(minilm: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    plain = word_lines(minilm, tokens, header=False)
    # As in glove.840B: a key that contains a space is not the vector of its first word.
    first, rest = plain.split("\n", 1)
    phrase = "at name@domain.com " + " ".join(["0.5"] * 50)
    (tmp_path / "glove.txt").write_text("\n".join([first, phrase, rest]))
    (tmp_path / "fasttext.vec").write_text(word_lines(minilm, tokens, header=True))
    with gzip.open(tmp_path / "glove.txt.gz", "wt") as stream:
        stream.write(plain)
    table = {line.split(" ")[0]: np.array(line.split(" ")[1:], np.float64) for line in plain.splitlines()}
    captions = ["Smiling face at night!", "zzyzx qwrtp", "", "face face cat"]
    known_words = [["smiling", "face", "at", "night"], ["face", "face", "cat"]]
    expected = l2_normalize(np.stack([np.mean([table[w] for w in words], axis=0) for words in known_words]))
    for file in ("glove.txt", "fasttext.vec", "glove.txt.gz"):
        encoder = load(f"words:{tmp_path / file}", captions)
        actual = encoder.encode(captions, 64)
        np.testing.assert_allclose(actual[[0, 3]], expected, atol=1e-4)
        assert not actual[[1, 2]].any()
        assert encoder.dim == 50


def test_invalid_word_vector_files_raise(minilm: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    plain = word_lines(minilm, tokens, header=False).splitlines()
    row = next(i for i, line in enumerate(plain) if line.startswith("face "))
    plain[row] = plain[row].rsplit(" ", 3)[0]
    (tmp_path / "cut.txt").write_text("\n".join(plain))
    with pytest.raises(ModelError, match=rf"cut\.txt, line {row + 1} "):
        load(f"words:{tmp_path / 'cut.txt'}", ["a face"])
    with pytest.raises(ModelError, match="no vector"):
        load(f"words:{tmp_path / 'cut.txt'}", ["zzyzx"])
    (tmp_path / "prose.txt").write_text("It was a dark night.\n")
    with pytest.raises(ModelError, match=r"prose\.txt"):
        load(f"words:{tmp_path / 'prose.txt'}", ["night"])
    del plain[row]
    (tmp_path / "half.txt.gz").write_bytes(gzip.compress("\n".join(plain).encode())[:-2000])
    with pytest.raises(ModelError, match=r"half\.txt\.gz"):
        load(f"words:{tmp_path / 'half.txt.gz'}", ["face"])
    with pytest.raises(ModelError, match=r"nowhere\.vec"):
        resolve_encoder("words:nowhere.vec")


def test_idf_equals_scikit_learn(dataset: CaptionDataset) -> None:
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.preprocessing import normalize

    captions = all_captions(dataset)
    parts = [captions[:100], captions[100:101], [], captions[101:]]
    encoder = BagOfWordsEncoder(lambda: iter(parts), use_idf=True)
    counts: Any = count_hashed_words(captions)
    reference: Any = TfidfTransformer().fit(counts)
    np.testing.assert_allclose(encoder.idf, reference.idf_, rtol=1e-6)
    plain = normalize(counts)
    # Up to 2,048 different words, no two share a column, so every similarity is exact.
    for actual, direct in ((encoder, reference.transform(counts)), (load("bow", captions), plain)):
        rows = actual.encode(captions, 64)
        np.testing.assert_allclose(rows @ rows.T, (direct @ direct.T).toarray(), atol=1e-6)
        assert rows.shape == (len(captions), NUM_COLUMNS)


@pytest.mark.parametrize("num_direct_columns", [2048, 256])
def test_hashing_preserves_tfidf_neighbors(num_direct_columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    # With 256 direct columns, most of the 1,400 words of these captions share a column.
    monkeypatch.setattr("likewise.embeddings.lexical._NUM_DIRECT_COLUMNS", num_direct_columns)
    captions = sorted({emoji.name for emoji in load_emoji()})
    exact: Any = TfidfVectorizer(analyzer=lambda text: re.findall(r"\w+", text.lower())).fit_transform(
        captions
    )
    truth = (exact @ exact.T).toarray()
    rows = load("tfidf", captions).encode(captions, 64).astype(np.float16).astype(np.float32)
    hashed = rows @ rows.T
    for similarity in (truth, hashed):
        np.fill_diagonal(similarity, -1)
    nearest = np.argsort(-hashed, axis=1, kind="stable")[:, :10]
    tenth = -np.sort(-truth, axis=1)[:, 9:10]
    # Equally similar captions are interchangeable.
    overlap = (np.take_along_axis(truth, nearest, axis=1) >= tenth - 1e-6).mean()
    assert overlap >= 0.95


def test_split_words_of_many_scripts() -> None:
    assert split_words("L'été, c'est 2 fois!") == ["L", "été", "c", "est", "2", "fois"]
    assert split_words("हिन्दी में लिखा") == ["हिन्दी", "में", "लिखा"]
    assert split_words("красный дом—синий") == ["красный", "дом", "синий"]
    assert split_words("猫と犬 dog") == ["猫", "と", "犬", "dog"]
    assert split_words("cafe\u0301") == split_words("café")
    assert split_words("😀 …") == []


def test_invalid_encoder_names_raise(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="'word:'.*Did you mean words.*tfidf"):
        resolve_encoder("word:glove.txt")
    with pytest.raises(InvalidInputError, match="example: hf:"):
        resolve_encoder("hf:")
    with pytest.raises(InvalidInputError, match="`pooling` .*tfidf.*hf:"):
        resolve_encoder("tfidf", EncoderOptions(pooling="cls"))
    with pytest.raises(InvalidInputError, match="`max_length`"):
        EncoderOptions(max_length=0)
    with pytest.raises(ModelError, match="/nowhere"):
        resolve_encoder("hf:/nowhere")
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve_encoder(f"hf:{tmp_path}")
    with pytest.raises(ModelError, match="nothing"):
        resolve_encoder("image:nothing")


def test_weights_id_depends_on_scheme_and_weights_and_the_name_on_options(
    minilm: Path, tmp_path: Path
) -> None:
    names = [MINILM, str(minilm), f"hf:{minilm}", "tfidf", "bow", "image:random:resnet10t"]
    assert len({resolve_encoder(name).weights_id for name in names}) == len(names)
    for number in range(2):
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / "config.json").write_text(str(number))
        names.append(resolve_encoder(f"model2vec:{tmp_path / 'm'}").weights_id)
    assert names[-1] != names[-2]
    spec = resolve_encoder(f"hf:{minilm}", EncoderOptions(pooling="cls", max_length=20))
    assert spec.name == "hf:model+cls+20"


def test_unavailable_hub_models_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (
        "no-such-owner/no-such-model",
        "hf:no-such-owner/no-such-model",
        "model2vec:no-such-owner/no-such-model",
    ):
        with pytest.raises(ModelError, match="cannot load.*Hugging Face hub"):
            load(name)


def test_loading_restores_the_logging_of_transformers(minilm: Path) -> None:
    from transformers.utils import logging as transformers_logging

    before = (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
    load(f"hf:{minilm}")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
