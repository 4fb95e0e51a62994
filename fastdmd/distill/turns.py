"""One iteration of DMD2: a generator turn and a guidance turn over static buffers, eager, compiled or captured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from fastdmd.diffusion import DenoisingNetwork
from fastdmd.distill.ahead import Source
from fastdmd.distill.buffers import Buffers
from fastdmd.distill.draws import Draws
from fastdmd.distill.execution import Executor
from fastdmd.distill.guard import Guard, NanPolicy, marks
from fastdmd.distill.methods import Matched, Method, Terms
from fastdmd.distill.roles import cast_roles
from fastdmd.distill.scheduled import Scheduled
from fastdmd.distill.starts import make_images
from fastdmd.distill.statistics import TURN_STATISTICS, ClassSums, comparison, turn_statistics
from fastdmd.distill.tally import MOST_LEFT_OUT, Tally
from fastdmd.optim import AdamWEMA
from fastdmd.ranks import Ranks
from fastdmd.sampling import Generator
from fastdmd.shards import rest


class DMD2:
    """Teacher, generator and fake score, and the two turns that alternate (Yin et al. 2024, DMD2).

    Generator and fake score start as copies of the teacher, see `roles`. The generator makes images at
    `generator_sigmas`, the highest first, or at `conditioning_sigma` alone; of several, each sample of a batch at one,
    see `starts.make_images`. With `clamp_images` they stay in [-1, 1], see `sampling.clamp_images`. `generator_options`
    and `guidance_options` go to `AdamWEMA`. Each turn differentiates only through the network that it trains.

    `execution`: "eager"; "compiled", every network by `torch.compile`; "captured", each whole turn from noising to the
    average of the weights: on CUDA compiled networks and one graph, on a CPU the same operations as eager, see
    `RecordedTurn`. All give the same numbers to rounding.
    `compute_dtype` is what the networks compute in, see `AdamWEMA`. `accumulation_steps` processes a batch in that many
    parts, with the gradient of the whole: less memory, more time. `method` says which losses the turns add up; by
    default those of DMD2, with `sigma_data` in the weight of the fake score's. What it has for a head is trained in
    guidance turns by an `AdamWEMA` of its own, with `head_options`. `nan_policy`: an update with NaN or infinity is
    left out ("skip"), or all that follow are, too ("stop"). With a `process_group` of torch.distributed, each process
    has an equal part of the batch, and updates are those of the whole, see `AdamWEMA`; scalars are of a part. The
    teacher is the first one's. With `shard` each process has a part of each network, too, see `ShardedAdamWEMA`, but
    for the head: the teacher that is given is cut, and execution is eager.
    """

    def __init__(
        self,
        teacher: DenoisingNetwork,
        *,
        generator_sigmas: tuple[float, ...] | None = None,
        conditioning_sigma: float | None = None,
        sigma_data: float,
        dfake_gen_update_ratio: int,
        clamp_images: bool = False,
        generator_options: Mapping[str, Any],
        guidance_options: Mapping[str, Any],
        execution: str = "eager",
        compute_dtype: torch.dtype | None = None,
        accumulation_steps: int = 1,
        method: Method | None = None,
        head_options: Mapping[str, Any] | None = None,
        nan_policy: NanPolicy = "skip",
        process_group: Any = None,
        shard: bool = False,
    ):
        for name, count in (
            ("dfake_gen_update_ratio", dfake_gen_update_ratio),
            ("accumulation_steps", accumulation_steps),
        ):
            if count < 1:
                raise ValueError(f"fastdmd.DMD2: expected {name} >= 1, got {count}")
        if (generator_sigmas is None) == (conditioning_sigma is None):
            raise ValueError("fastdmd.DMD2: expected either generator_sigmas or conditioning_sigma, got both or none")
        if conditioning_sigma is not None:
            generator_sigmas = (conditioning_sigma,)
        assert generator_sigmas is not None
        self.device = next(teacher.parameters()).device
        self.ranks, self.is_in_parts = Ranks.of(process_group), shard
        self.executor = Executor(execution, self.device, records=self.ranks.is_alone and not teacher.foreign_name)
        if shard and execution != "eager":
            raise ValueError(f"fastdmd.DMD2: expected eager execution of networks that are cut, got {execution}")
        self.method: Method = (Matched(sigma_data) if method is None else method).of_ranks(self.ranks)
        self.dfake_gen_update_ratio, self.accumulation_steps = dfake_gen_update_ratio, accumulation_steps
        self.teacher, self.generator_optimizer, self.guidance_optimizer = cast_roles(
            teacher,
            self.ranks,
            num_steps=len(generator_sigmas),
            in_parts=shard,
            compute_dtype=compute_dtype,
            generator_options=generator_options,
            guidance_options=guidance_options,
        )
        self.generator = cast(DenoisingNetwork, self.generator_optimizer.network)
        self.fake_score = cast(DenoisingNetwork, self.guidance_optimizer.network)
        self.head_optimizer: AdamWEMA | None = None
        guidance_norms: tuple[str, ...] = ("fake_grad_norm",)
        if self.method.head is not None:
            shared: dict[str, Any] = {"compute_dtype": compute_dtype, "process_group": process_group}
            self.head_optimizer = AdamWEMA(self.method.head, **shared, **(head_options or {}))
            guidance_norms += ("head_grad_norm",)
        generator_scalars = (*self.method.generator_scalars, "generator_grad_norm")
        self.guard = Guard(self.device, stops=nan_policy == "stop")
        tally = functools.partial(Tally, device=self.device, guard=self.guard, is_shared=not self.ranks.is_alone)
        self.generator_tally = tally(generator_scalars, statistics=TURN_STATISTICS)
        self.class_sums: ClassSums | None = None  # of the images of generator turns
        if teacher.num_classes:
            self.class_sums = ClassSums(teacher.image_shape, teacher.num_classes, self.device)
        self.guidance_tally = tally((*self.method.guidance_scalars, *guidance_norms))
        self._teacher = self.executor.denoiser(self.teacher)
        self._fake_score = self.executor.denoiser(self.fake_score)
        self._sampler = Generator(self.executor.denoiser(self.generator), generator_sigmas, clamp_images)
        self._first_step = dataclasses.replace(self._sampler, sigmas=generator_sigmas[:1])  # what a regression trains
        self.buffers: Buffers | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles. Pickles part buffers from their views, so the next iteration makes new ones."""
        return vars(self) | {"buffers": None}

    def iterate(self, step: int, draws: Source) -> dict[str, Tensor]:
        """Iteration `step`: a generator turn where the ratio says so, and a guidance turn.

        One x_gen serves both turns, so the guidance turn sees the generator as it was before its update. `draws` gives
        the random inputs of an iteration; those of later ones may be asked for ahead of time. Another function than
        before is asked anew, and images made ahead serve where it draws what they were made from: on a GPU that
        comparison waits for the device, so pass the same function every time.

        Returns the scalars of its turns by name, 0-dim tensors on the device that are valid until the next iteration:
        `loss_fake` and `fake_grad_norm`, and in an iteration with a generator turn `loss_dm` and `generator_grad_norm`;
        with a head `head_grad_norm`, and whatever else the method tells.
        """
        self.guard.begin(step)
        buffers = self.load(draws(step) if self.buffers is None else self.buffers.ahead.draws(step, draws))
        ahead, moves = buffers.ahead, step % self.dfake_gen_update_ratio == 0
        if moves:
            self.generator_optimizer.advance()
            self.generator_turn()
        else:
            if (start := ahead.missing(step)) is not None:
                self._generate_ahead(start, draws)
            self.executor.join()
            buffers.x_gen.copy_(ahead.images(step))
        if ahead.starts(step + 1):
            self._generate_ahead(step + 1, draws)  # beside the guidance turn, where there are streams
        self.guidance_optimizer.advance()
        if self.head_optimizer is not None:
            self.head_optimizer.advance()
        self.guidance_turn()
        self.executor.join()  # before anybody changes the weights, or frees a model whose buffers are written beside
        return self.guidance_tally.scalars() | (self.generator_tally.scalars() if moves else {})

    # The turns. They read and write static buffers and nothing else, so that a CUDA graph can hold them. An iteration
    # runs them; by themselves they serve measurements.

    def generator_turn(self) -> None:
        """Moves the generator along the distribution-matching gradient; leaves x_gen."""
        buffers = self._loaded("generator")
        self.executor.run("generator", lambda: self._generator_turn(buffers), self.generator_optimizer)

    def guidance_turn(self) -> None:
        """Lets the fake score follow the generator's distribution."""
        buffers = self._loaded("guidance")
        self.executor.run("guidance", lambda: self._guidance_turn(buffers), *self._guidance_optimizers)

    def generation(self) -> None:
        """Makes the images of the next chunk of iterations."""
        ahead = self._loaded("generation").ahead
        self.executor.run("generation", lambda: ahead.generate(self._sampler, self.accumulation_steps))

    @property
    def average(self) -> DenoisingNetwork:
        """The generator with the average of its weights. Raises RuntimeError without `ema_decay`."""
        network = self.generator_optimizer.ema_network
        if network is None:
            raise RuntimeError("fastdmd.DMD2: expected ema_decay among the generator_options, got none")
        return cast(DenoisingNetwork, network)

    @property
    def captured_turns(self) -> frozenset[str]:
        """Of generator, guidance and generation, those that are CUDA graphs by now."""
        return self.executor.captured

    @property
    def num_steps(self) -> int:
        """Of the generator."""
        return self._sampler.num_evaluations

    @property
    def images_ahead(self) -> int:
        """Iterations whose images a generation makes."""
        return self._loaded("generation").ahead.chunk

    def load(self, draws: Draws) -> Buffers:
        """Copies the random inputs of an iteration to where the turns read them; makes room at the first.

        Draws of another shape, another ratio or number of parts make other buffers, and turns over them other graphs.
        Raises ValueError for a batch that `accumulation_steps` does not divide, for parts of it that the steps of the
        generator do not divide, and for draws of one step where there are several, or the other way round.
        """
        num_parts, ratio = self.accumulation_steps, self.dfake_gen_update_ratio
        if self.buffers is None or not self.buffers.fit(draws, num_parts, ratio):
            if len(draws.noise) % num_parts:
                raise ValueError(
                    f"fastdmd.DMD2: expected a batch that {num_parts} accumulation steps divide, got {len(draws.noise)}"
                )
            if draws.is_of_one_step != (self.num_steps == 1):
                got = "one step" if draws.is_of_one_step else "several"
                raise ValueError(
                    f"fastdmd.DMD2: expected draws for generator_sigmas {self._sampler.sigmas}, got some for {got}"
                )
            self.executor.renew(("generator", "guidance"), ("generation",))
            self.buffers = Buffers(draws, num_parts, ratio)
        self.buffers.load(draws)
        return self.buffers

    def _loaded(self, turn: str) -> Buffers:
        if self.buffers is None:
            raise RuntimeError(f"fastdmd.DMD2: expected an iteration before a {turn} turn by itself, got none")
        return self.buffers

    def _generator_turn(self, buffers: Buffers) -> None:
        fused = self.executor.fused
        terms: list[Terms] = []
        seen: list[Tensor] = []
        comparisons: list[Tensor] = []
        watched = buffers.inputs.watched(self.num_steps)
        for part in buffers.parts:
            teacher = Scheduled(self._teacher, self._denoise_beside)
            fake_score = Scheduled(self._fake_score, self._denoise_and_join)
            x_gen = make_images(self._sampler, part.draws)
            found = self.method.generator_terms(
                x_gen, part.draws, teacher=teacher, fake_score=fake_score, generate=self._first_step
            )
            self._backward(found.total, self.generator_optimizer, accumulate=bool(terms))
            terms.append(found.detach())
            seen.append(fused(marks, part.draws.start_images, x_gen, teacher.D_x, fake_score.D_x))
            part.x_gen.copy_(x_gen.detach())
            if teacher.D_x is not None and fake_score.D_x is not None:
                compared = part.x_gen, teacher.D_x, fake_score.D_x, part.draws.dm_sigma
                comparisons.append(fused(comparison, *(x[watched] for x in compared)))
        statistics = fused(turn_statistics, buffers.x_gen[watched], comparisons)
        self._update(self.generator_tally, [self.generator_optimizer], terms, seen, statistics)
        if self.is_in_parts:
            rest(self.teacher)
        if self.class_sums is not None and buffers.inputs.class_labels is not None:
            fused(ClassSums.add, self.class_sums, buffers.x_gen[watched], buffers.inputs.class_labels[watched])

    def _guidance_turn(self, buffers: Buffers) -> None:
        terms: list[Terms] = []
        seen: list[Tensor] = []
        for part in buffers.parts:
            fake_score = Scheduled(self._fake_score, self._fake_score)
            found = self.method.guidance_terms(part.x_gen, part.draws, teacher=self._teacher, fake_score=fake_score)
            self._backward(found.total, self.guidance_optimizer, accumulate=bool(terms))
            if self.head_optimizer is not None and found.head is not None:
                self._backward(found.head, self.head_optimizer, accumulate=bool(terms))
            terms.append(found.detach())
            made = getattr(part.draws, "real_images", None), part.x_gen, None, fake_score.D_x
            seen.append(self.executor.fused(marks, *made))
        self._update(self.guidance_tally, self._guidance_optimizers, terms, seen)

    @property
    def _guidance_optimizers(self) -> list[AdamWEMA]:
        return [self.guidance_optimizer, *([] if self.head_optimizer is None else [self.head_optimizer])]

    def _generate_ahead(self, start: int, draws: Source) -> None:
        self._loaded("generation").ahead.fill(start, draws)
        with self.executor.beside():
            self.generation()

    def _backward(self, loss: Tensor, optimizer: AdamWEMA, *, accumulate: bool) -> None:
        """Adds the gradient of a part's share of the batch."""
        steps = self.accumulation_steps
        optimizer.backward(loss / steps if steps > 1 else loss, accumulate=accumulate)

    def _denoise_beside(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        """The teacher, on the side stream if there is one; `_denoise_and_join` waits for it."""
        with self.executor.beside():
            return self._teacher(x, sigma, class_labels)

    def _denoise_and_join(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        D_fake = self._fake_score(x, sigma, class_labels)
        self.executor.join()
        return D_fake

    def _update(
        self,
        tally: Tally,
        optimizers: list[AdamWEMA],
        terms: list[Terms],
        seen: list[Tensor],
        statistics: Tensor | None = None,
    ) -> None:
        """Moves what a turn trains, if the tally permits it, which is told the means over the parts."""
        losses = [_mean([part.scalars[name] for part in terms]) for name in tally.names[: -len(optimizers)]]
        shares = [part.left_out for part in terms if part.left_out is not None]
        left_out = _mean(shares) if shares else None
        found = seen[0] if len(seen) == 1 else torch.stack(seen).sum(0)
        permitted = self.executor.fused(Tally.permits, tally, losses, found, left_out)
        options: dict[str, Tensor] = {}
        if left_out is not None and not self.ranks.is_alone:
            options["balance"] = left_out - MOST_LEFT_OUT
        norms = [optimizer.update(permitted, **options) for optimizer in optimizers]
        told = {"seen": found, "left_out": left_out, "statistics": statistics}
        self.executor.fused(Tally.add, tally, *losses, *norms, **told)


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean()
