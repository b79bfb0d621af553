"""The operations that StyleGAN2 and the padding space need beyond plain convolutions, as readable PyTorch.

Each function is its own specification: differentiable twice (the R1 penalty needs the gradient of a gradient), out of
place, and correct on any device.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ACTS = {"lrelu": (0.2, math.sqrt(2)), "linear": (1.0, 1.0)}  # slope below zero, default gain


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    act: str = "lrelu",
    gain: float | None = None,
    noise: Tensor | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Add noise and a bias per channel, apply the activation, scale, clamp.

    Args:
        x: [N, C, ...].
        bias: [C] or None.
        act: "lrelu" (slope 0.2) or "linear".
        gain: positive factor on the result; by default √2 for "lrelu", which keeps the variance of its input, and 1
            for "linear" (StyleGAN2, Karras et al. 2020, appendix B).
        noise: [H, W] or [N, 1, H, W], the same for all channels, or None.
        clamp: the result lies in [−clamp, clamp]; positive, or None.
    """
    if act not in ACTS:
        raise ValueError(f"act: expected 'lrelu' or 'linear', got {act!r}")
    slope, default = ACTS[act]
    if noise is not None:
        x = x + noise.to(x.dtype)
    if bias is not None:
        x = x + bias.to(x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))
    if slope != 1:
        x = F.leaky_relu(x, slope)
    gain = default if gain is None else gain
    x = x if gain == 1 else x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def fir_filter(taps=(1, 3, 3, 1)) -> Tensor:
    """The low-pass filter of StyleGAN2, taps ⊗ taps with sum 1: [4, 4] for the default taps."""
    f = torch.tensor(taps, dtype=torch.float32)
    f = torch.outer(f, f)
    return f / f.sum()


def upfirdn2d(x: Tensor, f: Tensor, up: int = 1, down: int = 1, pad=(0, 0, 0, 0), gain: float = 1.0) -> Tensor:
    """Insert zeros, pad or crop, filter, drop samples (StyleGAN2, Karras et al. 2020, section 4 and appendix B).

    Args:
        x: [N, C, H, W].
        f: [kh, kw]; applied as a true convolution (flipped).
        up: (up − 1) zeros follow each pixel before filtering.
        down: every down-th pixel is kept after it.
        pad: (left, right, top, bottom) pixels of zeros after up-sampling; negative values crop.
        gain: factor on the result.

    Returns:
        [N, C, (H·up + top + bottom − kh) // down + 1, (W·up + left + right − kw) // down + 1].
    """
    n, c, h, w = x.shape
    if up > 1:
        x = F.pad(x.reshape(n, c, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1))  # [N, C, H, up, W, up]
        x = x.reshape(n, c, h * up, w * up)  # [N, C, H·up, W·up]
    left, right, top, bottom = pad
    same = left == right >= 0 and top == bottom >= 0  # padding that a convolution does by itself
    if any(pad) and not same:
        x = F.pad(x, pad)
    kernel = (f.flip(0, 1) * gain).to(x.dtype).expand(c, 1, -1, -1)  # [C, 1, kh, kw]
    # All samples are filtered, then some dropped: strided depthwise convolutions have no fast gradient on a CPU.
    x = F.conv2d(x, kernel, padding=(top, left) if same else 0, groups=c)
    return x[..., ::down, ::down]


def pad_ring(x: Tensor, ring: Tensor, style: Tensor | None = None) -> Tensor:
    """Surround each feature map with a ring of given coefficients, where a plain convolution would pad zeros.

    Args:
        x: [N, C, r, r].
        ring: [N, C, 4(r + 1)]: top row (r + 2, corners included), bottom row (r + 2), left column (r), right
            column (r); rows from left to right, columns from top to bottom.
        style: [N, C], a factor on x but not on the ring, or None.

    Returns:
        [N, C, r + 2, r + 2].
    """
    r = x.shape[-1]
    if style is not None:
        x = x * style.to(x.dtype)[:, :, None, None]
    top, bottom, left, right = ring.to(x.dtype).split((r + 2, r + 2, r, r), dim=-1)
    x = torch.cat((left.unsqueeze(-1), x, right.unsqueeze(-1)), dim=-1)  # [N, C, r, r + 2]
    return torch.cat((top.unsqueeze(-2), x, bottom.unsqueeze(-2)), dim=-2)  # [N, C, r + 2, r + 2]


def take_ring(x: Tensor) -> Tensor:
    """The outermost pixels of x in the order of `pad_ring`: [N, C, r + 2, r + 2] -> [N, C, 4(r + 1)]."""
    return torch.cat((x[..., 0, :], x[..., -1, :], x[..., 1:-1, 0], x[..., 1:-1, -1]), dim=-1)  # [N, C, 4(r + 1)]
