"""What the examples of the ops distil: an exact teacher of images 8x8, which show one of two patterns and some noise,
and a small network for generator and fake score."""

import torch
from torch import Tensor, nn

DEVIATION, SIGMA_DATA = 0.2, 0.5
ROWS = torch.arange(8)
PATTERNS = torch.stack([ROWS % 4 < 2, ROWS < 4]).float()[:, None, :, None].expand(2, 1, 8, 8) * 1.4 - 0.7


class Teacher(nn.Module):
    """`D(x, sigma)` -> [B, 1, 8, 8], the expectation of the image in `x = image + sigma * noise`: what it would be for
    either pattern, weighted by how likely that pattern is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("patterns", PATTERNS.clone())  # [2, 1, 8, 8]

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        x, variance = x[:, None], sigma.square().view(-1, 1, 1, 1, 1)  # [B, 1, 1, 8, 8], [B, 1, 1, 1, 1]
        either = (DEVIATION**2 * x + variance * self.patterns) / (DEVIATION**2 + variance)  # [B, 2, 1, 8, 8]
        distance = (x - self.patterns).square().sum((2, 3, 4), keepdim=True) / (2 * (DEVIATION**2 + variance))
        return (either * (-distance).softmax(dim=1)).sum(dim=1)


class Network(nn.Module):
    """A denoiser like it that learns, in EDM's preconditioning."""

    def __init__(self, width: int = 128):
        super().__init__()
        hidden = nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(64 + 1, width), nn.SiLU(), hidden, nn.SiLU(), nn.Linear(width, 64))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.view(-1, 1)
        F_x = self.layers(torch.cat([x.flatten(1) / (level**2 + SIGMA_DATA**2).sqrt(), level.log() / 4], dim=1))
        level = sigma.view(-1, 1, 1, 1)
        scale = (level**2 + SIGMA_DATA**2).sqrt()
        return SIGMA_DATA**2 / scale**2 * x + SIGMA_DATA * level / scale * F_x.view_as(x)


def pretrained(num_updates: int = 400, batch_size: int = 64) -> Network:
    """A network that has learnt what the teacher knows, roughly: where generator and fake score start."""
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(num_updates):
        images = PATTERNS[torch.randint(2, (batch_size,))] + DEVIATION * torch.randn(batch_size, 1, 8, 8)
        sigma = (1.5 * torch.randn(batch_size)).exp()
        D_x = network(images + sigma.view(-1, 1, 1, 1) * torch.randn_like(images), sigma)
        loss = ((1 / sigma**2 + 1 / SIGMA_DATA**2).view(-1, 1, 1, 1) * (D_x - images).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def resemblance(images: Tensor) -> tuple[float, float]:
    """How far images [N, 1, 8, 8] are from the pattern that is nearest, root mean square, which is DEVIATION for good
    ones; and the share of them that show the first pattern, a half."""
    distance = (images[:, None].cpu() - PATTERNS).square().mean((2, 3, 4)).sqrt()  # [N, 2]
    nearest, which = distance.min(dim=1)
    return nearest.square().mean().sqrt().item(), (which == 0).float().mean().item()
