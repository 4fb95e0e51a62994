"""How a distillation's speed grows with GPUs: a model of its costs, not a measurement.

    python -m benchmarks.scaling [--parameters 296e6] [--forward-gflops 219] [--ratio 5] [--batch 280] [--tflops 400]
        [--gbytes-per-second 300] [--latency-us 20] [--optimizer-ms 4] [--gradient-bytes 2]

The defaults are ImageNet-64's network on GPUs of one machine. With N GPUs, a batch of B images and one generator turn
in `ratio` iterations, an iteration takes

    t(N)    = B / N * image + optimizer * updates + exchange(N) * updates      updates = 1 + 1 / ratio
    image   = F (4 + 4 / ratio) / rate          F: a forward pass of one image
    exchange(N) = 2 (N - 1) / N * bytes / bandwidth + 2 (N - 1) * latency      a ring; bytes: of the flat gradient

Nothing overlaps: the exchange of all gradients stands between the backward pass and the optimizer. What does not
shrink with N, `fixed(N) = (optimizer + exchange(N)) * updates`, takes half of the time at `B = N * fixed(N) / image`:
of smaller batches, further GPUs help little. They make it slower beyond `N = (B * image / (2 latency * updates))^1/2`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one training; seconds, bytes and FLOPs per second."""

    parameters: float = 296e6
    forward_flops: float = 219e9
    ratio: float = 5
    rate: float = 400e12
    bandwidth: float = 300e9
    latency: float = 20e-6
    optimizer: float = 4e-3
    gradient_bytes: float = 2

    @property
    def updates(self) -> float:
        """An iteration, of a whole network each."""
        return 1 + 1 / self.ratio

    @property
    def image(self) -> float:
        return self.forward_flops * (4 + 4 / self.ratio) / self.rate

    def exchanged_bytes(self, num_gpus: int) -> float:
        """That each GPU sends in an iteration, and receives."""
        return 2 * (num_gpus - 1) / num_gpus * self.parameters * self.gradient_bytes * self.updates

    def exchange(self, num_gpus: int) -> float:
        """An iteration's."""
        steps = 2 * (num_gpus - 1)
        return self.exchanged_bytes(num_gpus) / self.bandwidth + steps * self.latency * self.updates

    def fixed(self, num_gpus: int) -> float:
        return self.optimizer * self.updates + self.exchange(num_gpus)

    def iteration(self, num_gpus: int, batch: float) -> float:
        return batch / num_gpus * self.image + self.fixed(num_gpus)

    def half_batch(self, num_gpus: int) -> float:
        """The batch of which half of the time is spent on images."""
        return num_gpus * self.fixed(num_gpus) / self.image

    def most_gpus(self, batch: float) -> int:
        """Beyond which an iteration takes longer again."""
        return max(1, int(math.sqrt(batch * self.image / (2 * self.latency * self.updates))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("parameters", 296e6),
        ("forward-gflops", 219),
        ("ratio", 5),
        ("batch", 280),
        ("tflops", 400),
        ("gbytes-per-second", 300),
        ("latency-us", 20),
        ("optimizer-ms", 4),
        ("gradient-bytes", 2),
    ):
        parser.add_argument(f"--{name}", type=float, default=default)
    given = parser.parse_args()
    if bad := [name for name, value in vars(given).items() if not 0 < value < math.inf]:
        parser.error(f"expected --{bad[0].replace('_', '-')} above 0, got {getattr(given, bad[0]):g}")
    costs = Costs(
        parameters=given.parameters,
        forward_flops=given.forward_gflops * 1e9,
        ratio=given.ratio,
        rate=given.tflops * 1e12,
        bandwidth=given.gbytes_per_second * 1e9,
        latency=given.latency_us * 1e-6,
        optimizer=given.optimizer_ms * 1e-3,
        gradient_bytes=given.gradient_bytes,
    )
    print(f"a model, not a measurement: batch {given.batch:g}, {costs.image * 1e3:.2f} ms an image")
    print(f"{'GPUs':>6}{'ms/iteration':>14}{'images/s':>10}{'of N times one':>16}{'MB sent':>10}{'half at batch':>15}")
    alone = costs.iteration(1, given.batch)
    for num_gpus in (1, 2, 4, 8, 16, 32, 64, 128):
        seconds = costs.iteration(num_gpus, given.batch)
        print(
            f"{num_gpus:>6}{seconds * 1e3:>14.1f}{given.batch / seconds:>10.0f}{alone / seconds / num_gpus:>16.1%}"
            f"{costs.exchanged_bytes(num_gpus) / 1e6:>10.0f}{costs.half_batch(num_gpus):>15.0f}"
        )
    print(f"slower again beyond {costs.most_gpus(given.batch)} GPUs")


if __name__ == "__main__":
    main()
