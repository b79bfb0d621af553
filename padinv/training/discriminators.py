"""Discriminators: StyleGAN2's (Karras et al. 2020), of frozen features (Sauer et al. 2021), and of codes (e4e)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from padinv.measure.lpips import lpips
from padinv.model.generator import EqualLinear, GeneratorConfig
from padinv.ops import bias_act, fir_filter, upfirdn2d


class EqualConv(nn.Module):
    """k×k convolution with equalised learning rate; with down, low-pass filtered and with stride 2."""

    def __init__(self, in_channels: int, out_channels: int, k: int, down: bool = False, act: str = "lrelu"):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, k, k))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if act == "lrelu" else None
        self.k, self.down, self.act = k, down, act
        self.register_buffer("fir", fir_filter(), persistent=False)

    def forward(self, x: Tensor, gain: float | None = None) -> Tensor:
        weight = self.weight * (1 / math.sqrt(self.weight[0].numel()))
        if self.down and self.k == 1:  # filter and drop samples first: a quarter of the multiply-adds
            x = F.conv2d(upfirdn2d(x, self.fir, down=2, pad=(1, 1, 1, 1)), weight)  # [N, C_out, r/2, r/2]
        elif self.down:
            x = F.conv2d(upfirdn2d(x, self.fir, pad=(2, 2, 2, 2)), weight, stride=2)  # [N, C_out, r/2, r/2]
        else:
            x = F.conv2d(x, weight, padding=self.k // 2)  # [N, C_out, r, r]
        return bias_act(x, self.bias, act=self.act, gain=gain)


class ResidualBlock(nn.Module):
    """Halve the resolution: two 3×3 convolutions beside a 1×1 shortcut, summed with unit variance."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv0 = EqualConv(in_channels, in_channels, 3)
        self.conv1 = EqualConv(in_channels, out_channels, 3, down=True)
        self.skip = EqualConv(in_channels, out_channels, 1, down=True, act="linear")

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.conv0(x), gain=1.0)  # √2 of the activation · √½ of the sum
        return y + self.skip(x, gain=math.sqrt(0.5))  # [N, C_out, r/2, r/2]


def minibatch_std(x: Tensor) -> Tensor:
    """Append a channel with the standard deviation over groups of images, which exposes a lack of variety.

    x: [N, C, H, W] -> [N, C + 1, H, W]; groups of 4 images, or of the largest divisor of N below it.
    """
    n, c, h, w = x.shape
    group = max(g for g in range(1, min(4, n) + 1) if n % g == 0)
    y = x.float().reshape(group, -1, c, h, w)  # [G, N/G, C, H, W]
    std = (y.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # [N/G]
    std = std.to(x.dtype).repeat(group).reshape(n, 1, 1, 1).expand(-1, -1, h, w)  # [N, 1, H, W]
    return torch.cat((x, std), dim=1)  # [N, C + 1, H, W]


class LatentDiscriminator(nn.Sequential):
    """Code -> logit: does w come from the generator's own mapping? (e4e, Tov et al. 2021, section 4.2)

    [N, w_dim] -> [N, 1].
    """

    def __init__(self, w_dim: int, layers: int = 4):
        hidden = [EqualLinear(w_dim, w_dim, act="lrelu") for _ in range(layers - 1)]
        super().__init__(*hidden, EqualLinear(w_dim, 1))


class FromImage(nn.Module):
    """Image -> vector. Channels and resolution are those of the generator's config; `compare` adds `minibatch_std`.

    Blocks are named by the resolution they start from, so that a network of a lower resolution is the tail of one of a
    higher resolution (`from_rgb` aside).
    """

    def __init__(self, config: GeneratorConfig, out: int, compare: bool):
        super().__init__()
        nf, self.resolution = config.channels, config.resolution
        self.from_rgb = nn.ModuleDict({f"r{self.resolution}": EqualConv(3, nf(self.resolution), 1)})
        self.blocks = nn.ModuleDict({f"r{r}": ResidualBlock(nf(r), nf(r // 2)) for r in config.resolutions[:0:-1]})
        self.conv = EqualConv(nf(4) + 1, nf(4), 3) if compare else None
        self.dense = EqualLinear(nf(4) * 16, nf(4), act="lrelu")
        self.out = EqualLinear(nf(4), out)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, 3, R, R] in [−1, 1] -> [N, out]. Raises ValueError on another resolution."""
        if x.shape[1:] != (3, self.resolution, self.resolution):
            raise ValueError(f"x: expected [N, 3, {self.resolution}, {self.resolution}], got {list(x.shape)}")
        x = self.from_rgb[f"r{self.resolution}"](x)  # [N, nf(R), R, R]
        for block in self.blocks.values():
            x = block(x)
        if self.conv is not None:
            x = self.conv(minibatch_std(x))  # [N, nf(4), 4, 4]
        with torch.autocast(x.device.type, enabled=False):
            return self.out(self.dense(x.float().flatten(1)))


class Discriminator(FromImage):
    """Image -> realness logit: [N, 3, R, R] in [−1, 1] -> [N]."""

    def __init__(self, config: GeneratorConfig):
        super().__init__(config, 1, compare=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(1)


class Both(nn.Module):
    """The discriminators of images, which is shown them augmented, and of features (Kumari et al. 2022, who keep the
    one of pixels beside those of features)."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.images, self.features = Discriminator(config), FeatureDiscriminator(config.resolution)


def augment(x: Tensor) -> Tensor:
    """Images in other colours and shifted by up to an eighth, differentiably (DiffAugment, Zhao et al. 2020)."""
    n, _, h, w = x.shape
    light, saturation, contrast = torch.rand(3, n, 1, 1, 1, device=x.device, dtype=x.dtype)
    x = x + light - 0.5
    grey = x.mean(dim=1, keepdim=True)  # [N, 1, H, W]
    x = grey + 2 * saturation * (x - grey)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (0.5 + contrast) * (x - mean)
    pad = h // 8
    rows, columns = (torch.randint(2 * pad + 1, (n, 1), device=x.device) + torch.arange(s, device=x.device)
                     for s in (h, w))  # fmt: skip
    padded = F.pad(x, (pad,) * 4).permute(0, 2, 3, 1)  # [N, H + 2 pad, W + 2 pad, 3]
    every = torch.arange(n, device=x.device)[:, None, None]
    return padded[every, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)  # [N, 3, H, W]


class FeatureHead(nn.Module):
    """Feature map -> logits of its patches, by spectrally normalised convolutions down to 4×4."""

    def __init__(self, channels: int, resolution: int, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        while resolution > 4:
            conv = nn.Conv2d(channels, width, 4, stride=2, padding=1)
            layers += [spectral_norm(conv), nn.LeakyReLU(0.2)]
            channels, resolution = width, resolution // 2
        conv = nn.Conv2d(channels, width, 3, padding=1)
        layers += [spectral_norm(conv), nn.LeakyReLU(0.2), spectral_norm(nn.Conv2d(width, 1, 1))]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)  # [N, patches]


class FeatureDiscriminator(nn.Module):
    """Image -> logits of patches at four scales of frozen VGG16 features (Projected GANs, Sauer et al. 2021).

    Features are mixed by fixed random convolutions, across channels and from coarse to fine (section 3.2), so that no
    scale can be ignored. Learns from far fewer images than a discriminator that starts from nothing, and needs no R1.
    """

    MAPS = (128, 256, 512, 512)  # channels of conv2_2, 3_3, 4_3, 5_3, at ½, ¼, ⅛ and 1/16 of the resolution

    def __init__(self, resolution: int, width: int = 64):
        super().__init__()
        self.resolution = resolution
        self.vgg = [lpips("vgg")]  # in a list: neither trained nor saved
        widths = (width, 2 * width, 4 * width, 4 * width)
        sizes = [resolution // 2 ** (i + 1) for i in range(4)]
        self.mix = nn.ModuleList(nn.Conv2d(c, w, 1, bias=False) for c, w in zip(self.MAPS, widths, strict=True))
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in zip(widths[1:], widths[:-1], strict=True)
        )
        for layer in (*self.mix, *self.down):
            nn.init.kaiming_normal_(layer.requires_grad_(False).weight, nonlinearity="linear")  # stay random
        self.heads = nn.ModuleList(FeatureHead(w, r, 2 * width) for w, r in zip(widths, sizes, strict=True))

    def features(self, x: Tensor) -> list[Tensor]:
        """x: [N, 3, R, R] in [−1, 1] -> four mixed maps [N, C, r, r], from fine to coarse."""
        vgg = self.vgg[0].to(x.device)
        x, maps = (x - vgg.mean) / vgg.std, []
        for layers, mix in zip(vgg.slices, (None, *self.mix), strict=True):
            x = layers(x)  # [N, C, r, r]
            if mix is not None:
                maps.append(mix(x))
        for i in reversed(range(3)):
            up = F.interpolate(maps[i + 1], scale_factor=2, mode="nearest")
            maps[i] = (maps[i] + self.down[i](up)) * math.sqrt(0.5)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, 3, R, R] in [−1, 1] -> logits [N, M] of all patches of all scales."""
        if x.shape[1:] != (3, self.resolution, self.resolution):
            raise ValueError(f"x: expected [N, 3, {self.resolution}, {self.resolution}], got {list(x.shape)}")
        logits = [head(m) for head, m in zip(self.heads, self.features(x), strict=True)]
        return torch.cat(logits, dim=1).float()  # [N, M]
