"""`RunDirectory`: the names of all files of a training run."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDirectory:
    """The layout of a run's directory; the files are optional until the run is finished.

    Attributes:
        path: The directory.
    """

    path: Path

    @property
    def config_path(self) -> Path:
        """The settings as given, and the values derived from them (YAML)."""
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        """Training metrics (JSON Lines)."""
        return self.path / "metrics.jsonl"

    @property
    def validation_path(self) -> Path:
        """Validation metrics (JSON Lines); empty without validation pairs."""
        return self.path / "validation.jsonl"

    @property
    def tensorboard_dir(self) -> Path:
        """The TensorBoard logs."""
        return self.path / "tensorboard"

    @property
    def encoder_path(self) -> Path:
        """The encoder that the run results in: the best with validation pairs, else the last."""
        return self.path / "encoder.safetensors"

    @property
    def best_encoder_path(self) -> Path:
        """The best encoder so far, until the run is finished."""
        return self.path / "encoder-best.safetensors"

    @property
    def last_encoder_path(self) -> Path:
        """The encoder of the last step, with validation pairs."""
        return self.path / "encoder-last.safetensors"

    @property
    def adaptation_path(self) -> Path:
        """The validation of all blends of an adaptation, and the chosen one (JSON)."""
        return self.path / "adaptation.json"

    @property
    def preview_views_path(self) -> Path:
        """The views of the first pairs, (pairs, views, size, size, 3) uint8 (NumPy)."""
        return self.path / "preview.npy"

    @property
    def preview_pairs_path(self) -> Path:
        """The images of the first pairs (JSON)."""
        return self.path / "preview.json"

    def checkpoint_path(self, step: int) -> Path:
        """Return the checkpoint after a number of steps."""
        return self.path / f"checkpoint-{step:08d}.safetensors"

    def list_checkpoints(self) -> list[Path]:
        """Return the existing checkpoints, oldest first."""
        return sorted(self.path.glob("checkpoint-*.safetensors"))
