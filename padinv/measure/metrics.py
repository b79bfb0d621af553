"""The one measuring protocol: distances per image, the Fréchet distance, editability.

A number is only worth the protocol beside it (network, version, resize, N, checkpoint): the label of
`frechet_features` belongs in every file.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from padinv.measure.lpips import MIN_SIZE, check_images, lpips, network_timeout, vgg_features
from padinv.model.generator import Generator

REFERENCE_LIMIT = 1.5  # largest magnitude accepted in a reference: resampling overshoots a little
OUTPUT_LIMIT = 8.0  # and in an image that a generator made, where single pixels overshoot far
MS_SSIM_SIZE = 176  # pixels: after four halvings torchmetrics' window of 11 must still fit
FRECHET_SIZE = 256  # pixels: larger images are reduced to this for VGG16's features


# ----------------------------------------------------------------------------------------------------------------------
# Distances per image


@torch.no_grad()
def compare(x: Tensor, y: Tensor, nets: Sequence[str] = ("alex", "vgg")) -> dict[str, Tensor]:
    """Distances of outputs x from their references y, image by image.

    Args:
        x: float [N, 3, H, W] in [-1, 1], at least 32 pixels a side, any N: it is batched inside. Pixels that
            overshoot are clamped, as saving or showing the image would.
        y: likewise; moved to the device of x.
        nets: networks of LPIPS v0.1 to measure with.

    Returns:
        Float32 tensors [N] on the CPU: "mse" (mean over channels and pixels), "psnr" (dB, range 2; 106 where
        images are equal), "ssim", "lpips_alex", "lpips_vgg", and from 176 pixels a side "ms_ssim".

    Raises:
        TypeError: not float tensors.
        ValueError: shapes that are wrong or differ, N = 0, or values far from [-1, 1] or NaN.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    check_images("x", x, MIN_SIZE, OUTPUT_LIMIT)
    check_images("y", y, MIN_SIZE, REFERENCE_LIMIT)
    if x.shape != y.shape or not len(x):
        raise ValueError(f"compare: expected x, y of one shape, N > 0, got {list(x.shape)}, {list(y.shape)}")
    networks = {f"lpips_{net}": lpips(net, x.device) for net in nets}
    parts: dict[str, list[Tensor]] = {}
    for a, b in zip(chunks(x), chunks(y), strict=True):
        a, b = a.float().clamp(-1, 1), b.to(x.device).float().clamp(-1, 1)
        mse = (a - b).square().mean((1, 2, 3))
        values = {"mse": mse, "psnr": 10 * torch.log10(4 / mse.clamp_min(1e-10))}
        values["ssim"] = ssim(a, b, data_range=2.0, reduction="none").reshape(-1)
        if min(a.shape[2:]) >= MS_SSIM_SIZE:
            values["ms_ssim"] = ms_ssim(a, b, data_range=2.0, reduction="none").reshape(-1)
        values |= {name: network(a, b) for name, network in networks.items()}
        for name, value in values.items():
            parts.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Split a batch so that VGG16 fits into little memory: 64 images at 64², 4 at 256², 1 from 512²."""
    return x.split(max(1, 2**18 // (x.shape[2] * x.shape[3])))


def summarise(values: dict[str, Tensor]) -> dict[str, float]:
    """Means over the images of what `compare` returns, rounded to 6 decimals."""
    return {name: round(value.double().mean().item(), 6) for name, value in values.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Fréchet distance


def vgg_label(side: int) -> str:
    """Of `frechet_features` by VGG16, for images whose smaller side is so many pixels."""
    return f"vgg16-conv5_3-gap-512@{min(FRECHET_SIZE, side)}"


@torch.no_grad()
def frechet_features(images: Tensor, network: str = "auto") -> tuple[Tensor, str]:
    """Features of the Fréchet distance, and the label that must stand beside every number made from them.

    Committed results name their network; what "auto" picks depends on the machine.

    Args:
        images: float [N, 3, H, W] in [-1, 1], at least 32 pixels a side; overshoot is clamped.
        network: "inception", whose distance alone is called FID: pool3 of pytorch-fid's Inception v3, images
            rounded to 8 bits and resized to 299 by pytorch-fid. Label "fid-inception-v3-pool3-2048".
            "vgg16": `vgg_features`, on images of s × s, where s is their smaller side but at most 256
            (resized by antialiased bilinear interpolation if need be). Label "vgg16-conv5_3-gap-512@s".
            "auto": Inception if its weights are cached or can be downloaded, else VGG16 with a warning.

    Returns:
        Float32 [N, D] on the CPU, and the label.

    Raises:
        TypeError, ValueError: as `compare`, or another network.
        FileNotFoundError: weights are neither cached nor downloadable.
    """
    if network not in ("auto", "inception", "vgg16"):
        raise ValueError(f'network: expected "auto", "inception" or "vgg16", got {network!r}')
    check_images("images", images, MIN_SIZE, OUTPUT_LIMIT)
    size = min(FRECHET_SIZE, *images.shape[2:])
    label = vgg_label(size)
    if network != "vgg16":
        try:
            model, label = load_inception().to(images.device), "fid-inception-v3-pool3-2048"
        except FileNotFoundError as error:
            if network == "inception":
                raise
            warnings.warn(f"{error}; VGG16 takes its place", stacklevel=2)
            network = "vgg16"
    if network == "vgg16":
        model = lpips("vgg", images.device)
    features = []
    for x in chunks(images):
        x = x.float().clamp(-1, 1)
        if network == "vgg16":
            if x.shape[2:] != (size, size):
                x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)  # [N, 3, size, size]
            features.append(vgg_features(model, x))
        else:
            features.append(model((x * 127.5 + 127.5).round() / 255)[0].flatten(1))  # [N, 2048]
    return torch.cat(features).cpu(), label


def load_inception():
    """Inception v3 of pytorch-fid, from torch's cache or its download."""
    from pytorch_fid.inception import InceptionV3

    try:
        with network_timeout():
            return InceptionV3().eval()
    except OSError as error:
        raise FileNotFoundError(f"pytorch-fid's Inception weights: no cache or download ({error})") from error


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to features [N, D] and [M, D]: pytorch-fid's formula in float64.

    Warns unless N and M are above D: the covariance is singular then, and the estimate far too high.

    Raises:
        ValueError: other shapes, fewer than 2 samples, features that are not finite.
    """
    from pytorch_fid.fid_score import calculate_frechet_distance

    moments = []
    for name, f in (("real", real), ("fake", fake)):
        if f.ndim != 2 or f.shape[1] != real.shape[-1] or len(f) < 2 or not f.isfinite().all():
            expected = f"expected finite features [N, {real.shape[-1]}] with N > 1"
            raise ValueError(f"{name}: {expected}, got {list(f.shape)}, or NaN in them")
        if len(f) <= f.shape[1]:
            warnings.warn(f"{name}: {len(f)} samples of {f.shape[1]} features: biased", stacklevel=2)
        f = f.double().cpu().numpy()
        moments += [f.mean(0), np.cov(f, rowvar=False)]
    return float(calculate_frechet_distance(*moments))


# ----------------------------------------------------------------------------------------------------------------------
# Editability


@torch.no_grad()
def style_distance(w: Tensor, G: Generator, n: int = 10_000, seed: int = 0) -> Tensor:
    """How far codes lie from the generator's own, in its styles: the root mean square of the standardised styles of
    all layers; about 1 for codes of its mapping, and growing as codes leave what the generator was trained on.

    Args:
        w: [N, num_ws, w_dim].
        G: generator.
        n, seed: codes of the mapping that give each style's mean and deviation.

    Returns:
        Float32 [N] on the CPU.
    """
    layers = []  # in the order of w, where two blocks share one the styles of both
    for i, block in enumerate(G.blocks):
        first = max(2 * i - 1, 0)
        convs = [conv for conv in (block.conv0, block.conv1, block.to_rgb) if conv is not None]
        layers += [(first + j, conv.affine) for j, conv in enumerate(convs)]
    z = torch.randn(n, G.config.z_dim, generator=torch.Generator().manual_seed(seed)).to(w.device)
    own = G.mapping(z)
    parts = []
    for j, affine in layers:
        native = affine(own[:, j])  # [n, C]
        parts.append((affine(w[:, j]) - native.mean(dim=0)) / native.std(dim=0))
    return torch.cat(parts, dim=1).square().mean(dim=1).sqrt().float().cpu()
