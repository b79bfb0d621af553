"""Training of the encoders."""

import dataclasses
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from padinv.files.checkpoints import load_encoder, load_generator, save_encoder
from padinv.images.datasets import to_float
from padinv.images.viz import save_grid
from padinv.measure.identity import ArcFace, arcface
from padinv.measure.lpips import lpips
from padinv.model.codes import Code
from padinv.model.encoder import Encoder
from padinv.model.tensors import file_hash
from padinv.training.discriminators import Discriminator, LatentDiscriminator
from padinv.training.loop import Batches, Loop, Run, average_gradients, r1_penalty, share_statistics, start, step_seed
from padinv.training.views import views


@dataclass(frozen=True)
class EncoderTraining(Run):
    """The losses of METHOD section 5, each switched off by 0, and what the encoder predicts."""

    lr: float = 1e-4
    lr_final: float = 1.0  # factor on lr at the end of a cosine; 1 keeps lr fixed, as the paper does
    resolution: int | None = None  # of images and losses, to which outputs are averaged down; None: the generator's
    mse: float = 1.0
    lpips: float = 0.8
    identity: float = 0.0  # 1 − cosine of ArcFace features, for faces (0.1 in the paper)
    identity_weights: str = ""  # path of model_ir_se50.pth, which users bring
    identity_box: tuple = ArcFace.FFHQ_BOX  # top, left and side of the face in the image; [0, 0, 1] for tight crops
    w_norm: float = 0.003  # 2-norm of w − w_avg over layers and channels
    adversarial: float = 0.0
    adversarial_lr: float = 1e-4  # of both discriminators
    r1_gamma: float = 10.0
    r1_every: int = 16  # steps
    delta_norm: float = 0.0  # e4e: 2-norm of each layer's offset from the first w, summed over layers
    w_adversarial: float = 0.0  # e4e: against a discriminator of codes
    unlock: tuple = ()  # e4e: (images until the second w may differ from the first, images until each further one)
    passes: int = 1  # ReStyle: steps on one batch, each from where the one before led
    swap: float = 0.0  # weight of recoloured images drawn from P of the original and W+ of a warped copy (`views`)
    lpips_weights: str = ""  # path of exported LPIPS weights, for a machine without the packages
    encoder: dict = dataclasses.field(default_factory=dict)  # fields of EncoderConfig


def train_encoder(
    data: str,
    generator: str,
    out: str,
    config: EncoderTraining,
    run_dir: str,
    curves: str | None = None,
    base: str | None = None,
    init: str | None = None,
) -> Encoder:
    """Train an encoder for a frozen generator (paper, section 3.3; METHOD section 5), or go on with a run.

    Args:
        data: folder or zip of images.
        generator: its checkpoint.
        out: safetensors file to write.
        config, run_dir, curves: as in `train_generator`; `config.encoder` says what is predicted.
        base: checkpoint of a trained encoder. A residual encoder is trained then, which goes on from its answers
            (ReStyle, Alaluf et al. 2021), `config.passes` times for each batch.
        init: checkpoint of an encoder of the same architecture, whose weights training starts from.

    Raises:
        Stop, ValueError: as `train_generator`.
    """
    accelerator = start(config)
    inputs = {"data": file_hash(data) if Path(data).is_file() else str(data), "generator": file_hash(generator)}
    likeness = arcface(config.identity_weights, accelerator.device, config.identity_box) if config.identity else None
    others = (("base", base), ("init", init), ("arcface", likeness and config.identity_weights))
    inputs |= {key: file_hash(path) for key, path in others if path}
    loop = Loop(config, accelerator, run_dir, curves, inputs)
    G = load_generator(generator, accelerator.device).to(memory_format=torch.channels_last)
    r = config.resolution or G.resolution
    if r > G.resolution or G.resolution % r:
        raise ValueError(f"resolution: expected a divisor of the generator's {G.resolution}, got {r}")
    batches = Batches(data, r, config, accelerator)

    def draw(code: Code) -> Tensor:
        y = G(code)
        return y if r == G.resolution else F.adaptive_avg_pool2d(y, r)  # [N, 3, r, r]

    torch.manual_seed(step_seed(config.seed, 0, -2))
    first = load_encoder(base, accelerator.device).to(memory_format=torch.channels_last) if base else None
    E = Encoder.residual_of(first) if base else Encoder.for_generator(G, **config.encoder)
    if init:
        trained = load_encoder(init)
        if trained.config != E.config:
            raise ValueError(f"init: {init} has another architecture than the settings; give it the same `encoder`")
        E.load_state_dict(trained.state_dict())
    if config.swap and (base or E.padding is None):
        raise ValueError("swap: needs an encoder that predicts P, and no residual one")
    E = E.to(accelerator.device, memory_format=torch.channels_last).requires_grad_(True).train()
    share_statistics(E, accelerator)
    perceptual = lpips("alex", accelerator.device, config.lpips_weights or None) if config.lpips else None
    networks = [E, Adam(E.parameters(), lr=config.lr)]
    if config.adversarial:
        D = Discriminator(replace(G.config, resolution=r)).to(accelerator.device, memory_format=torch.channels_last)
        networks += [D, Adam(D.parameters(), lr=config.adversarial_lr)]
    if config.w_adversarial:
        D_w = LatentDiscriminator(G.config.w_dim).to(accelerator.device)
        networks += [D_w, Adam(D_w.parameters(), lr=config.adversarial_lr)]
    state = loop.load()
    if state is not None:
        for item, saved in zip(networks, state["networks"], strict=True):
            item.load_state_dict(saved)

    def discriminate(D: nn.Module, optimizer: Adam, real: Tensor, fake: Tensor) -> Tensor:
        """A step of a discriminator: logistic loss, lazy R1."""
        with accelerator.autocast():
            loss = F.softplus(D(fake.detach())).mean() + F.softplus(-D(real)).mean()
        penalty = 0.0
        if loop.step % config.r1_every == 0:
            penalty = 0.5 * config.r1_gamma * config.r1_every * r1_penalty(D, real)
        optimizer.zero_grad(set_to_none=True)
        (loss + penalty).backward()
        average_gradients(accelerator, D)
        optimizer.step()
        return loss

    def unlocked(w: Tensor) -> Tensor:
        """w with those layers tied to the first whose turn has not come yet (e4e, section 4.1)."""
        if not config.unlock:
            return w
        alone, every = config.unlock
        free = 1 + max(0, 1 + math.floor((loop.step * config.batch - alone) / every))
        tied = torch.arange(G.num_ws, device=w.device)[:, None] >= free  # [num_ws, 1]
        return torch.where(tied, w[:, :1], w)

    def step() -> dict:
        x = batches[loop.step].contiguous(memory_format=torch.channels_last)
        progress = loop.step * config.batch / config.images
        for group in networks[1].param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            group["lr"] = config.lr * (config.lr_final + (1 - config.lr_final) * cosine)
        if first is None:
            return improve(x)[0]
        with torch.no_grad(), accelerator.autocast():
            code = first(x)
        for _ in range(config.passes):
            values, code = improve(x, code)
        return values  # of the last pass

    def losses(x: Tensor, code: Code | None) -> tuple[dict, Tensor, Tensor, Tensor, Code]:
        """Of images, and of their codes so far: values for the curves, the loss, targets, answers, codes."""
        n, weight = len(x), x.new_ones(len(x))
        if config.swap:
            colours, warped = views(x)
            seen = torch.cat((x, warped)).contiguous(memory_format=torch.channels_last)  # [2N, 3, S, S]
            x = torch.cat((x, colours))  # [2N, 3, R, R]
            weight = torch.cat((weight, config.swap * weight))
        with accelerator.autocast():
            if config.swap:
                code = E(seen)
                plain = code[: len(seen) // 2]
                code = Code(code.w, Code.cat([plain, plain]).p)
            elif code is None:
                code = E(x)
            else:
                with torch.no_grad():
                    y = draw(code)
                code = E(x, y, code)
            code = replace(code, w=unlocked(code.w))
            y = draw(code)
        values, loss = {}, 0.0
        if config.mse:
            error = (y - x).square().mean(dim=(1, 2, 3))  # [N]
            values["mse"] = error[:n].mean()
            loss = loss + config.mse * (weight * error).sum() / n
        if config.lpips:
            with accelerator.autocast():
                error = perceptual(y, x)  # [N]
            values["lpips"] = error[:n].mean()
            loss = loss + config.lpips * (weight * error).sum() / n
        if config.identity:
            values["identity"] = likeness(y[:n], x[:n]).mean()
            loss = loss + config.identity * values["identity"]
        if config.w_norm:
            values["w_norm"] = (code.w - G.w_avg).flatten(1).norm(dim=1).mean()
            loss = loss + config.w_norm * values["w_norm"]
        if config.adversarial:
            D.requires_grad_(False)
            with accelerator.autocast():
                values["adversarial"] = F.softplus(-D(y)).mean()
            D.requires_grad_(True)
            loss = loss + config.adversarial * values["adversarial"]
        if config.delta_norm:
            values["delta_norm"] = (code.w[:, 1:] - code.w[:, :1]).norm(dim=2).sum(dim=1).mean()
            loss = loss + config.delta_norm * values["delta_norm"]
        if config.w_adversarial:
            D_w.requires_grad_(False)
            values["w_adversarial"] = F.softplus(-D_w(code.w.flatten(0, 1))).mean()
            D_w.requires_grad_(True)
            loss = loss + config.w_adversarial * values["w_adversarial"]
        return values, loss, x, y, code

    def improve(x: Tensor, code: Code | None = None) -> tuple[dict, Code]:
        """One step of the encoder, of a residual one from a code; what it predicted."""
        networks[1].zero_grad(set_to_none=True)
        values, shown, start = {}, [], 0
        for part in x.chunk(config.accumulate):
            share = len(part) / len(x)
            given = None if code is None else code[start : start + len(part)]
            start += len(part)
            own, loss, *seen = losses(part, given)
            (share * loss).backward()
            values = {key: values.get(key, 0) + share * value.detach() for key, value in own.items()}
            shown.append([t.detach() for t in seen])
        average_gradients(accelerator, E)
        networks[1].step()
        targets, answers, codes = zip(*shown, strict=True)
        x, y, code = torch.cat(targets), torch.cat(answers), Code.cat(codes)
        if config.adversarial:
            values["loss_D"] = discriminate(D, networks[3], x, y)
        if config.w_adversarial:
            with torch.no_grad():
                real = G.mapping(torch.randn(len(x), G.config.z_dim, device=x.device))
            values["loss_D_w"] = discriminate(D_w, networks[-1], real.flatten(0, 1), code.w.flatten(0, 1))
        return values, code.detach()

    some = [batches.images[i] for i in range(min(24, len(batches.images)))]
    fixed = to_float(torch.stack(some).to(accelerator.device))

    def grid(path: Path) -> None:
        E.eval()
        with torch.no_grad(), accelerator.autocast():
            code = first(fixed) if base else E(fixed)
            for _ in range(config.passes if base else 0):
                code = E(fixed, draw(code), code)
            save_grid(torch.stack((fixed, draw(code)), dim=1).flatten(0, 1), path)  # pairs side by side
        E.train()

    loop.run(step, lambda: {"networks": [item.state_dict() for item in networks]}, grid)
    E.eval()
    if accelerator.is_main_process:
        save_encoder(E, out, training=dataclasses.asdict(config), images=loop.step * config.batch, **inputs)
    return E
