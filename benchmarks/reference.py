"""The networks written plainly, layer by layer and head by head, with the weights of ours: what the benchmark beats.

It computes the same (`bench.py` compares before it times) and does no more than it must: no dead heads, no copies.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from padinv.model.codes import Code, Padding, centre, ring_resolution
from padinv.model.encoder import Encoder, resize
from padinv.model.generator import Generator
from padinv.ops import take_ring


def layer(conv, x: Tensor, w: Tensor, ring: Tensor | None, fir: Tensor) -> Tensor:
    """A modulated 3×3 convolution with its noise, bias and activation."""
    weight = conv.weight / math.sqrt(conv.weight[0].numel())
    with torch.autocast(x.device.type, enabled=False):
        style = conv.affine(w)  # [N, C_in]
        demodulate = torch.rsqrt(F.linear(style.square(), weight.square().sum(dim=(2, 3))) + 1e-8)  # [N, C_out]
    x = x * style.to(x.dtype)[:, :, None, None]
    if conv.up:
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        taps = (4 * fir).to(x.dtype).expand(x.shape[1], 1, -1, -1)
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), taps, groups=x.shape[1])
    else:
        x = F.pad(x, (1, 1, 1, 1))
        if ring is not None:
            r = x.shape[-1] - 2
            x[..., 0, :], x[..., -1, :], x[..., 1:-1, 0], x[..., 1:-1, -1] = ring.to(x.dtype).split(
                (r + 2, r + 2, r, r), dim=-1
            )
        x = F.conv2d(x, weight)
    x = x * demodulate.to(x.dtype)[:, :, None, None]
    x = x + conv.noise.to(x.dtype) * conv.noise_strength.to(x.dtype)
    x = x + conv.bias.to(x.dtype)[:, None, None]
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def colours(rgb, x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        style = rgb.affine(w) / math.sqrt(x.shape[1])
    return F.conv2d(x * style.to(x.dtype)[:, :, None, None], rgb.weight).float() + rgb.bias[:, None, None]


def synthesis(G: Generator, code: Code) -> Tensor:
    """The image of a code, as `G(code)`."""
    x = code.p.const if code.p is not None and code.p.const is not None else G.const.expand(len(code), -1, -1, -1)
    rings = (*(code.p.rings if code.p is not None else ()), *[None] * len(G.blocks))
    image = None
    for i, block in enumerate(G.blocks):
        if block.conv0 is not None:
            x = layer(block.conv0, x, code.w[:, 2 * i - 1], None, G.fir)
        x = layer(block.conv1, x, code.w[:, 2 * i], rings[i], G.fir)
        y = colours(block.to_rgb, x, code.w[:, 2 * i + 1])
        if image is not None:
            n, c, r, _ = image.shape
            image = F.pad(image.reshape(n, c, r, 1, r, 1), (0, 1, 0, 0, 0, 1)).reshape(n, c, 2 * r, 2 * r)
            y = y + F.conv2d(F.pad(image, (2, 1, 2, 1)), (4 * G.fir).expand(c, 1, -1, -1), groups=c)
        image = y
    return image


def residual(block, x: Tensor) -> Tensor:
    before, first, act, second, after, gate = block.residual
    y = after(second(act(first(before(x)))))
    y = y * gate(y)
    x = x[:, :, :: block.stride, :: block.stride]
    return y + (x if block.shortcut is None else block.shortcut(x))


def heads(level, x: Tensor) -> list[Tensor]:
    """One w after another: [N, w_dim] each."""
    n, _, channels = level.weight.shape
    ws = []
    for i in range(n):
        y = x
        for conv in level.convs:
            weight, bias = conv.weight.chunk(n)[i], conv.bias.chunk(n)[i]
            y = F.leaky_relu(F.conv2d(y, weight, bias, stride=2, padding=1), 0.01)
        with torch.autocast(x.device.type, enabled=False):
            ws.append(F.linear(y.float().flatten(1), level.weight[i] / math.sqrt(channels), level.bias[i]))
    return ws


def padding(branch, x: Tensor, const: Tensor) -> Padding:
    """P by whole maps, of which the rings are cut: heads per layer, with a constant."""
    for block in branch.blocks:
        x = residual(block, x)
    size = 2 ** (len(branch.channels) + 1) + 2
    whole = None if branch.aligned else resize(x, size, size)
    inner = resize(x, 4, 4) if branch.aligned else centre(whole, 4)
    inner = inner if branch.const is None else branch.const(inner)
    rings = []
    for i, head in enumerate(branch.rings):
        size = ring_resolution(i) + 2
        y = F.conv2d(resize(x, size, size) if branch.aligned else whole, head.weight[..., None], head.bias)
        rings.append(take_ring(y if branch.aligned else centre(y, size)).float())
    return Padding(inner.float() + const if branch.offset else inner.float(), tuple(rings))


def encode(E: Encoder, x: Tensor) -> Code:
    """The code of images at the encoder's resolution, as `E(x)`."""
    x = E.stem(x)
    features = []
    for stage in E.stages:
        for block in stage:
            x = residual(block, x)
        features.append(x)
    levels = [E.laterals[2](features[-1])]
    for lateral, feature in ((E.laterals[1], features[-2]), (E.laterals[0], features[-3])):
        below = F.interpolate(levels[-1], size=feature.shape[-2:], mode="bilinear", align_corners=True)
        levels.append(lateral(feature) + below)
    ws = [w for level, x in zip(E.heads[::-1], levels, strict=True) if level is not None for w in heads(level, x)]
    w = torch.stack(ws, dim=1) + E.w_avg
    return Code(w, None if E.padding is None else padding(E.padding, levels[2 - E.config.padding_level], E.const))
