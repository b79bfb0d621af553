"""Training of the encoders: an `EncoderTrainer` with the networks, the losses and a step, `train_encoder` around it."""

import dataclasses
import math
from collections.abc import Iterator
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
from padinv.model.generator import Generator
from padinv.training.discriminators import Discriminator, LatentDiscriminator
from padinv.training.loop import Batches, Loop, Run, average_gradients, frozen, r1_penalty, restore, share_statistics
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
    w_only: float = 0.0  # weight of the distances of G(w) without P, beside those with it: w keeps drawing what it can
    w_only_part: float = 1.0  # share of each batch on which they are taken
    p_drop: float = 0.0  # share of each batch that is drawn from w alone, instead
    p_from: int = 0  # images that are drawn from w alone before P comes in
    w_hinge: float = 0.0  # in place of w_norm: how much closer to w_avg than codes of the mapping w is, on average
    interior_norm: float = 0.0  # mean square of the interior
    edited: float = 0.0  # weight of the distances after random edits, on images of the generator, where they are known
    edited_part: float = 0.25  # share of each batch that makes room for those images
    swap: float = 0.0  # weight of recoloured images drawn from P of the original and w of a warped copy (`views`)
    swap_from: int = 0  # the first w that comes from the copy; 0: W+ as a whole, as the paper blends
    lpips_weights: str = ""  # path of exported LPIPS weights, for a machine without the packages
    encoder: dict = dataclasses.field(default_factory=dict)  # fields of EncoderConfig


def start_encoder(config: EncoderTraining, G: Generator, first: Encoder | None, init: str | None) -> Encoder:
    """The encoder to train: a new one, one that goes on from the answers of `first`, or one with the weights of `init`.

    Raises:
        ValueError: the file is of another architecture, or the settings do not go together.
    """
    E = Encoder.for_generator(G, **config.encoder) if first is None else Encoder.residual_of(first)
    if init:
        trained = load_encoder(init)
        if trained.config != E.config:
            raise ValueError(f"init: {init} has another architecture than the settings; give it the same `encoder`")
        E.load_state_dict(trained.state_dict())
    alone = [name for name in ("swap", "p_drop", "edited") if getattr(config, name)]
    without = alone == ["edited"] or (alone == ["swap"] and config.swap_from)  # what needs no P
    if alone and (first is not None or len(alone) > 1 or (E.padding is None and not without)):
        raise ValueError(f"{', '.join(alone)}: one at a time, for an encoder that predicts P and is no residual one")
    if not 0 <= config.swap_from < G.num_ws:
        raise ValueError(f"swap_from: expected 0 to {G.num_ws - 1}, got {config.swap_from}")
    if config.interior_norm and not E.config.interior:
        raise ValueError("interior_norm: needs an encoder that predicts an interior")
    return E.to(G.const.device, memory_format=torch.channels_last).requires_grad_(True).train()


class Adversary:
    """A discriminator with its optimiser: logistic loss, lazy R1."""

    def __init__(self, D: nn.Module, config: EncoderTraining, loop: Loop):
        self.D, self.optimizer = D, Adam(D.parameters(), lr=config.adversarial_lr)
        self.config, self.loop = config, loop

    def fooled(self, x: Tensor) -> Tensor:
        """The loss of who made x."""
        with frozen(self.D):
            return F.softplus(-self.D(x)).mean()

    def step(self, real: Tensor, fake: Tensor) -> Tensor:
        with self.loop.autocast():
            loss = F.softplus(self.D(fake.detach())).mean() + F.softplus(-self.D(real)).mean()
        penalty = 0.0
        if self.loop.step % self.config.r1_every == 0:
            penalty = 0.5 * self.config.r1_gamma * self.config.r1_every * r1_penalty(self.D, real)
        self.loop.descend(self.D, self.optimizer, loss + penalty)
        return loss


class EncoderTrainer:
    """The encoder E for a frozen G, its losses, and a step.

    Attributes:
        first: the encoder that a residual E goes on from, or None.
        networks: modules and optimisers, in the order of the saved state.
    """

    def __init__(
        self, config: EncoderTraining, loop: Loop, batches: Batches, G: Generator, base: str | None, init: str | None
    ):
        self.config, self.loop, self.batches, self.G = config, loop, batches, G
        self.resolution = config.resolution or G.resolution
        loop.seed(0)
        self.first = load_encoder(base, loop.device).to(memory_format=torch.channels_last) if base else None
        self.E = start_encoder(config, G, self.first, init)
        share_statistics(self.E, loop.accelerator)
        self.optimizer = Adam(self.E.parameters(), lr=config.lr)
        self.networks = [self.E, self.optimizer]
        if config.identity:
            self.likeness = arcface(config.identity_weights, loop.device, config.identity_box)
        self.predict, self.synthesis = loop.compiled(self.E.forward), loop.compiled(G.synthesis)
        if config.lpips:
            self.perceptual = lpips("alex", loop.device, config.lpips_weights or None)
            self.features = loop.compiled(self.perceptual.features)
        if config.w_hinge:
            with torch.no_grad():
                w = G.mapping(torch.randn(10_000, G.config.z_dim, device=loop.device))
                self.spread = (w - G.w_avg).flatten(1).norm(dim=1).mean()
        if config.adversarial:
            D = Discriminator(replace(G.config, resolution=self.resolution))
            self.of_images = self.adversary(D.to(loop.device, memory_format=torch.channels_last))
        if config.w_adversarial:
            self.of_codes = self.adversary(LatentDiscriminator(G.config.w_dim).to(loop.device))
        if (state := loop.load()) is not None:
            restore(self.networks, state["networks"])
        some = [batches.images[i] for i in range(min(24, len(batches.images)))]
        self.fixed = to_float(torch.stack(some).to(loop.device))  # images of the grid

    def adversary(self, D: nn.Module) -> Adversary:
        found = Adversary(D, self.config, self.loop)
        self.networks += [found.D, found.optimizer]
        return found

    # What it predicts

    def draw(self, code: Code) -> Tensor:
        y = self.synthesis(code.w, code.p)
        return y if self.resolution == self.G.resolution else F.adaptive_avg_pool2d(y, self.resolution)  # [N, 3, r, r]

    def unlocked(self, w: Tensor) -> Tensor:
        """w with those layers tied to the first whose turn has not come yet (e4e, section 4.1)."""
        if not self.config.unlock:
            return w
        alone, every = self.config.unlock
        free = 1 + max(0, 1 + math.floor((self.loop.shown - alone) / every))
        tied = torch.arange(self.G.num_ws, device=w.device)[:, None] >= free  # [num_ws, 1]
        return torch.where(tied, w[:, :1], w)

    def encode(self, x: Tensor, code: Code | None) -> Code:
        """Of images; a residual encoder goes on from a code."""
        if code is None:
            return self.predict(x)
        with torch.no_grad():
            y = self.draw(code)
        return self.predict(x, y, code)

    def encode_swapped(self, x: Tensor, warped: Tensor) -> Code:
        """2N codes, all with P of x: of x, and with the w from `swap_from` on of its warped copies."""
        code = self.predict(torch.cat((x, warped)).contiguous(memory_format=torch.channels_last))
        plain, k = code[: len(x)], self.config.swap_from
        w = torch.cat((plain.w[:, :k], code.w[len(x) :, k:]), dim=1)  # [N, num_ws, w_dim]
        return Code.cat([plain, Code(w, plain.p)])

    # What it learns from

    def target(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images with what LPIPS sees in them, which serves every answer to them."""
        with torch.no_grad(), self.loop.autocast():
            return x, self.features(x) if self.config.lpips else None

    def distances(self, y: Tensor, target: tuple) -> Iterator[tuple[str, Tensor]]:
        """Losses of each image, by the setting that weighs them: [N]."""
        x, features = target
        if self.config.mse:
            yield "mse", (y - x).square().mean(dim=(1, 2, 3))
        if self.config.lpips:
            with self.loop.autocast():
                mine = self.features(y)
            yield "lpips", self.perceptual.distance(mine, features)

    def answers(self, code: Code) -> Tensor:
        """Images of codes, where P was dropped or does not count yet from w alone."""
        n, config = len(code), self.config
        k = n if self.loop.shown < config.p_from else math.ceil(config.p_drop * n)
        if code.p is None or not k:
            return self.draw(code)
        alone = self.draw(Code(code.w[:k]))
        return alone if k == n else torch.cat((alone, self.draw(code[k:])))

    def further(self, code: Code, target: tuple, edited: tuple | None) -> Iterator[tuple[str, float, Tensor]]:
        """Distances of other images of the codes: name, weight, mean.

        Of those drawn from w alone, and of those of the generator after an edit, `edited` being that edit of w and its
        true outcome.
        """
        config, cases = self.config, []
        if config.w_only and code.p is not None:
            n = math.ceil(config.w_only_part * len(target[0]))
            cases.append(("w_only", Code(code.w[:n]), tuple(t if t is None else t[:n] for t in target)))
        if edited is not None:
            change, outcome = edited
            k = len(change)
            cases.append(("edited", Code(code.w[:k] + change, None if code.p is None else code.p[:k]), outcome))
        for weight, other, its_target in cases:
            with self.loop.autocast():
                y = self.draw(other)
            for name, error in self.distances(y, its_target):
                label = f"{weight.removesuffix('_only')}_{name}"
                yield label, getattr(config, weight) * getattr(config, name), error.mean()

    def penalties(self, y: Tensor, x: Tensor, code: Code, n: int) -> Iterator[tuple[str, Tensor]]:
        """The other losses, by the setting that weighs them; n: of the images, those that are no views."""
        config, w = self.config, code.w
        if config.identity:
            yield "identity", self.likeness(y[:n], x[:n]).mean()
        if config.w_norm or config.w_hinge:
            distance = (w - self.G.w_avg).flatten(1).norm(dim=1).mean()
            yield "w_norm", distance
        if config.w_hinge:
            yield "w_hinge", F.relu(self.spread - distance)
        if config.interior_norm:
            yield "interior_norm", code.p.interior.square().mean()
        if config.adversarial:
            with self.loop.autocast():
                loss = self.of_images.fooled(y)
            yield "adversarial", loss
        if config.delta_norm:
            yield "delta_norm", (w[:, 1:] - w[:, :1]).norm(dim=2).sum(dim=1).mean()
        if config.w_adversarial:
            yield "w_adversarial", self.of_codes.fooled(w.flatten(0, 1))

    @torch.no_grad()
    def known(self, x: Tensor) -> tuple[Tensor, tuple | None]:
        """A batch whose first images are the generator's own, with an edit of their w and its true outcome.

        The edits lead from one code of the mapping towards another, 0.2 to 0.6 of the way.
        """
        if not self.config.edited:
            return x, None
        k, (z_dim, device) = math.ceil(self.config.edited_part * len(x)), (self.G.config.z_dim, x.device)
        w, start, end = self.G.mapping(torch.randn(3 * k, z_dim, device=device)).chunk(3)  # [k, num_ws, w_dim] each
        change = (0.2 + 0.4 * torch.rand(k, 1, 1, device=device)) * (end - start)
        with self.loop.autocast():
            before, after = (self.draw(Code(w + step)).float().clamp(-1, 1) for step in (0, change))
        x = torch.cat((before, x[k:])).contiguous(memory_format=torch.channels_last)
        return x, (change, self.target(after))

    def losses(self, x: Tensor, code: Code | None) -> tuple[dict, Tensor, Tensor, Tensor, Code]:
        """Of images, and of their codes so far: values for the curves, the loss, targets, answers, codes."""
        n, swap = len(x), self.config.swap
        x, edited = self.known(x)
        if swap:
            colours, warped = views(x)
        with self.loop.autocast():
            code = self.encode_swapped(x, warped) if swap else self.encode(x, code)
            code = replace(code, w=self.unlocked(code.w))
            y = self.answers(code)
        target = self.target(x := torch.cat((x, colours)) if swap else x)
        weight = x.new_ones(len(x))
        weight[n:] = swap
        values, loss = {}, 0.0
        for name, error in self.distances(y, target):
            values[name] = error[:n].mean()
            loss = loss + getattr(self.config, name) * (weight * error).sum() / n
        for name, weight, error in self.further(code[:n], tuple(t if t is None else t[:n] for t in target), edited):
            values[name] = error
            loss = loss + weight * error
        for name, value in self.penalties(y, x, code, n):
            values[name] = value
            loss = loss + getattr(self.config, name) * value
        return values, loss, x, y, code

    # A step

    def step(self) -> dict[str, Tensor]:
        config, x = self.config, self.batches[self.loop.step].contiguous(memory_format=torch.channels_last)
        cosine = 0.5 * (1 + math.cos(math.pi * self.loop.shown / config.images))
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * (config.lr_final + (1 - config.lr_final) * cosine)
        if self.first is None:
            return self.improve(x)[0]
        with torch.no_grad(), self.loop.autocast():
            code = self.first(x)
        for _ in range(config.passes):
            values, code = self.improve(x, code)
        return values  # of the last pass

    def improve(self, x: Tensor, code: Code | None = None) -> tuple[dict, Code]:
        """One step of the encoder, of a residual one from a code; what it predicted."""
        self.optimizer.zero_grad(set_to_none=True)
        values, seen, start = {}, [], 0
        for part in x.chunk(self.config.accumulate):
            share = len(part) / len(x)
            given = None if code is None else code[start : start + len(part)]
            start += len(part)
            own, loss, *found = self.losses(part, given)
            (share * loss).backward()
            values = {key: values.get(key, 0) + share * value.detach() for key, value in own.items()}
            seen.append([t.detach() for t in found])
        average_gradients(self.loop.accelerator, self.E)
        self.optimizer.step()
        targets, answers, codes = zip(*seen, strict=True)
        code = Code.cat(codes)
        return values | self.discriminate(torch.cat(targets), torch.cat(answers), code.w), code

    def discriminate(self, x: Tensor, y: Tensor, w: Tensor) -> dict[str, Tensor]:
        """A step of each discriminator, on targets, answers and codes."""
        values = {}
        if self.config.adversarial:
            values["loss_D"] = self.of_images.step(x, y)
        if self.config.w_adversarial:
            with torch.no_grad():
                real = self.G.mapping(torch.randn(len(x), self.G.config.z_dim, device=x.device))
            values["loss_D_w"] = self.of_codes.step(real.flatten(0, 1), w.flatten(0, 1))
        return values

    def state(self) -> dict:
        return {"networks": [item.state_dict() for item in self.networks]}

    def grid(self, path: Path) -> None:
        x = self.fixed
        self.E.eval()
        with torch.no_grad(), self.loop.autocast():
            code = self.E(x) if self.first is None else self.first(x)
            for _ in range(self.config.passes if self.first else 0):
                code = self.E(x, self.draw(code), code)
            save_grid(torch.stack((x, self.draw(code)), dim=1).flatten(0, 1), path)  # pairs side by side
        self.E.train()


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
    weights = config.identity_weights if config.identity else None
    loop = Loop(config, run_dir, curves, data, generator=generator, base=base, init=init, arcface=weights)
    G = load_generator(generator, loop.device).to(memory_format=torch.channels_last)
    r = config.resolution or G.resolution
    if r > G.resolution or G.resolution % r:
        raise ValueError(f"resolution: expected a divisor of the generator's {G.resolution}, got {r}")
    trainer = EncoderTrainer(config, loop, Batches(data, r, config, loop.accelerator), G, base, init)
    loop.run(trainer)
    E = trainer.E.eval()
    if loop.accelerator.is_main_process:
        save_encoder(E, out, **loop.provenance())
    return E
