"""Training of the generator."""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from padinv.files.checkpoints import save_generator
from padinv.images.viz import save_grid
from padinv.model.generator import Generator, GeneratorConfig
from padinv.model.tensors import file_hash
from padinv.training.discriminators import Discriminator, FeatureDiscriminator
from padinv.training.loop import Batches, Loop, Run, average_gradients, r1_penalty, start, step_seed


@dataclass(frozen=True)
class GeneratorTraining(Run):
    """Non-saturating loss, lazy R1, style mixing, EMA (StyleGAN2, Karras et al. 2020, appendix B)."""

    z_dim: int = 256
    w_dim: int = 256
    mapping_layers: int = 4
    channel_base: int = 2048
    channel_max: int = 128
    resolution: int = 64
    grow: tuple = ()  # ((resolution, images), …): first train at lower resolutions up to these image counts
    discriminator: str = "images"  # or "features", of VGG16, where images or hours are few (Projected GANs)
    discriminator_lr: float | None = None  # None: lr
    r1_gamma: float = 0.3  # weight of the R1 penalty, scaled by (r / resolution)² at lower resolutions
    r1_every: int = 16  # steps
    path_length: float = 0.0  # weight of path-length regularisation (2 in StyleGAN2); 0 leaves it out
    path_length_every: int = 4  # steps
    noise: str = "random"  # "none" for images without stochastic detail, whose edges noise would roughen
    style_mixing: float = 0.9  # probability of two z for one image
    ema_images: float = 10_000  # half-life of the averaged generator
    beta1: float = 0.0
    beta2: float = 0.99
    half: bool = False  # store the weights as float16


def stage(config: GeneratorTraining, images: int) -> int:
    """The resolution that is trained once `images` have been shown."""
    return next((r for r, until in config.grow if images < until), config.resolution)


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
    if config.discriminator not in ("images", "features"):
        raise ValueError(f'discriminator: expected "images" or "features", got {config.discriminator!r}')
    features = config.discriminator == "features"
    accelerator = start(config)
    inputs = {"data": file_hash(data) if Path(data).is_file() else str(data)}
    loop = Loop(config, accelerator, run_dir, curves, inputs)
    batches = Batches(data, config.resolution, config, accelerator)

    def build(resolution: int, old: tuple | None = None) -> tuple[Generator, Discriminator, Generator, Adam, Adam]:
        """Networks and optimisers at a resolution; layers shared with the lower resolution keep their weights."""
        torch.manual_seed(step_seed(config.seed, resolution, -2))
        fields = ("z_dim", "w_dim", "mapping_layers", "channel_base", "channel_max")
        architecture = GeneratorConfig(resolution=resolution, **{k: getattr(config, k) for k in fields})
        G = Generator(architecture)
        D = FeatureDiscriminator(resolution) if features else Discriminator(architecture)
        G_ema = copy.deepcopy(G)
        if old is not None:
            for new, trained in zip((G, D, G_ema), old[:3], strict=True):
                shapes = {name: t.shape for name, t in new.state_dict().items()}
                known = {name: t for name, t in trained.state_dict().items() if shapes.get(name) == t.shape}
                new.load_state_dict(known, strict=False)
            for g in (G, G_ema):  # the grown generator starts as the up-sampled one
                nn.init.zeros_(g.blocks[-1].to_rgb.weight)
        G, D, G_ema = (m.to(accelerator.device, memory_format=torch.channels_last) for m in (G, D, G_ema))
        G_ema.eval().requires_grad_(False)
        # StyleGAN2, appendix B: as many updates, fewer penalties.
        lazy_G = config.path_length_every / (config.path_length_every + 1) if config.path_length else 1.0
        lazy_D = config.r1_every / (config.r1_every + 1) if config.r1_gamma else 1.0
        lr_D = config.lr if config.discriminator_lr is None else config.discriminator_lr
        optimizers = [
            Adam([t for t in m.parameters() if t.requires_grad], lr=lr * c, betas=(config.beta1**c, config.beta2**c))
            for m, lr, c in ((G, config.lr, lazy_G), (D, lr_D, lazy_D))
        ]
        return G, D, G_ema, *optimizers

    state = loop.load()
    resolution = stage(config, loop.step * config.batch)
    if state is not None:
        resolution = state["resolution"]
    networks = build(resolution)
    pl_mean = torch.zeros([], device=accelerator.device)
    if state is not None:
        for item, saved in zip(networks, state["networks"], strict=True):
            item.load_state_dict(saved)
        pl_mean = state["pl_mean"]

    def fake(n: int) -> tuple[Tensor, Tensor]:
        """n images of fresh z, and their codes; some take a second z from a random layer on (style mixing)."""
        G = networks[0]
        z = torch.randn(2 * n, config.z_dim, device=accelerator.device)
        w, other = G.mapping(z).chunk(2)  # 2 × [N, num_ws, w_dim]
        with torch.no_grad():
            G.w_avg.lerp_(w[:, 0].mean(dim=0), 0.005)
        cut = torch.randint(1, G.num_ws, (n, 1, 1), device=z.device)
        cut = torch.where(torch.rand_like(cut, dtype=torch.float32) < config.style_mixing, cut, G.num_ws)
        w = torch.where(torch.arange(G.num_ws, device=z.device)[:, None] < cut, w, other)
        with accelerator.autocast():
            return G.synthesis(w, noise=config.noise), w

    def update(module: nn.Module, optimizer: Adam, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(accelerator, module)
        optimizer.step()

    def step() -> dict:
        nonlocal networks, resolution, pl_mean
        shown = loop.step * config.batch
        if stage(config, shown) != resolution:
            resolution = stage(config, shown)
            networks = build(resolution, networks)
        G, D, G_ema, opt_G, opt_D = networks
        real = batches[loop.step]
        real = F.adaptive_avg_pool2d(real, resolution).contiguous(memory_format=torch.channels_last)  # [N, 3, r, r]
        n, values = len(real), {}

        with torch.no_grad():
            x, _ = fake(n)
        with accelerator.autocast():
            logits_fake, logits_real = D(x), D(real)
        if features:  # hinge
            loss = F.relu(1 + logits_fake).mean() + F.relu(1 - logits_real).mean()
        else:
            loss = F.softplus(logits_fake).mean() + F.softplus(-logits_real).mean()
        values |= {"loss_D": loss, "real": logits_real.mean(), "fake": logits_fake.mean()}
        if config.r1_gamma and loop.step % config.r1_every == 0:
            penalty = r1_penalty(D, real)
            gamma = config.r1_gamma * (resolution / config.resolution) ** 2
            loss = loss + 0.5 * gamma * config.r1_every * penalty
            values["r1"] = penalty
        update(D, opt_D, loss)

        D.requires_grad_(False)
        x, w = fake(n)
        with accelerator.autocast():
            loss = -D(x).mean() if features else F.softplus(-D(x)).mean()
        values["loss_G"] = loss
        if config.path_length and loop.step % config.path_length_every == 0:
            y = torch.randn_like(x) / resolution
            (gradient,) = torch.autograd.grad((x * y).sum(), w, create_graph=True)
            length = gradient.square().sum(dim=2).mean(dim=1).sqrt()  # [N]
            pl_mean = pl_mean.lerp(length.detach().mean(), 0.01)
            loss = loss + config.path_length * config.path_length_every * (length - pl_mean).square().mean()
        update(G, opt_G, loss)
        D.requires_grad_(True)

        # A short memory at first, else the average would drag the untrained start along.
        half_life = min(config.ema_images, 0.05 * (shown + config.batch))
        with torch.no_grad():
            weight = 1 - 0.5 ** (config.batch / half_life)
            torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), weight)
            for average, buffer in zip(G_ema.buffers(), G.buffers(), strict=True):
                average.copy_(buffer)
        return values

    z_grid = torch.randn(64, config.z_dim, generator=torch.Generator().manual_seed(config.seed))

    def grid(path: Path) -> None:
        with torch.no_grad(), accelerator.autocast():
            G_ema = networks[2]
            save_grid(G_ema.synthesis(G_ema.mapping(z_grid.to(accelerator.device))), path)

    def state_now() -> dict:
        states = [item.state_dict() for item in networks]
        return {"networks": states, "resolution": resolution, "pl_mean": pl_mean}

    loop.run(step, state_now, grid)
    G_ema = networks[2]
    with torch.no_grad():  # of the averaged mapping, which differs a little from the one that w_avg followed
        z = torch.randn(10_000, config.z_dim, generator=torch.Generator().manual_seed(config.seed))
        G_ema.w_avg.copy_(G_ema.mapping(z.to(accelerator.device))[:, 0].mean(dim=0))
    if accelerator.is_main_process:
        shown = loop.step * config.batch
        save_generator(G_ema, out, config.half, training=dataclasses.asdict(config), images=shown, **inputs)
    return G_ema
