"""StyleGAN2 generator (Karras et al. 2020: config F, skip architecture) whose padding is an argument.

One class serves training, pSp (p=None) and PadInv (p given): the padding space needs no copy of the network.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padinv.model.codes import Code, Padding
from padinv.ops import bias_act, fir_filter, pad_ring, upfirdn2d

NOISE = ("const", "none", "random")


@dataclass(frozen=True)
class GeneratorConfig:
    resolution: int = 64  # of the image, a power of two from 8
    z_dim: int = 512  # of the Gaussian input
    w_dim: int = 512  # of the intermediate latent space
    mapping_layers: int = 8  # depth of the network z -> w
    channel_base: int = 32768  # channels × resolution, until channel_max is met (config F; 16384 is half width)
    channel_max: int = 512  # most channels of any layer

    def __post_init__(self):
        if self.resolution < 8 or self.resolution & (self.resolution - 1):
            raise ValueError(f"resolution: expected a power of two from 8, got {self.resolution}")
        if self.mapping_layers < 1:
            raise ValueError(f"mapping_layers: expected 1 or more, got {self.mapping_layers}")

    def channels(self, r: int) -> int:
        """nf(r): feature channels at resolution r."""
        return min(self.channel_base // r, self.channel_max)

    @property
    def resolutions(self) -> list[int]:
        return [2**i for i in range(2, int(math.log2(self.resolution)) + 1)]

    @property
    def num_ws(self) -> int:
        return 2 * int(math.log2(self.resolution)) - 2


# ----------------------------------------------------------------------------------------------------------------------
# Layers


class EqualLinear(nn.Module):
    """Dense layer with equalised learning rate: stored weights are N(0, 1)/lr_mul, used times lr_mul/√fan_in."""

    def __init__(self, in_dim: int, out_dim: int, bias_init: float = 0.0, lr_mul: float = 1.0, act: str = "linear"):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_dim,), bias_init / lr_mul))
        self.weight_gain, self.bias_gain, self.act = lr_mul / math.sqrt(in_dim), lr_mul, act

    def forward(self, x: Tensor) -> Tensor:
        return bias_act(F.linear(x, self.weight * self.weight_gain), self.bias * self.bias_gain, act=self.act)


class ModulatedConv(nn.Module):
    """3×3 convolution under a style, then noise, bias and leaky-ReLU (StyleGAN2, section 2.2).

    The style scales the activation rather than the weight: equal results, and one dense convolution serves the
    whole batch. A padding ring is placed after that scaling, so its coefficients bypass the modulation; the
    demodulation applies to the convolution's output and hence to them too (METHOD, "order matters").
    """

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, resolution: int, up: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.affine = EqualLinear(w_dim, in_channels, bias_init=1.0)
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.register_buffer("noise", torch.randn(resolution, resolution))
        self.up = up

    def modulation(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Style and demodulation, [N, C_in] and [N, C_out], in float32 whatever autocast says: both are small, and
        rounding them would tint whole feature maps. The gain 1/√fan_in of the weight cancels out, but for ε."""
        with torch.autocast(w.device.type, enabled=False):
            style = self.affine(w.float())  # [N, C_in]
            power = self.weight.float().square().sum(dim=(2, 3))  # [C_out, C_in]
            return style, torch.rsqrt(F.linear(style.square(), power) + 1e-8 * self.weight[0].numel())

    def forward(
        self, x: Tensor, w: Tensor, ring: Tensor | None, noise: str, fir: Tensor, modulated: bool = False,
        interior: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        style, demodulate = self.modulation(w)
        if ring is not None and modulated:
            ring = ring * style[:, :, None]
        if interior is not None:  # added to what the style has scaled, so the scaling is done here
            x = x * style.to(x.dtype)[:, :, None, None] + interior.to(x.dtype)
            style = torch.ones_like(style)
        if self.up:
            x = x * style.to(x.dtype)[:, :, None, None]
            x = F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2)  # [N, C_out, 2r + 1, 2r + 1]
            x = upfirdn2d(x, fir, pad=(1, 1, 1, 1), gain=4)  # [N, C_out, 2r, 2r]
        elif ring is None:
            x = x * style.to(x.dtype)[:, :, None, None]
            x = F.conv2d(x, self.weight, padding=1)  # [N, C_out, r, r]
        else:
            x = F.conv2d(pad_ring(x, ring, style), self.weight)  # [N, C_out, r, r]
        x = x * demodulate.to(x.dtype)[:, :, None, None]
        maps = None  # of noise
        if noise != "none":
            fresh = noise == "random"
            maps = torch.randn(len(x), 1, *x.shape[2:], dtype=x.dtype, device=x.device) if fresh else self.noise
            maps = maps.to(x.dtype) * self.noise_strength.to(x.dtype)  # [N, 1, r, r] or [r, r]
        return bias_act(x, self.bias, noise=maps)


class ToRGB(nn.Module):
    """Modulated 1×1 convolution to colours, without demodulation."""

    def __init__(self, in_channels: int, w_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.affine = EqualLinear(w_dim, in_channels, bias_init=1.0)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(w.device.type, enabled=False):
            style = self.affine(w.float()) * (1 / math.sqrt(x.shape[1]))  # [N, C]
        x = F.conv2d(x * style.to(x.dtype)[:, :, None, None], self.weight)  # [N, 3, r, r]
        return bias_act(x, self.bias, act="linear")


class Block(nn.Module):
    """All layers of one resolution; the first block has no up-sampling convolution."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, resolution: int):
        super().__init__()
        self.conv0 = ModulatedConv(in_channels, out_channels, w_dim, resolution, up=True) if resolution > 4 else None
        self.conv1 = ModulatedConv(out_channels, out_channels, w_dim, resolution)
        self.to_rgb = ToRGB(out_channels, w_dim)

    def forward(
        self,
        x: Tensor,
        rgb: Tensor | None,
        ws: list[Tensor],
        ring: Tensor | None,
        noise: str,
        fir: Tensor,
        modulated: bool,
        interior: Tensor | None,
    ):
        if self.conv0 is not None:
            x = self.conv0(x, ws[0], None, noise, fir)  # [N, C_out, r, r]
        x = self.conv1(x, ws[-2], ring, noise, fir, modulated, interior)
        y = self.to_rgb(x, ws[-1]).float()  # [N, 3, r, r]
        if rgb is not None:
            y = y + upfirdn2d(rgb, fir, up=2, pad=(2, 1, 2, 1), gain=4)  # [N, 3, r, r]
        return x, y


class Mapping(nn.Module):
    """z -> w: pixel norm and dense layers at a hundredth of the learning rate (StyleGAN, section 2)."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        dims = [config.z_dim] + [config.w_dim] * config.mapping_layers
        self.layers = nn.ModuleList(
            EqualLinear(i, o, lr_mul=0.01, act="lrelu") for i, o in zip(dims[:-1], dims[1:], strict=True)
        )
        self.num_ws = config.num_ws
        self.register_buffer("w_avg", torch.zeros(config.w_dim))

    def forward(self, z: Tensor, truncation: float = 1.0) -> Tensor:
        """Codes of Gaussian inputs.

        Args:
            z: [N, z_dim].
            truncation: ψ of w_avg + ψ (w − w_avg); 1 leaves w as it is, 0 gives w_avg.

        Returns:
            [N, num_ws, w_dim], the same w for every layer.

        Raises:
            ValueError: z is not [N, z_dim].
        """
        z_dim = self.layers[0].weight.shape[1]
        if z.ndim != 2 or z.shape[1] != z_dim:
            raise ValueError(f"z: expected [N, {z_dim}], got {list(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            w = z.float() * torch.rsqrt(z.float().square().mean(dim=1, keepdim=True) + 1e-8)
            for layer in self.layers:
                w = layer(w)  # [N, w_dim]
        if truncation != 1:
            w = self.w_avg.lerp(w, truncation)
        return w[:, None].expand(-1, self.num_ws, -1)  # [N, num_ws, w_dim]


# ----------------------------------------------------------------------------------------------------------------------
# The network


class Generator(nn.Module):
    """z -> w -> image, with an optional padding p of the early layers.

    Attributes:
        config: the architecture.
        mapping: the network z -> w; `G.mapping(z, truncation=1.0)`.
        const: [1, nf(4), 4, 4], the learned input.
        num_ws, resolution: of `config`.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config, self.num_ws, self.resolution = config, config.num_ws, config.resolution
        self.mapping = Mapping(config)
        self.const = nn.Parameter(torch.randn(1, config.channels(4), 4, 4))
        self.blocks = nn.ModuleList(
            Block(config.channels(max(r // 2, 4)), config.channels(r), config.w_dim, r) for r in config.resolutions
        )
        self.register_buffer("fir", fir_filter(), persistent=False)

    @property
    def w_avg(self) -> Tensor:
        """[w_dim], the running mean of w."""
        return self.mapping.w_avg

    def check(self, w: Tensor, p: Padding | None) -> None:
        """Raise ValueError where w or p cannot belong to this generator."""
        if w.ndim != 3 or w.shape[1:] != (self.num_ws, self.config.w_dim):
            raise ValueError(f"w: expected [N, {self.num_ws}, {self.config.w_dim}] for this generator of "
                             f"{self.resolution}², got {list(w.shape)}")  # fmt: skip
        if p is None:
            return
        if len(p) != len(w):
            raise ValueError(f"p: expected a batch of {len(w)} as in w, got {len(p)}")
        if len(p.rings) > len(self.blocks):
            raise ValueError(f"p: {len(p.rings)} rings, but this generator of {self.resolution}² has only "
                             f"{len(self.blocks)} resolutions")  # fmt: skip
        if p.const is not None and p.const.shape[1] != self.const.shape[1]:
            raise ValueError(f"p.const: expected {self.const.shape[1]} channels, got {p.const.shape[1]}: "
                             "the code belongs to another generator")  # fmt: skip
        for r, ring in zip(self.config.resolutions, p.rings, strict=False):
            if ring.shape[1] != self.config.channels(r):
                raise ValueError(f"p.rings: expected {self.config.channels(r)} channels at resolution {r}, got "
                                 f"{ring.shape[1]}: the code belongs to another generator")  # fmt: skip
        if p.interior is not None:
            c, r = p.interior.shape[1:3]
            if r not in self.config.resolutions or c != self.config.channels(r):
                raise ValueError(f"p.interior: {c} channels at {r}² fit no layer of this generator of "
                                 f"{self.resolution}²: the code belongs to another generator")  # fmt: skip

    def synthesis(self, w: Tensor, p: Padding | None = None, noise: str = "const") -> Tensor:
        """Images of codes (paper, section 3).

        Args:
            w: [N, num_ws, w_dim].
            p: padding of the early layers; None pads zeros and starts from the learned constant.
            noise: "const" (the stored noise maps), "none", or "random" (fresh maps of torch's global generator).

        Returns:
            [N, 3, R, R], about [−1, 1], not clamped.

        Raises:
            ValueError: w or p of another generator, or an unknown noise mode.
        """
        self.check(w, p)
        if noise not in NOISE:
            raise ValueError(f"noise: expected one of {NOISE}, got {noise!r}")
        const = self.const if p is None or p.const is None else p.const
        x = const.expand(len(w), -1, -1, -1)  # [N, C, 4, 4]
        rings = (p.rings if p is not None else ()) + (None,) * len(self.blocks)
        rgb = None
        for i, block in enumerate(self.blocks):
            ws = [w[:, j] for j in range(max(2 * i - 1, 0), 2 * i + 2)]  # 3 × [N, w_dim], 2 for the first block
            here = p is not None and p.interior is not None and p.interior.shape[-1] == self.config.resolutions[i]
            interior, modulated = p.interior if here else None, p is not None and p.modulated
            x, rgb = block(x, rgb, ws, rings[i], noise, self.fir, modulated, interior)
        return rgb

    def forward(self, code: Code, noise: str = "const") -> Tensor:
        """Image of a `Code`: `synthesis(code.w, code.p, noise)`."""
        return self.synthesis(code.w, code.p, noise)
