"""What the page does, as plain functions over padinv's API: nothing here knows of a browser."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from padinv.images.datasets import ImageDataset, read_image, to_float, to_uint8
from padinv.inversion.directions import move, pca_directions
from padinv.inversion.editing import analogy, blend, customize
from padinv.model.codes import Code
from padinv.model.tensors import atomic_write
from padinv.photos.faces import cut, paste
from padinv.photos.networks import STEPS, Networks, encoded

MAX_BYTES = 20 << 20  # of an upload
MAX_PIXELS = 40_000_000  # of a picture, known before it is decoded
MAX_SIDE = 10_000  # pixels
MAX_STEPS = 1000
SAMPLES = 8  # pictures to pick from
FINE = 5  # the first w that holds colours, and little of shapes
FRAMES = {"faces": "tight", "ffhq": "ffhq"}  # how generators frame pictures, by the beginning of their names
WAYS = ("encoder", "encoder and steps", "search")  # to a code

Progress = Callable[[float], None] | None


@dataclass
class Studio:
    """Networks, with what the page offers beside them.

    Attributes:
        nets: the networks.
        samples: pictures to pick from, uint8 [N, 3, R, R], framed as the generator's are.
        directions: name -> code of one.
    """

    nets: Networks
    samples: Tensor
    directions: dict[str, Code]

    @property
    def ways(self) -> tuple[str, ...]:
        return WAYS if self.nets.E is not None else WAYS[2:]


@dataclass
class Face:
    """A picture and its code: photo uint8 [3, H, W], the matrix of the square in it, x [1, 3, R, R] in [−1, 1]."""

    photo: Tensor
    matrix: Tensor
    x: Tensor
    code: Code


# ----------------------------------------------------------------------------------------------------------------------
# Networks


def shipped(root: str | os.PathLike) -> dict[str, tuple[Path, Path | None]]:
    """The networks in checkpoints/ of a checkout: name -> files of generator and encoder, for blends where there is
    one; those with an encoder first. Raises FileNotFoundError where there are none."""
    found = {}
    for path in sorted(Path(root).glob("checkpoints/*/generator.safetensors")):
        encoders = [path.with_name(f"{name}.safetensors") for name in ("padinv-split", "padinv")]
        found[path.parent.name] = path, next(filter(Path.is_file, encoders), None)
    if not found:
        raise FileNotFoundError(f"no networks in {Path(root).resolve()}/checkpoints; run `dvc pull` in a checkout and "
                                "start there, or give --generator FILE")  # fmt: skip
    return dict(sorted(found.items(), key=lambda item: item[1][1] is None))


def opened(generator, encoder=None, device: str = "auto", samples: str | os.PathLike | None = None) -> Studio:
    """Load networks, and what lies beside the generator: directions-w.safetensors, which keep P, and
    directions-wp.safetensors, which move it too; where there are none, the main axes of w stand in their place.

    Args:
        generator, encoder: files of any format.
        device: "auto" for a GPU where there is one.
        samples: zip or folder of images to pick from; without, the generator draws some.
    """
    path = Path(generator)
    name = path.parent.name if path.stem == "generator" else path.stem
    template = next((frame for start, frame in FRAMES.items() if name.startswith(start)), "center")
    nets = Networks.load(generator, encoder, device, template=template)
    directions = {}
    for kind, suffix in (("w", ""), ("wp", ", with P")):
        if (file := path.with_name(f"directions-{kind}.safetensors")).is_file():
            names, found = nets.load_directions(file)
            directions |= zip((name + suffix for name in names), found, strict=True)
    if not directions:
        axes = pca_directions(nets.G, min(SAMPLES, nets.G.config.w_dim))
        directions = {f"axis {i + 1}": axis for i, axis in enumerate(axes)}
    if samples is not None and Path(samples).exists():
        images = ImageDataset(samples, nets.G.resolution)
        return Studio(nets, images.tensor(range(min(SAMPLES, len(images))), progress=False), directions)
    z = torch.randn(SAMPLES, nets.G.config.z_dim, generator=torch.Generator().manual_seed(0)).to(nets.G.w_avg)
    with torch.no_grad():
        drawn = torch.cat([nets.G(Code(w)) for w in nets.G.mapping(z, truncation=0.7).split(1)])
    return Studio(nets, to_uint8(drawn).cpu(), directions)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def uploaded(path: str | os.PathLike) -> Tensor:
    """A picture that came from outside, uint8 [3, H, W]. Raises ValueError, with its bare name, for what is no picture,
    or larger than the limits above; what is too large is never decoded."""
    path = Path(path)
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path.name}: {size / 1e6:.0f} MB, expected at most {MAX_BYTES >> 20}; make it smaller")
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception:  # read_image says what is wrong
        width = height = 0
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(f"{path.name}: {width} x {height} pixels, expected at most {MAX_SIDE} a side and "
                         f"{MAX_PIXELS // 10**6} million in all; make it smaller")  # fmt: skip
    return read_image(path.read_bytes(), name=path.name)


def inverted(
    studio: Studio, photo: Tensor, template: str, way: str, steps: int = STEPS, progress: Progress = None
) -> Face:
    """The code of a picture.

    Args:
        photo: uint8 [3, H, W].
        template: of `padinv.photos.faces.cut`.
        way: one of `studio.ways`.
        steps: of gradient, 1 to 1000; "encoder" takes none.
        progress: called with the share that is done.

    Raises:
        ValueError: no face, or a way or steps that there are not. ImportError: no detector.
    """
    if way not in studio.ways or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"expected one of {studio.ways} and 1 to {MAX_STEPS} steps, got {way!r} and {steps}")
    nets = replace(studio.nets, E=None if way == "search" else studio.nets.E, batch=1,
                   steps=0 if way == "encoder" else int(steps))  # fmt: skip
    crop, matrix = cut(photo, template, nets.G.resolution)
    x = to_float(crop)[None]
    return Face(photo, matrix, x, nets.invert(x, progress))


def blended(contour: Face, details: Face, strength: float = 1.0, first: int = FINE) -> Code:
    """`padinv.blend` of two pictures, the second giving w from the `first` on, or the last alone where there are fewer;
    0: all, the paper's blend."""
    num_ws = contour.code.w.shape[1]
    return blend(contour.code, details.code, strength, w=[float(i >= min(first, num_ws - 1)) for i in range(num_ws)])


def edited(
    studio: Studio, face: Face, pair: tuple[Tensor, Tensor], template: str, drawn: bool, strength: float,
    progress: Progress = None,
) -> Code:  # fmt: skip
    """What happened from one picture of a pair to the other happens to a face: drawn into its picture, which is then
    inverted (by the encoder, or a search of STEPS), or added to its code.

    Args:
        pair: uint8 [3, H, W] each; framed by `template`, as in `inverted`.
        strength: in [0, 1].

    Raises:
        ValueError: no face in one of the pair, or no difference between them.
    """
    nets = replace(studio.nets, batch=1)
    before, after = (to_float(cut(photo, template, nets.G.resolution)[0])[None] for photo in pair)
    if not drawn:
        return customize(face.code, nets.invert(before, progress), nets.invert(after, progress), strength)
    return nets.invert(analogy(face.x, before, after, strength), progress)


def with_directions(studio: Studio, path: str | os.PathLike) -> Studio:
    """The studio, with the directions of a file that came from outside before its own. Raises ValueError, with its bare
    name, as `Networks.load_directions`."""
    path = Path(path)
    try:
        names, found = studio.nets.load_directions(path)
    except ValueError as error:
        raise ValueError(str(error).replace(f"{path.parent}{os.sep}", "")) from error
    own = {f"{name} ({path.name})": direction for name, direction in zip(names, found, strict=True)}
    return replace(studio, directions=own | studio.directions)


def moved(studio: Studio, face: Face, amounts: dict[str, float]) -> Code:
    """A face's code along directions of the studio, each by so many standard deviations."""
    code = face.code
    for name, amount in amounts.items():
        code = move(code, studio.directions[name], amount) if amount else code
    return code


def drawing(studio: Studio, code: Code) -> Tensor:
    """The image of a code: uint8 [3, R, R], on the CPU."""
    with torch.no_grad():
        return to_uint8(studio.nets.G(code))[0].cpu()


def pasted(studio: Studio, face: Face, code: Code) -> Tensor:
    """The photograph of a face with the image of a code in its place: uint8 [3, H, W]."""
    return paste(face.photo, to_float(drawing(studio, code)), face.matrix)


def saved(studio: Studio, code: Code, folder: str | os.PathLike) -> tuple[str, str]:
    """Write the image of a code, and the code: paths of picture.png and code.safetensors in the folder."""
    folder = Path(folder)
    atomic_write(folder / "picture.png", encoded(drawing(studio, code)))
    return str(folder / "picture.png"), str(studio.nets.save(code, folder / "code")[0])
