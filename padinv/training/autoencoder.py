"""A warm start for generators of photographs: an autoencoder through z, whose decoder is the generator.

Images are encoded to the sphere of radius √z_dim, on which Gaussian z all but lie, jittered there, spread over it, and
decoded. Every image has a place in z then, so that the adversarial training which follows starts from all of them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from padinv.model.generator import GeneratorConfig
from padinv.training.discriminators import FromImage


class ToLatent(FromImage):
    """Image -> z on the sphere: [N, 3, R, R] in [−1, 1] -> [N, z_dim], of norm √z_dim."""

    def __init__(self, config: GeneratorConfig):
        super().__init__(config, config.z_dim, compare=False)

    def forward(self, x: Tensor) -> Tensor:
        return on_sphere(super().forward(x))


def on_sphere(z: Tensor) -> Tensor:
    """[N, z_dim], scaled to the norm √z_dim."""
    return F.normalize(z, dim=1) * math.sqrt(z.shape[1])


def jitter(z: Tensor, noise: float) -> Tensor:
    """z, moved on the sphere by Gaussian noise of so many deviations."""
    return on_sphere(z + noise * torch.randn_like(z))


def uniformity(z: Tensor) -> Tensor:
    """How far points on the sphere, [N, z_dim], are from being spread evenly (Wang and Isola 2020): lower is more even.
    At most 0, as for one point."""
    if len(z) == 1:
        return 0 * z.sum()
    return torch.pdist(F.normalize(z, dim=1)).square().mul(-2).exp().mean().log()
