"""A whole iteration of DMD2 as one CUDA graph: no Python between its kernels, and fresh noise at every replay.

`python -m examples.captured_step` runs it where there is a GPU; on a CPU the same function runs as it is.
"""

import copy
from collections.abc import Callable

import torch

from examples.plain_loop import BATCH_SIZE, START, generate
from examples.toy import SIGMA_DATA, Teacher, pretrained
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


def main(iterations: int = 400) -> list[float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    teacher, generator = Teacher().to(device), pretrained().to(device)
    fake_score = copy.deepcopy(generator)
    # A step count, a rate and a norm that live on the device: an update needs nothing from the host.
    optimizer = AdamWEMA(generator, learning_rate=1e-3, betas=(0.0, 0.999), max_grad_norm=10.0)
    fake_optimizer = AdamWEMA(fake_score, learning_rate=2e-3, betas=(0.0, 0.999), max_grad_norm=10.0)
    state = ops.rng_state(seed=0, device=device)
    images, ones = torch.zeros(BATCH_SIZE, 1, 8, 8, device=device), torch.ones(BATCH_SIZE, device=device)
    loss_dm, loss_fake = torch.zeros(2, device=device)

    def levels() -> torch.Tensor:
        """Log-normal, of numbers that the device draws."""
        return (1.2 * ops.add_noise(torch.zeros_like(ones).view(-1, 1, 1, 1), ones, rng_state=state).flatten()).exp()

    def step() -> None:
        x_gen = generate(generator, ops.add_noise(images, ones, rng_state=state))
        sigma = levels()
        with torch.no_grad():
            x_t = ops.add_noise(x_gen, sigma, rng_state=state)
            D_real, D_fake = teacher(x_t, sigma), fake_score(x_t, sigma)
        loss = ops.dm_loss(x_gen, D_real, D_fake)
        loss_dm.copy_(loss.detach())
        optimizer.backward(loss)
        optimizer.step()

        x_gen, sigma = x_gen.detach(), levels()
        x_t = ops.add_noise(x_gen, sigma, rng_state=state)
        loss = ops.fake_loss(fake_score(x_t, sigma), x_gen, sigma, sigma_data=SIGMA_DATA)
        loss_fake.copy_(loss.detach())
        fake_optimizer.backward(loss)
        fake_optimizer.step()

    run = captured(step, device)
    losses = []
    for _ in range(iterations):
        run()
        losses.append(loss_fake.item())  # the one wait for the device; leave it out of a loop that shall be fast
    print(f"{iterations} iterations on {device}, from {START:g}: loss of the fake score {losses[-1]:.3f}")
    assert len(set(losses)) == iterations, "expected fresh noise at every replay"
    return losses


if __name__ == "__main__":
    main()
