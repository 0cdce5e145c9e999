"""The levels `full` and `lora` of `adapt`: weights are trained, then blended with those of the start.

Blending is WiSE-FT (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", eq. 1).
"""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from likewise.artifacts import Artifact
from likewise.data.dataset import CaptionDataset, ImageRef
from likewise.distributed import (
    CPUSyncBatchNorm,
    DistributedContext,
    convert_to_sync_batchnorm,
    local_device,
    wrap_ddp,
)
from likewise.errors import DependencyError, TrainingError
from likewise.models.backbones import freeze_unused_parameters
from likewise.models.checkpoints import save_encoder
from likewise.models.encoders import ImageEncoder
from likewise.parallel import default_num_workers
from likewise.progress import Progress
from likewise.rng import Stream, derive_seed
from likewise.run_directory import RunDirectory
from likewise.training.adapt_config import AdaptConfig, FinetuneOptions, FullOptions, LoraOptions
from likewise.training.adapt_data import AdaptData
from likewise.training.blending import Blender, BlendFeatures
from likewise.training.config import TrainConfig, build_schedule, build_view_specs, resolve_augmentation
from likewise.training.feature_adapter import WARMUP_STEPS, feature_moments
from likewise.training.initial import Start, make_start
from likewise.training.loader import PairDataset, PairLoader
from likewise.training.losses import nt_xent_loss
from likewise.training.methods.base import Batch, EMAModel, SiameseMethod, StepOutput, forward_views
from likewise.training.methods.options import SimCLROptions
from likewise.training.optim import build_finetune_optimizer
from likewise.training.run_files import precision_name, write_config
from likewise.training.trainer import Trainer, choose_dtype


@final
class AnchoredSimCLR(SiameseMethod):
    """SimCLR (Chen et al. 2020, eq. 1) that fine-tunes a pretrained backbone and stays near its features.

    The anchor is the mean squared distance between the features of a view and those of the start, each
    divided by its standard deviation over the images (after LDIFS, Mukhoti et al. 2023, "Fine-tuning can
    cripple your foundation model", which compares the features of all layers without dividing them). The
    statistics of batch norm in the backbone stay those of the start. The result is an exponential moving
    average of the weights.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        options: SimCLROptions,
        finetune_options: FinetuneOptions,
        start: nn.Module | None,
        std: Float[Tensor, " d"],
    ) -> None:
        """Add a projection head and a moving average of the backbone.

        Args:
            backbone: Images (b, 3, h, w) -> features (b, feature_dim).
            feature_dim: Features per image, d.
            options: Options of the loss of pairs.
            finetune_options: Options of the level.
            start: A frozen copy of the start; None without an anchor.
            std: Standard deviation of each feature of the start.
        """
        super().__init__(backbone, feature_dim, options)
        self.temperature, self.finetune_options = options.temperature, finetune_options
        self.ema_model = EMAModel(backbone)
        self.register_buffer("std", std)
        self.std: Tensor
        # Outside of the modules: it is neither trained nor part of checkpoints.
        self._start = (start,)

    def train(self, mode: bool = True) -> "AnchoredSimCLR":  # torch's own signature
        """Set the mode of all modules, except that batch norm of the backbone keeps its statistics."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm | CPUSyncBatchNorm):
                module.eval()
        return self

    def on_step_start(self, batch: Batch) -> None:
        """Update the moving average."""
        if self.training:
            self.ema_model.update(self.backbone, momentum=self.finetune_options.ema_momentum)

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features, the projections of both views, and the distances from the start's features."""
        features = torch.cat(forward_views(self.backbone, batch.views))
        z1, z2 = self.projector(features).chunk(2)
        (start,) = self._start
        if start is None:
            return features, (z1, z2)
        with torch.no_grad():
            start_features = torch.cat(forward_views(start, batch.views)).float()
        distances = ((features.float() - start_features) / self.std).square().mean(dim=1)
        return features, (z1, z2, distances.view(2, -1).mean(dim=0))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return NT-Xent plus the weighted distance from the start's features."""
        loss = nt_xent_loss(outputs[0], outputs[1], self.temperature)
        if len(outputs) == 2:
            return StepOutput(loss=loss)
        distance = outputs[2].mean()
        return StepOutput(
            loss=loss + self.finetune_options.anchor_weight * distance,
            logs={"anchor_distance": distance.detach()},
        )

    def trained_backbone(self) -> nn.Module:
        """Return the moving average of the backbone, with the last step."""
        average = deepcopy(self.ema_model)
        average.update(self.backbone, momentum=self.finetune_options.ema_momentum)
        return average.ema_modules[0]


@final
class WeightBlender(Blender):
    """Blends of the weights of a start and of its fine-tuned version (WiSE-FT)."""

    def __init__(
        self,
        encoder: ImageEncoder,
        start: Start,
        trained: nn.Module,
        data: AdaptData,
        num_workers: int | None,
    ) -> None:
        """Combine both.

        Args:
            encoder: The start.
            start: Its structure and preprocessing.
            trained: A model of the same structure with the trained weights.
            data: The images to encode.
            num_workers: Threads that read images.
        """
        self._model = deepcopy(encoder.model).float().eval().requires_grad_(False)
        self._start_weights = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._trained_weights = trained.state_dict()
        self._encoder = replace(encoder, model=self._model)
        self._start, self._data, self._num_workers = start, data, num_workers

    def features(self, blend: float) -> BlendFeatures:
        """Return the features of a blend."""
        self._set_weights(blend)
        split, retain = self._data.split, self._data.retain
        positions, rows = np.unique(np.concatenate([split.anchors, split.partners]), return_inverse=True)
        anchors, partners = self._encode(self._data.dataset, positions)[rows].chunk(2)
        retained = None if retain is None else self._encode(retain.dataset, retain.positions)
        return BlendFeatures(anchors=anchors, partners=partners, retained=retained)

    def save(self, path: Path, blend: float) -> None:
        """Write the encoder of a blend."""
        self._set_weights(blend)
        image_cache = self._data.image_cache
        save_encoder(
            path,
            self._model,
            self._start.structure,
            bands=None if image_cache is None else image_cache.bands,
            transform=self._start.transform,
        )

    def _set_weights(self, blend: float) -> None:
        """Set each weight to (1 - blend) times the start's plus blend times the trained one."""
        self._model.load_state_dict(blend_weights(self._start_weights, self._trained_weights, blend))

    def _encode(self, dataset: CaptionDataset, positions: np.ndarray) -> Float[Tensor, "n d"]:
        """Return the features of readable images of a dataset."""
        refs: list[ImageRef] = [dataset[int(position)].image for position in positions]
        batches = self._encoder.encode_batches(refs, root=dataset.root, num_workers=self._num_workers)
        return torch.from_numpy(np.concatenate([features for features, _ in batches]))


def blend_weights(
    start: Mapping[str, Tensor], trained: Mapping[str, Tensor], blend: float
) -> dict[str, Tensor]:
    """Return (1 - blend) times the weights of the start plus blend times the trained ones; integers are kept.

    Args:
        start: Weights by name.
        trained: Weights of the same names and shapes.
        blend: Weight of the trained ones, from 0 to 1.
    """
    return {
        name: value.lerp(trained[name].to(value), blend) if value.is_floating_point() else value
        for name, value in start.items()
    }


def finetune(
    data: AdaptData,
    encoder: ImageEncoder,
    config: AdaptConfig,
    artifact: Artifact,
    *,
    dist_context: DistributedContext,
    num_workers: int | None,
    progress: Progress,
) -> WeightBlender:
    """Train the weights of an encoder, from the last checkpoint on if there is one.

    Args:
        data: Pairs, images and features of the start.
        encoder: The start; it is not modified.
        config: The settings, with the options of the level `full` or `lora`.
        artifact: The run.
        dist_context: The process.
        num_workers: Threads that make batches.
        progress: Progress bars.

    Raises:
        DependencyError: if `lora` needs peft, which is not installed.
        InterruptedRunError: after Ctrl-C, with a checkpoint written.
        TrainingError: if no layer can be updated, or the loss is not finite.
    """
    options = config.level_options
    assert isinstance(options, FinetuneOptions)  # noqa: S101  # the other level has no weights to train
    train_config = _train_config(config, options, encoder)
    start = make_start(replace(encoder, model=deepcopy(encoder.model)))
    loader = _build_loader(data, start, train_config, dist_context, num_workers)
    schedule = build_schedule(train_config, len(loader.dataset), data.dataset.path)
    schedule = replace(schedule, peak_lr=config.peak_lr, warmup_steps=min(WARMUP_STEPS, schedule.steps // 2))
    device = local_device(torch.device(encoder.device.type))
    method = _build_method(data, encoder, start, config, options)
    if dist_context.world_size > 1:
        convert_to_sync_batchnorm(method, device)
    method.to(device).to(memory_format=torch.channels_last)
    trainer = Trainer(
        artifact=artifact,
        dataset=data.dataset,
        config=train_config,
        loader=loader,
        evaluator=None,
        schedule=schedule,
        method=method,
        ddp_method=wrap_ddp(method) if dist_context.world_size > 1 else method,
        start=start,
        optimizer=build_finetune_optimizer(
            method.backbone,
            method.projector,
            lr=schedule.peak_lr,
            weight_decay=config.weight_decay,
            layer_decay=options.layer_decay if isinstance(options, FullOptions) else 1.0,
            frozen_steps=round(options.frozen_fraction * schedule.steps),
        ),
        device=device,
        dtype=choose_dtype(options.precision, device),
        dist_context=dist_context,
        progress=progress,
    )
    if dist_context.is_main_process and not trainer.run_dir.config_path.is_file():
        _write_config(trainer, data, encoder)
    dist_context.barrier()
    trainer.fit()
    trained = method.trained_backbone()
    if isinstance(options, LoraOptions):
        trained = merge_lora(trained)
    return WeightBlender(encoder, start, trained, data, num_workers)


def _train_config(config: AdaptConfig, options: FinetuneOptions, encoder: ImageEncoder) -> TrainConfig:
    return TrainConfig(
        method=SimCLROptions(temperature=config.temperature, projector_dims=config.projector_dims),
        image_size=encoder.transform.image_size,
        max_steps=config.max_steps,
        batch_size=config.pairs_per_step,
        grad_cache_chunk_size=options.grad_cache_chunk_size,
        augmentation=options.augmentation,
        weight_decay=config.weight_decay,
        precision=options.precision,
        seed=config.seed,
    )


def _build_loader(
    data: AdaptData,
    start: Start,
    train_config: TrainConfig,
    dist_context: DistributedContext,
    num_workers: int | None,
) -> PairLoader:
    view_specs = build_view_specs(train_config, data.pairs.pair_config, start.preprocessing)
    assert data.image_cache is not None  # noqa: S101  # `open_adapt_data` builds it for this level
    pair_dataset = PairDataset(data.image_cache, data.pairs, seed=train_config.seed, view_specs=view_specs)
    if num_workers is None:
        num_workers = max(1, default_num_workers() // (2 * dist_context.local_world_size))
    return PairLoader(
        pair_dataset, batch_size=train_config.batch_size, num_workers=num_workers, dist_context=dist_context
    )


def _build_method(
    data: AdaptData, encoder: ImageEncoder, start: Start, config: AdaptConfig, options: FinetuneOptions
) -> AnchoredSimCLR:
    """Build the method; the initial weights of its head are a function of the seed."""
    _, std = feature_moments(data.features.vectors, data.pairs.anchors)
    device = local_device(torch.device(encoder.device.type))
    frozen_start = None
    if options.anchor_weight > 0:
        frozen_start = deepcopy(encoder.model).float().eval().requires_grad_(False).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(config.seed, Stream.HEADS))
        backbone = start.backbone
        if isinstance(options, LoraOptions):
            backbone = add_lora(backbone, encoder.transform.image_size, options)
        method = AnchoredSimCLR(
            backbone,
            encoder.feature_dim,
            SimCLROptions(temperature=config.temperature, projector_dims=config.projector_dims),
            options,
            frozen_start,
            std,
        )
    method.grad_cache_chunk_size = options.grad_cache_chunk_size
    return method


def add_lora(model: nn.Module, image_size: int, options: LoraOptions) -> nn.Module:
    """Add low-rank updates (LoRA, Hu et al. 2022, eq. 3) to the linear and convolutional layers of a model.

    Updated are layers of exactly torch's `Linear` and `Conv2d` without groups on which the features depend;
    not, for example, depthwise convolutions and the projections inside of torch's `MultiheadAttention`. All
    other weights are frozen. The update is zero at the start.

    Args:
        model: Images (b, 3, h, w) -> features (b, d); it is modified.
        image_size: Side of the square input in pixels.
        options: Rank and scale.

    Returns:
        The model in the wrapper of peft.

    Raises:
        DependencyError: if peft is not installed.
        TrainingError: if the model has no such layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise DependencyError(
            "level 'lora' needs peft: pip install 'likewise[lora]'", field="level"
        ) from error
    names = [name for name, module in model.named_modules() if _can_have_lora(module)]
    if not names:
        raise TrainingError(
            "the encoder has no linear or convolutional layer that level 'lora' can update; use level 'full'",
            field="level",
        )
    # A list of names would also select all layers whose names end with one of them.
    pattern = "|".join(map(re.escape, names))
    lora_config = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=pattern)
    wrapped: Any = model
    peft_model = get_peft_model(wrapped, lora_config)
    freeze_unused_parameters(peft_model, image_size)
    return peft_model


def _can_have_lora(module: nn.Module) -> bool:
    # Subclasses compute something else, such as the padding of TensorFlow, which peft does not know.
    if type(module) is nn.Linear:
        return module.weight.requires_grad
    return type(module) is nn.Conv2d and module.groups == 1 and module.weight.requires_grad


def merge_lora(model: Any) -> nn.Module:
    """Return a model of `add_lora` with the updates added to its weights, and the structure it had before."""
    return model.merge_and_unload()


def _write_config(trainer: Trainer, data: AdaptData, encoder: ImageEncoder) -> None:
    derived = asdict(trainer.schedule) | {
        "augmentation": resolve_augmentation(trainer.config, data.pairs.pair_config),
        "device": trainer.device.type,
        "precision": precision_name(trainer.dtype),
        "world_size": trainer.dist_context.world_size,
        "start": dict(encoder.load_args),
    }
    settings = trainer.artifact.manifest.settings | {
        "backbone": encoder.name,
        "image_size": encoder.transform.image_size,
    }
    write_config(RunDirectory(trainer.artifact.path), settings, data.pairs, data.dataset, derived)
