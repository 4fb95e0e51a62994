"""`python -m fastdmd.pretrain`: trains a teacher, with EDM's objective or that of flow matching."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm

from fastdmd import cli, data, diffusion, dmd2, machine, outputs, teachers, terminal
from fastdmd.bounds import above, at_least, within
from fastdmd.budget import training_bytes
from fastdmd.checkpoint import save_network
from fastdmd.config import (
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
    warm_up_notice,
)
from fastdmd.machine import versions
from fastdmd.optim import AdamWEMA
from fastdmd.pictures import SampleHistory
from fastdmd.quality import Evaluation, Measurement, table, teacher_sampler
from fastdmd.run_folder import RunFolder
from fastdmd.trainer import NUM_SAMPLE_COLUMNS, interruptible, sample_inputs
from fastdmd.unet import UNet, UNetConfig

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
    attention_resolutions: Annotated[tuple[int, ...], at_least(1, 2**14)] = (7,)
    """Feature-map sizes with self-attention."""
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
        architecture = {name: getattr(self, name) for name in shared}
        return UNetConfig(
            image_channels=image_shape[0], image_size=image_shape[1], num_classes=num_classes, **architecture
        )


@terminal.command("fastdmd.pretrain")
def main(arguments: list[str] | None = None) -> None:
    config = cli.parse(PretrainConfig, "fastdmd.pretrain", arguments)
    with cli.user_errors("fastdmd.pretrain", advice=ADVICE):
        device = cli.resolve_device(config.device)
        if not config.dry_run:
            outputs.require_folder(config.out)
        if (notice := warm_up_notice(config)) is not None:
            terminal.say(notice)
        machine.prepare(device, batch_size=config.batch_size)
        dataset = data.load(config.data, device=device)
        torch.manual_seed(config.seed)  # of the initial weights
        if config.init is None:
            shape = config.network(dataset.image_shape, dataset.num_classes)
            try_architecture(config, shape, device)
            network = UNet(shape)
        else:
            network = teachers.load(config.init)
            if not isinstance(network, UNet):
                raise ValueError(f"expected --init to be a network of fastdmd, got a {type(network).__name__}")
            network.requires_grad_(True)
            dataset = dataset.require(image_shape=network.image_shape, num_classes=network.num_classes)
        if config.dry_run:
            cli.print_resolved(config, network)
            return
        network = network.to(device=device, memory_format=torch.channels_last)
        if config.label_emphasis != 1 and network.num_classes == 0:
            raise ValueError(f"expected --label-emphasis 1 without class labels, got {config.label_emphasis}")
        evaluation = cli.make_evaluation(config, network, dataset if config.data else None, device)
        run = RunFolder(config.out, cli.to_json(config))
    print(f"training a teacher on {len(dataset)} images of {dataset.name}, in {run.path}, on {device}")
    with cli.run_errors("fastdmd.pretrain", "training", ADVICE):
        summary = pretrain(config, network, dataset, run, evaluation)
    if summary["outcome"] == "interrupted":
        sys.exit(130)


def try_architecture(config: PretrainConfig, shape: UNetConfig, device: torch.device) -> None:
    """Raises ValueError where parts do not fit together, or network and batch not into memory; before either is made.

    Says where no feature map has one of --attention-resolutions.
    """
    sizes = [(shape.image_size // shape.patch_size) >> level for level in range(len(shape.channel_multipliers))]
    if shape.attention_resolutions and not set(shape.attention_resolutions) & set(sizes):
        wanted = " ".join(map(str, shape.attention_resolutions))
        terminal.say(f"no attention: no feature map has --attention-resolutions {wanted}, only {sizes}")
    try:
        num_bytes = training_bytes(lambda: UNet(shape), config.batch_size)
    except RuntimeError as error:
        raise ValueError(f"expected a network whose parts fit together, got {error}") from error
    cli.require_memory(num_bytes, device, f"this network with --batch-size {config.batch_size}", ADVICE)


def pretrain(config: PretrainConfig, network: UNet, dataset: data.Dataset, run: RunFolder,
             evaluation: Evaluation | None) -> dict:  # fmt: skip
    """Trains, saves, measures; returns the summary that it wrote.

    Its `outcome` is "complete" or "interrupted" (Ctrl-C; what was reached is saved).
    """
    device = next(network.parameters()).device
    optimizer = AdamWEMA(
        network.train(), learning_rate=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm, warmup_steps=config.warmup_iterations, decay_steps=config.iterations,
        ema_decay=config.ema_decay,
    )  # fmt: skip
    sampler = teacher_sampler(optimizer.ema_network, config.teacher_steps)
    history = SampleHistory(run.path / "samples.png")
    sample_noise, sample_labels = sample_inputs(network, config.seed, device)
    snapshot_every = -(-config.iterations // config.snapshots)
    weights_dtype = getattr(torch, config.weights_dtype)
    started = time.perf_counter()

    def snapshot(iteration: int) -> None:
        save(iteration)
        history.add(sampler(sample_noise, sample_labels).unflatten(0, (-1, NUM_SAMPLE_COLUMNS)))

    def save(iteration: int, **figures: Any) -> None:
        save_network(
            run.path / "teacher.safetensors", optimizer.ema_network, kind="teacher", dtype=weights_dtype,
            iterations=iteration, seconds=time.perf_counter() - started, config=dataclasses.asdict(config),
            versions=versions(device), **figures,
        )  # fmt: skip

    # Phase 1: train.
    iteration = 0
    loss_sum = torch.zeros((), device=device)
    with (
        interruptible() as interrupted,
        tqdm(total=config.iterations, unit="it", dynamic_ncols=True) as progress,
    ):
        while iteration < config.iterations and not interrupted():
            images, class_labels = dataset.random_batch(
                config.batch_size, seed=config.seed, step=iteration, device=device
            )
            generator = diffusion.random_generator(config.seed, iteration, device)
            normal = torch.randn(len(images), device=device, generator=generator)
            sigma = diffusion.lognormal_sigma(normal, config.sigma_mean, config.sigma_std)
            noise = torch.randn(images.shape, device=device, generator=generator)
            loss = dmd2.denoising_loss(
                images, network, class_labels, sigma=sigma, noise=noise, sigma_data=network.sigma_data
            )
            optimizer.backward(loss)
            optimizer.step()
            loss_sum += loss.detach()
            iteration += 1
            progress.update()
            if iteration % config.log_every == 0:
                mean_loss, seconds = loss_sum.item() / config.log_every, time.perf_counter() - started
                loss_sum.zero_()
                run.log(iteration=iteration, loss=mean_loss, seconds=seconds)
                images_per_second = iteration * config.batch_size / seconds
                progress.set_postfix({"loss": f"{mean_loss:.4f}", "images/s": f"{images_per_second:.0f}"})
            if iteration % snapshot_every == 0 and iteration < config.iterations:
                snapshot(iteration)
    snapshot(iteration)

    # Phase 2: finish the weights, and measure what the file holds; it records the figures.
    with torch.no_grad():
        if config.label_emphasis != 1:
            optimizer.ema_network.emphasize_labels(config.label_emphasis)
        for parameter in optimizer.ema_network.parameters():
            parameter.copy_(parameter.to(weights_dtype))
    save(iteration)
    row = Measurement(None, None)
    outcome = "complete" if iteration == config.iterations else "interrupted"
    if outcome == "complete" and evaluation is not None:
        try:
            row = evaluation.measure(sampler, evaluations=2 * config.teacher_steps - 1, name="teacher")
            save(iteration, record=evaluation.record(row))
        except KeyboardInterrupt:
            outcome = "interrupted"
    floor = evaluation.floor if evaluation else Measurement(None, None)
    figures = {"teacher": dataclasses.asdict(row), "floor": dataclasses.asdict(floor)}
    summary = {
        **figures, "iterations": iteration, "outcome": outcome, "seconds": time.perf_counter() - started,
        "versions": versions(device),
    }  # fmt: skip
    run.write_json("summary.json", summary)
    run.close()
    if outcome == "complete" and evaluation is not None:
        print(table({"teacher": row, "floor: real images": evaluation.floor}))
    print(f"{run.path}: teacher.safetensors, samples.png, summary.json")
    return summary


if __name__ == "__main__":
    main()
