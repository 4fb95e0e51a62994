"""The fair opponents: the DMD2 loop with everything that PyTorch itself offers for speed, compiled or not.

`torch.compile`d networks, unless they are slower so, channels_last, autocast to bfloat16 where ours computes in
it, fused AdamW, foreach clipping and averaging, a loss without a pseudo-target. No op of fastdmd is in it; the random
numbers are the same. Attention is as in our network, by SDPA or, on a CPU and of few pixels, by plain products, which
were measured to be faster there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.textbook import TextbookDMD2
from fastdmd.distill.draws import materialised


class FairDMD2(TextbookDMD2):
    def __init__(self, teacher, *, bfloat16: bool, compiled: bool, **options):
        super().__init__(teacher, **options)
        self.bfloat16 = bfloat16
        for network in (self.teacher, self.generator, self.fake_score, self.ema):
            network.to(memory_format=torch.channels_last)
        adamw = dict(betas=options["betas"], weight_decay=options["weight_decay"], fused=True)
        self.generator_optimizer = torch.optim.AdamW(self.generator.parameters(), **adamw)
        self.guidance_optimizer = torch.optim.AdamW(self.fake_score.parameters(), **adamw)
        self.D_real, self.D_gen, self.D_fake = (
            torch.compile(network, dynamic=False) if compiled else network
            for network in (self.teacher, self.generator, self.fake_score)
        )

    def iterate(self, step, draws):
        draws = materialised(draws)
        with torch.autocast(draws.noise.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self._iterate(step, draws)

    def _iterate(self, step, draws):
        noise, moves = draws.noise.contiguous(memory_format=torch.channels_last), step % self.ratio == 0
        sigma = torch.full((len(noise),), self.conditioning_sigma, device=noise.device)
        loss_dm = None
        with torch.set_grad_enabled(moves):
            x_gen = self.D_gen(noise * self.conditioning_sigma, sigma, draws.class_labels)
        if moves:
            with torch.no_grad():
                x_t = x_gen + draws.dm_sigma.view(-1, 1, 1, 1) * draws.dm_noise
                D_real = self.D_real(x_t, draws.dm_sigma, draws.class_labels)
                D_fake = self.D_fake(x_t, draws.dm_sigma, draws.class_labels)
                weight_factor = (x_gen - D_real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
                grad = torch.nan_to_num((D_fake - D_real) / weight_factor, 0.0, 0.0, 0.0)
                loss_dm = 0.5 * grad.square().mean()
            x_gen.backward(grad / grad.numel())
            self._update(0, self.generator, self.generator_optimizer)
            decay = min(self.ema_decay, self.num_updates[0] / (self.num_updates[0] + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.parameters()), 1 - decay)
        x_gen = x_gen.detach()
        x_t = x_gen + draws.fake_sigma.view(-1, 1, 1, 1) * draws.fake_noise
        D_fake = self.D_fake(x_t, draws.fake_sigma, draws.class_labels)
        weight = draws.fake_sigma**-2 + self.sigma_data**-2
        loss_fake = (weight.view(-1, 1, 1, 1) * F.mse_loss(D_fake, x_gen, reduction="none")).mean()
        loss_fake.backward()
        self._update(1, self.fake_score, self.guidance_optimizer)
        return loss_dm, loss_fake
