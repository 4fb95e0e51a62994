"""A whole iteration of DMD2 as one CUDA graph: no Python between its kernels, and fresh noise at every replay.

`python -m examples.captured_step` runs it where there is a GPU; on a CPU the same function runs as it is.
"""

import copy
from collections.abc import Callable

import torch

from examples.plain_loop import BATCH_SIZE, generate
from examples.toy import SIGMA_DATA, Network, Teacher, pretrained
from fastdmd import ops
from fastdmd.optim import AdamWEMA


def captured(step: Callable[[], None], device: torch.device, num_eager: int = 3) -> Callable[[], None]:
    """`step` as a graph. It reads and writes the same tensors each time, and never asks what one holds. The first calls
    run eagerly, on the stream that will be captured, and are iterations like any other."""
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(num_eager):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # notes what step() would do, and does nothing
        step()
    return graph.replay


def make_step(network: Network, teacher: Teacher) -> tuple[Callable[[], None], torch.Tensor]:
    """A generator turn and a guidance turn on the device of both, and the tensor that has the loss of the last."""
    generator, fake_score = copy.deepcopy(network), copy.deepcopy(network)
    # Step count, rate and norm live on the device: an update needs nothing from the host.
    optimizer = AdamWEMA(generator, learning_rate=1e-3, betas=(0.0, 0.999), max_grad_norm=10.0)
    fake_optimizer = AdamWEMA(fake_score, learning_rate=2e-3, betas=(0.0, 0.999), max_grad_norm=10.0)
    device = teacher.patterns.device
    state = ops.rng_state(seed=0, device=device)
    zeros, ones = torch.zeros(BATCH_SIZE, 1, 8, 8, device=device), torch.ones(BATCH_SIZE, device=device)
    loss_fake = torch.zeros((), device=device)

    def levels() -> torch.Tensor:
        """Log-normal, [B]."""
        return (1.2 * ops.add_noise(zeros[:, :, :1, :1].contiguous(), ones, rng_state=state).flatten()).exp()

    def step() -> None:
        x_gen = generate(generator, ops.add_noise(zeros, ones, rng_state=state))
        sigma = levels()
        with torch.no_grad():
            x_t = ops.add_noise(x_gen, sigma, rng_state=state)
            D_real, D_fake = teacher(x_t, sigma), fake_score(x_t, sigma)
        optimizer.backward(ops.dm_loss(x_gen, D_real, D_fake))
        optimizer.step()

        x_gen, sigma = x_gen.detach(), levels()
        x_t = ops.add_noise(x_gen, sigma, rng_state=state)
        loss = ops.fake_loss(fake_score(x_t, sigma), x_gen, sigma, sigma_data=SIGMA_DATA)
        loss_fake.copy_(loss.detach())
        fake_optimizer.backward(loss)
        fake_optimizer.step()

    return step, loss_fake


def main(iterations: int = 400) -> list[float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    step, loss_fake = make_step(pretrained().to(device), Teacher().to(device))
    run, losses = captured(step, device), []
    for _ in range(iterations):
        run()
        losses.append(loss_fake.item())  # the one wait for the device; a loop that shall be fast does not look so often
    print(f"{iterations} iterations on {device}: loss of the fake score from {losses[0]:.3f} to {losses[-1]:.3f}")
    assert len(set(losses)) == iterations, "expected fresh noise at every replay"
    return losses


if __name__ == "__main__":
    main()
