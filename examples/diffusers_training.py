"""The training script of a diffusers user, with a distillation behind it: UNet2DModel, DDPMScheduler, `fastdmd.ops`.

`python -m examples.diffusers_training` (needs diffusers) trains a tiny v network, distils it, and leaves a folder that
diffusers reads.
"""

import copy
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from examples.toy import DEVIATION, PATTERNS, resemblance
from fastdmd import ops

BATCH_SIZE, RATIO = 32, 2
scheduler = DDPMScheduler(num_train_timesteps=1000, prediction_type="v_prediction")
# x_vp = sqrt(alpha) image + sqrt(1 - alpha) noise is (image + sigma noise) / sqrt(1 + sigma^2) with this sigma.
SIGMAS = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()  # [1000], ascending


def real_images(num: int) -> Tensor:
    """[num, 1, 8, 8]; yours come from a DataLoader."""
    return PATTERNS[torch.randint(2, (num,))] + DEVIATION * torch.randn(num, 1, 8, 8)


def train(unet: UNet2DModel, num_updates: int) -> None:
    """As diffusers' own script does it; nothing here is fastdmd's."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(num_updates):
        images, t = real_images(BATCH_SIZE), torch.randint(1000, (BATCH_SIZE,))
        noise = torch.randn_like(images)
        x_vp, v = scheduler.add_noise(images, noise, t), scheduler.get_velocity(images, noise, t)
        F.mse_loss(unet(x_vp, t).sample, v).backward()
        optimizer.step()
        optimizer.zero_grad()


def noised(images: Tensor, sigma: Tensor, state: Tensor) -> Tensor:
    """x_vp in one pass over memory, the noise made on the way."""
    return ops.add_noise(images, sigma, scale=(1 + sigma.square()).rsqrt(), rng_state=state)


def denoise(unet: UNet2DModel, x_vp: Tensor, t: Tensor) -> Tensor:
    """The image that a v network sees: (x_vp - sigma v) / sqrt(1 + sigma^2)."""
    sigma = SIGMAS[t].view(-1, 1, 1, 1)
    return (x_vp - sigma * unet(x_vp, t).sample) * (1 + sigma.square()).rsqrt()


def generate(generator: UNet2DModel, z: Tensor) -> Tensor:
    """Images in one step, from the last timestep, where x_vp is noise alone."""
    return denoise(generator, z, torch.full((len(z),), 999))


def distil(teacher: UNet2DModel, iterations: int) -> UNet2DModel:
    """A generator of one step."""
    generator, fake_score = copy.deepcopy(teacher), copy.deepcopy(teacher)
    generator_optimizer = torch.optim.AdamW(generator.parameters(), lr=5e-4, betas=(0.0, 0.999))
    fake_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=1e-3, betas=(0.0, 0.999))
    state = ops.rng_state(seed=0)
    for step in range(iterations):
        x_gen = generate(generator, torch.randn(BATCH_SIZE, 1, 8, 8))
        if step % RATIO == 0:
            t = torch.randint(20, 980, (BATCH_SIZE,))
            with torch.no_grad():
                x_vp = noised(x_gen, SIGMAS[t], state)
                D_real, D_fake = denoise(teacher, x_vp, t), denoise(fake_score, x_vp, t)
            ops.dm_loss(x_gen, D_real, D_fake).backward()
            generator_optimizer.step()
            generator_optimizer.zero_grad()

        x_gen, t = x_gen.detach(), torch.randint(1000, (BATCH_SIZE,))
        D_fake = denoise(fake_score, noised(x_gen, SIGMAS[t], state), t)
        ops.denoising_loss(D_fake, x_gen, 1 + SIGMAS[t] ** -2).backward()  # the mean squared error of v
        fake_optimizer.step()
        fake_optimizer.zero_grad()
    return generator


def main(out: Path = Path("generator"), num_updates: int = 200, iterations: int = 100) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "norm_num_groups": 4}
    unet = UNet2DModel(8, 1, 1, block_out_channels=[16, 32], layers_per_block=1, **blocks)
    train(unet, num_updates)
    distil(unet.eval(), iterations).save_pretrained(out)
    generator, z = UNet2DModel.from_pretrained(out, low_cpu_mem_usage=False).eval(), torch.randn(500, 1, 8, 8)
    with torch.no_grad():
        (before, _), (after, share) = (resemblance(generate(network, z)) for network in (unet, generator))
    print(f"{before:.2f}, then {after:.2f} from a pattern, {DEVIATION} is right; {share:.0%} show the first one")
    assert after < 0.75 * before and 0.2 < share < 0.8


if __name__ == "__main__":
    main()
