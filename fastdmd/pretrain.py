"""`python -m fastdmd.pretrain`: trains a teacher, with EDM's objective or that of flow matching."""

from __future__ import annotations

from fastdmd.runs import startup

if __name__ == "__main__":
    startup.prepare("fastdmd.pretrain")

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from fastdmd import data, diffusion, teachers
from fastdmd.distill.budget import training_bytes
from fastdmd.distill.losses import denoising_loss
from fastdmd.distill.tally import Tally
from fastdmd.memory import require_memory
from fastdmd.networks.unet import UNet, UNetConfig
from fastdmd.networks.weights import save_network
from fastdmd.optim import AdamWEMA
from fastdmd.quality import sample
from fastdmd.runs import cli, machine, terminal
from fastdmd.runs.config import (
    BatchSize,
    DataDeviation,
    Decay,
    EvaluationConfig,
    Iterations,
    LogDeviation,
    LogMean,
    Rate,
    Snapshots,
    Switch,
    WarmUp,
    WeightDecay,
    fail,
    warm_up_notice,
)
from fastdmd.runs.distillation import NUM_SAMPLE_COLUMNS, sample_inputs
from fastdmd.runs.folder import RunFolder, require_new
from fastdmd.runs.loop import Loop
from fastdmd.runs.machine import versions
from fastdmd.sampling import HeunSampler, Sampler
from fastdmd.settings import above, at_least, within

ADVICE = "a smaller --batch-size or --model-channels needs less"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(EvaluationConfig):
    """Train a teacher. The embedded MNIST teacher has these defaults, --label-emphasis 1.3 and
    --weights-dtype float16."""

    out: Path = Path("runs/teacher")
    """Run folder; must not hold a run yet."""
    init: str | None = None
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
    dynamics: Literal["edm", "flow"] = "edm"
    """EDM's preconditioning and objective, or flow matching's velocity, noise minus image."""
    sigma_mean: LogMean = -0.2
    """Mean of ln(sigma) in training, which is logit(t) in flow matching."""
    sigma_std: LogDeviation = 1.5
    """Standard deviation of ln(sigma) in training."""
    sigma_data: DataDeviation = 0.5
    """Standard deviation of the data, as the preconditioning assumes it."""
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
    log_every: Iterations = 100
    """Iterations between lines of metrics.jsonl."""
    snapshots: Snapshots = 10
    """How often, over the run, weights and samples are written."""
    label_emphasis: Annotated[float, above(0, 1000)] = 1.0
    """After training, class embeddings move this much farther from their mean: classes more distinct, variety less."""
    weights_dtype: Literal["float32", "float16"] = "float32"
    """Precision of the weights in the file; float16 halves it. What is measured is what the file holds."""
    dry_run: Switch = False
    """Print the resolved configuration and stop."""

    def network(self, image_shape: tuple[int, int, int], num_classes: int) -> UNetConfig:
        """The network for images `(C, H, W)`."""
        shared = {field.name for field in dataclasses.fields(UNetConfig)} & set(vars(self))
        architecture = {name: getattr(self, name) for name in shared} | {"attention_resolutions": ()}
        config = UNetConfig(
            image_channels=image_shape[0], image_size=image_shape[1], num_classes=num_classes, **architecture
        )
        asked = config.sizes[-1:] if self.attention_resolutions is None else self.attention_resolutions
        if not set(asked) <= set(config.sizes):
            sizes = ", ".join(map(str, config.sizes))
            fail(self, "attention_resolutions", f"out of {sizes}, the feature-map sizes of these images")
        return dataclasses.replace(config, attention_resolutions=asked)


@terminal.command("fastdmd.pretrain")
def main(arguments: list[str] | None = None) -> None:
    config = cli.parse(PretrainConfig, "fastdmd.pretrain", arguments)
    with cli.user_errors("fastdmd.pretrain", advice=ADVICE):
        device = cli.resolve_device(config.device)
        if not config.dry_run:
            require_new(config.out)
        if (notice := warm_up_notice(config)) is not None:
            terminal.say(notice)
        machine.prepare(device, batch_size=config.batch_size)
        torch.manual_seed(config.seed)  # of the initial weights
        network = None if config.init is None else initial_network(config.init)
        dataset = data.load(
            config.data, labels=config.labels, resize=config.resize, crop=config.crop, device=device,
            image_shape=network and network.image_shape, num_classes=network and network.num_classes,
        )  # fmt: skip
        if network is None:
            architecture = config.network(dataset.image_shape, dataset.num_classes)
            config = dataclasses.replace(config, attention_resolutions=architecture.attention_resolutions)
            try_architecture(config, architecture, device)
            network = UNet(architecture)
        if config.dry_run:
            cli.print_resolved(config, network)
            return
        network = network.to(device=device, memory_format=torch.channels_last)
        if config.label_emphasis != 1 and network.num_classes == 0:
            raise ValueError(f"expected --label-emphasis 1 without class labels, got {config.label_emphasis}")
        evaluation = cli.make_evaluation(config, network, dataset if config.data else None, device)
        folder = RunFolder(config.out, cli.to_json(config))
        with folder.being_set_up():
            loop = Loop(Pretraining(config, network, dataset, folder), config, folder)
    print(f"training a teacher on {len(dataset)} images of {dataset.name}, in {folder.path}, on {device}")
    with cli.run_errors("fastdmd.pretrain", "training", ADVICE):
        summary = loop.run(evaluation)
    print(f"{folder.path}: teacher.safetensors, samples.png, summary.json")
    cli.leave("fastdmd.pretrain", summary, config.iterations)


def initial_network(init: str) -> UNet:
    """The teacher to go on from. Raises ValueError for one that is not ours."""
    network = teachers.load(init)
    if not isinstance(network, UNet):
        raise ValueError(f"expected --init to be a network of fastdmd, got a {type(network).__name__}")
    return network.requires_grad_(True)


def try_architecture(config: PretrainConfig, architecture: UNetConfig, device: torch.device) -> None:
    """Before either is made: ValueError where parts do not fit together, or network and batch not into memory."""
    try:
        num_bytes = training_bytes(lambda: UNet(architecture), config.batch_size)
    except RuntimeError as error:
        raise ValueError(f"expected a network whose parts fit together, got {error}") from error
    require_memory(num_bytes, device, f"this network with --batch-size {config.batch_size}", ADVICE)


class Pretraining:
    """What the loop is given: the average of the weights is what it keeps, shows and measures."""

    def __init__(self, config: PretrainConfig, network: UNet, dataset: data.Dataset, folder: RunFolder):
        self.config, self._dataset, self._path = config, dataset, folder.path / "teacher.safetensors"
        self._device = next(network.parameters()).device
        self._trained = network.train()
        self._optimizer = AdamWEMA(
            network, learning_rate=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm, warmup_steps=config.warmup_iterations, decay_steps=config.iterations,
            ema_decay=config.ema_decay,
        )  # fmt: skip
        self.network = self._optimizer.ema_network
        self.tallies = (Tally(("loss", "grad_norm"), self._device),)
        self._sampler = HeunSampler(self.network, config.teacher_steps)
        self._sample_inputs = sample_inputs(network, config.seed, self._device)
        self._weights_dtype = getattr(torch, config.weights_dtype)
        self._started = time.perf_counter()

    def iterate(self, iteration: int) -> None:
        config = self.config
        images, class_labels = self._dataset.random_batch(
            config.batch_size, seed=config.seed, step=iteration, device=self._device
        )
        generator = diffusion.random_generator(config.seed, iteration, self._device)
        normal = torch.randn(len(images), device=self._device, generator=generator)
        loss = denoising_loss(
            images, self._trained, class_labels,
            sigma=diffusion.lognormal_sigma(normal, config.sigma_mean, config.sigma_std),
            noise=torch.randn(images.shape, device=self._device, generator=generator),
            sigma_data=self._trained.sigma_data,
        )  # fmt: skip
        self._optimizer.backward(loss)
        self.tallies[0].add(loss, self._optimizer.step())

    @torch.no_grad()
    def finish(self) -> None:
        """Emphasises labels, and rounds the weights to what the file holds, which is what is measured."""
        if self.config.label_emphasis != 1:
            self.network.emphasize_labels(self.config.label_emphasis)
        for parameter in self.network.parameters():
            parameter.copy_(parameter.to(self._weights_dtype))

    def samples(self) -> Tensor:
        return sample(self._sampler, *self._sample_inputs).unflatten(0, (-1, NUM_SAMPLE_COLUMNS))

    def save(self, iteration: int, **information: Any) -> None:
        save_network(
            self._path, self.network, kind="teacher", dtype=self._weights_dtype, iterations=iteration,
            seconds=time.perf_counter() - self._started, config=dataclasses.asdict(self.config),
            versions=versions(self._device), **information,
        )  # fmt: skip

    def measurements(self) -> Iterator[tuple[str, Sampler, dict | None]]:
        yield "teacher", self._sampler, None


if __name__ == "__main__":
    main()
