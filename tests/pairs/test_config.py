"""Rules as settings: what is refused, what is said, and how they are typed."""

import subprocess
import sys
from pathlib import Path

import pytest

from likewise.errors import InvalidInputError
from likewise.neighbors.config import SearchConfig
from likewise.pairs.config import PairConfig, parse_pair_config


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"k": 0}, "k is 0; it must be at least 1"),
        ({"pairs": "label", "hubs": "csls"}, "--hubs means nothing for pairs from label"),
        ({"min_similarity": 1.5}, "min similarity is 1.5; it must be between -1 and 1"),
        ({"self_share": -0.1}, "self share is -0.1"),
        ({"draw_temperature": 0.0}, "must be above 0"),
        ({"ratio": 0.5}, "ratio is 0.5; it must be at least 1"),
        ({"pairs": "file"}, "--pairs-file FILE go together"),
        ({"pairs_file": Path("p.csv")}, "--pairs-file FILE go together"),
        ({"hubs": "mutual-proximity", "captions": "best"}, "one vector an image"),
        ({"pairs": "hybrid", "captions": "best"}, "one vector an image"),
        ({"pairs": "label", "scope": "other"}, "--scope means nothing for pairs from label"),
        ({"pairs": "self", "k": 3}, "--k means nothing for pairs from self"),
        ({"pairs": "label", "fallback": "nearest"}, "none is the nearest"),
        ({"captions": "draw", "mutual": 5}, "compares single captions"),
        ({"index_recall": 2.0}, "index recall is 2.0"),
    ],
)
def test_what_no_rule_can_mean_is_refused(given: dict, told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        PairConfig(**given)


def test_rules_are_typed_as_settings() -> None:
    assert parse_pair_config("paper") == PairConfig()
    assert parse_pair_config("k=3, mutual=10,hubs=csls") == PairConfig(
        k=3, mutual_k=10, hubness_correction="csls"
    )
    assert parse_pair_config("distinct-captions,min-similarity=0.5") == PairConfig(
        exclude_identical_captions=True, min_similarity=0.5
    )
    assert parse_pair_config("pairs=file,pairs_file=a.csv") == PairConfig(
        source="file", pairs_file=Path("a.csv")
    )
    with pytest.raises(InvalidInputError, match="unknown setting 'mutal'.*Did you mean mutual"):
        parse_pair_config("mutal=3")
    with pytest.raises(InvalidInputError, match="k stands twice in the rule 'k=3,k=5'"):
        parse_pair_config("k=3,k=5")
    with pytest.raises(InvalidInputError, match="'three' in the rule 'k=three' is not a number"):
        parse_pair_config("k=three")


def test_summaries_say_every_setting_in_words() -> None:
    assert PairConfig().summary() == "each image is paired with the image described most like it"
    told = PairConfig(
        k=5,
        sampling_temperature=0.1,
        group_scope="different",
        exclude_identical_captions=True,
        mutual_k=10,
        self_pair_prob=0.25,
        ratio_threshold=1.1,
    ).summary()
    for words in (
        "one of the 5 images described most like it, the nearer the more often",
        "from another group",
        "never of the same caption",
        "each other's 10 nearest",
        "ratio 1.1",
        "in 25% of the draws with itself",
    ):
        assert words in told
    assert (
        PairConfig(source="vision").summary() == "each image is paired with the image that looks most like it"
    )


def test_what_is_searched_for_is_a_part_of_the_rule() -> None:
    rule = PairConfig(k=3, group_scope="same", exclude_near_duplicates=True)
    assert rule.search_config == SearchConfig(group_scope="same", exclude_near_duplicates=True)
    assert PairConfig().num_candidates == 1
    assert PairConfig(k=3, mutual_k=10).num_candidates == 10
    assert PairConfig(hubness_correction="csls").num_candidates == 50


def test_names_are_checked_without_the_types() -> None:
    # In a process of its own: the tests' type checker would be first to complain.
    for given, told in (
        ("pairs='langage'", "unknown source of pairs 'langage'; known: self, language"),
        ("scope='sam'", "unknown scope 'sam'; known: any, same, other. Did you mean same?"),
        ("captions='bst'", "unknown captions 'bst'; known: mean, best, draw. Did you mean best?"),
    ):
        code = f"from likewise.neighbors.rules import PairRule; PairRule({given})"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert told in ran.stderr
