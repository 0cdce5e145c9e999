"""`adapt`: improve a pretrained encoder for a captioned dataset, or keep it."""

import logging
from dataclasses import asdict
from pathlib import Path

import torch

from likewise.artifacts import Artifact, write_json
from likewise.data.dataset import CaptionDataset
from likewise.distributed import DistributedContext, init_distributed, local_device
from likewise.models.encoders import ImageEncoder, load_encoder
from likewise.pairs.config import PairConfig
from likewise.progress import NULL_PROGRESS, Progress
from likewise.run_directory import RunDirectory
from likewise.training.adapt_config import AdaptConfig, AdapterOptions, adapt_config_to_dict
from likewise.training.adapt_data import AdaptData, open_adapt_data
from likewise.training.blending import Blender, choose_blend
from likewise.training.feature_adapter import FeatureBlender, train_adapter
from likewise.training.finetuning import finetune
from likewise.training.run_files import pair_config_to_dict, write_config
from likewise.training.train import Run
from likewise.training.trainer import ARTIFACT_KIND

logger = logging.getLogger(__name__)

# Paths and names; what they refer to is hashed with the inputs.
_NON_HASHED = ("encoder", "caption_encoder", "image_encoder", "filter", "pairs_file", "index")


def adapt(
    dataset: CaptionDataset | str | Path,
    encoder: ImageEncoder | str | Path,
    out: str | Path,
    config: AdaptConfig | None = None,
    pair_config: PairConfig | None = None,
    *,
    retain: CaptionDataset | str | Path | None = None,
    num_workers: int | None = None,
    progress: Progress = NULL_PROGRESS,
) -> Run:
    """Adapt a pretrained encoder to a dataset by its captions, and keep the start if that does not help.

    The features of all images are computed once, and cached in the dataset. At level `adapter` a residual
    adapter is trained on them. At `lora` and `full` the weights of the encoder are trained on image pairs.
    The start and the adapted encoder are then blended with the weight that is best on held-out pairs: their
    features at `adapter`, else their weights. The start is kept if no blend is significantly better. The
    run's encoder is used like any other.

    An interrupted call resumes at the missing features, and at the last checkpoint of the weights; the
    training of an adapter takes a minute or two, and starts again. Under torchrun, `lora` and `full` train on
    all processes.

    Args:
        dataset: The dataset or its path; pairs by language need caption embeddings.
        encoder: The start: an encoder, or whatever `load_encoder` accepts. It is not modified.
        out: The directory of the run.
        config: The settings; defaults to a residual adapter.
        pair_config: The pair sampling; defaults to the nearest caption.
        retain: Other images with labels, on which a nearest-neighbor classifier may lose at most
            `config.max_retention_loss`.
        num_workers: Threads that read images and make batches; defaults to the number of cores, and for
            batches to half of it.
        progress: Progress bars.

    Raises:
        ArtifactError: if embeddings are missing or `out` holds something else.
        InvalidInputError: if no image has a partner, or the retention dataset has no labels.
        DependencyError: if level `lora` needs peft, which is not installed.
        InterruptedRunError: after Ctrl-C while weights are trained, with a checkpoint written.
        ModelError: if the encoder cannot be loaded, or its features are not finite.
        TrainingError: if there are fewer images than a batch, or the loss is not finite.
    """
    config = AdaptConfig() if config is None else config
    pair_config = PairConfig() if pair_config is None else pair_config
    dataset, out = CaptionDataset.open(dataset), Path(out)
    encoder = encoder if isinstance(encoder, ImageEncoder) else load_encoder(encoder)
    with init_distributed(local_device(torch.device(encoder.device.type))) as dist_context:
        if not dist_context.is_main_process:
            dist_context.barrier()
            progress = NULL_PROGRESS
        data = open_adapt_data(dataset, encoder, config, pair_config, retain, num_workers, progress)
        settings = (
            {"method": config.level_options.name, "encoder": encoder.name}
            | pair_config_to_dict(pair_config)
            | adapt_config_to_dict(config)
        )
        inputs = data.input_keys(encoder)
        with Artifact.exclusive(out, ARTIFACT_KIND, settings, inputs, non_hashed=_NON_HASHED) as artifact:
            if dist_context.is_main_process:
                dist_context.barrier()
            if artifact.is_complete:
                logger.info("%s is finished already", out)
            else:
                _adapt(data, encoder, config, artifact, dist_context, num_workers, progress)
            dist_context.barrier()
    return Run(out)


def _adapt(
    data: AdaptData,
    encoder: ImageEncoder,
    config: AdaptConfig,
    artifact: Artifact,
    dist_context: DistributedContext,
    num_workers: int | None,
    progress: Progress,
) -> None:
    """Train the level, choose the blend, and write the run."""
    options = config.level_options
    if isinstance(options, AdapterOptions):
        if not dist_context.is_main_process:
            return
        _write_config(data, encoder, config, artifact)
        adapter = train_adapter(data, encoder, config, options, artifact.path, progress)
        blender: Blender = FeatureBlender(encoder, adapter, data)
    else:
        blender = finetune(
            data,
            encoder,
            config,
            artifact,
            dist_context=dist_context,
            num_workers=num_workers,
            progress=progress,
        )
    if dist_context.is_main_process:
        _choose(blender, data, config, artifact)


def _write_config(data: AdaptData, encoder: ImageEncoder, config: AdaptConfig, artifact: Artifact) -> None:
    write_config(
        RunDirectory(artifact.path),
        artifact.manifest.settings | {"backbone": encoder.name, "image_size": encoder.transform.image_size},
        data.pairs,
        data.dataset,
        {"device": encoder.device.type, "steps": config.max_steps, "start": dict(encoder.load_args)},
    )


def _choose(blender: Blender, data: AdaptData, config: AdaptConfig, artifact: Artifact) -> None:
    """Choose the blend, and write its encoder."""
    run_dir = RunDirectory(artifact.path)
    outcome = choose_blend(
        blender,
        labels=data.val_labels,
        retained_labels=None if data.retain is None else data.retain.labels,
        max_retention_loss=config.max_retention_loss,
        seed=config.seed,
    )
    write_json(run_dir.adaptation_path, asdict(outcome))
    blender.save(run_dir.encoder_path, outcome.blend)
    logger.info(outcome.summary())
    artifact.finish({"steps": config.max_steps, "images": len(data.pairs.anchors)}, data.features.skipped)
