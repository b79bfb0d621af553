"""Faces in photographs: find them, align them as FFHQ does, paste them back; or take the middle of a picture.

A face's square lies in its photograph as a matrix [2, 3], which takes (u, v, 1), u and v in [−1, 1] from the left and
the top of the crop, to (x, y) in pixels from the photograph's top left corner. Photographs and crops are uint8
[3, H, W], as `padinv.images.datasets.read_image` gives them.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# How much of FFHQ's square to cut, as a factor on its side, and how far below its centre, in half sides. "tight" is
# how UTKFace cuts: medians over 200 of its faces, nine tenths of which lie within 0.59 to 0.68 and 0.18 to 0.24.
TEMPLATES = {"ffhq": (1.0, 0.0), "tight": (0.63, 0.21)}
SEARCHED = 1024  # pixels of the longer side of the picture that faces are looked for in; larger ones are reduced
MIN_FACE = 40  # pixels of the smallest face in it
CERTAINTY = 0.9  # of the detector, from 0 to 1: below it, what was found is no face
NO_FACE = "no face found; of pictures without faces take the middle (--crop center)"


@functools.cache
def detector():
    """MTCNN (Zhang et al. 2016) of facenet-pytorch, whose weights lie in the package; on the CPU.

    Raises:
        ImportError: the package is missing; names the command that installs it.
    """
    try:
        from facenet_pytorch import MTCNN
    except ImportError as error:
        raise ImportError(f"faces are found by the package facenet-pytorch, which cannot be imported ({error}). Fix: "
                          'pip install "facenet-pytorch~=2.5.3". Pictures that are aligned crops already need no '
                          "detector: --aligned") from error  # fmt: skip
    return MTCNN(keep_all=True, min_face_size=MIN_FACE, thresholds=[0.6, 0.7, CERTAINTY]).eval()


def detect(photo: Tensor) -> Tensor:
    """The five landmarks of each face in a photograph, the largest face first.

    Args:
        photo: uint8 [3, H, W]; faces smaller than a twenty-fifth of the longer side are not looked for.

    Returns:
        Float32 [N, 5, 2]: x and y in pixels of the eye on the left of the picture, the eye on the right, the tip of
        the nose, the left and the right corner of the mouth. N is 0 where there is no face.

    Raises:
        ImportError: as `detector`.
    """
    _, h, w = photo.shape
    factor = max(1.0, max(h, w) / SEARCHED)
    size = round(w / factor), round(h / factor)
    if min(size) < MIN_FACE:
        return torch.zeros(0, 5, 2)
    picture = Image.fromarray(photo.permute(1, 2, 0).contiguous().numpy())
    if factor > 1:
        picture = picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)  # anti-aliased
    margin = min(size) // 4  # of the border's colours: without it landmarks near the border are drawn inwards
    picture = np.pad(np.asarray(picture), ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    _, _, found = detector().detect(Image.fromarray(picture), landmarks=True)
    if found is None:
        return torch.zeros(0, 5, 2)
    points = torch.from_numpy(np.array(found.tolist(), np.float32)) - margin  # [N, 5, 2]
    nose, size = points[:, 2], torch.tensor(size)
    points = points[((nose >= 0) & (nose <= size)).all(dim=1)]
    return points * (torch.tensor([w, h]) / size)


def align(points: Tensor, template: str = "ffhq") -> Tensor:
    """The square of a face as FFHQ cuts it (Karras et al. 2019, appendix A): turned with the line of the eyes and that
    from the eyes to the mouth, and as large as the distances between them ask for.

    Args:
        points: [5, 2] of `detect`.
        template: "ffhq", or "tight" for the closer crops of UTKFace: a part of that square.

    Returns:
        The matrix [2, 3].

    Raises:
        ValueError: another template or shape.
    """
    if template not in TEMPLATES or points.shape != (5, 2):
        raise ValueError(f"points, template: expected [5, 2] and one of {tuple(TEMPLATES)}, got {list(points.shape)} "
                         f"and {template!r}")  # fmt: skip
    scale, down = TEMPLATES[template]
    left, right, _, *mouth = points.double()
    eyes = (left + right) / 2
    across, along = right - left, (mouth[0] + mouth[1]) / 2 - eyes
    x = across + torch.stack((along[1], -along[0]))  # both, turned to the same direction
    x = x / x.norm().clamp_min(1e-6) * torch.maximum(2.0 * across.norm(), 1.8 * along.norm())
    y = torch.stack((-x[1], x[0]))
    centre = eyes + 0.1 * along + down * y
    return torch.stack((scale * x, scale * y, centre), dim=1).float()  # [2, 3]


def middle(photo: Tensor) -> Tensor:
    """The matrix of the largest centred square of a photograph."""
    _, h, w = photo.shape
    half = min(h, w) / 2
    return torch.tensor([[half, 0, (w - 2 * half) // 2 + half], [0, half, (h - 2 * half) // 2 + half]])


def half_side(matrix: Tensor) -> float:
    """Of the square, in pixels of the photograph."""
    return matrix[:, 0].norm().item()


def outline(matrix: Tensor) -> Tensor:
    """The square's corners in the photograph, from the top left one around and back to it: [2, 5]."""
    return matrix @ torch.tensor([[-1.0, 1, 1, -1, -1], [-1, -1, 1, 1, -1], [1, 1, 1, 1, 1]])


def crop(photo: Tensor, matrix: Tensor, resolution: int) -> Tensor:
    """Cut out a square, anti-aliased: uint8 [3, resolution, resolution]. Beyond its edges a photograph is mirrored."""
    _, h, w = photo.shape
    side = 2 * half_side(matrix)
    k = max(1, int(side / (2 * resolution)))  # first averaged over k × k pixels
    spans = []
    for low, high, size in zip(*outline(matrix).aminmax(dim=1), (w, h), strict=True):
        low, high = float(low), float(high)
        low, high = min(low, 2 * size - high), max(high, -low)  # what mirroring shows
        spans.append((max(0, math.floor(low) - 2 * k), min(size, math.ceil(high) + 2 * k)))
    (x0, x1), (y0, y1) = ((low, max(low + 1, high)) for low, high in spans)
    part = photo[None, :, y0:y1, x0:x1].float()  # [1, 3, h, w]
    if k > 1:
        part = F.avg_pool2d(part, k, ceil_mode=True, count_include_pad=False)
    fine = resolution * max(1, math.ceil(side / (k * resolution)))  # then sampled at least once for every pixel
    steps = (torch.arange(fine) + 0.5) * 2 / fine - 1
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    xy = torch.stack((u, v, torch.ones_like(u)), dim=-1) @ matrix.T  # [fine, fine, 2], x and y
    extent = torch.tensor([part.shape[3], part.shape[2]]) * k
    grid = (xy - torch.tensor([x0, y0])) * 2 / extent - 1
    out = F.grid_sample(part, grid[None], padding_mode="reflection", align_corners=False)
    out = F.avg_pool2d(out, fine // resolution)[0]  # [3, R, R]
    return out.round().clamp(0, 255).to(torch.uint8)


def cut(photo: Tensor, template: str, resolution: int, name: str = "the picture") -> tuple[Tensor, Tensor]:
    """What a generator should draw of a photograph: its largest face, aligned, or its middle.

    Args:
        photo: uint8 [3, H, W].
        template: of `align`, or "center" for the largest centred square.
        resolution: of the crop.
        name: of the photograph, for the error.

    Returns:
        The crop, uint8 [3, resolution, resolution], and the matrix of its square, for `paste`.

    Raises:
        ValueError: no face, or another template.
        ImportError: as `detector`.
    """
    if template == "center":
        matrix = middle(photo)
    elif not len(points := detect(photo)):
        raise ValueError(f"{name}: {NO_FACE}")
    else:
        matrix = align(points[0], template)
    return crop(photo, matrix, resolution), matrix


def paste(photo: Tensor, image: Tensor, matrix: Tensor, border: float = 0.2) -> Tensor:
    """The photograph with an image in the place of a face's square; nothing outside the square changes.

    Args:
        photo: uint8 [3, H, W].
        image: the inverted or edited crop, [3, R, R] in [−1, 1].
        matrix: of the square.
        border: width of the soft transition inside the square's edges, in half sides.

    Returns:
        uint8 [3, H, W], a copy.
    """
    _, h, w = photo.shape
    out, half = photo.clone(), half_side(matrix)
    (x0, x1), (y0, y1) = (
        (max(0, math.floor(float(low))), min(size, math.ceil(float(high))))
        for low, high, size in zip(*outline(matrix).aminmax(dim=1), (w, h), strict=True)
    )
    if x0 >= x1 or y0 >= y1:
        return out
    image = image.detach().float().cpu()[None]
    if image.shape[-1] > 2 * half:
        image = F.interpolate(image, size=(max(1, round(2 * half)),) * 2, mode="area")  # [1, 3, side, side]
    y, x = torch.meshgrid(torch.arange(y0, y1) + 0.5, torch.arange(x0, x1) + 0.5, indexing="ij")
    uv = (torch.stack((x, y), dim=-1) - matrix[:, 2]) @ matrix[:, :2] / half**2  # [h, w, 2]; columns at right angles
    sampled = F.grid_sample(image, uv[None], padding_mode="border", align_corners=False)[0]  # [3, h, w]
    t = ((1 - uv.abs().amax(dim=-1)) / border).clamp(0, 1)
    mask = t * t * (3 - 2 * t)  # [h, w], without a kink at either end
    part = out[:, y0:y1, x0:x1].float()
    blended = part + mask * (sampled * 127.5 + 127.5 - part)
    out[:, y0:y1, x0:x1] = blended.round().clamp(0, 255).to(torch.uint8)
    return out
