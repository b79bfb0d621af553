"""Stickers on images, whose place is the same in all: an edit whose truth is known."""

import numpy as np
import torch
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
