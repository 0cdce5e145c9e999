"""Which languages the captions are written in, as far as their length lets it be told."""

from collections import Counter
from typing import Any

from likewise.collection.audit.survey import rows_of
from likewise.collection.records import Collection
from likewise.errors import DependencyError
from likewise.progress import Progress

SHORTEST = 20
SURE = 0.5
SAMPLE = 20_000
TOO_SHORT = "too short to tell"
UNSURE = "unsure"


def language_mix(collection: Collection, captions: int, progress: Progress) -> dict[str, Any]:
    """Guess the language of up to 20,000 captions, taken evenly from all.

    Captions under 20 characters are not guessed, and guesses that py3langid holds for less than half
    likely are counted as unsure: titles and lists of names often are.

    Raises:
        DependencyError: where py3langid is missing.
    """
    every = max(1, -(-captions // SAMPLE))
    counts: Counter[str] = Counter()
    identify = _identifier() if captions else None
    number = 0
    with progress.task("languages", -(-captions // every), "captions") as task:
        for shard in range(len(collection.shards)):
            for _, row in rows_of(collection, shard, ["captions"]):
                for caption in row["captions"]:
                    if number % every == 0:
                        counts[_language(identify, caption)] += 1
                        task.advance()
                    number += 1
    return {
        "captions": counts.total(),
        "of": captions,
        "counts": [list(entry) for entry in counts.most_common()],
    }


def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as fault:
        raise DependencyError(
            "the audit needs py3langid 0.4 or later: pip install 'py3langid>=0.4'"
        ) from fault
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _language(identify: Any, caption: str) -> str:
    if len(caption) < SHORTEST:
        return TOO_SHORT
    language, probability = identify.classify(caption)
    return str(language) if probability >= SURE else UNSURE
