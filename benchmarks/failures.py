"""Runs that fail, each in its own way, and runs that do not: what alarms are judged by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdmd.distill import DMD2, Draws

Fault = Callable[[DMD2], None]
WITH_GAN = {"gan_guidance_weight": 1e-2}
PUBLISHED_GAN = {**WITH_GAN, "gan_features": "fake"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A distillation of the embedded teacher, and what is done to it."""

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of TrainConfig
    fault: Fault | None = None  # done to the model before the iteration `at`
    at: int = 0


def denoised(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Fault:
    """The teacher gives `change(x, sigma, D_x)`."""

    def apply(model: DMD2) -> None:
        model.teacher.register_forward_hook(lambda module, given, D_x: change(given[0], given[1], D_x))

    return apply


def labelled(change: Callable[[Tensor], Tensor]) -> Fault:
    """The teacher is told other labels."""

    def apply(model: DMD2) -> None:
        model.teacher.register_forward_pre_hook(lambda module, given: (*given[:2], change(given[2])))

    return apply


def rates(generator: float = 1.0, fake_score: float = 1.0) -> Fault:
    """Learning rates times these."""

    def apply(model: DMD2) -> None:
        model.generator_optimizer.peak_learning_rate *= generator
        model.guidance_optimizer.peak_learning_rate *= fake_score

    return apply


def deaf(model: DMD2) -> None:
    """The generator makes of any noise what it makes of none."""
    model.generator.register_forward_pre_hook(lambda module, given: (given[0] * 0, *given[1:]))


def collapsed(model: DMD2) -> None:
    """The generator's last layer starts with zeros: one image, a grey one."""
    with torch.no_grad():
        last = [module for module in model.generator.modules() if isinstance(module, nn.Conv2d)][-1]
        for parameter in last.parameters():
            parameter.zero_()


def noisy(x: Tensor, sigma: Tensor, D_x: Tensor) -> Tensor:
    """At high levels of noise."""
    random = torch.Generator().manual_seed(0)
    return D_x + (sigma > 5)[:, None, None, None] * 0.7 * torch.randn(D_x.shape, generator=random)


def redrawn(change: Callable[[Draws], Draws]) -> Fault:
    """What is drawn is drawn differently."""

    def apply(model: DMD2) -> None:
        iterate, sources = model.iterate, {}  # the same function every time, as it asks for
        model.iterate = lambda step, draws: iterate(step, sources.setdefault(draws, lambda at: change(draws(at))))

    return apply


def one_class(drawn: Draws) -> Draws:
    return dataclasses.replace(drawn, class_labels=torch.full_like(drawn.class_labels, 3))


def shuffled(labels: Tensor) -> Tensor:
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(int(labels.sum())))]


FAILURES = [
    Case("generator's rate x 30", {"generator_lr": 6e-4 * 30}),
    Case("generator's rate x 100", {"generator_lr": 6e-4 * 100}),
    Case("both rates x 30", {"generator_lr": 6e-4 * 30, "fake_score_lr": 1.2e-3 * 30}),
    Case("fake score's rate x 50", {"fake_score_lr": 1.2e-3 * 50}),
    Case("ratio 1, slow fake score", {"dfake_gen_update_ratio": 1, "fake_score_lr": 1e-5}),
    Case("fake score stands still", {"fake_score_lr": 1e-12}),
    Case("fake score's rate / 100", {"fake_score_lr": 1.2e-5}),
    Case("teacher x 2", fault=denoised(lambda x, sigma, D_x: 2 * D_x)),
    Case(
        "teacher x 1.5 at high levels",
        fault=denoised(lambda x, sigma, D_x: D_x * (1 + 0.5 * (sigma > 2))[:, None, None, None]),
    ),
    Case("teacher told one label", fault=labelled(torch.zeros_like)),
    Case("teacher told shuffled labels", fault=labelled(shuffled)),
    Case("teacher constant", fault=denoised(lambda x, sigma, D_x: torch.zeros_like(D_x))),
    Case("teacher noisy at high levels", fault=denoised(noisy)),
    Case("adversarial weight 30", {**PUBLISHED_GAN, "gan_generator_weight": 30.0}),
    Case("adversarial weight 30, of images", {**WITH_GAN, "gan_generator_weight": 30.0}),
    Case("discriminator stands still", {**PUBLISHED_GAN, "gan_features": "teacher", "gan_lr": 1e-20}),
    Case("collapsed from the start", {"generator_lr": 6e-5}, fault=collapsed),  # by default it heals at once
    Case("generator deaf to noise", fault=deaf),
    Case("labels of one class", fault=redrawn(one_class)),
    Case("late: rates x 50", fault=rates(50, 50), at=96),
    Case("late: fake score stops", fault=rates(1, 1e-9), at=96),
    Case("late: teacher x 2", fault=denoised(lambda x, sigma, D_x: 2 * D_x), at=96),
    Case("starts from little noise", {"conditioning_sigma": 0.01}),
    Case("weight decay 3000", {"weight_decay": 3000.0}),
]
HEALTHY = [
    Case("default"),
    Case("batch 12", {"batch_size": 12}),
    Case("batch 48", {"batch_size": 48}),
    Case("ratio 3", {"dfake_gen_update_ratio": 3}),
    Case("ratio 5", {"dfake_gen_update_ratio": 5}),
    Case("ratio 10", {"dfake_gen_update_ratio": 10}),
    Case("rates x 2", {"generator_lr": 1.2e-3, "fake_score_lr": 2.4e-3}),
    Case("rates / 2", {"generator_lr": 3e-4, "fake_score_lr": 6e-4}),
    Case("with the adversarial term", WITH_GAN),
    Case("with the published one", PUBLISHED_GAN),
    Case("constant rates", {"lr_schedule": "constant"}),
    Case("four steps", {"generator_sigmas": (80.0, 24.4, 5.8, 0.9)}),
]
