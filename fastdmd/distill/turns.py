"""One iteration of DMD2: a generator turn and a guidance turn over static buffers, eager, compiled or captured."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdmd.diffusion import Denoiser
from fastdmd.distill.draws import Draws
from fastdmd.distill.execution import CapturedTurn, CompiledNetwork, Compiler
from fastdmd.distill.losses import denoising_loss, generator_loss
from fastdmd.distill.tally import Tally
from fastdmd.optim import AdamWEMA
from fastdmd.sampling import Generator

EXECUTIONS = ("eager", "compiled", "captured")
# Of torch.compile on a GPU; read when a DMD2 is made. CUDA graphs are "captured" execution's own. On an H200, beside
# other work, the first iteration of the MNIST networks took 53 s like this; "max-autotune-no-cudagraphs", which times
# every convolution, was not done with the first network after 60 s.
COMPILE_MODE = "default"
# Images in one no-grad forward of the generator, which serves several iterations where the batch is smaller. Measured
# on two cores, 48-wide network: 8 images cost 1.5 ms each, 72 cost 1.1 ms, 128 the same.
MAX_IMAGES_AHEAD = 128


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """0-dim tensors on the device, valid until the next turn; the generator's are None where it did not move."""

    loss_fake: Tensor
    fake_grad_norm: Tensor
    loss_dm: Tensor | None = None
    generator_grad_norm: Tensor | None = None


class DMD2:
    """Teacher, generator and fake score, and the two turns that alternate (Yin et al. 2024, DMD2).

    Generator and fake score start as copies of the teacher, all in eval mode: dropout would be noise that the other
    networks do not see. `generator_options` and `guidance_options` go to `AdamWEMA`. The teacher never requires
    gradients, and no flag is toggled between turns: each turn differentiates only through the network that it trains.

    `execution`: "eager"; "compiled", every network by `torch.compile`; "captured" (CUDA), compiled networks and each
    whole turn, from noising to the average of the weights, one CUDA graph. All three give the same numbers to rounding.
    `compute_dtype` is what the networks compute in, see `AdamWEMA`. `accumulation_steps` processes a batch in that many
    parts, with the gradient of the whole: less memory, more time.
    """

    def __init__(self, teacher: nn.Module, *, conditioning_sigma: float, sigma_data: float,
                 dfake_gen_update_ratio: int, generator_options: dict, guidance_options: dict,
                 execution: str = "eager", compute_dtype: torch.dtype | None = None, accumulation_steps: int = 1
                 ):  # fmt: skip
        self.device = next(teacher.parameters()).device
        if execution not in EXECUTIONS:
            raise ValueError(f"fastdmd.DMD2: expected execution out of {', '.join(EXECUTIONS)}, got {execution}")
        if execution == "captured" and self.device.type != "cuda":
            raise ValueError(f"fastdmd.DMD2: expected a CUDA device for captured execution, got {self.device}")
        teacher = teacher.eval().requires_grad_(False)
        self.teacher = teacher
        if compute_dtype is not None:
            self.teacher = copy.deepcopy(teacher)
            for parameter in self.teacher.parameters():  # not the buffers: frequencies need their digits
                parameter.data = parameter.data.to(compute_dtype)
        self.conditioning_sigma, self.sigma_data = conditioning_sigma, sigma_data
        self.dfake_gen_update_ratio, self.accumulation_steps = dfake_gen_update_ratio, accumulation_steps
        # One after the other: the optimizer moves the parameters, and the next copy takes the place that they left.
        self.generator = copy.deepcopy(teacher).requires_grad_(True)
        self.generator_optimizer = AdamWEMA(self.generator, compute_dtype=compute_dtype, **generator_options)
        self.fake_score = copy.deepcopy(teacher).requires_grad_(True)
        self.guidance_optimizer = AdamWEMA(self.fake_score, compute_dtype=compute_dtype, **guidance_options)
        self.execution = execution
        self.generator_tally = Tally(("loss_dm", "generator_grad_norm"), self.device)
        self.guidance_tally = Tally(("loss_fake", "fake_grad_norm"), self.device)
        # Of the turns, and of what runs beside them, where turns are captured; made with the buffers.
        self._stream: torch.cuda.Stream | None = None
        self._side_stream: torch.cuda.Stream | None = None
        self._captured: dict[str, CapturedTurn] = {}
        self._compiler = Compiler(COMPILE_MODE if self.device.type == "cuda" else None)
        self._generator, self._teacher, self._fake_score = map(
            self._executable, (self.generator, self.teacher, self.fake_score)
        )
        self._inputs: Draws | None = None
        self._source: Callable[[int], Draws] | None = None
        self._drawn: dict[int, Draws] = {}  # from the source, ahead of time

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles. Pickles part buffers from their views, so the next iteration makes new ones."""
        kept = {name: value for name, value in vars(self).items() if name not in ("_parts", "_x_gen", "_ahead")}
        left = {"_inputs": None, "_source": None, "_drawn": {}, "_captured": {}, "_stream": None, "_side_stream": None}
        return {**kept, **left}

    def iterate(self, step: int, draws: Callable[[int], Draws]) -> StepMetrics:
        """Iteration `step`: a generator turn where the ratio says so, and a guidance turn.

        One x_gen serves both turns, so the guidance turn sees the generator as it was before its update. `draws` gives
        the random inputs of an iteration; those of later ones may be asked for ahead of time. Another function than
        before is asked anew, and images made ahead serve where it draws what they were made from: on a GPU that
        comparison waits for the device, so pass the same function every time.
        """
        drawn = self._drawn.pop(step, None)
        if draws is not self._source:
            ahead, drawn = drawn, draws(step)
            if ahead is None or not _same_start(ahead, drawn):
                self._chunk_start = None
        self._load(drawn or draws(step))
        moves = step % self.dfake_gen_update_ratio == 0
        if moves:
            self.generator_optimizer.advance()
            self.generator_turn()
        else:
            self._take_x_gen(step, draws)
        if self._starts_chunk(step + 1):
            self._generate_ahead(step + 1, draws)  # beside the guidance turn, where there are streams
        self.guidance_optimizer.advance()
        self.guidance_turn()
        self._join()  # before anybody changes the weights, or frees a model whose buffers are written beside
        return StepMetrics(*self.guidance_tally.latest, *(self.generator_tally.latest if moves else ()))

    # The turns. They read and write static buffers and nothing else, so that a CUDA graph can hold them. An iteration
    # runs them; by themselves they serve measurements.

    def generator_turn(self) -> None:
        self._execute("generator", self._run_generator_turn)

    def guidance_turn(self) -> None:
        self._execute("guidance", self._run_guidance_turn)

    def generation(self) -> None:
        self._execute("generation", self._run_generation)

    @property
    def captured_turns(self) -> frozenset[str]:
        """Of generator, guidance and generation, those that are CUDA graphs by now."""
        return frozenset(name for name, turn in self._captured.items() if turn.is_captured)

    def _execute(self, name: str, run: Callable[[], None]) -> None:
        if self._inputs is None:
            raise RuntimeError(f"fastdmd.DMD2: expected an iteration before a {name} turn by itself, got none")
        turn = self._captured.get(name)  # holds no `run`, and so not this model: `del model` frees it
        run() if turn is None else turn(run)

    def _run_generator_turn(self) -> None:
        """Moves the generator along the distribution-matching gradient; leaves x_gen."""
        losses, shares = [], []
        for part in self._parts:
            x_gen = self._generate(part.noise, part.class_labels)
            loss, left_out = generator_loss(
                x_gen, self._denoise_beside, self._denoise_and_join, part.class_labels, sigma=part.dm_sigma,
                noise=part.dm_noise,
            )  # fmt: skip
            losses.append(self._backward(loss, part, self.generator_optimizer))
            shares.append(left_out)
            part.x_gen.copy_(x_gen.detach())
        norm = self.generator_optimizer.update()
        self.generator_tally.add(_mean(losses), norm, left_out=_mean(shares))

    def _run_guidance_turn(self) -> None:
        """Lets the fake score follow the generator's distribution."""
        losses = []
        for part in self._parts:
            loss = denoising_loss(
                part.x_gen, self._fake_score, part.class_labels, sigma=part.fake_sigma, noise=part.fake_noise,
                sigma_data=self.sigma_data,
            )  # fmt: skip
            losses.append(self._backward(loss, part, self.guidance_optimizer))
        self.guidance_tally.add(_mean(losses), self.guidance_optimizer.update())

    def _run_generation(self) -> None:
        """Makes the images of the next chunk of iterations."""
        size = len(self._ahead.noise) // self.accumulation_steps
        with torch.no_grad():
            for start in range(0, len(self._ahead.noise), size):
                rows = slice(start, start + size)
                class_labels = None if self._ahead.class_labels is None else self._ahead.class_labels[rows]
                self._ahead.x_gen[rows] = self._generate(self._ahead.noise[rows], class_labels)

    def _generate(self, noise: Tensor, class_labels: Tensor | None) -> Tensor:
        return Generator(self._generator, (self.conditioning_sigma,))(noise, class_labels)

    def _backward(self, loss: Tensor, part: _Part, optimizer: AdamWEMA) -> Tensor:
        """Adds the gradient of a part's share of the batch; returns its loss."""
        share = loss / self.accumulation_steps if self.accumulation_steps > 1 else loss
        optimizer.backward(share, accumulate=part is not self._parts[0])
        return loss.detach()

    # Static buffers.

    def _load(self, draws: Draws) -> None:
        """Copies the random inputs of an iteration to where the turns read them; makes room at the first."""
        form = draws.noise.shape, self.dfake_gen_update_ratio
        if self._inputs is None or self._form != form:
            self._allocate(draws)
            self._form = form
        for field in dataclasses.fields(Draws):
            if (buffer := getattr(self._inputs, field.name)) is not None:
                buffer.copy_(getattr(draws, field.name))

    def _allocate(self, draws: Draws) -> None:
        """Buffers for draws of this shape, and turns over them: another shape or ratio, other graphs."""
        B = len(draws.noise)
        if B % self.accumulation_steps:
            raise ValueError(
                f"fastdmd.DMD2: expected a batch that {self.accumulation_steps} accumulation steps divide, got {B}"
            )
        if self.execution == "captured":
            torch.cuda.synchronize(self.device)  # what runs still reads the buffers and graphs that go now
            if self._stream is None:
                self._stream, self._side_stream = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
            pool = torch.cuda.graph_pool_handle()
            self._captured = {
                "generator": CapturedTurn(self._stream, pool), "guidance": CapturedTurn(self._stream, pool),
                "generation": CapturedTurn(self._side_stream, torch.cuda.graph_pool_handle()),
            }  # fmt: skip
        fields = {field.name: getattr(draws, field.name) for field in dataclasses.fields(Draws)}
        fields = {name: None if value is None else torch.empty_like(value) for name, value in fields.items()}
        self._inputs = Draws(**fields)
        self._x_gen = torch.empty_like(draws.noise)
        self._drawn.clear()
        size = B // self.accumulation_steps
        self._parts = [
            _Part(x_gen=x, **{name: None if value is None else value[start : start + size]
                              for name, value in fields.items()})
            for start, x in zip(range(0, B, size), self._x_gen.split(size), strict=True)
        ]  # fmt: skip
        # A chunk of iterations between two generator turns, whose images are made at once.
        between = self.dfake_gen_update_ratio - 1
        fitting = [n for n in range(1, between + 1) if between % n == 0 and n * B <= MAX_IMAGES_AHEAD]
        self._chunk, self._chunk_start = max(fitting, default=1), None
        self._ahead = _Ahead(*(
            None if value is None else value.new_empty((self._chunk * B, *value.shape[1:]))
            for value in (draws.noise, draws.noise, draws.class_labels)
        ))  # fmt: skip

    # Images for the iterations between generator turns.

    def _starts_chunk(self, step: int) -> bool:
        position = step % self.dfake_gen_update_ratio
        return position > 0 and (position - 1) % self._chunk == 0

    def _take_x_gen(self, step: int, draws: Callable[[int], Draws]) -> None:
        index = (step % self.dfake_gen_update_ratio - 1) % self._chunk
        if self._chunk_start != step - index:  # the first iteration, or the first after a change
            self._generate_ahead(step - index, draws)
        self._join()
        self._x_gen.copy_(self._ahead.x_gen.unflatten(0, (self._chunk, -1))[index])

    def _generate_ahead(self, start: int, draws: Callable[[int], Draws]) -> None:
        """Makes the images of the iterations `[start, start + chunk)`."""
        self._drawn.clear()
        for index, step in enumerate(range(start, start + self._chunk)):
            drawn = self._drawn[step] = draws(step)
            rows = slice(index * len(drawn.noise), (index + 1) * len(drawn.noise))
            self._ahead.noise[rows].copy_(drawn.noise)
            if drawn.class_labels is not None:
                self._ahead.class_labels[rows].copy_(drawn.class_labels)
        self._chunk_start, self._source = start, draws
        if self._side_stream is None:
            return self.generation()
        self._side_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side_stream):
            self.generation()

    # How networks are called.

    def _executable(self, network: nn.Module) -> Denoiser:
        if self.execution == "eager":
            return network
        return CompiledNetwork(network, self._compiler)

    def _denoise_beside(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        """The teacher, on the side stream if there is one; `_denoise_and_join` waits for it.

        What each stream makes is freed when both have met again, and its memory goes to later work of that stream.
        """
        if self._side_stream is None:
            return self._teacher(x, sigma, class_labels)
        self._side_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side_stream):
            return self._teacher(x, sigma, class_labels)

    def _denoise_and_join(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        D_fake = self._fake_score(x, sigma, class_labels)
        self._join()
        return D_fake

    def _join(self) -> None:
        """Lets what comes next wait for what runs beside."""
        if self._side_stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side_stream)


def _same_start(a: Draws, b: Draws) -> bool:
    """Whether a generator makes the same images of both."""
    if (a.class_labels is None) != (b.class_labels is None):
        return False
    return torch.equal(a.noise, b.noise) and (a.class_labels is None or torch.equal(a.class_labels, b.class_labels))


@dataclasses.dataclass(frozen=True)
class _Part(Draws):
    """Rows of the static buffers that one backward pass serves."""

    x_gen: Tensor  # [B, C, H, W]


@dataclasses.dataclass(frozen=True)
class _Ahead:
    x_gen: Tensor  # [chunk * B, C, H, W]
    noise: Tensor  # [chunk * B, C, H, W]
    class_labels: Tensor | None  # int64 [chunk * B]


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean()
