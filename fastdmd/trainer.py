"""The distillation loop, in visible phases."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from fastdmd import diffusion, dmd2
from fastdmd.adapters import Adapted
from fastdmd.checkpoint import save_network
from fastdmd.config import TrainConfig
from fastdmd.diffusion import Denoiser, random_generator
from fastdmd.machine import versions
from fastdmd.pictures import SampleHistory
from fastdmd.precision import compute_dtype
from fastdmd.quality import SAMPLING_STREAM, Evaluation, Measurement, one_step_sampler, table, teacher_sampler
from fastdmd.run_folder import RunFolder
from fastdmd.step import DMD2, StepMetrics
from fastdmd.unet import UNet

NUM_SAMPLE_ROWS = 10  # of samples.png, at most: one row per class
NUM_SAMPLE_COLUMNS = 11  # the first repeats its noise through the run


def build(config: TrainConfig, teacher: UNet | Adapted) -> DMD2:
    """The networks and optimizers of one distillation."""
    config = config.for_teacher(teacher)
    shared = dict(
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    num_generator_updates = -(-config.iterations // config.dfake_gen_update_ratio)
    return DMD2(
        teacher,
        conditioning_sigma=config.conditioning_sigma,
        sigma_data=config.sigma_data,
        dfake_gen_update_ratio=config.dfake_gen_update_ratio,
        execution=config.execution, compute_dtype=compute_dtype(config.precision),
        accumulation_steps=config.accumulation_steps,
        generator_options=dict(
            learning_rate=config.generator_lr, ema_decay=config.ema_decay, **shared,
            warmup_steps=-(-config.warmup_iterations // config.dfake_gen_update_ratio),
            decay_steps=num_generator_updates if config.lr_schedule == "cosine" else None,
        ),
        guidance_options=dict(
            learning_rate=config.guidance_lr, warmup_steps=config.warmup_iterations, **shared,
            decay_steps=config.iterations if config.lr_schedule == "cosine" else None,
        ),
    )  # fmt: skip


def make_draws(config: TrainConfig, network: Denoiser, device: torch.device) -> Callable[[int], dmd2.Draws]:
    """The random inputs of every iteration, as a function of its number."""
    config = config.for_teacher(network, device)
    if network.dynamics == "flow":
        sigmas = diffusion.lognormal_sigmas(
            config.num_train_timesteps, mean=config.time_mean, std=config.time_std, device=device
        )
    else:
        sigmas = diffusion.karras_sigmas(
            config.num_train_timesteps, sigma_min=config.sigma_min, sigma_max=config.sigma_max, rho=config.rho,
            device=device,
        )  # fmt: skip
    min_step, max_step = config.step_range
    shape = (config.batch_size, *network.image_shape)
    return lambda step: dmd2.draw(shape, network.num_classes, sigmas, min_step, max_step, seed=config.seed, step=step)


def distill(config: TrainConfig, teacher: UNet | Adapted, run: RunFolder, evaluation: Evaluation | None,
            teacher_record: dict | None = None) -> dict:  # fmt: skip
    """Trains, saves, measures; returns the summary that it wrote.

    Its `outcome` is "complete", "interrupted" (Ctrl-C; what was reached is saved) or "diverged" (the losses are not
    finite; the weights and samples of the last snapshot stay). `teacher_record` is what the teacher's file says of its
    quality (`Evaluation.record`), so that it need not be measured again.
    """
    started = time.perf_counter()
    config = config.for_teacher(teacher)
    device = next(teacher.parameters()).device
    draws = make_draws(config, teacher, device)
    model = build(config, teacher)
    history = SampleHistory(run.path / "samples.png")
    noise, class_labels = sample_inputs(teacher, config.seed, device)
    snapshot_every = -(-config.iterations // config.snapshots)

    def snapshot(iteration: int) -> None:
        generator = model.generator_optimizer.ema_network
        save_generator(config, run, generator, iteration)
        samples = one_step_sampler(generator, config.conditioning_sigma)(noise, class_labels)
        history.add(samples.unflatten(0, (-1, NUM_SAMPLE_COLUMNS)))

    # Phase 1: train.
    iteration, outcome, first_seconds = 0, "complete", None
    snapshot(iteration)
    meter = Meter(run, config, device)
    with (
        interruptible() as interrupted,
        tqdm(total=config.iterations, unit="it", dynamic_ncols=True) as progress,
    ):
        while iteration < config.iterations:
            meter.add(model.iterate(iteration, draws))
            iteration += 1
            progress.update()
            if iteration == 1:
                meter.sums.tolist()  # waits for the device
                first_seconds = time.perf_counter() - started
                progress.write(f"first iteration done after {first_seconds:.1f} s")
            if interrupted():
                outcome = "interrupted"
            if iteration % config.log_every == 0 or iteration == config.iterations or outcome == "interrupted":
                means = meter.flush(iteration)
                progress.set_postfix({name: f"{value:.4g}" for name, value in means.items() if "norm" not in name})
                if not all(map(math.isfinite, means.values())):
                    outcome = "diverged"
            if outcome != "complete":
                break
            if iteration % snapshot_every == 0 and iteration < config.iterations:
                snapshot(iteration)
    if outcome != "diverged":
        snapshot(iteration)
    train_seconds = time.perf_counter() - started

    # Phase 2: measure, the teacher beside the generator.
    rows = {"teacher": Measurement(None, None), "generator": Measurement(None, None)}
    if outcome == "complete" and evaluation is not None:
        generator = model.generator_optimizer.ema_network
        sampler = one_step_sampler(generator, config.conditioning_sigma)
        try:
            rows["generator"] = evaluation.measure(sampler, evaluations=1, name="generator")
            rows["teacher"] = evaluation.measure(
                teacher_sampler(teacher, config.teacher_steps), evaluations=2 * config.teacher_steps - 1,
                name="teacher", record=teacher_record,
            )  # fmt: skip
        except KeyboardInterrupt:
            outcome = "interrupted"

    # Phase 3: report.
    summary = {
        **{name: dataclasses.asdict(row) for name, row in rows.items()},
        "floor": dataclasses.asdict(evaluation.floor if evaluation else Measurement(None, None)),
        "iterations": iteration, "outcome": outcome,
        "seconds": time.perf_counter() - started, "train_seconds": train_seconds,
        "first_iteration_seconds": first_seconds,
        "versions": versions(device),
    }  # fmt: skip
    run.write_json("summary.json", summary)
    run.close()
    if outcome == "complete" and evaluation is not None:
        print(table({**rows, "floor: real images": evaluation.floor}))
        if rows["teacher"].recorded:
            print(
                "The teacher's distance and accuracy are on record in its weight file; --measure-teacher repeats them."
            )
    return summary


class Meter:
    """Adds up losses on the device; they cross to the host once per log interval."""

    def __init__(self, run: RunFolder, config: TrainConfig, device: torch.device):
        self.run, self.batch_size = run, config.batch_size
        self.sums = torch.zeros(2, 2, device=device)  # rows: generator, guidance; columns: loss, gradient norm
        self.counts = [0, 0]
        self.started = self.last = time.perf_counter()

    def add(self, metrics: StepMetrics) -> None:
        self.sums[1] += torch.stack([metrics.loss_fake, metrics.fake_grad_norm])
        self.counts[1] += 1
        if metrics.loss_dm is not None:
            self.sums[0] += torch.stack([metrics.loss_dm, metrics.generator_grad_norm])
            self.counts[0] += 1

    def flush(self, iteration: int) -> dict[str, float]:
        """Writes the means since the last call to metrics.jsonl, and returns them."""
        (dm_loss, dm_norm), (fake_loss, fake_norm) = self.sums.tolist()
        now = time.perf_counter()
        values = {"images_per_second": self.counts[1] * self.batch_size / (now - self.last)}
        values |= {"loss_fake": fake_loss / self.counts[1], "fake_grad_norm": fake_norm / self.counts[1]}
        if self.counts[0]:
            values |= {"loss_dm": dm_loss / self.counts[0], "generator_grad_norm": dm_norm / self.counts[0]}
        self.run.log(iteration=iteration, seconds=now - self.started, **values)
        self.sums.zero_()
        self.counts, self.last = [0, 0], now
        return values


def save_generator(config: TrainConfig, run: RunFolder, generator: UNet | Adapted, iteration: int) -> None:
    save_network(
        run.path / "generator.safetensors", generator, kind="generator", conditioning_sigma=config.conditioning_sigma,
        iterations=iteration, config=dataclasses.asdict(config),
    )  # fmt: skip


def sample_inputs(network: Denoiser, seed: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Noise and labels of samples.png: rows of NUM_SAMPLE_COLUMNS images, a class each."""
    num_rows = min(NUM_SAMPLE_ROWS, network.num_classes or NUM_SAMPLE_ROWS)
    generator = random_generator(seed, 0, device, stream=SAMPLING_STREAM + 1)
    noise = torch.randn(num_rows * NUM_SAMPLE_COLUMNS, *network.image_shape, device=device, generator=generator)
    if not network.num_classes:
        return noise, None
    return noise, torch.arange(num_rows, device=device).repeat_interleave(NUM_SAMPLE_COLUMNS)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the yielded function return True; the second one interrupts as usual."""
    if threading.current_thread() is not threading.main_thread():  # only it can have signal handlers
        yield lambda: False
        return
    pressed = False

    def press(signal_number, frame) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
