"""A warm start for generators of photographs: an autoencoder through z, whose decoder is the generator.

Images are encoded to the sphere of radius √z_dim, on which Gaussian z all but lie, jittered there, spread over it, and
decoded. Every image has a place in z then, so that the adversarial training which follows starts from all of them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padinv.model.generator import EqualLinear, GeneratorConfig
from padinv.training.discriminators import EqualConv, ResidualBlock


class ToLatent(nn.Module):
    """Image -> z on the sphere: the trunk of StyleGAN2's discriminator, named by resolution as that is."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        nf, r = config.channels, config.resolution
        self.from_rgb = nn.ModuleDict({f"r{r}": EqualConv(3, nf(r), 1)})
        self.blocks = nn.ModuleDict({f"r{r}": ResidualBlock(nf(r), nf(r // 2)) for r in config.resolutions[:0:-1]})
        self.dense = EqualLinear(nf(4) * 16, nf(4), act="lrelu")
        self.out = EqualLinear(nf(4), config.z_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, R, R] in [−1, 1] -> [N, z_dim], of norm √z_dim."""
        x = self.from_rgb[f"r{x.shape[-1]}"](x)  # [N, nf(R), R, R]
        for block in self.blocks.values():
            x = block(x)
        with torch.autocast(x.device.type, enabled=False):
            return on_sphere(self.out(self.dense(x.float().flatten(1))))


def on_sphere(z: Tensor) -> Tensor:
    """[N, z_dim], scaled to the norm √z_dim."""
    return F.normalize(z, dim=1) * math.sqrt(z.shape[1])


def jitter(z: Tensor, noise: float) -> Tensor:
    """z, moved on the sphere by Gaussian noise of so many deviations."""
    return on_sphere(z + noise * torch.randn_like(z))


def uniformity(z: Tensor) -> Tensor:
    """How far points on the sphere are from being spread evenly (Wang and Isola 2020): lower is more even."""
    return torch.pdist(F.normalize(z, dim=1)).square().mul(-2).exp().mean().log()
