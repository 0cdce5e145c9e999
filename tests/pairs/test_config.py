"""Pair configs: validation, summaries and parsing."""

import subprocess
import sys
from pathlib import Path

import pytest

from likewise.errors import InvalidInputError
from likewise.neighbors.config import SearchConfig
from likewise.pairs.config import PairConfig, parse_pair_config


def test_default_is_the_nearest_caption() -> None:
    config = PairConfig()
    assert config.source == "language"
    assert config.summary() == "each image is paired with the image with the most similar captions"
    assert PairConfig(source="self").summary() == "each image is paired with another view of itself"


@pytest.mark.parametrize(
    ("overrides", "field", "text"),
    [
        ({"k": 0}, "k", "at least 1, got 0"),
        ({"source": "label", "hubness_correction": "csls"}, "hubness_correction", "does not apply"),
        ({"min_similarity": 1.5}, "min_similarity", "between -1 and 1, got 1.5"),
        ({"self_pair_prob": -0.1}, "self_pair_prob", "got -0.1"),
        ({"sampling_temperature": 0.0}, "sampling_temperature", "above 0"),
        ({"ratio_threshold": 0.5}, "ratio_threshold", "at least 1, got 0.5"),
        ({"source": "file"}, "pairs_file", "require each other"),
        ({"pairs_file": Path("p.csv")}, "pairs_file", "require each other"),
        (
            {"hubness_correction": "mutual-proximity", "caption_pooling": "max"},
            "caption_pooling",
            "one vector",
        ),
        ({"source": "hybrid", "caption_pooling": "max"}, "caption_pooling", "one vector"),
        (
            {"source": "hybrid", "hubness_correction": "mutual-proximity"},
            "hubness_correction",
            "does not apply to `source` 'hybrid'",
        ),
        ({"source": "label", "group_scope": "different"}, "group_scope", "does not apply"),
        ({"source": "self", "k": 3}, "k", "does not apply to `source` 'self'"),
        ({"source": "label", "fallback": "nearest"}, "fallback", "no nearest"),
        ({"caption_pooling": "sample", "mutual_k": 5}, "caption_pooling", "single captions"),
        ({"target_recall": 2.0}, "target_recall", "got 2.0"),
    ],
)
def test_invalid_pair_config_raises(overrides: dict, field: str, text: str) -> None:
    with pytest.raises(InvalidInputError, match=text) as excinfo:
        PairConfig(**overrides)
    assert excinfo.value.field == field


def test_pair_configs_are_parsed_from_text() -> None:
    assert parse_pair_config("default") == PairConfig()
    config = parse_pair_config("k=3,caption_encoder=./a, b,mutual-k=5,exclude_identical_captions")
    assert (config.k, config.caption_encoder, config.mutual_k) == (3, "./a, b", 5)
    assert config.exclude_identical_captions
    assert parse_pair_config("k=3, mutual-k=10,hubness_correction=csls") == PairConfig(
        k=3, mutual_k=10, hubness_correction="csls"
    )
    assert parse_pair_config("exclude-identical-captions,min-similarity=0.5") == PairConfig(
        exclude_identical_captions=True, min_similarity=0.5
    )
    assert parse_pair_config("source=file,pairs_file=a.csv") == PairConfig(
        source="file", pairs_file=Path("a.csv")
    )
    with pytest.raises(InvalidInputError, match="'mutal_k'.*Did you mean mutual_k"):
        parse_pair_config("mutal_k=3")
    with pytest.raises(InvalidInputError, match="'k=3,k=5'") as excinfo:
        parse_pair_config("k=3,k=5")
    assert excinfo.value.field == "k"
    with pytest.raises(InvalidInputError, match="'three'.*'k=three'"):
        parse_pair_config("k=three")


def test_summary_names_every_constraint() -> None:
    summary = PairConfig(
        k=5,
        sampling_temperature=0.1,
        group_scope="different",
        exclude_identical_captions=True,
        mutual_k=10,
        self_pair_prob=0.25,
        ratio_threshold=1.1,
    ).summary()
    for phrase in (
        "one of the 5 images with the most similar captions, sampled by similarity",
        "in a different group",
        "without identical captions",
        "each other's 10 nearest",
        "ratio of 1.1",
        "with probability 25% with itself",
    ):
        assert phrase in summary
    assert (
        PairConfig(source="vision").summary()
        == "each image is paired with the image with the most similar image embeddings"
    )


def test_search_config_has_only_the_fields_of_the_search() -> None:
    config = PairConfig(k=3, group_scope="same", exclude_near_duplicates=True)
    assert config.search_config == SearchConfig(group_scope="same", exclude_near_duplicates=True)
    assert PairConfig().num_candidates == 1
    assert PairConfig(k=3, mutual_k=10).num_candidates == 10
    assert PairConfig(hubness_correction="csls").num_candidates == 50


def test_choices_are_checked_without_a_type_checker() -> None:
    # In a subprocess, because the type checker of the tests would raise first.
    for argument, choices in (
        ("source='langage'", "self, language"),
        ("group_scope='sam'", "any, same, different. Did you mean same?"),
        ("caption_pooling='men'", "mean, max, sample."),
    ):
        code = f"from likewise.pairs.config import PairConfig; PairConfig({argument})"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"`{argument.partition('=')[0]}`" in result.stderr
        assert choices in result.stderr
