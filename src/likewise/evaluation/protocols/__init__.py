"""Registry of evaluation protocols; each is one `Protocol` subclass in its own file."""

from dataclasses import dataclass, field, fields, replace

from likewise.errors import InvalidInputError, did_you_mean
from likewise.evaluation.protocols.base import AnnotationType, ClassificationConfig, Protocol
from likewise.evaluation.protocols.clustering import Clustering, ClusteringConfig
from likewise.evaluation.protocols.detection import Detection, DetectionConfig
from likewise.evaluation.protocols.fewshot import FewShot, FewShotConfig
from likewise.evaluation.protocols.finetune import FineTuning, FineTuningConfig
from likewise.evaluation.protocols.image_text import ImageText, ImageTextConfig
from likewise.evaluation.protocols.knn import KNN, KNNConfig, KNNGrid, KNNGridConfig
from likewise.evaluation.protocols.linear import Linear, LinearProbeConfig
from likewise.evaluation.protocols.localization import Localization, LocalizationConfig
from likewise.evaluation.protocols.retrieval import Retrieval, RetrievalConfig
from likewise.evaluation.protocols.segmentation import Segmentation, SegmentationConfig
from likewise.evaluation.protocols.zero_shot import ZeroShot, ZeroShotConfig

__all__ = ["PROTOCOLS", "AnnotationType", "Protocol", "ProtocolConfig", "build_protocol"]

_CLASSIFICATION = (Linear, FewShot, KNN, KNNGrid, FineTuning, ZeroShot)
_OTHERS = (Retrieval, Clustering, Localization, ImageText, Detection, Segmentation)
PROTOCOLS: dict[str, type[Protocol]] = {protocol.name: protocol for protocol in _CLASSIFICATION + _OTHERS}


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """The configs of all protocols; the field of protocol `knn-grid` is `knn_grid`, and so on."""

    linear: LinearProbeConfig = field(default_factory=LinearProbeConfig)
    fewshot: FewShotConfig = field(default_factory=FewShotConfig)
    knn: KNNConfig = field(default_factory=KNNConfig)
    knn_grid: KNNGridConfig = field(default_factory=KNNGridConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    finetune: FineTuningConfig = field(default_factory=FineTuningConfig)
    localization: LocalizationConfig = field(default_factory=LocalizationConfig)
    zeroshot: ZeroShotConfig = field(default_factory=ZeroShotConfig)
    image_text: ImageTextConfig = field(default_factory=ImageTextConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)

    def with_mean_class_accuracy(self) -> "ProtocolConfig":
        """Return a copy in which every classification protocol reports the mean per-class accuracy."""
        configs = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{
            name: replace(config, mean_class_accuracy=True)
            for name, config in configs.items() if isinstance(config, ClassificationConfig)
        })  # fmt: skip


def build_protocol(name: str, config: ProtocolConfig) -> Protocol:
    """Return the protocol with its config; raises InvalidInputError for an unknown name."""
    if name not in PROTOCOLS:
        known = f"known: {', '.join(PROTOCOLS)}.{did_you_mean(name, list(PROTOCOLS))}"
        raise InvalidInputError(f"unknown protocol {name!r}; {known}", field="protocols")
    return PROTOCOLS[name](getattr(config, name.replace("-", "_")))
