"""Kernels of `padinv.ops` for GPUs, written in Triton, which comes with torch: compiled on first use, without nvcc.

Only what costs PyTorch several passes over memory is here; `padinv.ops.reference` specifies each function. First and
second gradients are PyTorch's own operations, and upfirdn2d again. On a CPU the kernels run in Triton's interpreter
(tests). Where there is no Triton, this can be imported and `try_out` says so.
"""

from __future__ import annotations  # those of kernels name Triton

import torch
from torch import Tensor
from torch.autograd import Function

from padinv.ops import reference

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs, for Windows and for macOS comes without
    triton = None

BLOCK = 512  # items of a program
SMALL = 1 << 30  # elements up to which indices are 32-bit
jit = triton.jit if triton else lambda function: function


# ----------------------------------------------------------------------------------------------------------------------
# Kernels: an item is a pixel of one channel of y, in the order of y's memory. LAST: x and y are channels-last


@jit
def pad_ring_kernel(x, ring, style, y, total, channels, r,
                    ACC: tl.constexpr, LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    real = at < total
    side = r + 2
    pixel = at // channels if LAST else at
    column = pixel % side
    row = pixel // side % side
    plane = pixel // side // side  # n, or n·C + c
    map_ = plane * channels + at % channels if LAST else plane  # n·C + c
    at_x = (plane * r + row - 1) * r + column - 1
    at_x = at_x * channels + at % channels if LAST else at_x
    at_side = 2 * side + tl.where(column == 0, 0, r) + row - 1
    at_ring = tl.where(row == 0, column, tl.where(row == r + 1, side + column, at_side))
    inside = (row > 0) & (row <= r) & (column > 0) & (column <= r)
    a = tl.load(x + at_x, mask=real & inside, other=0).to(ACC)
    if style is not None:
        a *= tl.load(style + map_, mask=real & inside, other=0).to(ACC)
    b = tl.load(ring + map_ * (4 * (r + 1)) + at_ring, mask=real & (inside == 0), other=0).to(ACC)
    tl.store(y + at, tl.where(inside, a, b).to(y.dtype.element_ty), mask=real)


@jit
def upfirdn2d_kernel(x, f, y, total, channels, height, width, out_height, out_width, skip_x, shift_x, skip_y, shift_y,
                     gain, UP: tl.constexpr, DOWN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                     FLIP: tl.constexpr, ACC: tl.constexpr, LAST: tl.constexpr, INDEX: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    real = at < total
    pixel = at // channels if LAST else at
    x0 = pixel % out_width * DOWN + shift_x  # the first tap's place on the up-sampled grid, skip·UP too far right
    y0 = pixel // out_width % out_height * DOWN + shift_y
    plane = pixel // out_width // out_height  # n, or n·C + c
    kx0 = (UP - x0 % UP) % UP  # the first tap that meets a sample rather than a zero
    ky0 = (UP - y0 % UP) % UP
    sums = tl.full([BLOCK], 0, ACC)  # tl.zeros is compiled code, which the interpreter does not take
    for i in tl.static_range((KH + UP - 1) // UP):
        for j in tl.static_range((KW + UP - 1) // UP):
            ky = ky0 + i * UP
            kx = kx0 + j * UP
            iy = (y0 + ky) // UP - skip_y
            ix = (x0 + kx) // UP - skip_x
            meets = real & (ky < KH) & (kx < KW) & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
            tap = KH * KW - 1 - ky * KW - kx if FLIP else ky * KW + kx
            at_x = (plane * height + iy) * width + ix
            at_x = at_x * channels + at % channels if LAST else at_x
            a = tl.load(x + at_x, mask=meets, other=0).to(ACC)
            sums += tl.load(f + tap, mask=meets, other=0).to(ACC) * a
    tl.store(y + at, (sums * gain).to(y.dtype.element_ty), mask=real)


def launch(kernel, x: Tensor, tensors, shape, *numbers, **constants) -> Tensor:
    """What a kernel makes of x and the other tensors: [shape], in the memory layout of x."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    tensors = [None if t is None else t.contiguous() for t in tensors]
    if total := y.numel():
        constants["ACC"] = tl.float64 if x.dtype == torch.float64 else tl.float32
        constants["INDEX"] = tl.int32 if max(total, x.numel()) < SMALL else tl.int64
        with torch.cuda.device_of(x):
            kernel[(triton.cdiv(total, BLOCK),)](
                x.contiguous(memory_format=layout), *tensors, y, total, *numbers, LAST=last, BLOCK=BLOCK, **constants
            )
    return y


# ----------------------------------------------------------------------------------------------------------------------
# Functions


class UpFirDn2d(Function):
    @staticmethod
    def forward(ctx, x, f, up, down, pad, gain, flip):  # flip: a true convolution
        (n, c, h, w), (kh, kw), (left, right, top, bottom) = x.shape, f.shape, pad
        size = (h * up + top + bottom - kh) // down + 1, (w * up + left + right - kw) // down + 1
        ctx.save_for_backward(f)
        ctx.settings, ctx.sizes = (up, down, pad, gain, flip), ((w, size[1]), (h, size[0]))
        # Kernels divide nothing below zero: the grid is moved by a multiple of `up` to begin at or after it.
        moved = [number for before in (left, top) for number in (-(-before // up), -before % up)]
        return launch(upfirdn2d_kernel, x, [f], (n, c, *size), c, h, w, *size, *moved, float(gain), UP=up, DOWN=down,
                      KH=kh, KW=kw, FLIP=flip)  # fmt: skip

    @staticmethod
    def backward(ctx, dy):
        """The transpose of upfirdn2d is upfirdn2d, with up and down exchanged and the filter turned round."""
        (f,), (up, down, pad, gain, flip), back = ctx.saved_tensors, ctx.settings, []
        for k, before, (size, out) in zip(f.shape[::-1], pad[::2], ctx.sizes, strict=True):
            back += [k - 1 - before, size * up - up + 1 - out * down + before]
        return UpFirDn2d.apply(dy, f, down, up, back, gain, not flip), None, None, None, None, None, None


class PadRing(Function):
    @staticmethod
    def forward(ctx, x, ring, style):
        n, c, r = x.shape[:3]
        ctx.save_for_backward(x, style)
        ctx.dtype = ring.dtype
        return launch(pad_ring_kernel, x, [ring, style], (n, c, r + 2, r + 2), c, r)

    @staticmethod
    def backward(ctx, dy):
        x, style = ctx.saved_tensors
        dx, d_style = dy[..., 1:-1, 1:-1], None
        if style is not None:
            wide = torch.promote_types(dy.dtype, torch.float32)  # of sums
            d_style = (dx * x).sum(dim=(2, 3), dtype=wide).to(style.dtype)
            dx = dx * style.to(dy.dtype)[:, :, None, None]
        return dx, reference.take_ring(dy).to(ctx.dtype), d_style


def upfirdn2d(x, f, up=1, down=1, pad=(0, 0, 0, 0), gain=1.0):
    if f.requires_grad:  # the kernels have no gradient of the filter
        return reference.upfirdn2d(x, f, up, down, pad, gain)
    return UpFirDn2d.apply(x, f, up, down, pad, gain, True)


def pad_ring(x, ring, style=None):
    """Raises ValueError for a ring or a map of another shape: kernels would read beyond their memory."""
    n, c, r = x.shape[:3]
    if x.shape[2:] != (r, r):
        raise ValueError(f"x: expected square maps [N, C, r, r], got {list(x.shape)}")
    if ring.shape != (n, c, 4 * (r + 1)):
        raise ValueError(f"ring: expected {[n, c, 4 * (r + 1)]} for x {list(x.shape)}, got {list(ring.shape)}")
    return PadRing.apply(x, ring, None if style is None else style.expand(n, c))


def try_out(device) -> None:
    """Run each kernel on one pixel; raises whatever keeps them from it, such as no C compiler for Triton."""
    if triton is None:
        raise ImportError("Triton is not installed")
    x = torch.ones(1, 1, 1, 1, device=device)
    upfirdn2d(pad_ring(x, torch.ones(1, 1, 8, device=device)), x[0, 0])
