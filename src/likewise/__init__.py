"""Language-guided contrastive pre-training: images with similar captions become positive pairs.

dataset = likewise.import_dataset("photos/", "photos.likewise")
likewise.embed(dataset, encoder="all-MiniLM-L6-v2")
run = likewise.train(dataset, out="run", config=likewise.TrainConfig(backbone="resnet18", image_size=64))
encoder = likewise.load_encoder(run)
features = encoder.encode(["cat.jpg", "dog.jpg"])
print(likewise.evaluate(encoder, datasets=["eurosat"], protocols=["linear", "knn"]).table())
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from likewise.data.audit.audit import AuditReport, audit_dataset
    from likewise.data.config import AuditConfig, ImportOptions
    from likewise.data.dataset import CaptionDataset
    from likewise.data.images import UnreadableImageError
    from likewise.data.importing import import_dataset
    from likewise.embeddings.config import EncoderOptions
    from likewise.embeddings.embed import embed
    from likewise.embeddings.store import Embeddings
    from likewise.errors import (
        ArtifactError,
        DependencyError,
        InterruptedRunError,
        InvalidInputError,
        LikewiseError,
        ModelError,
        TrainingError,
    )
    from likewise.evaluation.datasets.captioned import CaptionedDataset, open_captioned
    from likewise.evaluation.datasets.detection import DetectionDataset, open_detection
    from likewise.evaluation.datasets.labeled import LabeledDataset, open_labeled
    from likewise.evaluation.datasets.segmentation import SegmentationDataset, open_segmentation
    from likewise.evaluation.evaluate import ColumnOptions, evaluate
    from likewise.evaluation.protocols import ProtocolConfig
    from likewise.evaluation.results import Comparison, EvalResults, ResultRow, compare, read_results
    from likewise.models.encoders import ImageEncoder, load_encoder
    from likewise.neighbors.config import SearchConfig
    from likewise.neighbors.index import Neighbors, find_neighbors
    from likewise.pairs.analyze import PairAnalysis, analyze_pairs
    from likewise.pairs.build import build_pairs
    from likewise.pairs.config import PairConfig
    from likewise.pairs.sampling import Pairs
    from likewise.progress import Progress, RichProgress
    from likewise.report.run_report import write_report
    from likewise.training import losses
    from likewise.training.adapt_config import (
        AdaptConfig,
        AdapterOptions,
        FullOptions,
        LevelOptions,
        LoraOptions,
    )
    from likewise.training.adaptation import adapt
    from likewise.training.blending import AdaptOutcome, BlendScore
    from likewise.training.config import TrainConfig
    from likewise.training.loader import PairDataset, PairLoader
    from likewise.training.methods.options import (
        BarlowTwinsOptions,
        BYOLOptions,
        CLIPOptions,
        DCLOptions,
        DeCLIPOptions,
        MethodOptions,
        MoCoOptions,
        MoCoV3Options,
        NNCLROptions,
        PairClassifierOptions,
        SigLIPOptions,
        SimCLROptions,
        SimSiamOptions,
        SLIPOptions,
        SupConOptions,
        SwAVOptions,
        VICRegOptions,
    )
    from likewise.training.train import Run, train

__version__ = "0.1.0"
__all__ = [
    "AdaptConfig",
    "AdaptOutcome",
    "AdapterOptions",
    "ArtifactError",
    "AuditConfig",
    "AuditReport",
    "BYOLOptions",
    "BarlowTwinsOptions",
    "BlendScore",
    "CLIPOptions",
    "CaptionDataset",
    "CaptionedDataset",
    "ColumnOptions",
    "Comparison",
    "DCLOptions",
    "DeCLIPOptions",
    "DependencyError",
    "DetectionDataset",
    "Embeddings",
    "EncoderOptions",
    "EvalResults",
    "FullOptions",
    "ImageEncoder",
    "ImportOptions",
    "InterruptedRunError",
    "InvalidInputError",
    "LabeledDataset",
    "LevelOptions",
    "LikewiseError",
    "LoraOptions",
    "MethodOptions",
    "MoCoOptions",
    "MoCoV3Options",
    "ModelError",
    "NNCLROptions",
    "Neighbors",
    "PairAnalysis",
    "PairClassifierOptions",
    "PairConfig",
    "PairDataset",
    "PairLoader",
    "Pairs",
    "Progress",
    "ProtocolConfig",
    "ResultRow",
    "RichProgress",
    "Run",
    "SLIPOptions",
    "SearchConfig",
    "SegmentationDataset",
    "SigLIPOptions",
    "SimCLROptions",
    "SimSiamOptions",
    "SupConOptions",
    "SwAVOptions",
    "TrainConfig",
    "TrainingError",
    "UnreadableImageError",
    "VICRegOptions",
    "adapt",
    "analyze_pairs",
    "audit_dataset",
    "build_pairs",
    "compare",
    "embed",
    "evaluate",
    "find_neighbors",
    "import_dataset",
    "load_encoder",
    "losses",
    "open_captioned",
    "open_detection",
    "open_labeled",
    "open_segmentation",
    "read_results",
    "train",
    "write_report",
]

# Public names are imported on first use: `import likewise` and `likewise --help` do not import torch.
_MODULES = {
    "AdaptConfig": "likewise.training.adapt_config",
    "AdaptOutcome": "likewise.training.blending",
    "AdapterOptions": "likewise.training.adapt_config",
    "BlendScore": "likewise.training.blending",
    "FullOptions": "likewise.training.adapt_config",
    "LevelOptions": "likewise.training.adapt_config",
    "LoraOptions": "likewise.training.adapt_config",
    "adapt": "likewise.training.adaptation",
    "ArtifactError": "likewise.errors",
    "AuditConfig": "likewise.data.config",
    "AuditReport": "likewise.data.audit.audit",
    "BYOLOptions": "likewise.training.methods.options",
    "BarlowTwinsOptions": "likewise.training.methods.options",
    "CLIPOptions": "likewise.training.methods.options",
    "CaptionDataset": "likewise.data.dataset",
    "CaptionedDataset": "likewise.evaluation.datasets.captioned",
    "ColumnOptions": "likewise.evaluation.evaluate",
    "DCLOptions": "likewise.training.methods.options",
    "DeCLIPOptions": "likewise.training.methods.options",
    "Comparison": "likewise.evaluation.results",
    "DependencyError": "likewise.errors",
    "DetectionDataset": "likewise.evaluation.datasets.detection",
    "Embeddings": "likewise.embeddings.store",
    "EncoderOptions": "likewise.embeddings.config",
    "EvalResults": "likewise.evaluation.results",
    "ImageEncoder": "likewise.models.encoders",
    "ImportOptions": "likewise.data.config",
    "InterruptedRunError": "likewise.errors",
    "InvalidInputError": "likewise.errors",
    "LabeledDataset": "likewise.evaluation.datasets.labeled",
    "LikewiseError": "likewise.errors",
    "MethodOptions": "likewise.training.methods.options",
    "MoCoOptions": "likewise.training.methods.options",
    "MoCoV3Options": "likewise.training.methods.options",
    "ModelError": "likewise.errors",
    "NNCLROptions": "likewise.training.methods.options",
    "PairClassifierOptions": "likewise.training.methods.options",
    "Neighbors": "likewise.neighbors.index",
    "PairAnalysis": "likewise.pairs.analyze",
    "PairConfig": "likewise.pairs.config",
    "PairDataset": "likewise.training.loader",
    "PairLoader": "likewise.training.loader",
    "Pairs": "likewise.pairs.sampling",
    "Progress": "likewise.progress",
    "ProtocolConfig": "likewise.evaluation.protocols",
    "ResultRow": "likewise.evaluation.results",
    "RichProgress": "likewise.progress",
    "Run": "likewise.training.train",
    "SLIPOptions": "likewise.training.methods.options",
    "SearchConfig": "likewise.neighbors.config",
    "SigLIPOptions": "likewise.training.methods.options",
    "SimCLROptions": "likewise.training.methods.options",
    "SimSiamOptions": "likewise.training.methods.options",
    "SupConOptions": "likewise.training.methods.options",
    "SwAVOptions": "likewise.training.methods.options",
    "SegmentationDataset": "likewise.evaluation.datasets.segmentation",
    "TrainConfig": "likewise.training.config",
    "TrainingError": "likewise.errors",
    "UnreadableImageError": "likewise.data.images",
    "VICRegOptions": "likewise.training.methods.options",
    "analyze_pairs": "likewise.pairs.analyze",
    "audit_dataset": "likewise.data.audit.audit",
    "build_pairs": "likewise.pairs.build",
    "compare": "likewise.evaluation.results",
    "embed": "likewise.embeddings.embed",
    "evaluate": "likewise.evaluation.evaluate",
    "find_neighbors": "likewise.neighbors.index",
    "import_dataset": "likewise.data.importing",
    "load_encoder": "likewise.models.encoders",
    "losses": "likewise.training",
    "open_captioned": "likewise.evaluation.datasets.captioned",
    "open_detection": "likewise.evaluation.datasets.detection",
    "open_labeled": "likewise.evaluation.datasets.labeled",
    "open_segmentation": "likewise.evaluation.datasets.segmentation",
    "read_results": "likewise.evaluation.results",
    "train": "likewise.training.train",
    "write_report": "likewise.report.run_report",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module 'likewise' has no attribute {name!r}")
    if name == "losses":  # a module, not a name in one
        return import_module("likewise.training.losses")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
