"""Pictures: grids of images, and the figures that notebooks share."""

import math
from pathlib import Path

import numpy as np

from PIL import Image
from torch import Tensor

from padinv.data import to_uint8


def tile(images: Tensor, columns: int | None = None, pad: int = 1) -> np.ndarray:
    """Images beside and below each other on white: [N, 3, H, W] in [−1, 1] -> uint8 [rows·(H + pad) + pad, …, 3]."""
    n, _, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, 3), 255, dtype=np.uint8)
    for i, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):  # [N, H, W, 3]
        y, x = pad + i // columns * (h + pad), pad + i % columns * (w + pad)
        canvas[y : y + h, x : x + w] = image
    return canvas


def save_grid(images: Tensor, path: str | Path, columns: int | None = None, scale: int = 1) -> None:
    """Write `tile(images)` as a PNG without volatile metadata; `scale` enlarges pixels."""
    picture = Image.fromarray(tile(images, columns))
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
