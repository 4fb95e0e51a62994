"""DMD2 in a training loop of your own: plain PyTorch, with the losses and the noise of `fastdmd.ops`.

`python -m examples.plain_loop` distils an exact teacher of toy images into a generator of one step, in seconds.
"""

import copy

import torch
from torch import Tensor, nn

from examples.toy import DEVIATION, SIGMA_DATA, Teacher, pretrained, resemblance
from fastdmd import ops

BATCH_SIZE, RATIO = 64, 2  # guidance turns per generator turn
START = 80.0  # the noise level that the generator starts from


def generate(generator: nn.Module, z: Tensor) -> Tensor:
    """Standard normal z [B, 1, 8, 8] to images, in one step."""
    return generator(START * z, torch.full((len(z),), START, device=z.device))


def generator_loss(
    generator: nn.Module, teacher: nn.Module, fake_score: nn.Module, z: Tensor, sigma: Tensor, state: Tensor
) -> Tensor:
    """In which direction the generated distribution is wrong, as teacher and fake score see it at noise levels sigma
    [B]; `state` is where the noise comes from, and moves on with each draw."""
    x_gen = generate(generator, z)
    with torch.no_grad():
        x_t = ops.add_noise(x_gen, sigma, rng_state=state)
        D_real, D_fake = teacher(x_t, sigma), fake_score(x_t, sigma)
    return ops.dm_loss(x_gen, D_real, D_fake)


def fake_score_loss(generator: nn.Module, fake_score: nn.Module, z: Tensor, sigma: Tensor, state: Tensor) -> Tensor:
    """How well the fake score denoises what the generator makes."""
    with torch.no_grad():
        x_gen = generate(generator, z)
    x_t = ops.add_noise(x_gen, sigma, rng_state=state)
    return ops.fake_loss(fake_score(x_t, sigma), x_gen, sigma, sigma_data=SIGMA_DATA)


def distil(network: nn.Module, iterations: int, generator_loss=generator_loss, fake_score_loss=fake_score_loss):
    """The generator, and the fake score's loss at every iteration."""
    teacher, generator, fake_score = Teacher(), copy.deepcopy(network), copy.deepcopy(network)
    generator_optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-3, betas=(0.0, 0.999))
    fake_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=2e-3, betas=(0.0, 0.999))
    state, random = ops.rng_state(seed=0), torch.Generator().manual_seed(0)
    losses = []
    for step in range(iterations):
        z = torch.randn(BATCH_SIZE, 1, 8, 8, generator=random)
        sigma, fake_sigma = (1.2 * torch.randn(2, BATCH_SIZE, generator=random)).exp()
        if step % RATIO == 0:
            generator_loss(generator, teacher, fake_score, z, sigma, state).backward()
            generator_optimizer.step()
            generator_optimizer.zero_grad()
        loss = fake_score_loss(generator, fake_score, z, fake_sigma, state)
        loss.backward()
        fake_optimizer.step()
        fake_optimizer.zero_grad()
        losses.append(loss.item())
    return generator, losses


def main(iterations: int = 1200) -> None:
    torch.manual_seed(0)
    network, z = pretrained(), torch.randn(1000, 1, 8, 8)
    generator, _ = distil(network, iterations)
    with torch.no_grad():
        before, after = (resemblance(generate(made_by, z)) for made_by in (network, generator))
    for name, (distance, share) in {"before": before, "after": after}.items():
        print(f"{name}: {distance:.2f} from a pattern, where {DEVIATION} is right; {share:.0%} show the first one")
    assert before[0] > 1.5 * DEVIATION and abs(after[0] - DEVIATION) < 0.2 * DEVIATION and 0.35 < after[1] < 0.65


if __name__ == "__main__":
    main()
