"""Images made from others, so that their relation is known: recoloured and warped views, and stickers."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

# Where stickers go, in shares of the side of an image whose face fills it: colour, ellipses and rectangles.
STICKERS = {
    "clothes": ("#2b6cb0", (), ((0.0, 0.88, 1.0, 1.0),)),
    "facial_hair": ("#3b2417", ((0.34, 0.68, 0.52, 0.75), (0.48, 0.68, 0.66, 0.75)), ()),
    "glasses": ("#15171c", ((0.18, 0.36, 0.46, 0.56), (0.54, 0.36, 0.82, 0.56)), ((0.44, 0.43, 0.56, 0.46),)),
    "hair": ("#d9a441", ((-0.14, 0.12, 0.14, 1.3), (0.86, 0.12, 1.14, 1.3), (-0.1, -0.25, 1.1, 0.14)), ()),
    "hat": ("#b83280", ((0.18, -0.3, 0.82, 0.3),), ((0.04, 0.14, 0.96, 0.22),)),
    "mouth": ("#d62839", ((0.36, 0.76, 0.64, 0.86),), ()),
}


def stick(images: Tensor, name: str) -> Tensor:
    """The images with a sticker of `STICKERS` on each: uint8 [N, 3, R, R] -> likewise. What it does not cover
    stays as it is, and where it goes is the same in all: made for aligned faces, of people or cats."""
    if name not in STICKERS:
        raise ValueError(f"name: expected one of {sorted(STICKERS)}, got {name!r}")
    colour, ellipses, rectangles = STICKERS[name]
    r, fine = images.shape[-1], 8
    cover = Image.new("L", (fine * r, fine * r))
    draw = ImageDraw.Draw(cover)
    for shapes, paint in ((ellipses, draw.ellipse), (rectangles, draw.rectangle)):
        for box in shapes:
            paint([fine * r * share for share in box], fill=255)
    paper, mask = Image.new("RGB", (r, r), colour), cover.resize((r, r), Image.Resampling.BOX)
    pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
    done = np.stack([np.array(Image.composite(paper, x, mask)) for x in pictures])  # [N, R, R, 3]
    return torch.from_numpy(done).permute(0, 3, 1, 2).contiguous()  # [N, 3, R, R]


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
