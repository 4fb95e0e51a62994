"""Pretraining of a teacher: its settings, and what the loop is given."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from torch import Tensor

from fastdmd import ops
from fastdmd.data import Dataset
from fastdmd.diffusion import Dynamics, lognormal_sigma
from fastdmd.distill.draws import DataDeviation, LogDeviation, LogMean
from fastdmd.distill.exchange import exchange
from fastdmd.distill.guard import Guard, NanPolicy, marks
from fastdmd.distill.losses import denoising_loss
from fastdmd.distill.optimization import Decay, Rate, WarmUp, WeightDecay
from fastdmd.distill.states import (
    digest,
    digest_of_draws,
    first_not_finite,
    load_optimizer_state,
    optimizer_state,
    require_same_draws,
    tensors_of_optimizer,
)
from fastdmd.distill.tally import Tally
from fastdmd.networks.unet import UNet, UNetConfig
from fastdmd.networks.weights import save_network
from fastdmd.optim import AdamWEMA
from fastdmd.randomness import Stream, normals
from fastdmd.ranks import ALONE, Ranks
from fastdmd.runs.checkpoints import CheckpointSettings
from fastdmd.runs.config import BatchSize, CommandConfig, Iterations, Snapshots
from fastdmd.runs.folder import RunFolder
from fastdmd.runs.machine import versions
from fastdmd.runs.pictures import SampleSheet
from fastdmd.runs.record import RecordSettings
from fastdmd.sampling import HeunSampler, Sampler
from fastdmd.settings import Input, OmitArgPrefixes, Settings, Switch, above, at_least, fail, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveSettings(Settings):
    """What the network learns to say, and from which noise levels."""

    dynamics: Dynamics = "edm"
    """EDM's preconditioning and objective, or flow matching's velocity, noise minus image."""
    sigma_mean: LogMean = -0.2
    """Mean of ln(sigma) in training, which is logit(t) in flow matching."""
    sigma_std: LogDeviation = 1.5
    """Standard deviation of ln(sigma) in training."""
    sigma_data: DataDeviation = 0.5
    """Standard deviation of the data, as the preconditioning assumes it."""

    def of(self, network: UNet) -> ObjectiveSettings:
        """That of a network to go on from. Raises ValueError where one was asked for that is neither this nor the
        default."""
        own: dict[str, Any] = {"dynamics": network.dynamics, "sigma_data": network.sigma_data}
        for name, value in own.items():
            if getattr(self, name) not in (getattr(ObjectiveSettings, name), value):
                fail(self, name, f"{value}, as --init was trained")
        return dataclasses.replace(self, **own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchitectureSettings(Settings):
    """The network, but for what the data decide; fields of `UNetConfig`."""

    patch_size: Annotated[int, at_least(1, 1024)] = 2
    """Pixels per side folded into channels before the first convolution."""
    model_channels: Annotated[int, at_least(1, 2**14)] = 48
    """Width that the multipliers refer to, and width of the noise embedding."""
    channel_multipliers: Annotated[tuple[int, ...], at_least(1, 64)] = (1, 2)
    """Width at each resolution, finest first, in units of model_channels."""
    num_blocks: Annotated[int, at_least(1, 64)] = 1
    """Residual blocks at each resolution of the encoder."""
    attention_resolutions: Annotated[tuple[int, ...] | None, at_least(1, 2**14)] = None
    """Feature-map sizes with self-attention, beside the middle, which has it always. Default: the coarsest."""
    channels_per_head: Annotated[int, at_least(0, 2**14)] = 0
    """Channels of an attention head; 0 means one head."""
    adaptive_scale: bool = True
    """Embeddings scale and shift normalised features (ADM); otherwise they are added (DDPM++)."""
    dropout: Annotated[float, within(0, 1, below=True)] = 0.0
    """Dropout probability inside residual blocks."""

    def network(self, objective: ObjectiveSettings, dataset: Dataset) -> UNetConfig:
        """The network for these images and classes. Raises ValueError for one that cannot be."""
        channels, size, _ = dataset.image_shape
        config = UNetConfig(
            image_channels=channels,
            image_size=size,
            num_classes=dataset.num_classes,
            dynamics=objective.dynamics,
            sigma_data=objective.sigma_data,
            **(vars(self) | {"attention_resolutions": ()}),
        )
        asked = config.sizes[-1:] if self.attention_resolutions is None else self.attention_resolutions
        if not set(asked) <= set(config.sizes):
            sizes = ", ".join(map(str, config.sizes))
            fail(self, "attention_resolutions", f"out of {sizes}, the feature-map sizes of these images")
        return dataclasses.replace(config, attention_resolutions=asked)

    def of(self, network: UNetConfig) -> ArchitectureSettings:
        """That of a network, of which the data have decided some."""
        own = {field.name: getattr(network, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(CommandConfig):
    """Train a teacher.

    `mnist` has these defaults, --label-emphasis 1.3 and --weights-dtype float16."""

    out: Path = Path("runs/teacher")
    """Run folder; must not hold a run yet, but for --resume auto."""
    init: Annotated[str | None, Input] = None
    """Weight file of a teacher to go on from, or `mnist`: the embedded one. Its architecture overrules these flags."""
    iterations: Iterations = 11_500
    """Number of optimizer updates."""
    batch_size: BatchSize = 128
    """Images per update."""
    learning_rate: Rate = 1.5e-3
    """Peak learning rate of AdamW; falls to zero along a cosine."""
    warmup_iterations: WarmUp = 300
    """Updates over which the learning rate rises."""
    weight_decay: WeightDecay = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Rate = 1.0
    """Gradients are clipped to this global norm."""
    ema_decay: Decay = 0.999
    """Decay of the average of the weights, per update. The average is the teacher."""
    objective: Annotated[ObjectiveSettings, OmitArgPrefixes] = ObjectiveSettings()
    architecture: Annotated[ArchitectureSettings, OmitArgPrefixes] = ArchitectureSettings()
    checkpoint: Annotated[CheckpointSettings, OmitArgPrefixes] = CheckpointSettings()
    record: Annotated[RecordSettings, OmitArgPrefixes] = RecordSettings()
    log_every: Iterations = 100
    """Iterations between lines of metrics.jsonl."""
    snapshots: Snapshots = 10
    """How often, over the run, weights and samples are written."""
    nan_policy: NanPolicy = "skip"
    """What NaN or infinity in data, loss or gradient comes to. skip: that update is left out, and the run ends after
    ten in a row; stop: the run ends."""
    label_emphasis: Annotated[float, above(0, 1000)] = 1.0
    """After training, class embeddings move this much farther from their mean: classes more distinct, variety less."""
    weights_dtype: Literal["float32", "float16"] = "float32"
    """Precision of the weights in the file; float16 halves it. What is measured is what the file holds."""
    dry_run: Switch = False
    """Print the resolved configuration and stop."""

    has_open_end = False  # the learning rate falls towards it


class Pretraining:
    """What the loop is given: the average of the weights is what it keeps, shows and measures."""

    is_in_parts = False

    def __init__(
        self, config: PretrainConfig, network: UNet, dataset: Dataset, folder: RunFolder, ranks: Ranks = ALONE
    ):
        self.config, self._dataset, self._folder, self._ranks = config, dataset, folder, ranks
        self._rows = ranks.rows(config.batch_size)
        self._device = next(network.parameters()).device
        self._trained = network.train()
        self._optimizer = AdamWEMA(
            network,
            learning_rate=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            warmup_steps=config.warmup_iterations,
            decay_steps=config.iterations,
            ema_decay=config.ema_decay,
            process_group=ranks.group,
        )
        self.network = cast(UNet, self._optimizer.ema_network)
        self._guard = Guard(self._device, stops=config.nan_policy == "stop")
        self.tallies = (Tally(("loss", "grad_norm"), self._device, guard=self._guard),)
        self._sampler = HeunSampler(self.network, config.evaluation.teacher_steps)
        self._sheet = SampleSheet(network, config.seed, self._device)
        self._weights_dtype = getattr(torch, config.weights_dtype)
        self._started = time.perf_counter()
        self._next = 0  # iteration

    def iterate(self, iteration: int) -> None:
        self._next = iteration + 1
        self._guard.begin(iteration)
        config = self.config
        first_sample = self._rows.start
        images, class_labels = self._batch(iteration, self._rows)

        def key(stream: Stream) -> Tensor:
            place = {"iteration": iteration, "first_sample": first_sample}
            return ops.rng_key(config.seed, stream=stream, device=self._device, **place)

        normal = normals((len(images), 1, 1, 1), key(Stream.TRAINING_LEVEL)).flatten()
        loss = denoising_loss(
            images,
            self._trained,
            class_labels,
            sigma=lognormal_sigma(normal, config.objective.sigma_mean, config.objective.sigma_std),
            rng_key=key(Stream.TRAINING_NOISE),
            sigma_data=self._trained.sigma_data,
        )
        self._optimizer.backward(loss)
        seen = marks(images, None, None, None)
        self._optimizer.advance()
        norm = self._optimizer.update(self.tallies[0].permits([loss], seen))
        self.tallies[0].add(loss, norm, seen=seen)

    def _batch(self, iteration: int, rows: slice) -> tuple[Tensor, Tensor | None]:
        return self._dataset.random_batch(
            rows.stop - rows.start,
            seed=self.config.seed,
            step=iteration,
            device=self._device,
            stream=Stream.TRAINING_IMAGE,
            first_sample=rows.start,
        )

    def _next_batch(self) -> dict[str, Tensor | None]:
        """That of all processes."""
        images, labels = self._batch(self._next, slice(0, self.config.batch_size))
        return {"images": images, "labels": labels}

    def exchange(self) -> None:
        exchange(self.tallies, self._ranks)

    def digest(self) -> str:
        return digest(*tensors_of_optimizer(self._optimizer))

    def state_dict(self) -> dict[str, Any]:
        """And a digest of the images that come next: others would be no continuation."""
        return {
            "optimizer": optimizer_state(self._optimizer),
            "tally": self.tallies[0].state_dict(),
            "next": self._next,
            "draws": digest_of_draws(self._next_batch()),
            "seconds": time.perf_counter() - self._started,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next = state["next"]  # which the loop has looked at
        require_same_draws(self._next, state["draws"], self._next_batch())
        load_optimizer_state(self._optimizer, state["optimizer"], self._next, "optimizer")
        self.tallies[0].load_state_dict(state["tally"])
        self._started = time.perf_counter() - state["seconds"]

    def fault(self) -> str | None:
        return first_not_finite({"network": self._optimizer})

    @torch.no_grad()
    def finish(self) -> None:
        """Emphasises labels, and rounds the weights to what the file holds, which is what is measured."""
        if self.config.label_emphasis != 1:
            self.network.emphasize_labels(self.config.label_emphasis)
        for parameter in self.network.parameters():
            parameter.copy_(parameter.to(self._weights_dtype))

    def samples(self) -> Tensor:
        return self._sheet.of(self._sampler)

    def save(self, iteration: int, **information: Any) -> None:
        if not self._folder.is_written:
            return
        save_network(
            self._folder.path / "teacher.safetensors",
            self.network,
            kind="teacher",
            dtype=self._weights_dtype,
            iterations=iteration,
            seconds=time.perf_counter() - self._started,
            config=dataclasses.asdict(self.config),
            versions=versions(self._device),
            **information,
        )

    def measurements(self) -> Iterator[tuple[str, Sampler, dict | None]]:
        yield "teacher", self._sampler, None
