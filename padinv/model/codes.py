"""Points of the extended latent space W+ & P: `Code(w, p)` with `Padding(const, rings)`.

Codes form a vector space, so that an edit is a difference and a blend is a sum: `0.5 * (a + b)`, `b - a`, `a[:4]`.
"""

import json
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from padinv.model.tensors import load_tensors, save_tensors
from padinv.ops import pad_ring, take_ring


def ring_resolution(i: int) -> int:
    """Resolution of the i-th padded layer: 4, 8, 16, …"""
    return 4 * 2**i


def centre(x: Tensor, size: int) -> Tensor:
    """The middle of square maps: [N, C, s, s] -> [N, C, size, size]."""
    margin = (x.shape[-1] - size) // 2
    return x[..., margin : margin + size, margin : margin + size]  # [N, C, size, size]


class _Linear:
    """Arithmetic of everything that is a tuple of tensors with the same batch; subclasses give `map` and `zip`."""

    __array_ufunc__ = None  # a numpy scalar times a code is a code, not an array of codes

    def map(self, f: Callable[[Tensor], Tensor]):
        raise NotImplementedError

    def zip(self, other, f: Callable[[Tensor, Tensor], Tensor]):
        raise NotImplementedError

    def __add__(self, other):
        return self.zip(other, torch.add) if isinstance(other, type(self)) else NotImplemented

    def __sub__(self, other):
        return self.zip(other, torch.sub) if isinstance(other, type(self)) else NotImplemented

    def __mul__(self, factor):
        return self.map(lambda t: t * factor) if isinstance(factor, numbers.Real) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor):
        return self.map(lambda t: t / divisor) if isinstance(divisor, numbers.Real) else NotImplemented

    def __neg__(self):
        return self.map(torch.neg)

    def __getitem__(self, index):
        if isinstance(index, numbers.Integral):
            if not -len(self) <= index < len(self):
                raise IndexError(f"code {index} of a batch of {len(self)}")
            index = slice(index, index + 1 or None)  # the batch dimension stays
        return self.map(lambda t: t[index])

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def to(self, *args, **kwargs):
        return self.map(lambda t: t.to(*args, **kwargs))

    def detach(self):
        return self.map(Tensor.detach)

    def clone(self):
        return self.map(Tensor.clone)


@dataclass(frozen=True, eq=False)
class Padding(_Linear):
    """A point of the padding space P (paper, section 3): the coefficients that replace a generator's padding.

    Attributes:
        const: [N, C, 4, 4], in place of the generator's constant input (the padding of an empty tensor), or None to
            keep the generator's own.
        rings: for r = 4, 8, 16, … the coefficients [N, nf(r), 4(r + 1)] around the input of the second 3×3
            convolution of that resolution, in the order of `padinv.ops.pad_ring`.
        modulated: whether the generator multiplies the rings by the style, as it does the activations inside them; the
            paper's do not (an ablation).
        interior: [N, nf(r), r, r], added to the activation that the ring of r surrounds, after the style modulation,
            or None. A step past the paper, whose ring is the border of such a map (METHOD section 13).
    """

    const: Tensor | None
    rings: tuple[Tensor, ...]
    modulated: bool = False
    interior: Tensor | None = None

    def __post_init__(self):
        object.__setattr__(self, "rings", tuple(self.rings))
        if not self.tensors:
            raise ValueError("Padding: neither const nor rings given; use p=None for a code without padding")
        for i, ring in enumerate(self.rings):
            positions = 4 * (ring_resolution(i) + 1)
            if ring.ndim != 3 or ring.shape[2] != positions:
                raise ValueError(f"rings[{i}]: expected [N, C, {positions}] for resolution {ring_resolution(i)}, "
                                 f"got {list(ring.shape)}")  # fmt: skip
        if self.const is not None and (self.const.ndim != 4 or self.const.shape[2:] != (4, 4)):
            raise ValueError(f"const: expected [N, C, 4, 4], got {list(self.const.shape)}")
        if self.interior is not None and (self.interior.ndim != 4 or self.interior.shape[2] != self.interior.shape[3]):
            raise ValueError(f"interior: expected [N, C, r, r], got {list(self.interior.shape)}")
        if len({len(t) for t in self.tensors}) > 1:
            raise ValueError(f"Padding: batch sizes differ: {[len(t) for t in self.tensors]}")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.const, *self.rings, self.interior) if t is not None)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def map(self, f):
        const = None if self.const is None else f(self.const)  # in the order of `tensors`
        rings = tuple(f(ring) for ring in self.rings)
        return Padding(const, rings, self.modulated, None if self.interior is None else f(self.interior))

    def zip(self, other, f):
        mine, theirs = (
            [None if t is None else [*t.shape[1:]] for t in (p.const, *p.rings, p.interior)] for p in (self, other)
        )
        if mine != theirs or self.modulated != other.modulated:
            raise ValueError(f"p: paddings of different layout, const, rings and interior of {mine} against {theirs}; "
                             "both codes must come from encoders of one layout for one generator")  # fmt: skip
        pairs = iter(zip(self.tensors, other.tensors, strict=True))
        return self.map(lambda _: f(*next(pairs)))

    @classmethod
    def from_maps(cls, maps: dict[int, Tensor]) -> "Padding":
        """From the full maps of the authors' release: key 0 holds the constant, 2i + 1 the map of the i-th ring.

        Every map is [N, C, s, s] with s = 2^(L+1) + 2; only the centre 4×4 of the constant's and the ring of the
        centre (r + 2)² of a layer's map are read.
        """
        keys = sorted(key for key in maps if key)
        if keys != [2 * i + 1 for i in range(len(keys))]:
            raise ValueError(f"maps: expected the keys 0, 1, 3, 5, …, got {sorted(maps)}")
        rings = tuple(take_ring(centre(maps[key], ring_resolution(i) + 2)) for i, key in enumerate(keys))
        return cls(centre(maps[0], 4) if 0 in maps else None, rings)

    def to_maps(self) -> dict[int, Tensor]:
        """The authors' full maps, zero wherever no generator reads: the inverse of `from_maps`.

        Raises ValueError for an interior, which they have no place for.
        """
        if self.interior is not None:
            raise ValueError("interior: the authors' maps have no place for it")
        size = ring_resolution(max(len(self.rings) - 1, 0)) + 2

        def embed(x: Tensor) -> Tensor:
            margin = (size - x.shape[-1]) // 2
            return F.pad(x, (margin,) * 4)  # [N, C, size, size]

        maps = {} if self.const is None else {0: embed(self.const)}
        for i, ring in enumerate(self.rings):
            r = ring_resolution(i)
            maps[2 * i + 1] = embed(pad_ring(ring.new_zeros(*ring.shape[:2], r, r), ring))
        return maps


@dataclass(frozen=True, eq=False)
class Code(_Linear):
    """A batch of points of W+ & P.

    Attributes:
        w: [N, num_ws, w_dim].
        p: the padding, or None where the generator's own is kept (a code of pSp).
    """

    w: Tensor
    p: Padding | None = None

    def __post_init__(self):
        if self.w.ndim != 3:
            raise ValueError(f"w: expected [N, num_ws, w_dim], got {list(self.w.shape)}")
        if self.p is not None and len(self.p) != len(self.w):
            raise ValueError(f"p: expected a batch of {len(self.w)} as in w, got {len(self.p)}")

    def __len__(self) -> int:
        return len(self.w)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.w,) + (() if self.p is None else self.p.tensors)

    def map(self, f):
        return Code(f(self.w), None if self.p is None else self.p.map(f))

    def zip(self, other, f):
        if (self.p is None) != (other.p is None):
            raise ValueError("p: one code has padding and the other has none; use Code(code.w) to drop it")
        if self.w.shape[1:] != other.w.shape[1:]:
            raise ValueError(f"w: codes of different generators: {list(self.w.shape)} and {list(other.w.shape)}")
        return Code(f(self.w, other.w), None if self.p is None else self.p.zip(other.p, f))

    @classmethod
    def cat(cls, codes: Sequence["Code"]) -> "Code":
        """Join codes of one layout along the batch."""
        for code in codes[1:]:
            codes[0].zip(code, lambda a, b: b)  # raises where layouts differ
        p = None
        if codes[0].p is not None:
            parts = map(torch.cat, zip(*(c.p.tensors for c in codes), strict=True))
            p = codes[0].p.map(lambda _: next(parts))
        return cls(torch.cat([c.w for c in codes]), p)

    def save(self, path, **metadata) -> None:
        """Write the code to a safetensors file, at once or not at all; metadata values must be JSON."""
        tensors = {"w": self.w}
        if self.p is not None:
            tensors |= {f"ring{i}": ring for i, ring in enumerate(self.p.rings)}
            tensors |= {key: t for key in ("const", "interior") if (t := getattr(self.p, key)) is not None}
            metadata |= {"modulated": True} if self.p.modulated else {}
        save_tensors(path, tensors, {"kind": "code", **{key: json.dumps(value) for key, value in metadata.items()}})

    @classmethod
    def load(cls, path, device="cpu") -> "Code":
        """Read what `save` wrote. Raises ValueError, naming the file, on anything else."""
        tensors, metadata = load_tensors(path, kind="code", device=device)
        try:
            rings = tuple(tensors[f"ring{i}"] for i in range(sum(key.startswith("ring") for key in tensors)))
            modulated = metadata.get("modulated") == "true"
            parts = tensors.get("const"), rings, modulated, tensors.get("interior")
            p = Padding(*parts) if len(tensors) > 1 else None
            return cls(tensors["w"], p)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a whole code ({error})") from error
