"""Training of the generator: `Networks` of a resolution, a `GeneratorTrainer` of them, `train_generator` around it."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from padinv.files.checkpoints import save_generator
from padinv.images.viz import save_grid
from padinv.measure.lpips import lpips
from padinv.model.generator import Generator, GeneratorConfig
from padinv.training.autoencoder import ToLatent, jitter, uniformity
from padinv.training.discriminators import Both, Discriminator, FeatureDiscriminator, augment
from padinv.training.loop import Batches, Loop, Run, follow, frozen, r1_penalty, restore


@dataclass(frozen=True)
class Growing(Run):
    """A generator that grows while it is trained."""

    z_dim: int = 256
    w_dim: int = 256
    mapping_layers: int = 4
    channel_base: int = 2048
    channel_max: int = 128
    resolution: int = 64
    grow: tuple = ()  # ((resolution, images), …): first train at lower resolutions up to these image counts
    ema_images: float = 10_000  # half-life of the averaged networks; a short memory at first (`half_life`)
    half: bool = False  # store the weights as float16

    def stage(self, images: int) -> int:
        """The resolution that is trained once `images` have been shown."""
        return next((r for r, until in self.grow if images < until), self.resolution)

    def half_life(self, images: int) -> float:
        """Of the averaged networks after so many images: else the average would drag the untrained start along."""
        return min(self.ema_images, 0.05 * (images + self.batch))

    def architecture(self, resolution: int) -> GeneratorConfig:
        fields = ("z_dim", "w_dim", "mapping_layers", "channel_base", "channel_max")
        return GeneratorConfig(resolution=resolution, **{name: getattr(self, name) for name in fields})


def inherit(new: nn.Module, old: nn.Module) -> None:
    """Take over the weights of a network of a lower resolution, in the layers that both have. A generator starts as the
    up-sampled old one."""
    shapes = {name: t.shape for name, t in new.state_dict().items()}
    known = {name: t for name, t in old.state_dict().items() if shapes.get(name) == t.shape}
    new.load_state_dict(known, strict=False)
    if isinstance(new, Generator):
        nn.init.zeros_(new.blocks[-1].to_rgb.weight)


@dataclass(frozen=True)
class GeneratorTraining(Growing):
    """Non-saturating loss, lazy R1, style mixing, EMA (StyleGAN2, Karras et al. 2020, appendix B)."""

    discriminator: str = "images"  # or "features", of VGG16, where images or hours are few (Projected GANs); or "both"
    discriminator_lr: float | None = None  # None: lr
    r1_gamma: float = 0.3  # weight of the R1 penalty, scaled by (r / resolution)² at lower resolutions
    r1_every: int = 16  # steps
    path_length: float = 0.0  # weight of path-length regularisation (2 in StyleGAN2); 0 leaves it out
    path_length_every: int = 4  # steps
    noise: str = "random"  # "none" for images without stochastic detail, whose edges noise would roughen
    style_mixing: float = 0.9  # probability of two z for one image
    # A warm start, for photographs: an autoencoder through z (`padinv.training.autoencoder`).
    reconstruct: float = 0.0  # weight of L1 + LPIPS-Alex of its images; 0 leaves it out
    reconstruct_final: float = 1.0  # factor on it at the end of the run
    warm: int = 0  # images before which it is trained alone
    z_noise: float = 0.3  # deviations by which its z are jittered
    uniformity: float = 0.1  # weight of the even spread of z, beside the images
    beta1: float = 0.0
    beta2: float = 0.99


# Losses: a discriminator's, of logits of fakes and of reals, and the generator's, of logits of fakes.
LOGISTIC = (
    lambda fake, real: F.softplus(fake).mean() + F.softplus(-real).mean(),
    lambda fake: F.softplus(-fake).mean(),
)
HINGE = (lambda fake, real: F.relu(1 + fake).mean() + F.relu(1 - real).mean(), lambda fake: -fake.mean())
DISCRIMINATORS = {  # by name: what makes it, and its parts, each with what it is shown of images and its losses
    "images": (Discriminator, lambda D: [(D, nn.Identity(), *LOGISTIC)]),
    "features": (lambda config: FeatureDiscriminator(config.resolution), lambda D: [(D, nn.Identity(), *HINGE)]),
    "both": (Both, lambda D: [(D.images, augment, *LOGISTIC), (D.features, nn.Identity(), *HINGE)]),
}


class Networks(NamedTuple):
    """Of one resolution, with their optimisers, in the order of the saved state."""

    G: Generator
    D: nn.Module
    G_ema: Generator
    E: nn.Module  # `ToLatent`, or nothing
    opt_G: Adam  # of E too
    opt_D: Adam


def build(config: GeneratorTraining, resolution: int, device: torch.device, old: Networks | None = None) -> Networks:
    """Networks and optimisers at a resolution; layers shared with the lower resolution keep their weights."""
    architecture = config.architecture(resolution)
    G = Generator(architecture)
    D = DISCRIMINATORS[config.discriminator][0](architecture)
    G_ema, E = copy.deepcopy(G), ToLatent(architecture) if config.reconstruct else nn.Identity()
    if old is not None:
        for new, trained in ((G, old.G), (D, old.D), (G_ema, old.G_ema), (E, old.E)):
            inherit(new, trained)
    G, D, G_ema, E = (m.to(device, memory_format=torch.channels_last) for m in (G, D, G_ema, E))
    G_ema.eval().requires_grad_(False)
    # StyleGAN2, appendix B: as many updates, fewer penalties.
    lazy_G = config.path_length_every / (config.path_length_every + 1) if config.path_length else 1.0
    lazy_D = config.r1_every / (config.r1_every + 1) if config.r1_gamma else 1.0
    lr_D = config.lr if config.discriminator_lr is None else config.discriminator_lr

    def optimizer(modules: tuple[nn.Module, ...], lr: float, c: float) -> Adam:
        trained = [t for module in modules for t in module.parameters() if t.requires_grad]
        return Adam(trained, lr=lr * c, betas=(config.beta1**c, config.beta2**c))

    return Networks(G, D, G_ema, E, optimizer((G, E), config.lr, lazy_G), optimizer((D,), lr_D, lazy_D))


class GeneratorTrainer:
    """The networks, of the resolution that the loop has come to, and a step of them."""

    def __init__(self, config: GeneratorTraining, loop: Loop, batches: Batches):
        self.config, self.loop, self.batches = config, loop, batches
        self.perceptual = lpips("alex", loop.device) if config.reconstruct else None
        state = loop.load()
        self.set(config.stage(loop.shown) if state is None else state["resolution"])
        self.pl_mean = torch.zeros([], device=loop.device)  # of path lengths
        if state is not None:
            restore(self.networks, state["networks"])
            self.pl_mean = state["pl_mean"]
        self.z_grid = torch.randn(64, config.z_dim, generator=torch.Generator().manual_seed(config.seed))

    def set(self, resolution: int, old: Networks | None = None) -> None:
        self.loop.seed(resolution)
        self.resolution, self.networks = resolution, build(self.config, resolution, self.loop.device, old)

    def step(self) -> dict[str, Tensor]:
        config, shown = self.config, self.loop.shown
        if (resolution := config.stage(shown)) != self.resolution:
            self.set(resolution, self.networks)
        real = F.adaptive_avg_pool2d(self.batches[self.loop.step], resolution)  # [N, 3, r, r]
        real = real.contiguous(memory_format=torch.channels_last)
        values = {} if self.warming else self.step_D(real)
        values |= self.step_G(real)
        follow(self.networks.G_ema, self.networks.G, config.batch, config.half_life(shown))
        return values

    @property
    def warming(self) -> bool:
        return bool(self.config.reconstruct) and self.loop.shown < self.config.warm

    def reconstruction(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the autoencoder, with its weight, and values for the curves."""
        config, (G, _, _, E, *_) = self.config, self.networks
        with self.loop.autocast():
            z = E(x)
            y = G.synthesis(G.mapping(jitter(z, config.z_noise)), noise=config.noise)
        values = {"l1": (y - x).abs().mean(), "lpips": self.perceptual(y, x).mean(), "uniformity": uniformity(z)}
        progress = max(0.0, self.loop.shown - config.warm) / max(1, config.images - config.warm)
        weight = config.reconstruct * (1 + progress * (config.reconstruct_final - 1))
        return weight * (values["l1"] + values["lpips"] + config.uniformity * values["uniformity"]), values

    def fake(self, n: int) -> tuple[Tensor, Tensor]:
        """n images of fresh z, and their codes; some take a second z from a random layer on (style mixing)."""
        config, G = self.config, self.networks.G
        z = torch.randn(2 * n, config.z_dim, device=self.loop.device)
        w, other = G.mapping(z).chunk(2)  # 2 × [N, num_ws, w_dim]
        with torch.no_grad():
            G.w_avg.lerp_(w[:, 0].mean(dim=0), 0.005)
        cut = torch.randint(1, G.num_ws, (n, 1, 1), device=z.device)
        cut = torch.where(torch.rand_like(cut, dtype=torch.float32) < config.style_mixing, cut, G.num_ws)
        w = torch.where(torch.arange(G.num_ws, device=z.device)[:, None] < cut, w, other)
        with self.loop.autocast():
            return G.synthesis(w, noise=config.noise), w

    @property
    def judges(self) -> list[tuple]:
        """The parts of the discriminator, as of `DISCRIMINATORS`. R1 and the curves are of the first."""
        return DISCRIMINATORS[self.config.discriminator][1](self.networks.D)

    def step_D(self, real: Tensor) -> dict[str, Tensor]:
        config, D = self.config, self.networks.D
        with torch.no_grad():
            x, _ = self.fake(len(real))
        with self.loop.autocast():
            logits = [(part(view(x)), part(view(real))) for part, view, *_ in self.judges]
        loss = sum(loss_D(*pair) for (_, _, loss_D, _), pair in zip(self.judges, logits, strict=True))
        values = {"loss_D": loss, "real": logits[0][1].mean(), "fake": logits[0][0].mean()}
        if config.r1_gamma and self.loop.step % config.r1_every == 0:
            values["r1"] = r1_penalty(self.judges[0][0], real)
            gamma = config.r1_gamma * (self.resolution / config.resolution) ** 2
            loss = loss + 0.5 * gamma * config.r1_every * values["r1"]
        self.loop.descend(D, self.networks.opt_D, loss)
        return values

    def step_G(self, real: Tensor) -> dict[str, Tensor]:
        config, (G, D, _, E, *_) = self.config, self.networks
        again, values = self.reconstruction(real) if config.reconstruct else (0.0, {})
        if self.warming:
            self.loop.descend(nn.ModuleList((G, E)), self.networks.opt_G, again)
            return values
        with frozen(D):
            x, w = self.fake(len(real))
            with self.loop.autocast():
                loss = sum(loss_G(part(view(x))) for part, view, _, loss_G in self.judges)
            values["loss_G"] = loss
            loss = loss + again
            if config.path_length and self.loop.step % config.path_length_every == 0:
                y = torch.randn_like(x) / self.resolution
                (gradient,) = torch.autograd.grad((x * y).sum(), w, create_graph=True)
                length = gradient.square().sum(dim=2).mean(dim=1).sqrt()  # [N]
                mean = self.loop.accelerator.reduce(length.detach().mean(), "mean")
                self.pl_mean = self.pl_mean.lerp(mean, 0.01)
                penalty = (length - self.pl_mean).square().mean()
                loss = loss + config.path_length * config.path_length_every * penalty
            self.loop.descend(nn.ModuleList((G, E)), self.networks.opt_G, loss)
        return values

    def state(self) -> dict:
        states = [item.state_dict() for item in self.networks]
        return {"networks": states, "resolution": self.resolution, "pl_mean": self.pl_mean}

    def grid(self, path: Path) -> None:
        """Beside the picture the averaged generator is kept, so that how it became better can be measured later."""
        G = self.networks.G_ema
        with torch.no_grad(), self.loop.autocast():
            save_grid(G.synthesis(G.mapping(self.z_grid.to(self.loop.device))), path)
        kept = path.parent / "kept" / f"{self.loop.shown:08d}.safetensors"
        kept.parent.mkdir(exist_ok=True)
        save_generator(G, kept, self.config.half, images=self.loop.shown)


def train_generator(
    data: str, out: str, config: GeneratorTraining, run_dir: str, curves: str | None = None
) -> Generator:
    """Train a StyleGAN2 generator, or go on with a run that was cut off, and write its moving average to `out`.

    Args:
        data: folder or zip of images.
        out: safetensors file to write.
        config: all that the result depends on, beside the data.
        run_dir: folder of the resumable state and of the sample grids.
        curves: folder for dvclive's curves.

    Raises:
        Stop: ended early by a signal or by values that are not finite; the state is kept.
        ValueError: no images, another discriminator, or a run folder that holds another run.
    """
    if config.discriminator not in DISCRIMINATORS:
        raise ValueError(f"discriminator: expected one of {list(DISCRIMINATORS)}, got {config.discriminator!r}")
    loop = Loop(config, run_dir, curves, data)
    trainer = GeneratorTrainer(config, loop, Batches(data, config.resolution, config, loop.accelerator))
    loop.run(trainer)
    G = trainer.networks.G_ema
    with torch.no_grad():  # of the averaged mapping, which differs a little from the one that w_avg followed
        z = torch.randn(10_000, config.z_dim, generator=torch.Generator().manual_seed(config.seed))
        G.w_avg.copy_(G.mapping(z.to(loop.device))[:, 0].mean(dim=0))
    if loop.accelerator.is_main_process:
        save_generator(G, out, config.half, **loop.provenance())
    return G
