"""PadInv's encoder: image -> Code(w, p) in one pass (paper, section 3.2). Without its P branch it is pSp's.

IResNet-SE backbone -> feature pyramid over the last three stages -> one head per w, and the padding branch.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padinv.model.codes import Code, Padding, centre, ring_resolution
from padinv.model.generator import Generator
from padinv.ops import take_ring


@dataclass(frozen=True)
class EncoderConfig:
    """The defaults suit 64² images on a CPU; `Encoder.for_generator` fills in what belongs to the generator.

    The released faces model: input_resolution 256, widths (64, 128, 256, 512), depths (3, 4, 14, 3), se_reduction 16,
    pyramid_channels, head_channels and padding_channels 512, padding_depth 2, padding_level 1, padding "outright",
    layout "centre".
    """

    num_ws: int = 10  # codes per image: the generator's
    w_dim: int = 512  # numbers per code: the generator's
    channels: tuple[int, ...] = (512, 512, 512, 512, 512)  # nf(4), nf(8), nf(16), …: the generator's
    input_resolution: int = 64  # images of other sizes are resized to it
    stem_stride: int = 1  # of the first convolution; 2 lets large images in at little cost
    widths: tuple[int, ...] = (32, 64, 128, 192)  # channels of each backbone stage
    depths: tuple[int, ...] = (1, 3, 3, 2)  # blocks of each stage
    strides: tuple[int, ...] = (2, 2, 2, 2)  # of the first block of each stage
    se_reduction: int = 8  # channels ÷ hidden channels of squeeze-and-excitation
    pyramid_channels: int = 128  # of each pyramid level
    head_channels: int | None = 64  # of each W+ head; None for w_dim
    padded_resolutions: int = 4  # L: padded layers, at 4², 8², …; 0 to keep zeros
    replace_const: bool = True  # predict the constant input too; with L = 0 and False this is pSp
    padding: str = "offset"  # P as an "offset" from the generator's own padding, or "outright" as released
    layout: str = "aligned"  # "aligned": every ring lies on the image's border; "centre": one map, cropped, as released
    padding_level: int = 0  # pyramid level that feeds the P branch: 0 the finest, 2 the coarsest
    padding_channels: int = 48  # of the P branch
    padding_depth: int = 2  # blocks of the P branch
    interior: int = 0  # resolution of an interior beside the rings; 0: none, as in the paper (METHOD section 13)
    # What the ablations vary, and the baselines.
    padding_heads: str = "layer"  # 1×1 heads of the rings: one per "layer", one "shared", or "none"
    modulated: bool = False  # the rings lie before the style modulation: the generator multiplies them by the style
    predict_w: bool = True  # False keeps w at w_avg: P alone
    base_w: bool = False  # e4e: the first head gives one w for all layers, the others their offsets from it
    residual: bool = False  # ReStyle: from an image and its inversion so far, the change of the code

    def __post_init__(self):
        for name in ("channels", "widths", "depths", "strides"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON and YAML give lists
        if not 3 <= len(self.widths) == len(self.depths) == len(self.strides):
            raise ValueError("widths, depths, strides: expected one number for each of at least 3 stages, got "
                             f"{self.widths}, {self.depths}, {self.strides}")  # fmt: skip
        if not 0 <= self.padded_resolutions <= len(self.channels):
            raise ValueError(f"padded_resolutions: expected 0 to {len(self.channels)}, the generator's resolutions, "
                             f"got {self.padded_resolutions}")  # fmt: skip
        inside = tuple(ring_resolution(i) for i in range(len(self.channels)))
        choices = {"padding": ("offset", "outright"), "layout": ("aligned", "centre"), "padding_level": (0, 1, 2),
                   "padding_heads": ("layer", "shared", "none"), "interior": (0, *inside)}  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        if not self.predict_w and not self.predicts_p:
            raise ValueError(
                "predict_w: an encoder without w, rings (padded_resolutions) and constant predicts nothing"
            )
        headless = self.padding == "outright" and self.replace_const or self.padding_heads == "none"
        if headless and self.padding_channels != self.channels[0]:
            raise ValueError(f"padding_channels: outright padding or padding_heads none take the P branch as it is: "
                             f"expected {self.channels[0]}, the constant's, got {self.padding_channels}")  # fmt: skip
        if self.level_sizes[-1] < 2:
            raise ValueError(f"strides: {self.strides} leave nothing of {self.input_resolution}² images: the last "
                             "stage must keep at least 2²")  # fmt: skip

    @property
    def predicts_p(self) -> bool:
        return self.padded_resolutions > 0 or self.replace_const or self.interior > 0

    @property
    def interior_channels(self) -> int:
        """nf(r) of the interior's resolution r."""
        return self.channels[int(math.log2(self.interior)) - 2]

    @property
    def level_sizes(self) -> list[int]:
        """Side of each pyramid level, finest first."""
        sizes = [-(-self.input_resolution // self.stem_stride)]
        for stride in self.strides:
            sizes.append(-(-sizes[-1] // stride))
        return sizes[-3:]

    @property
    def level_heads(self) -> list[int]:
        """W+ heads of each pyramid level, finest first: as pSp, the first 3 w from the coarsest, 4 from the middle,
        the rest from the finest."""
        coarse = min(self.num_ws, 3)
        middle = min(self.num_ws - coarse, 4)
        return [self.num_ws - coarse - middle, middle, coarse]


# ----------------------------------------------------------------------------------------------------------------------
# Layers


class SqueezeExcitation(nn.Module):
    """A gate for each channel, computed from the means of all (Hu et al. 2018)."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.squeeze = nn.Conv2d(channels, hidden, 1, bias=False)
        self.excite = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x.mean(dim=(2, 3), keepdim=True))  # [N, hidden, 1, 1]
        return self.excite(F.relu(x)).sigmoid()  # [N, C, 1, 1]


class ResidualBlock(nn.Module):
    """IResNet block of ArcFace (Deng et al. 2019): BN, 3×3, PReLU, 3×3 with the stride, BN, SE, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, se_reduction: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.PReLU(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            SqueezeExcitation(out_channels, se_reduction),
        )
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # Sampled before the 1×1 convolution: the same numbers as by its stride, whose gradient oneDNN 3.11 gets wrong
        # for few channels (its issue 6035).
        shortcut = x[:, :, :: self.stride, :: self.stride]  # [N, C_in, H/stride, W/stride]
        if self.shortcut is not None:
            shortcut = self.shortcut(shortcut)  # [N, C_out, H/stride, W/stride]
        x = self.residual[:-1](x)  # [N, C_out, H/stride, W/stride]
        return torch.addcmul(shortcut, x, self.residual[-1](x))


class Heads(nn.Module):
    """The W+ heads of one pyramid level: each a chain of stride-2 convolutions down to 1×1, then a dense layer.

    The heads run side by side: their first convolutions share the input and form one, later ones are one grouped
    convolution, the equalised dense layers one batched product.
    """

    def __init__(self, heads: int, size: int, in_channels: int, channels: int, w_dim: int):
        super().__init__()
        width = heads * channels
        self.convs = nn.ModuleList([nn.Conv2d(in_channels, width, 3, stride=2, padding=1)])
        for _ in range(math.ceil(math.log2(size)) - 1):
            self.convs.append(nn.Conv2d(width, width, 3, stride=2, padding=1, groups=heads))
        self.weight = nn.Parameter(torch.randn(heads, w_dim, channels))
        self.bias = nn.Parameter(torch.zeros(heads, w_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, s, s] -> [N, heads, w_dim]."""
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.01)  # [N, heads · C_head, s/2, s/2]
        heads, _, channels = self.weight.shape
        with torch.autocast(x.device.type, enabled=False):
            x = x.float().reshape(-1, heads, channels)  # [N, heads, C_head]
            return torch.einsum("nhc,hwc->nhw", x, self.weight / math.sqrt(channels)) + self.bias  # [N, heads, w_dim]


class PaddingBranch(nn.Module):
    """A pyramid level -> the point of P (paper, section 3.2).

    The 1×1 head of a layer is evaluated on its ring only, the only pixels a generator reads. Predicting an offset,
    the heads start at zero: training starts exactly from the generator's own padding.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        c, in_channels = config.padding_channels, config.pyramid_channels
        self.blocks = nn.Sequential(
            *(ResidualBlock(c if i else in_channels, c, 1, config.se_reduction) for i in range(config.padding_depth))
        )
        self.channels = config.channels[: config.padded_resolutions]
        heads = {"layer": len(self.channels), "shared": 1, "none": 0}[config.padding_heads]
        self.rings = nn.ModuleList(nn.Conv1d(c, nf, 1) for nf in self.channels[:heads])
        offset = config.padding == "offset"
        headed = offset and config.replace_const and config.padding_heads != "none"
        self.const = nn.Conv2d(c, config.channels[0], 1) if headed else None
        self.interior = nn.Conv2d(c, config.interior_channels, 1) if config.interior else None
        for head in ([*self.rings, self.const] if offset else []) + [self.interior]:
            if head is not None:
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
        self.config, self.aligned, self.offset = config, config.layout == "aligned", offset

    def forward(self, x: Tensor, const: Tensor) -> Padding:
        """x: [N, C, s, s], const: [1, nf(4), 4, 4] of the generator."""
        x = self.blocks(x)  # [N, C_p, s, s]
        r = self.config.interior
        interior = self.interior(resize(x, r, r)).float() if r else None  # [N, nf(r), r, r]
        if self.aligned:
            edges = torch.stack((x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]), dim=2)  # [N, C_p, 4, s]
            inner = resize(x, 4, 4)  # [N, C_p, 4, 4]
        else:
            size = 2 ** (len(self.channels) + 1) + 2
            x = resize(x, size, size)  # [N, C_p, 2^(L+1) + 2, 2^(L+1) + 2]
            inner = centre(x, 4)  # [N, C_p, 4, 4]
        rings = []
        for i, nf in enumerate(self.channels):
            size = ring_resolution(i) + 2
            if self.aligned:  # the ring of x resized to size², without the pixels inside
                top, bottom, left, right = resize(edges, 4, size).unbind(dim=2)  # 4 × [N, C_p, size]
                ring = torch.cat((top, bottom, left[..., 1:-1], right[..., 1:-1]), dim=-1)  # [N, C_p, 4(r + 1)]
            else:
                ring = take_ring(centre(x, size))  # [N, C_p, 4(r + 1)]
            if self.rings:
                ring = self.rings[min(i, len(self.rings) - 1)](ring)
            rings.append(ring[:, :nf].float())  # [N, nf(r), 4(r + 1)]
        if not self.config.replace_const:
            return Padding(None, rings, self.config.modulated, interior)
        inner = (inner if self.const is None else self.const(inner)).float()  # [N, nf(4), 4, 4]
        return Padding(const + inner if self.offset else inner, rings, self.config.modulated, interior)


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with the corner pixels on the corners: [N, C, H, W] -> [N, C, height, width]."""
    return F.interpolate(x, size=(height, width), mode="bicubic", align_corners=True)


# ----------------------------------------------------------------------------------------------------------------------
# The network


class Encoder(nn.Module):
    """Image -> Code(w, p).

    Attributes:
        config: the architecture.
        w_avg: [w_dim] of the generator; w is predicted as an offset from it.
        const: [1, nf(4), 4, 4] of the generator; with padding "offset" the constant is an offset from it.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        c, fed = config.pyramid_channels, config.widths[-3:]
        widths = (config.widths[0], *config.widths)
        self.stem = nn.Sequential(
            nn.Conv2d(6 if config.residual else 3, widths[0], 3, stride=config.stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.PReLU(widths[0]),
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    ResidualBlock(widths[i + (j > 0)], widths[i + 1], stride if j == 0 else 1, config.se_reduction)
                    for j in range(depth)
                )
            )
            for i, (depth, stride) in enumerate(zip(config.depths, config.strides, strict=True))
        )
        # As in pSp, the coarsest level is the last stage itself where its channels fit.
        self.laterals = nn.ModuleList(
            nn.Identity() if i == 2 and width == c else nn.Conv2d(width, c, 1) for i, width in enumerate(fed)
        )
        self.heads = nn.ModuleList(
            Heads(heads, size, c, config.head_channels or config.w_dim, config.w_dim)
            if heads and config.predict_w
            else None
            for heads, size in zip(config.level_heads, config.level_sizes, strict=True)
        )
        self.padding = PaddingBranch(config) if config.predicts_p else None
        self.register_buffer("w_avg", torch.zeros(config.w_dim))
        self.register_buffer("const", torch.zeros(1, config.channels[0], 4, 4))

    @classmethod
    def for_generator(cls, G: Generator, **overrides) -> "Encoder":
        """A new encoder into the latent space of G; overrides are fields of `EncoderConfig`.

        Unless overridden, L is 4 or all the resolutions that G has.
        """
        channels = tuple(map(G.config.channels, G.config.resolutions))
        known = {"num_ws": G.num_ws, "w_dim": G.config.w_dim, "channels": channels}
        encoder = cls(EncoderConfig(**known | {"padded_resolutions": min(4, len(channels))} | overrides))
        encoder.w_avg.copy_(G.w_avg)
        encoder.const.copy_(G.const.detach())
        return encoder.to(G.const.device)

    @classmethod
    def residual_of(cls, base: "Encoder") -> "Encoder":
        """An encoder that goes on from what `base` answers (ReStyle, Alaluf et al. 2021, section 3): it has base's
        weights, sees the inversion beside the image, and starts by changing nothing.

        Raises:
            ValueError: the rings of base have no heads, which alone can start at no change.
        """
        if base.config.padded_resolutions and base.config.padding_heads == "none":
            raise ValueError('base: padding_heads "none" leaves nothing to start from zero, expected another')
        encoder = cls(replace(base.config, residual=True, base_w=False, padding="offset")).to(base.w_avg.device)
        state = encoder.state_dict() | base.state_dict()  # an outright base has no head of the constant
        stem = state["stem.0.weight"]
        state["stem.0.weight"] = torch.cat((stem, torch.zeros_like(stem)), dim=1)  # [C, 6, 3, 3]
        encoder.load_state_dict(state)
        last = [head for head in encoder.heads if head is not None]
        if encoder.padding is not None:
            branch = encoder.padding
            last += [head for head in (*branch.rings, branch.const, branch.interior) if head is not None]
        for head in last:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        return encoder

    def forward(self, x: Tensor, y: Tensor | None = None, code: Code | None = None) -> Code:
        """Invert images (paper, section 3.2).

        Args:
            x: [N, 3, S, S] in [−1, 1]. S other than config.input_resolution is area-averaged down to it, or bilinearly
                interpolated up.
            y, code: for a residual encoder: the inversion so far, [N, 3, R, R], and its code, which is to be changed.

        Returns:
            Code in float32: w [N, num_ws, w_dim], and p, or None for pSp.

        Raises:
            ValueError: x is not a batch of square float images of 3 channels, or y and code are missing or not wanted.
        """
        if (self.config.residual, self.config.residual) != (y is not None, code is not None):
            wants = "an image x, its inversion y and that code" if self.config.residual else "images x alone"
            raise ValueError(f"y, code: this encoder takes {wants}")
        x = self.resized(x)  # [N, 3, S, S]
        if y is not None:
            x = torch.cat((x, self.resized(y)), dim=1)  # [N, 6, S, S]

        x = self.stem(x)  # [N, widths[0], S/stem_stride, S/stem_stride]
        features = []
        for stage in self.stages:
            x = stage(x)  # [N, widths[i], s/stride, s/stride]
            features.append(x)

        levels = [self.laterals[2](features[-1])]  # coarsest first: [N, C, s, s]
        for layer, feature in zip(self.laterals[1::-1], features[-2:-4:-1], strict=True):
            below = F.interpolate(levels[-1], size=feature.shape[-2:], mode="bilinear", align_corners=True)
            levels.append(layer(feature) + below)  # [N, C, 2s, 2s]

        if self.config.predict_w:
            heads = zip(self.heads[::-1], levels, strict=True)
            w = torch.cat([head(level) for head, level in heads if head is not None], dim=1)  # [N, num_ws, w_dim]
            if self.config.base_w:
                w = torch.cat((w[:, :1], w[:, :1] + w[:, 1:]), dim=1)
        else:
            w = self.w_avg.new_zeros(len(x), self.config.num_ws, self.config.w_dim)
        w = w + (self.w_avg if code is None else code.w)
        if self.padding is None:
            return Code(w)
        level = levels[2 - self.config.padding_level]
        if code is None:
            return Code(w, self.padding(level, self.const))
        return Code(w, code.p + self.padding(level, torch.zeros_like(self.const)))

    def resized(self, x: Tensor) -> Tensor:
        """Checked, and at the encoder's resolution."""
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3] or not x.is_floating_point():
            raise ValueError("x: expected square float images [N, 3, S, S] in [−1, 1], got "
                             f"{x.dtype} {list(x.shape)}")  # fmt: skip
        size = (self.config.input_resolution,) * 2
        if x.shape[-1] > size[0]:
            return F.interpolate(x, size=size, mode="area")  # [N, 3, S, S]
        return F.interpolate(x, size=size, mode="bilinear") if x.shape[-1] < size[0] else x  # [N, 3, S, S]
