"""Learn image encoders from captioned images: pictures that are described alike, learn alike.

collection = likewise.import_collection("photos/", "photos.likewise")
likewise.embed(collection, "all-mpnet-base-v2")
likewise.find_neighbors(collection)
run = likewise.train(collection, "run", likewise.TrainSettings(backbone="resnet18", size=64))
likewise.evaluate(run.path, "labelled/")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from likewise.data.audit.audit import audit_dataset
    from likewise.data.dataset import CaptionDataset
    from likewise.data.importing import import_dataset
    from likewise.data.readers.base import ImportOptions
    from likewise.embeddings.embed import embed
    from likewise.errors import LikewiseError
    from likewise.evaluation.evaluate import evaluate
    from likewise.neighbors.config import SearchConfig
    from likewise.neighbors.index import find_neighbors
    from likewise.pairs.analyze import analyze_pairs
    from likewise.pairs.build import build_pairs
    from likewise.pairs.config import PairConfig
    from likewise.report.run_report import write_report
    from likewise.training.config import TrainConfig
    from likewise.training.train import Run, train

__version__ = "0.1.0"
__all__ = [
    "CaptionDataset",
    "ImportOptions",
    "LikewiseError",
    "PairConfig",
    "Run",
    "SearchConfig",
    "TrainConfig",
    "analyze_pairs",
    "audit_dataset",
    "build_pairs",
    "embed",
    "evaluate",
    "find_neighbors",
    "import_dataset",
    "train",
    "write_report",
]

# Names are loaded when first used: `import likewise` and `likewise --help` stay fast without torch.
_HOMES = {
    "CaptionDataset": "likewise.data.dataset",
    "ImportOptions": "likewise.data.readers.base",
    "LikewiseError": "likewise.errors",
    "PairConfig": "likewise.pairs.config",
    "Run": "likewise.training.train",
    "TrainConfig": "likewise.training.config",
    "SearchConfig": "likewise.neighbors.config",
    "audit_dataset": "likewise.data.audit.audit",
    "analyze_pairs": "likewise.pairs.analyze",
    "embed": "likewise.embeddings.embed",
    "evaluate": "likewise.evaluation.evaluate",
    "import_dataset": "likewise.data.importing",
    "find_neighbors": "likewise.neighbors.index",
    "build_pairs": "likewise.pairs.build",
    "train": "likewise.training.train",
    "write_report": "likewise.report.run_report",
}


def __getattr__(name: str) -> Any:
    """Load a public name from where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'likewise' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
