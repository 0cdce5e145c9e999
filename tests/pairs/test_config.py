"""Rules as settings: what is refused, what is said, and how they are typed."""

import subprocess
import sys
from pathlib import Path

import pytest

from likewise.errors import InputError
from likewise.neighbors.config import SearchRule
from likewise.pairs.config import PairRule, parse_rule


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
    with pytest.raises(InputError, match=told):
        PairRule(**given)


def test_rules_are_typed_as_settings() -> None:
    assert parse_rule("paper") == PairRule()
    assert parse_rule("k=3, mutual=10,hubs=csls") == PairRule(k=3, mutual=10, hubs="csls")
    assert parse_rule("distinct-captions,min-similarity=0.5") == PairRule(
        distinct_captions=True, min_similarity=0.5
    )
    assert parse_rule("pairs=file,pairs_file=a.csv") == PairRule(pairs="file", pairs_file=Path("a.csv"))
    with pytest.raises(InputError, match="unknown setting 'mutal'.*Did you mean mutual"):
        parse_rule("mutal=3")
    with pytest.raises(InputError, match="k stands twice in the rule 'k=3,k=5'"):
        parse_rule("k=3,k=5")
    with pytest.raises(InputError, match="'three' in the rule 'k=three' is not a number"):
        parse_rule("k=three")


def test_summaries_say_every_setting_in_words() -> None:
    assert PairRule().summary() == "each image is paired with the image described most like it"
    told = PairRule(
        k=5,
        draw_temperature=0.1,
        scope="other",
        distinct_captions=True,
        mutual=10,
        self_share=0.25,
        ratio=1.1,
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
    assert PairRule(pairs="vision").summary() == "each image is paired with the image that looks most like it"


def test_what_is_searched_for_is_a_part_of_the_rule() -> None:
    rule = PairRule(k=3, scope="same", distinct_images=True)
    assert rule.search == SearchRule(scope="same", distinct_images=True)
    assert PairRule().depth == 1
    assert PairRule(k=3, mutual=10).depth == 10
    assert PairRule(hubs="csls").depth == 50


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
