"""Inversion of images into W+ & P, by an encoder or by gradient, and the way back: the images of codes."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from padinv.measure.lpips import LPIPS, check_images, lpips
from padinv.model.codes import Code, Padding
from padinv.model.encoder import Encoder
from padinv.model.generator import Generator

SPACES = ("w+p", "w+")


def invert(
    x: Tensor,
    E: Encoder,
    G: Generator,
    steps: int = 0,
    space: str = "w+p",
    lr: float = 0.03,
    lpips_weight: float = 0.8,
    domain_weight: float = 0.0,
    residual: Encoder | None = None,
    passes: int = 5,
    batch: int = 16,
    progress: bool = False,
) -> Code:
    """Codes whose images are close to x (paper, section 3; refinement as in IDInvert's second step).

    Args:
        x: [N, 3, S, S] in [−1, 1], of any size S from 32; the distance is measured at the generator's resolution.
        E: encoder trained for G.
        G: generator, also `torch.compile(G)`: its steps are shorter, after a minute for the first. Without steps, E and
            G may be those of `padinv.compile`.
        steps: gradient steps from the encoder's answer on MSE + lpips_weight · LPIPS-Alex. Each image keeps the best
            code on its way, the encoder's included, so no step makes it worse. 0: the encoder alone.
        space: "w+p" refines w and p, "w+" refines w and keeps p as encoded.
        lr: of Adam for w; p moves at 0.3 of it. It follows a cosine to 0.
        lpips_weight: 0 leaves the perceptual term out.
        domain_weight: of the mean square between w and E's w of the inversion, which keeps codes where the encoder
            maps images to (IDInvert, Zhu et al. 2020, equation 4); 0 leaves it out.
        residual: encoder that corrects E's answer (ReStyle, Alaluf et al. 2021).
        passes: of encoders in all, E's included, where there is a residual one.
        batch: images that are computed together; they do not influence each other.
        progress: show a bar.

    Returns:
        Code of N images, on the device of G, without gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, or E of another generator.
    """
    check_images("x", x, limit=1.5)
    if steps < 0 or space not in SPACES or batch < 1 or not lr > 0 or passes < 1:
        raise ValueError(f"expected steps ≥ 0, space in {SPACES}, batch ≥ 1, passes ≥ 1 and lr > 0, got steps={steps}, "
                         f"space={space!r}, batch={batch}, passes={passes}, lr={lr}")  # fmt: skip
    for name, encoder in (("E", E), ("residual", residual)):
        if encoder is not None and (encoder.config.num_ws, encoder.config.w_dim) != (G.num_ws, G.config.w_dim):
            raise ValueError(f"{name}: predicts {encoder.config.num_ws}×{encoder.config.w_dim} codes, but G takes "
                             f"{G.num_ws}×{G.config.w_dim}: it was trained for another generator")  # fmt: skip
    perceptual = lpips("alex", G.const.device) if steps and lpips_weight else None
    codes = []
    with tqdm(total=len(x) * max(steps, 1), unit="step", disable=not progress) as bar:
        for part in x.split(batch):
            part = part.to(G.const.device, torch.float32)
            with torch.no_grad():
                code = E(part)
                for _ in range(passes - 1 if residual is not None else 0):
                    code = residual(part, G(code), code)
            if steps:
                paces = {code.w: 1.0}
                if space == "w+p" and code.p is not None:  # many coefficients that act together: as fast as w, some
                    paces |= dict.fromkeys(code.p.tensors, 0.3)  # images would overshoot

                def away(code: Code, y: Tensor) -> Tensor:
                    return domain_weight * (E(y).w - code.w).square().mean(dim=(1, 2))  # [N]

                penalty = away if domain_weight else None
                code = descend(part, code, G, steps, paces, lr, cosine, perceptual, lpips_weight, penalty, bar=bar)
            else:
                bar.update(len(part))
            codes.append(code)
    return Code.cat(codes)


@torch.no_grad()
def draw(code: Code, G: Generator, batch: int = 50) -> Tensor:
    """The images of any number of codes, so many computed together: [N, 3, R, R], without gradient."""
    return torch.cat([G(code[i : i + batch]) for i in range(0, len(code), batch)])


def project(
    x: Tensor,
    G: Generator,
    space: str = "w",
    steps: int = 500,
    lr: float = 0.1,
    lpips_weight: float = 0.8,
    batch: int = 64,
    noise: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> Code:
    """Codes found by gradient alone, from w_avg (the projector of StyleGAN2, Karras et al. 2020, appendix D).

    The learning rate rises over the first twentieth of the steps and falls over the last quarter. The distance is that
    of `invert`.

    Args:
        x: [N, 3, S, S] in [−1, 1], as in `invert`.
        G: generator, as in `invert`.
        space: "w", one code for all layers; "w+", one for each; "w+p", and the padding of as many layers as PadInv
            pads, from the generator's own.
        steps: of Adam.
        lr: its highest, for w and p.
        lpips_weight, batch, progress: as in `invert`.
        noise: on w, in standard deviations of the mapping's; it fades out over the first three quarters of the steps.
            StyleGAN2's projector has 0.05 of it; images come out closer without, and edits as true.
        seed: of the noise.

    Returns:
        Code of N images, on the device of G, without gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    check_images("x", x, limit=1.5)
    if x.shape[2] != x.shape[3]:
        raise ValueError(f"x: expected square images, got {list(x.shape)}")
    if steps < 1 or space not in ("w", *SPACES) or batch < 1 or not lr > 0 or not noise >= 0:
        raise ValueError(f"expected steps ≥ 1, space in {('w', *SPACES)}, batch ≥ 1, lr > 0 and noise ≥ 0, got "
                         f"steps={steps}, space={space!r}, batch={batch}, lr={lr}, noise={noise}")  # fmt: skip
    device = G.const.device
    perceptual = lpips("alex", device) if lpips_weight else None
    rng = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        w = G.mapping(torch.randn(10_000, G.config.z_dim, device=device, generator=rng))[:, 0]  # [10000, w_dim]
        spread = (w - G.w_avg).square().sum(dim=1).mean().sqrt().item()  # σ of w

    def shake(t: float, w: Tensor) -> Tensor | None:
        scale = noise * spread * max(0.0, 1 - t / 0.75) ** 2
        return scale * torch.randn(w.shape, device=device, generator=rng) if scale else None

    codes = []
    with tqdm(total=len(x) * steps, unit="step", disable=not progress) as bar:
        for part in x.split(batch):
            n = len(part)
            w = G.w_avg.expand(n, 1 if space == "w" else G.num_ws, -1).clone()  # [N, 1 or num_ws, w_dim]
            p = None
            if space == "w+p":
                sizes = list(zip(G.config.resolutions, map(G.config.channels, G.config.resolutions), strict=True))[:4]
                rings = tuple(torch.zeros(n, nf, 4 * (r + 1), device=device) for r, nf in sizes)
                p = Padding(G.const.detach().expand(n, -1, -1, -1).clone(), rings)
            start = Code(w, p)
            paces = dict.fromkeys(start.tensors, 1.0)
            codes.append(descend(part.to(start.w), start, G, steps, paces, lr, ramp, perceptual, lpips_weight,
                                 noise=shake, bar=bar))  # fmt: skip
    return Code.cat(codes)


def tune(
    x: Tensor, pivot: Code, G: Generator, steps: int = 350, lr: float = 3e-4, lpips_weight: float = 0.8, bar=None
) -> Generator:
    """A generator of its own for one image: its weights move until it draws x at the pivot (PTI, Roich et al. 2021).

    Args:
        x: [1, 3, R, R] in [−1, 1], at the generator's resolution.
        pivot: code of x, best one w for all layers: `project(x, G, "w")`.
        G: generator; it stays as it is.
        steps, lr: of Adam, on the distance of `invert`.
        bar: a tqdm bar, moved by one at each step.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
    """
    check_images("x", x, limit=1.5)
    if len(x) != 1 or x.shape[-1] != G.resolution or len(pivot) != 1:
        raise ValueError(f"x, pivot: expected one image at the generator's {G.resolution}² and its code, got "
                         f"{list(x.shape)} and {len(pivot)} codes")  # fmt: skip
    mine = Generator(G.config).to(G.const.device)
    mine.load_state_dict(G.state_dict())
    mine.eval().mapping.requires_grad_(False)
    perceptual = lpips("alex", G.const.device)
    target = perceptual.features(x)
    optimizer = torch.optim.Adam([t for t in mine.parameters() if t.requires_grad], lr=lr)
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(steps):
            y = mine(pivot)
            loss = (y - x).square().mean() + lpips_weight * perceptual.distance(perceptual.features(y), target).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if bar is not None:
                bar.update()
    return mine.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# Descent


def cosine(t: float) -> float:
    """Factor on the learning rate: from 1 to 0 over t in [0, 1]."""
    return 0.5 * (1 + math.cos(math.pi * t))


def ramp(t: float) -> float:
    """Factor on the learning rate in StyleGAN2's projector: up until t = 0.05, down by a cosine from 0.75."""
    return min(1.0, t / 0.05) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.25)))


def descend(
    x: Tensor,
    start: Code,
    G: Generator,
    steps: int,
    paces: dict[Tensor, float],
    lr: float,
    schedule: Callable[[float], float],
    perceptual: LPIPS | None,
    lpips_weight: float,
    penalty: Callable[[Code, Tensor], Tensor] | None = None,
    noise: Callable[[float, Tensor], Tensor | None] | None = None,
    bar: tqdm | None = None,
) -> Code:
    """Minimise the distance between x and the image of a code, each image by itself; the best codes seen.

    Args:
        start: where to start; w [N, 1, w_dim] stands for the same w in every layer.
        paces: the tensors of `start` that move, and the factor on lr of each.
        schedule: factor on lr at t in [0, 1].
        penalty: of a code and its image, [N], added to the distance.
        noise: to add to w at t, or None when it is over; only codes without noise are kept.
    """
    if x.shape[-1] != G.resolution:
        x = F.interpolate(x, size=(G.resolution,) * 2, mode="area" if x.shape[-1] > G.resolution else "bilinear")
    target = perceptual.features(x) if perceptual else None
    with torch.inference_mode(False), torch.enable_grad():
        moved = {id(t): t.detach().clone().requires_grad_(True) for t in paces}
        code = start.map(lambda t: moved[id(t)] if id(t) in moved else t.detach().clone())
        groups = [{"params": [moved[id(t)]], "pace": pace} for t, pace in paces.items()]
        optimizer = torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.99))
        best, best_loss = code.detach().clone(), torch.full((len(x),), math.inf, device=x.device)
        for step in range(steps + 1):  # the last pass only measures
            t = step / steps
            extra = noise(t, code.w) if noise and step < steps else None
            w = code.w if extra is None else code.w + extra
            full = Code(w.expand(-1, G.num_ws, -1), code.p)
            y = G(full)
            loss = (y - x).square().mean(dim=(1, 2, 3))  # [N]
            if perceptual:
                loss = loss + lpips_weight * perceptual.distance(perceptual.features(y), target)
            if penalty:
                loss = loss + penalty(full, y)
            if extra is None:
                better = loss.detach() < best_loss
                best_loss = torch.where(better, loss.detach(), best_loss)
                for kept, now in zip(best.tensors, code.tensors, strict=True):
                    kept[better] = now.detach()[better]
            if step == steps:
                return Code(best.w.expand(-1, G.num_ws, -1).contiguous(), best.p)
            for group in optimizer.param_groups:
                group["lr"] = group["pace"] * lr * schedule(t)
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()  # a sum of terms of single images: the batch size changes nothing
            optimizer.step()
            if bar is not None:
                bar.update(len(x))
