"""One denoiser as five kinds of network: what each --parameterization is called with, and gives.

Stand-ins for a network of your own, which docs/own-teacher.md takes rightly and wrongly: fastdmd's embedded teacher,
behind the inputs and outputs of DDPM, of v-prediction, of flow matching and of EDM.
"""

import torch
from torch import nn

from fastdmd import load_teacher

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)  # DDPM's, linear


class StandIn(nn.Module):
    image_shape, num_classes = (1, 28, 28), 10

    def __init__(self):
        super().__init__()
        self.unet = load_teacher("mnist")
        self.register_buffer("sigmas", (1 / ABAR - 1).sqrt().float(), persistent=False)  # by timestep

    def image_and_noise(self, x, sigma, labels):
        """Both as the teacher expects them in x = image + sigma * noise; sigma [B]."""
        image = self.unet(x, sigma, labels)
        return image, (x - image) / sigma[:, None, None, None]


class X0(StandIn):
    def forward(self, x, sigma, labels):
        return self.image_and_noise(x, sigma, labels)[0]


class Edm(StandIn):
    sigma_data = 0.5

    def forward(self, x_in, c_noise, labels):
        """F_x, with which the image is c_skip * x + c_out * F_x; x_in = x / sqrt(sigma^2 + sigma_data^2)."""
        sigma = (4 * c_noise).exp()[:, None, None, None]
        total = (sigma**2 + self.sigma_data**2).sqrt()
        image, _ = self.image_and_noise(x_in * total, sigma.flatten(), labels)
        return (image - self.sigma_data**2 / total * x_in) * total / (sigma * self.sigma_data)


class Epsilon(StandIn):
    def forward(self, x_t, timestep, labels):
        """The noise in x_t = sqrt(abar) * image + sqrt(1 - abar) * noise."""
        sigma = self.sigmas[timestep.round().long()]
        x = x_t * (1 + sigma**2).sqrt()[:, None, None, None]  # x_t / sqrt(abar)
        return self.image_and_noise(x, sigma, labels)[1]


class V(StandIn):
    def forward(self, x_t, timestep, labels):
        """sqrt(abar) * noise - sqrt(1 - abar) * image, of the same x_t."""
        sigma = self.sigmas[timestep.round().long()]
        scale = (1 + sigma**2).sqrt()[:, None, None, None]  # 1 / sqrt(abar)
        image, noise = self.image_and_noise(x_t * scale, sigma, labels)
        return (noise - sigma[:, None, None, None] * image) / scale


class Flow(StandIn):
    def forward(self, x_t, t, labels):
        """noise - image, the velocity of x_t = (1 - t) * image + t * noise."""
        t = t.clamp(max=1 - 1e-6)
        image, noise = self.image_and_noise(x_t / (1 - t)[:, None, None, None], t / (1 - t), labels)
        return noise - image
