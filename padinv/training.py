"""Training of the generator and of the encoders: one process or many, a CPU or GPUs, resumable to the bit.

    python -m padinv.training generator --data data/avatars-64/train.zip --out generator.safetensors --workdir runs/g
    accelerate launch -m padinv.training encoder --method padinv …

Every random number of step k follows from (seed, k, process), so a resumed run repeats what an unbroken one does.
"""

import argparse
import copy
import dataclasses
import io
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed.nn as distributed_nn
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.optim import Adam
from tqdm import tqdm

from padinv.checkpoints import atomic_write, file_hash, load_encoder, load_generator, save_encoder, save_generator
from padinv.codes import Code
from padinv.data import ImageDataset, to_float
from padinv.discriminator import Discriminator, FeatureDiscriminator, LatentDiscriminator
from padinv.encoder import Encoder
from padinv.generator import Generator, GeneratorConfig
from padinv.identity import ArcFace, arcface
from padinv.ops.frozen import keep_memory
from padinv.synthetic import views
from padinv.viz import save_grid


@dataclass(frozen=True)
class Run:
    """What both trainings share."""

    seed: int = 0
    images: int = 100_000  # training images to show, in all
    batch: int = 16  # over all processes
    accumulate: int = 1  # parts in which an encoder's process takes its share of a batch, to need less memory
    lr: float = 2.5e-3
    precision: str = "fp32"  # or "bf16": activations and products in bfloat16, weights and losses in float32
    mirror: bool = False  # flip images left to right at random
    workers: int = 0  # threads of each process that decode images as they are needed; 0: all are held in memory
    log_every: int = 20  # steps between points of the curves
    save_every: int = 600  # seconds between saved states
    grid_every: int = 10_000  # images between sample grids


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


# ----------------------------------------------------------------------------------------------------------------------
# Shared parts


def step_seed(seed: int, step: int, process: int) -> int:
    """A seed of its own for each step and process (a 64-bit mix, so that neighbours share nothing)."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + process * 0x94D049BB133111EB + 1) % 2**64
    x = (x ^ (x >> 31)) * 0xD6E8FEB86659FD93 % 2**64
    return (x ^ (x >> 32)) % 2**63


class Batches:
    """Batch k of an endless, shuffled sequence of images: each epoch is one permutation. Images are held in memory as
    bytes, or decoded by `config.workers` threads while the two steps before are computed."""

    def __init__(self, data: str, resolution: int, config: Run, accelerator: Accelerator):
        if config.batch % accelerator.num_processes:
            raise ValueError(
                f"batch: expected a multiple of the {accelerator.num_processes} processes, got {config.batch}"
            )
        self.images: Tensor | ImageDataset = ImageDataset(data, resolution)
        self.pool = ThreadPoolExecutor(config.workers) if config.workers else None
        if self.pool is None:
            self.images = self.images.tensor(progress=accelerator.is_main_process)  # uint8 [N, 3, R, R]
        self.config, self.accelerator = config, accelerator
        self.epoch, self.order = -1, torch.empty(0)
        self.coming: dict[int, list[Future]] = {}  # step -> its images

    def index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.images))
        if epoch != self.epoch:
            rng = torch.Generator().manual_seed(step_seed(self.config.seed, epoch, -1))
            self.epoch, self.order = epoch, torch.randperm(len(self.images), generator=rng)
        return int(self.order[offset])

    def indices(self, step: int) -> list[int]:
        """This process's share of batch `step`."""
        local = self.config.batch // self.accelerator.num_processes
        first = step * self.config.batch + self.accelerator.process_index * local
        return [self.index(position) for position in range(first, first + local)]

    def load(self, step: int) -> Tensor:
        if self.pool is None:
            return self.images[self.indices(step)]
        for near in range(step, step + 3):
            if near not in self.coming:
                self.coming[near] = [self.pool.submit(self.images.__getitem__, i) for i in self.indices(near)]
        found = torch.stack([future.result() for future in self.coming[step]])
        self.coming = {near: futures for near, futures in self.coming.items() if near > step}
        return found

    def __getitem__(self, step: int) -> Tensor:
        """This process's share of batch `step`: [N, 3, R, R] in [−1, 1]."""
        x = to_float(self.load(step).to(self.accelerator.device, non_blocking=True))
        if self.config.mirror:
            flip = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
            x = torch.where(flip, x.flip(-1), x)
        return x


def average_gradients(accelerator: Accelerator, module: nn.Module) -> None:
    """The gradient of the global batch in every process, in one message. Explicit rather than through a wrapped
    module, since the losses here call methods other than `forward`."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if accelerator.num_processes == 1 or not gradients:
        return
    flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes, so that their number changes nothing. (torch's own is for GPUs.)"""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float()
        sums = torch.stack((wide.sum(dim=(0, 2, 3)), wide.square().sum(dim=(0, 2, 3))))  # [2, C]
        n = x.numel() // x.shape[1] * distributed.get_world_size()
        mean, square = distributed_nn.all_reduce(sums) / n
        variance = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return x * scale.to(x.dtype)[:, None, None] + (self.bias - mean * scale).to(x.dtype)[:, None, None]


def share_statistics(module: nn.Module, accelerator: Accelerator) -> None:
    """Let the batch norms of a module see the batches of all processes."""
    if accelerator.num_processes > 1:
        for layer in module.modules():
            if type(layer) is nn.BatchNorm2d:
                layer.__class__ = GlobalBatchNorm


def r1_penalty(D: nn.Module, x: Tensor) -> Tensor:
    """Mean squared norm of the logit's gradient at real images or codes (Mescheder et al. 2018), in float32."""
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1).mean()


def start(config: Run) -> Accelerator:
    """The processes, devices and precision of a run."""
    modes = {"fp32": "no", "bf16": "bf16"}
    if config.precision not in modes:
        raise ValueError(f"precision: expected one of {sorted(modes)}, got {config.precision!r}")
    keep_memory()
    # Left alone, accelerate takes each of several processes on CPUs for the only one.
    cpu = distributed.is_torchelastic_launched() and not torch.cuda.is_available()
    return Accelerator(cpu=cpu, mixed_precision=modes[config.precision])


class Stop(Exception):
    """Training ended early, its state saved."""


class Loop:
    """Progress, curves, saved states and signals around a training step.

    The state in `run_dir` is one file, replaced at once: a kill at any moment leaves the previous or the new one.
    """

    def __init__(self, config: Run, accelerator: Accelerator, run_dir: Path, curves: Path | None, inputs: dict):
        self.config, self.accelerator, self.run_dir, self.curves = config, accelerator, Path(run_dir), curves
        self.step, self.history, self.sums, self.inputs = 0, [], {}, inputs
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.state_path = self.run_dir / "state.pt"

    def load(self) -> dict | None:
        """The saved state of an earlier run with the same configuration and inputs, or None."""
        if not self.state_path.exists():
            return None
        state = torch.load(self.state_path, map_location=self.accelerator.device, weights_only=True)
        mine = json.loads(json.dumps(dataclasses.asdict(self.config) | self.inputs))
        saved = json.loads(state["config"])
        # What may change within a run.
        free = {"images", "log_every", "save_every", "grid_every", "accumulate", "workers"}
        changed = sorted(k for k in mine if k not in free and mine[k] != saved.get(k))
        if changed:
            raise ValueError(f"{self.state_path}: holds a run with other settings ({', '.join(changed)}); "
                             "remove the folder to start anew or give another --workdir")  # fmt: skip
        self.step, self.history = state["step"], json.loads(state["history"])
        return state

    def save(self, state: dict) -> None:
        if self.accelerator.is_main_process:
            config = json.dumps(dataclasses.asdict(self.config) | self.inputs)
            extra = {"config": config, "step": self.step, "history": json.dumps(self.history)}
            buffer = io.BytesIO()
            torch.save(state | extra, buffer)
            atomic_write(self.state_path, buffer.getvalue())
        self.accelerator.wait_for_everyone()

    def log(self, values: dict[str, Tensor]) -> None:
        """Collect values (means over `log_every` steps go to the curves) and stop on NaN."""
        for key, value in values.items():
            total, n = self.sums.get(key, (0.0, 0))
            self.sums[key] = (total + value.detach().float(), n + 1)
        if (self.step + 1) % self.config.log_every:
            return
        row = {key: float(self.accelerator.reduce(total / n, "mean")) for key, (total, n) in self.sums.items()}
        self.sums = {}
        if not all(map(math.isfinite, row.values())):
            raise Stop(f"not finite at step {self.step}: {row}; the last good state is {self.state_path}. "
                       "Lower lr, or use precision fp32")  # fmt: skip
        row = {"images": (self.step + 1) * self.config.batch} | {key: float(f"{v:.5g}") for key, v in row.items()}
        self.history.append(row)
        self.bar.set_postfix({key: f"{v:.3g}" for key, v in row.items() if key != "images"}, refresh=False)

    def write_curves(self) -> None:
        """Curves as dvclive's files, from the whole history, so that a resumed run leaves no seam."""
        if self.curves is None or not self.accelerator.is_main_process:
            return
        try:
            from dvclive import Live
        except ImportError:  # a bare training machine: the history stays in the state and in history.json
            return
        with Live(str(self.curves), dvcyaml=None, save_dvc_exp=False, report=None) as live:
            for row in self.history:
                live.step = row["images"]
                for key, value in row.items():
                    if key != "images":
                        live.log_metric(key, value, timestamp=False)
        for path in Path(self.curves).glob("metrics.json"):  # volatile and unused
            path.unlink()

    def run(self, step: Callable[[], dict], state: Callable[[], dict], grid: Callable[[Path], None]) -> None:
        """Call `step` until `images` are shown; raise `Stop` after saving when asked to end by SIGTERM or Ctrl-C."""
        config, stop = self.config, []
        handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
        steps = math.ceil(config.images / config.batch)
        self.bar = tqdm(total=steps * config.batch, initial=self.step * config.batch, unit="img", smoothing=0.02,
                        disable=not self.accelerator.is_main_process)  # fmt: skip
        saved = time.monotonic()
        try:
            while self.step < steps:
                torch.manual_seed(step_seed(config.seed, self.step, self.accelerator.process_index))
                self.log(step())
                self.step += 1
                self.bar.update(config.batch)
                shown = self.step * config.batch
                if self.accelerator.is_main_process and shown // config.grid_every > (
                    (shown - config.batch) // config.grid_every
                ):
                    grid(self.run_dir / f"samples-{shown:08d}.png")
                    atomic_write(self.run_dir / "history.json", json.dumps(self.history).encode())
                due = torch.tensor([time.monotonic() - saved > config.save_every, bool(stop)], dtype=torch.float32)
                due = self.accelerator.reduce(due.to(self.accelerator.device), "sum") > 0  # every process agrees
                if due.any():
                    self.save(state())
                    saved = time.monotonic()
                if due[1]:
                    raise Stop(f"asked to end at {shown:,} of {config.images:,} images; state saved in {self.run_dir}, "
                               "the same command goes on from there")  # fmt: skip
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.save(state())
        self.write_curves()


# ----------------------------------------------------------------------------------------------------------------------
# Generator


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


# ----------------------------------------------------------------------------------------------------------------------
# Encoder


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
    from padinv.losses import lpips

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


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def configure(cls: type, section: dict, overrides: list[str]) -> Run:
    """A training configuration from a section of params.yaml and `key=value` overrides; unknown keys are refused."""
    import yaml

    values = dict(section)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"--set: expected key=value, got {override!r}")
        values[key] = yaml.safe_load(value)
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown training settings {unknown}; there are {sorted(known)}")
    return cls(**values)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="padinv.training", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("generator", "encoder"))
    parser.add_argument("--section", help="of params.yaml (default: train_generator or train_encoder)")
    parser.add_argument("--method", default="padinv", help="encoder: entry of the section's methods (%(default)s)")
    parser.add_argument("--base", help="encoder: checkpoint of the encoder that a residual one goes on from")
    parser.add_argument("--init", help="encoder: checkpoint whose weights training starts from")
    parser.add_argument("--data", required=True, help="folder or zip of images")
    parser.add_argument("--generator", help="encoder: checkpoint of the generator to invert")
    parser.add_argument("--out", required=True, help="safetensors file to write")
    parser.add_argument("--workdir", required=True, help="folder of the resumable state and of sample grids")
    parser.add_argument("--curves", help="folder for the training curves")
    parser.add_argument("--params", default="params.yaml", help="parameters (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a parameter")
    args = parser.parse_args(arguments)
    import yaml

    try:
        params = yaml.safe_load(Path(args.params).read_text())
        if args.what == "generator":
            config = configure(GeneratorTraining, params[args.section or "train_generator"], args.set)
            train_generator(args.data, args.out, config, args.workdir, args.curves)
        else:
            section = dict(params[args.section or "train_encoder"])
            methods = section.pop("methods")
            if args.method not in methods:
                raise ValueError(f"--method: expected one of {sorted(methods)}, got {args.method!r}")
            method = dict(methods[args.method])
            section["encoder"] = section.get("encoder", {}) | method.pop("encoder", {})
            section |= method
            config = configure(EncoderTraining, section, args.set)
            if args.generator is None:
                raise ValueError("--generator: the checkpoint of the generator is needed")
            train_encoder(args.data, args.generator, args.out, config, args.workdir, args.curves, args.base, args.init)
    except (Stop, ValueError, OSError) as error:
        sys.exit(f"padinv.training: {error}")


if __name__ == "__main__":
    main()
