"""Inversion of images into W+ & P: the encoder's answer, optionally refined by gradient."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from padinv.codes import Code
from padinv.encoder import Encoder
from padinv.generator import Generator
from padinv.losses import check_images, lpips

SPACES = ("w+p", "w+")


def invert(
    x: Tensor,
    E: Encoder,
    G: Generator,
    steps: int = 0,
    space: str = "w+p",
    lr: float = 0.03,
    lpips_weight: float = 0.8,
    batch: int = 16,
    progress: bool = False,
) -> Code:
    """Codes whose images are close to x (paper, section 3; refinement as in IDInvert's second step).

    Args:
        x: [N, 3, S, S] in [−1, 1], of any size S from 32; the distance is measured at the generator's resolution.
        E: encoder trained for G.
        G: generator.
        steps: gradient steps from the encoder's answer on MSE + lpips_weight · LPIPS-Alex. Each image keeps the best
            code on its way, the encoder's included, so no step makes it worse. 0: the encoder alone.
        space: "w+p" refines w and p, "w+" refines w and keeps p as encoded.
        lr: of Adam for w; p moves at 0.3 of it. It follows a cosine to 0.
        lpips_weight: 0 leaves the perceptual term out.
        batch: images that are computed together; they do not influence each other.
        progress: show a bar.

    Returns:
        Code of N images, on the device of G, without gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, or E of another generator.
    """
    check_images("x", x, limit=1.5)
    if steps < 0 or space not in SPACES or batch < 1 or not lr > 0:
        raise ValueError(f"expected steps ≥ 0, space in {SPACES}, batch ≥ 1 and lr > 0, got steps={steps}, "
                         f"space={space!r}, batch={batch}, lr={lr}")  # fmt: skip
    if (E.config.num_ws, E.config.w_dim) != (G.num_ws, G.config.w_dim):
        raise ValueError(f"E: predicts {E.config.num_ws}×{E.config.w_dim} codes, but G takes "
                         f"{G.num_ws}×{G.config.w_dim}: it was trained for another generator")  # fmt: skip
    codes = []
    with tqdm(total=len(x) * max(steps, 1), unit="step", disable=not progress) as bar:
        for part in x.split(batch):
            part = part.to(G.const.device)
            with torch.no_grad():
                code = E(part)
            if steps:
                code = refine(part, code, G, steps, space, lr, lpips_weight, bar)
            else:
                bar.update(len(part))
            codes.append(code)
    return Code.cat(codes)


def refine(x: Tensor, code: Code, G: Generator, steps: int, space: str, lr: float, lpips_weight: float, bar) -> Code:
    """Minimise the distance between x and the image of `code`, each image by itself; the best codes seen."""
    if x.shape[-1] != G.resolution:
        x = F.interpolate(x, size=(G.resolution,) * 2, mode="area" if x.shape[-1] > G.resolution else "bilinear")
    perceptual = lpips("alex", x.device) if lpips_weight else None
    target = perceptual.features(x) if lpips_weight else None
    with torch.inference_mode(False), torch.enable_grad():
        code = code.clone()
        # The coefficients of P are many and act together: at the pace of w they overshoot on some images.
        paces = {code.w: 1.0} | ({t: 0.3 for t in code.p.tensors} if space == "w+p" and code.p is not None else {})
        groups = [{"params": [t.requires_grad_(True)], "pace": pace} for t, pace in paces.items()]
        optimizer = torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.99))
        best, best_loss = code.detach().clone(), torch.full((len(x),), math.inf, device=x.device)
        for step in range(steps + 1):  # the last pass only measures
            y = G(code)
            loss = (y - x).square().mean(dim=(1, 2, 3))  # [N]
            if lpips_weight:
                loss = loss + lpips_weight * perceptual.distance(perceptual.features(y), target)
            better = loss.detach() < best_loss
            best_loss = torch.where(better, loss.detach(), best_loss)
            for kept, now in zip(best.tensors, code.tensors, strict=True):
                kept[better] = now.detach()[better]
            if step == steps:
                return best
            for group in optimizer.param_groups:
                group["lr"] = group["pace"] * lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()  # a sum of terms of single images: the batch size changes nothing
            optimizer.step()
            bar.update(len(x))
