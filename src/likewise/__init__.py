"""Learn image encoders from captioned images: pictures that are described alike, learn alike.

collection = likewise.import_collection("photos/", "photos.likewise")
likewise.embed(collection, "all-mpnet-base-v2")
likewise.find_neighbors(collection)
run = likewise.train(collection, "run", likewise.TrainSettings(backbone="resnet18", size=64))
likewise.evaluate(run.path, "labelled/")
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from likewise.collection.audit.audit import audit
    from likewise.collection.importing import import_collection
    from likewise.collection.records import Collection
    from likewise.collection.sources.candidates import ImportOptions
    from likewise.embeddings.embed import embed
    from likewise.errors import LikewiseError
    from likewise.evaluation.evaluate import evaluate
    from likewise.neighbors.diagnose import diagnose
    from likewise.neighbors.neighbors import find_neighbors
    from likewise.neighbors.rules import PairRule, SearchRule
    from likewise.neighbors.sources import make_pairs
    from likewise.pretraining.settings import TrainSettings
    from likewise.pretraining.train import Run, train
    from likewise.report.html import write_report

# OpenMP's threads spin while they wait for each other. Unbounded, they take the processors from the threads
# that make batches and from other programs (training 3 times slower on 2 cores of which one is busy); without
# any spinning, small products wait for the scheduler (the linear probe 6 times slower).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
__all__ = [
    "Collection",
    "ImportOptions",
    "LikewiseError",
    "PairRule",
    "Run",
    "SearchRule",
    "TrainSettings",
    "audit",
    "diagnose",
    "embed",
    "evaluate",
    "find_neighbors",
    "import_collection",
    "make_pairs",
    "train",
    "write_report",
]

# Names are loaded when first used: `import likewise` and `likewise --help` stay fast without torch.
_HOMES = {
    "Collection": "likewise.collection.records",
    "ImportOptions": "likewise.collection.sources.candidates",
    "LikewiseError": "likewise.errors",
    "PairRule": "likewise.neighbors.rules",
    "Run": "likewise.pretraining.train",
    "TrainSettings": "likewise.pretraining.settings",
    "SearchRule": "likewise.neighbors.rules",
    "audit": "likewise.collection.audit.audit",
    "diagnose": "likewise.neighbors.diagnose",
    "embed": "likewise.embeddings.embed",
    "evaluate": "likewise.evaluation.evaluate",
    "import_collection": "likewise.collection.importing",
    "find_neighbors": "likewise.neighbors.neighbors",
    "make_pairs": "likewise.neighbors.sources",
    "train": "likewise.pretraining.train",
    "write_report": "likewise.report.html",
}


def __getattr__(name: str) -> Any:
    """Load a public name from where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'likewise' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
