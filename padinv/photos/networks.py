"""A generator with its encoder or alone, and what makes codes of pictures with them: for the commands and the page."""

import contextlib
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from PIL import Image
from torch import Tensor

from padinv.files.arrays import read_array
from padinv.files.checkpoints import is_safetensors, load_encoder, load_generator
from padinv.files.pickles import errors_of
from padinv.images.datasets import read_image, to_float
from padinv.images.viz import tile
from padinv.inversion.optimise import draw, invert, project
from padinv.model.codes import Code
from padinv.model.encoder import Encoder
from padinv.model.generator import Generator
from padinv.model.tensors import atomic_write, read_metadata
from padinv.photos.faces import cut

SPACES = ("w+p", "w+", "w")
STEPS = 300  # of a search without an encoder
BYTES = 100  # that the gradient of a step keeps for each value of an activation; measured, 78 to 103


@dataclass
class Networks:
    """A generator, its encoder if there is one, and how both are used.

    Attributes:
        G: the generator.
        E: its encoder, or None: codes are then searched for (`padinv.project`).
        template: how pictures are framed, as in `padinv.photos.faces.cut`.
        space: "w+p", "w+" or, without an encoder, "w".
        steps: of gradient; None for none after an encoder, 300 without.
        batch: pictures at once; None for 16 in one pass of the encoder, else for as many as there is memory for.
        bf16: search in half the memory, which rounds gradients; faster where the machine multiplies bfloat16. False
            with an encoder, whose steps are not rounded.
    """

    G: Generator
    E: Encoder | None = None
    template: str = "ffhq"
    space: str = "w+p"
    steps: int | None = None
    batch: int | None = None
    bf16: bool = False

    def __post_init__(self):
        """Raises ValueError for a setting out of range, an encoder of another generator, or too little memory."""
        if self.steps is None:
            self.steps = STEPS if self.E is None else 0
        if self.steps < (self.E is None):
            raise ValueError(f"--steps: expected {int(self.E is None)} or more, got {self.steps}")
        if self.space not in SPACES or self.space == "w" and self.E is not None:
            raise ValueError(f"--space: expected w+p or w+, or without an encoder also w, got {self.space!r}")
        if self.E is not None:
            check_pair(self.E, self.G)
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"--batch: expected 1 or more, got {self.batch}")
        self.bf16 = self.bf16 and self.E is None
        if self.bf16 and not multiplies_bf16(self.G.const.device):
            warnings.warn("--bf16: this processor does not multiply bfloat16, so a step takes half the memory but many "
                          "times as long; leave it out unless memory is what is missing", stacklevel=3)  # fmt: skip
        if self.batch is None:
            self.batch = room(self.G, self.bf16) if self.steps else 16

    @classmethod
    def load(cls, generator, encoder=None, device: torch.device | str = "auto", **settings) -> "Networks":
        """From files of any format; "auto" takes a GPU where there is one. Raises as `load_generator`."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return cls(load_generator(generator, device), encoder and load_encoder(encoder, device), **settings)

    def image(self, path, name: str | None = None) -> Tensor:
        """What the generator should draw of a picture in a file: [1, 3, R, R] in [−1, 1]. Raises as `read_image` and
        `cut`."""
        photo = read_image(path, name=name)
        return to_float(cut(photo, self.template, self.G.resolution, name or str(path))[0])[None]

    def invert(self, x: Tensor, progress: Callable[[float], None] | None = None) -> Code:
        """The codes of images, [N, 3, R, R] in [−1, 1]; `progress` is called with the share that is done, in (0, 1]."""
        passes = -(-len(x) // self.batch) * (self.steps + 1) if self.steps else 0
        with watched(self.G, progress, passes):
            if self.E is not None:
                code = invert(x, self.E, self.G, self.steps, self.space, batch=self.batch)
            else:
                with torch.autocast(self.G.const.device.type, torch.bfloat16, enabled=self.bf16):
                    code = project(x, self.G, self.space, self.steps, batch=self.batch)
        if progress is not None and not passes:
            progress(1.0)
        return code

    def code_of(self, path) -> Code:
        """The code in a file, or that of the picture in it. Raises ValueError for a code of another generator, else as
        `image`."""
        return self.load_code(path) if is_safetensors(path) else self.invert(self.image(path))

    def load_code(self, path) -> Code:
        """Read a code, or directions. Raises ValueError, naming the file, for those of another generator."""
        code = Code.load(path, self.G.const.device)
        try:
            if json.loads(read_metadata(path).get("generator", "null")) not in (None, fingerprint(self.G)):
                raise ValueError("whose w have another mean")
            self.G.check(code.w, code.p)
        except ValueError as error:
            raise ValueError(f"{path}: made with another generator ({error}); give --generator that one, or make it "
                             "anew with this one") from error  # fmt: skip
        return code

    def load_directions(self, path) -> tuple[list[str], Code]:
        """Read directions, each with its name: those of `padinv directions`; or another project's one of w, a tensor
        [w_dim], [1, w_dim] or [1, num_ws, w_dim] in a .npy or .pt, which keeps its length and is named as its file.

        Raises:
            ValueError: names the file: as `load_code` or `read_array`, another shape or type, names or numbers that
                make no directions.
        """
        num_ws, w_dim = self.G.num_ws, self.G.config.w_dim
        with errors_of(path):
            if is_safetensors(path):
                directions, names = self.load_code(path), json.loads(read_metadata(path).get("names", "[]"))
                names = [*names] or [*map(str, range(len(directions)))]
            else:
                d, names = read_array(path), [Path(path).stem]
                if list(d.shape) not in ([w_dim], [1, w_dim], [1, num_ws, w_dim]):
                    raise ValueError(f"a direction {list(d.shape)} does not fit this generator: expected [{w_dim}], "
                                     f"[1, {w_dim}] or [1, {num_ws}, {w_dim}]")  # fmt: skip
                if not d.is_floating_point():
                    raise ValueError(f"expected a direction of real numbers, found {d.dtype}")
                directions = Code(d.to(self.G.w_avg, copy=True).expand(1, num_ws, w_dim))
            if not names or len(names) != len(directions) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"expected a name for each of {len(directions)} directions, found {names}")
            if not all(t.isfinite().all() for t in directions.tensors):
                raise ValueError("a direction with NaN or an infinity")
        return names, directions

    def save(self, code: Code, out, **metadata) -> list[Path]:
        """Write codes and, beside them, a picture with their images in a row: out.safetensors and out.png."""
        files = [Path(out).with_suffix(suffix) for suffix in (".safetensors", ".png")]
        code.save(files[0], generator=fingerprint(self.G), **metadata)
        row = torch.from_numpy(tile(draw(code, self.G), columns=len(code), pad=int(len(code) > 1)))
        atomic_write(files[1], encoded(row.permute(2, 0, 1)))
        return files


def check_pair(E: Encoder, G: Generator) -> None:
    """Raise ValueError where E predicts codes of another generator than G: of other sizes, or around another mean."""
    ours, theirs = (G.num_ws, G.config.w_dim), (E.config.num_ws, E.config.w_dim)
    means = G.w_avg, E.w_avg  # zero, if it predicts no offset from it
    apart = ours != theirs or means[1].any() and (means[0] - means[1]).norm() > 0.1 * means[0].norm()
    if apart:
        raise ValueError(f"--encoder: was trained for another generator ({theirs[0]} codes of {theirs[1]}) than "
                         f"--generator ({ours[0]} of {ours[1]}, another mean); give that one, or leave --encoder "
                         "out to search")  # fmt: skip


def fingerprint(G: Generator) -> str:
    """16 digits that a generator keeps when it is tuned or its file converted: they stand in the codes made with it."""
    return hashlib.sha256(G.w_avg.detach().float().cpu().numpy().tobytes()).hexdigest()[:16]


def room(G: Generator, bf16: bool = False) -> int:
    """Pictures whose gradients fit into the free memory at once: at most 16 on a GPU, 4 on a CPU, which gains little
    from more and has each sooner on disk. Raises ValueError where one does not."""
    device = G.const.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    need = BYTES * sum(G.config.channels(r) * r * r for r in G.config.resolutions) / (2 if bf16 else 1)
    if free < need:
        raise ValueError(f"--generator: a step at {G.resolution}² takes about {need / 1e9:.1f} GB a picture, "
                         f"{free / 1e9:.1f} GB are free; --bf16 halves it, --batch 1 tries all the same")  # fmt: skip
    return max(1, min(int(0.8 * free / need), 16 if device.type == "cuda" else 4))


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is more than a way to store numbers there; where that is not known, it is taken to be."""
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # torch < 2.12
        return True
    has = torch.cpu.get_capabilities()
    return any(has[name] for name in has if "bf16" in name or name == "avx512_bw")  # by that one in few instructions


@contextlib.contextmanager
def watched(G: Generator, progress: Callable[[float], None] | None, passes: int) -> Iterator[None]:
    """Within it, `progress` hears of every pass through G, of so many."""
    if progress is None or not passes:
        yield
        return
    done = 0

    def passed(*_) -> None:
        nonlocal done
        done += 1
        progress(min(1.0, done / passes))

    hook = G.register_forward_hook(passed)
    try:
        yield
    finally:
        hook.remove()


def encoded(image: Tensor, kind: str = "PNG", **options) -> bytes:
    """A uint8 image [3, H, W] as the bytes of a file."""
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()
