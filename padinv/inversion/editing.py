"""Editing in W+ & P: blending, and customised edits that one pair of images defines (paper, section 4).

Both are arithmetic on codes: a blend takes a share of each layer from another image, an edit adds the difference of a
pair's codes to a target's. `analogy` draws an edit into images instead, to be inverted afterwards. Notebooks 04, 05
and 11 compare all of them with true results.
"""

import json
import math
import numbers
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from padinv.measure.lpips import check_images
from padinv.model.codes import Code
from padinv.model.tensors import read_metadata

MAX_STRENGTH = 3.0  # of an edit; further away generators draw nothing sensible
KEYS = 64  # pixels along a side of the images in which `analogy` looks colours up


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def check_strength(strength: float, low: float, high: float) -> None:
    if not isinstance(strength, numbers.Real) or isinstance(strength, bool):
        raise TypeError(f"strength: expected a number, got {type(strength).__name__}")
    if not low <= strength <= high:  # false for NaN too
        raise ValueError(f"strength: expected {low:g} to {high:g}, got {strength}")


def check_codes(**codes: Code) -> None:
    """Raise TypeError or ValueError, naming both, unless these two are codes of one layout, of N images each or one."""
    for name, code in codes.items():
        if not isinstance(code, Code):
            raise TypeError(f"{name}: expected a Code, as padinv.invert(x, E, G) gives, got {type(code).__name__}")
        if not len(code):
            raise ValueError(f"{name}: expected the code of at least one image, got none")
    (first, a), (second, b) = codes.items()
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise ValueError(f"{first}, {second}: expected equally many codes, or one of them, got {len(a)} and {len(b)}")
    try:
        a[:1].zip(b[:1], torch.add)
    except ValueError as error:
        raise ValueError(f"{first} and {second} do not fit together. {error}") from None


def layer_shares(
    like: Code,
    w: float | Sequence[float] = 0.0,
    const: float = 0.0,
    rings: float | Sequence[float] = 0.0,
    interior: float = 0.0,
) -> Code:
    """A code of one whose coefficients are the shares of their layers: one number for all w, or num_ws of them;
    likewise of the rings. ValueError for another number of them, or what is not finite."""

    def fill(name: str, values: float | Sequence[float], tensors: Sequence[Tensor]) -> list[Tensor]:
        values = [values] * len(tensors) if isinstance(values, numbers.Real) else list(values)
        if len(values) != len(tensors) or not all(map(math.isfinite, values)):
            raise ValueError(f"{name}: expected a finite number for each of {len(tensors)} layers, got {values}")
        return [torch.full_like(t[:1], value) for t, value in zip(tensors, values, strict=True)]

    shares = torch.stack(fill("w", w, like.w.unbind(dim=1)), dim=1)  # [1, num_ws, w_dim]
    if like.p is None:
        return Code(shares)
    single = {"const": const, "interior": interior}
    own = {key: fill(key, share, [t])[0] for key, share in single.items() if (t := getattr(like.p, key)) is not None}
    return Code(shares, replace(like.p, rings=tuple(fill("rings", rings, like.p.rings)), **own))


# ----------------------------------------------------------------------------------------------------------------------
# Blending


def blend(
    contour: Code,
    details: Code,
    strength: float = 1.0,
    w: float | Sequence[float] = 1.0,
    const: float = 0.0,
    rings: float | Sequence[float] = 0.0,
    interior: float = 0.0,
) -> Code:
    """The contour of one image, in P, with the details of another, in W+ (paper, section 4.3).

    contour + strength · share · (details − contour) for each layer. The result is a code, so blends chain.

    Args:
        contour: codes of N images, or of one.
        details: likewise. Of an encoder trained with `swap`, w from `swap_from` on hold colours and little of shapes.
        strength: in [0, 1]; 0 gives back `contour`.
        w: share of `details` in each w: one number for all, or num_ws of them. Style mixing is w=[0] * k + [1] * …,
            and the only way to blend codes without P.
        const: its share in the constant.
        rings: its share in each ring of P: one number for all, or one each, from the coarsest on.
        interior: its share in the interior.

    Returns:
        Code of N images.

    Raises:
        TypeError, ValueError: not codes, codes of different generators or encoders, a strength out of range, or shares
            that are not finite or not as many as layers.
    """
    check_strength(strength, 0, 1)
    check_codes(contour=contour, details=details)
    if contour.p is None and isinstance(w, numbers.Real) and w == 1:
        raise ValueError(f"w: of codes without P, w = 1 would leave nothing of contour; expected {contour.w.shape[1]} "
                         "shares, as [0] * k + [1] * … for style mixing")  # fmt: skip
    return contour + strength * (details - contour).zip(layer_shares(contour, w, const, rings, interior), torch.mul)


# ----------------------------------------------------------------------------------------------------------------------
# Customised edits


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of codes: `edit(targets, 0.8)`, `glasses + hat`, `-glasses`, `0.5 * glasses`.

    Attributes:
        offset: Code of one, added to targets.
        name: for people; it is kept in files.
    """

    offset: Code
    name: str = "edit"

    def __post_init__(self):
        if not isinstance(self.offset, Code) or len(self.offset) != 1:
            got = f"{len(self.offset)} of them" if isinstance(self.offset, Code) else type(self.offset).__name__
            raise ValueError(f"offset: expected one Code, got {got}; make edits with Edit.between(before, after)")
        if not all(t.isfinite().all() for t in self.offset.tensors):
            raise ValueError(f"edit {self.name!r}: its offset is not finite; invert the pair again")

    @classmethod
    def between(
        cls,
        before: Code,
        after: Code,
        name: str = "edit",
        w: float | Sequence[float] = 1.0,
        const: float = 1.0,
        rings: float | Sequence[float] = 1.0,
        interior: float = 1.0,
    ) -> "Edit":
        """The edit that a pair of images defines; several pairs of the same edit are averaged.

        Args:
            before, after: codes of the pair, of one encoder; best straight from it (steps=0), since refinement adds to
                each of the two what the other lacks.
            name: of the edit.
            w, const, rings, interior: shares of the difference that are taken, as in `blend`. By default all of it, in
                W+ and in P, which is closest to the truth (notebook 05); w=0 keeps the target's w, and the edit in P.

        Raises:
            TypeError, ValueError: not codes, codes that do not fit together, or a pair without a difference.
        """
        check_codes(before=before, after=after)
        offset = (after - before).map(lambda t: t.mean(dim=0, keepdim=True)).detach()
        if all(not t.any() for t in offset.tensors):
            raise ValueError("before, after: the same code twice; expected a pair of images that differ by the edit")
        return cls(offset.zip(layer_shares(offset, w, const, rings, interior), torch.mul), name)

    def __call__(self, targets: Code, strength: float = 1.0) -> Code:
        """Apply to any number of codes; strength in [−3, 3], where −1 undoes an edit."""
        check_strength(strength, -MAX_STRENGTH, MAX_STRENGTH)
        check_codes(**{"targets": targets, f"edit {self.name!r}": self.offset})
        return targets + strength * self.offset

    def __add__(self, other: "Edit") -> "Edit":
        if not isinstance(other, Edit):
            return NotImplemented
        check_codes(**{f"edit {self.name!r}": self.offset, f"edit {other.name!r} added": other.offset})
        return Edit(self.offset + other.offset, f"{self.name} + {other.name}")

    def __mul__(self, factor: float) -> "Edit":
        return Edit(self.offset * factor, self.name) if isinstance(factor, numbers.Real) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> "Edit":
        return Edit(-self.offset, f"not {self.name}")

    def save(self, path) -> None:
        """Write to a safetensors file, at once or not at all."""
        self.offset.save(path, edit=self.name)

    @classmethod
    def load(cls, path, device="cpu") -> "Edit":
        """Read what `save` wrote. Raises ValueError, naming the file, on anything else."""
        offset, metadata = Code.load(path, device), read_metadata(path)
        if "edit" not in metadata:
            raise ValueError(f"{path}: a code, expected an edit, as Edit.save writes")
        try:
            return cls(offset, json.loads(metadata["edit"]))
        except ValueError as error:
            raise ValueError(f"{path}: not a whole edit ({error})") from error


def customize(target: Code, before: Code, after: Code, strength: float = 1.0) -> Code:
    """Apply to targets what happened between before and after (paper, section 4.3).

    target + strength · (after − before), in W+ and in P; `Edit.between` takes less of it. That a pair shows two
    subjects cannot be told from its codes, since a hat moves them as far; `analogy` sees the images, and warns.

    Args:
        target: codes of any number of images.
        before, after: codes of the pair, in one pass of the encoder each.
        strength: in [−3, 3]; 0 changes nothing, −1 undoes the edit.

    Returns:
        Codes of the edited targets.

    Raises:
        TypeError, ValueError: not codes, codes of different generators or encoders, a pair without a difference, or a
            strength out of range.
    """
    return Edit.between(before, after)(target, strength)


# ----------------------------------------------------------------------------------------------------------------------
# Edits drawn into images


def analogy(x: Tensor, before: Tensor, after: Tensor, strength: float = 1.0) -> Tensor:
    """Draw the edit of a pair into other images: before is to after as x is to the result (Hertzmann et al. 2001).

    Where the pair differs, `after` is drawn in the colours of x: each of its pixels looks for the places of `before`
    that have its colour, and changes as x differs from `before` there. A colour that `before` lacks stays. The result
    is only a drawing: `padinv.invert(analogy(x, before, after), E, G, steps)` is its code, an image of the generator.

    Args:
        x: [N, 3, H, W] in [−1, 1].
        before, after: [1, 3, H, W], aligned as x is.
        strength: in [0, 1], of the change; the other way round, swap before and after.

    Returns:
        [N, 3, H, W] in [−1, 1].

    Raises:
        TypeError, ValueError: images of the wrong type or range, sizes that differ, a pair without a difference, or a
            strength out of range. A pair that differs nearly everywhere, as two subjects do, is a UserWarning.
    """
    check_strength(strength, 0, 1)
    for name, image in (("x", x), ("before", before), ("after", after)):
        check_images(name, image, limit=1.5)
        if image.shape[2:] != x.shape[2:] or (name != "x" and len(image) != 1):
            raise ValueError(f"{name}: expected [1, 3, {x.shape[2]}, {x.shape[3]}], one image of the size of x, got "
                             f"{list(image.shape)}; read_image(path, resolution) resizes")  # fmt: skip
    change = (after - before).abs().amax(dim=1, keepdim=True)  # [1, 1, H, W]
    if not change.any():
        raise ValueError("before, after: the same image twice; expected a pair that differs by the edit")
    if (change > 0.1).float().mean() > 0.65:
        warnings.warn("before, after: they differ nearly everywhere, as two subjects or two backgrounds do; the edit "
                      "carries more than the change that you want", stacklevel=2)  # fmt: skip

    def grid(height: int, width: int) -> Tensor:
        lines = (torch.linspace(-1, 1, size, device=x.device) for size in (height, width))
        return torch.cartesian_prod(*lines)  # [H · W, 2]

    small = [F.adaptive_avg_pool2d(t, [min(KEYS, size) for size in t.shape[2:]]) for t in (x, before)]
    difference = (small[0] - small[1]).flatten(2)  # [N, 3, P]
    keys, places = small[1][0].flatten(1).T, grid(*small[1].shape[2:])  # [P, 3], [P, 2]
    where = change.flatten().nonzero()[:, 0]  # [M]
    drawn = x.flatten(2).clone()  # [N, 3, H · W]
    for part in where.split(4096):
        colours = after[0].flatten(1).T[part]  # [m, 3]
        apart = torch.cdist(colours, keys).square() / 0.02  # colours that differ by about 0.1 still correspond
        near = torch.cdist(grid(*x.shape[2:])[part], places).square() / 2
        weights = torch.exp(-apart - near)  # [m, P]
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1)  # all small where no colour corresponds
        drawn[..., part] = colours.T + torch.einsum("mp, ncp -> ncm", weights, difference)
    mask = strength * (change / 0.1).clamp(max=1)  # faint differences, of compression say, count in part
    return (x + mask * (drawn.view_as(x) - x)).clamp(-1, 1)
