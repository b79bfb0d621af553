"""Recoloured images and the same warped: training without labels that parts P from W+."""

import torch
import torch.nn.functional as F
from torch import Tensor


def views(x: Tensor) -> tuple[Tensor, Tensor]:
    """Recoloured images, and the same warped: two views whose parts tell P from W+.

    P of x and w of the warped view together are to draw the recoloured one. P has not seen its colours and w not its
    shapes, so that each learns to hold what the other cannot; no labels are needed.

    x: [N, 3, R, R] in [−1, 1] -> twice [N, 3, R, R] in [−1, 1]. Channels are mixed around the identity and sometimes
    permuted; warps mirror half of the images, and scale, shear and shift by up to about a tenth.
    """
    n, device = len(x), x.device

    def spread(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, device=device) - 1

    orders = torch.rand(n, 3, device=device).argsort(dim=1)
    orders = torch.where(torch.rand(n, 1, device=device) < 0.3, orders, torch.arange(3, device=device))
    mix = F.one_hot(orders, 3).float() @ (torch.eye(3, device=device) + 0.3 * torch.randn(n, 3, 3, device=device))
    colours = torch.einsum("nij, njhw -> nihw", mix, x) + 0.15 * torch.randn(n, 3, 1, 1, device=device)
    colours = colours.clamp(-1, 1)  # [N, 3, R, R]
    theta = torch.eye(2, 3, device=device) + 0.1 * spread(n, 2, 3)  # [N, 2, 3]
    theta[:, 0, 0] *= spread(n).sign()
    where = F.affine_grid(theta, list(x.shape), align_corners=False)  # [N, R, R, 2]
    return colours, F.grid_sample(colours, where, padding_mode="border", align_corners=False)
