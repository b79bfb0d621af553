"""What all trainings share: settings, batches, several processes, saved states, curves.

A training makes a `Loop` (processes, saved state), `Batches` (images) and a `Trainer` (networks, one step), and calls
`loop.run(trainer)`. Every random number of step k follows from (seed, k, process), so a resumed run repeats what an
unbroken one does.
"""

import dataclasses
import datetime
import functools
import io
import json
import math
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import torch
import torch.distributed.nn as distributed_nn
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.utils.data import Subset
from tqdm import tqdm

from padinv.images.datasets import ImageDataset, to_float
from padinv.model.tensors import atomic_write, file_hash
from padinv.ops.memory import keep_memory


@dataclass(frozen=True)
class Run:
    """What both trainings share."""

    seed: int = 0
    images: int = 100_000  # training images to show, in all
    batch: int = 16  # over all processes
    accumulate: int = 1  # parts in which an encoder's process takes its share of a batch, to need less memory
    lr: float = 2.5e-3
    precision: str = "fp32"  # or "bf16": activations and products in bfloat16, weights and losses in float32
    compile: bool = False  # the networks of a step, by torch.compile: a minute at the start, then 1.1 to 1.4× as fast
    mirror: bool = False  # flip images left to right at random
    workers: int = 0  # threads of each process that decode images as they are needed; 0: all are held in memory
    log_every: int = 20  # steps between points of the curves
    save_every: float = 600  # seconds between saved states
    grid_every: int = 10_000  # images between sample grids


# ----------------------------------------------------------------------------------------------------------------------
# Images and random numbers


def step_seed(seed: int, step: int, process: int) -> int:
    """A seed of its own for each step and process (a 64-bit mix, so that neighbours share nothing)."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + process * 0x94D049BB133111EB + 1) % 2**64
    x = (x ^ (x >> 31)) * 0xD6E8FEB86659FD93 % 2**64
    return (x ^ (x >> 32)) % 2**63


class Batches:
    """Batch k of an endless, shuffled sequence of images, all or the `chosen`: each epoch is one permutation. Images
    are held in memory as bytes, or decoded by `config.workers` threads while the two steps before are computed."""

    def __init__(
        self, data: str, resolution: int, config: Run, accelerator: Accelerator, chosen: list[int] | None = None
    ):
        if config.batch % accelerator.num_processes:
            raise ValueError(
                f"batch: expected a multiple of the {accelerator.num_processes} processes, got {config.batch}"
            )
        source = ImageDataset(data, resolution)
        chosen = list(range(len(source))) if chosen is None else chosen
        self.pool = ThreadPoolExecutor(config.workers) if config.workers else None
        self.images = Subset(source, chosen)
        if self.pool is None:
            self.images = source.tensor(chosen, progress=accelerator.is_main_process)  # uint8 [N, 3, R, R]
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


# ----------------------------------------------------------------------------------------------------------------------
# Parts of a step


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
        wide, n = x.float(), x.numel() // x.shape[1] * distributed.get_world_size()
        mean = distributed_nn.all_reduce(wide.sum(dim=(0, 2, 3))) / n  # [C]
        centred = wide - mean[:, None, None]  # E[x²] − E[x]² would lose a variance far below the squared mean
        variance = distributed_nn.all_reduce(centred.square().sum(dim=(0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


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


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within it the module's weights get no gradients."""
    trained = [t for t in module.parameters() if t.requires_grad]
    for t in trained:
        t.requires_grad_(False)
    yield
    for t in trained:
        t.requires_grad_(True)


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, images: int, half_life: float) -> None:
    """Let a moving average of weights, whose half-life is in images, take in a step of so many; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - 0.5 ** (images / half_life))
    for mine, buffer in zip(average.buffers(), module.buffers(), strict=True):
        mine.copy_(buffer)


def finite(state: object) -> bool:
    """Whether all tensors of a state, in lists and dicts of them, are free of NaN and infinities."""
    if isinstance(state, dict | list):
        return all(map(finite, state.values() if isinstance(state, dict) else state))
    return not isinstance(state, Tensor) or bool(state.isfinite().all())


def restore(items: Iterable, states: list[dict]) -> None:
    """Modules and optimisers as they were saved."""
    for item, state in zip(items, states, strict=True):
        item.load_state_dict(state)


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def start() -> Accelerator:
    """The processes and devices of a run."""
    keep_memory()
    # Left alone, accelerate takes each of several processes on CPUs for the only one.
    return Accelerator(cpu=distributed.is_torchelastic_launched() and not torch.cuda.is_available())


def origin() -> dict[str, str | None]:
    """Where and when this process runs: the commit of the code ("-dirty" if code or settings differ from it, whatever
    else does; None without git), the machine, and the date."""

    def git(*arguments: str) -> str:
        command, folder = ["git", *arguments], Path(__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/padinv", ":/study", ":/params.yaml")
        commit = git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        commit = None
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    return {"commit": commit, "machine": machine, "date": datetime.date.today().isoformat()}


class Stop(Exception):
    """Training ended early; the last good state is kept."""


class Trainer(Protocol):
    """What `Loop.run` needs of a training."""

    def step(self) -> dict[str, Tensor]:
        """Learn from batch `loop.step`; values for the curves."""

    def state(self) -> dict:
        """What a resumed run needs: tensors, numbers, and lists and dicts of them."""

    def grid(self, path: Path) -> None:
        """Write a picture of how far it is."""


class Loop:
    """Processes, progress, curves, saved states and signals around the steps of a training.

    The state in `run_dir` is one file, replaced at once: a kill at any moment leaves the previous or the new one.

    Attributes:
        step: the number of the present step, from 0.
        shown: images shown in the steps before.
        accelerator, device: of this process.
        inputs: hashes of what the result depends on beside the settings.
        sums: of values since the last point of the curves: {name: (sum, how many)}.
    """

    def __init__(self, config: Run, run_dir: str, curves: str | None, data: str, **files: str | None):
        """data: folder or zip of images. files: further ones that the result depends on, or None."""
        self.config, self.run_dir, self.curves = config, Path(run_dir), curves
        if config.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: expected fp32 or bf16, got {config.precision!r}")
        self.accelerator = start()
        self.device = self.accelerator.device
        self.files = {"data": data} | {name: path for name, path in files.items() if path}
        self.step, self.history, self.sums = 0, [], {}
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.state_path = self.run_dir / "state.pt"

    def autocast(self) -> torch.autocast:
        # Not accelerate's, which allows a process one precision in its life.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    @functools.cached_property
    def inputs(self) -> dict[str, str]:
        hashes = {name: file_hash(path) for name, path in self.files.items() if name != "data"}
        data = self.files["data"]
        return {"data": file_hash(data) if Path(data).is_file() else str(data)} | hashes

    @property
    def shown(self) -> int:
        return self.step * self.config.batch

    def compiled(self, function: Callable) -> Callable:
        """The function, or what torch.compile makes of it, if the settings ask for that."""
        return torch.compile(function, dynamic=False) if self.config.compile else function

    def seed(self, part: int) -> None:
        """Start the random numbers anew for one part of the set-up."""
        torch.manual_seed(step_seed(self.config.seed, part, -2))

    def descend(self, module: nn.Module, optimizer: Optimizer, loss: Tensor) -> None:
        """A step of the optimiser down the mean loss of all processes."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.accelerator, module)
        optimizer.step()

    def provenance(self) -> dict:
        """What a checkpoint says of its training."""
        return {"training": dataclasses.asdict(self.config), "images": self.shown, **self.inputs, **origin()}

    def load(self) -> dict | None:
        """The saved state of an earlier run with the same configuration and inputs, or None."""
        known, mine = (json.loads(json.dumps(dataclasses.asdict(c))) for c in (type(self.config)(), self.config))
        mine |= self.inputs
        if not self.state_path.exists():
            return None
        where = "cpu" if self.device.type == "cpu" else self.device  # of several processes' "cpu:0" torch knows nothing
        state = torch.load(self.state_path, map_location=where, weights_only=True)
        saved = known | json.loads(state["config"])  # settings newer than the state had their defaults
        # What may change within a run.
        free = {"images", "log_every", "save_every", "grid_every", "accumulate", "workers"}
        changed = sorted(k for k in mine if k not in free and mine[k] != saved.get(k))
        if changed:
            raise ValueError(f"{self.state_path}: holds a run with other settings ({', '.join(changed)}); "
                             "remove the folder to start anew or give another --workdir")  # fmt: skip
        self.step, self.history = state["step"], json.loads(state["history"])
        self.sums = state.get("sums", {})  # older states lack them
        return state

    def save(self, state: dict) -> None:
        """Replace the saved state. `Stop` without that if values since the last point, or the state, are not finite."""
        self.means()
        if not finite(state):  # the same in every process, as gradients are
            self.fail("the state")
        if self.accelerator.is_main_process:
            config = json.dumps(dataclasses.asdict(self.config) | self.inputs)
            extra = {"config": config, "step": self.step, "history": json.dumps(self.history), "sums": self.sums}
            buffer = io.BytesIO()
            torch.save(state | extra, buffer)
            atomic_write(self.state_path, buffer.getvalue())
        self.accelerator.wait_for_everyone()

    def log(self, values: dict[str, Tensor]) -> None:
        """Collect values; means over `log_every` steps go to the curves."""
        for key, value in values.items():
            total, n = self.sums.get(key, (0.0, 0))
            self.sums[key] = (total + value.detach().float(), n + 1)
        if (self.step + 1) % self.config.log_every:
            return
        row = {key: float(f"{v:.5g}") for key, v in self.means().items()}
        row, self.sums = {"images": (self.step + 1) * self.config.batch} | row, {}
        self.history.append(row)
        self.bar.set_postfix({key: f"{v:.3g}" for key, v in row.items() if key != "images"}, refresh=False)

    def means(self) -> dict[str, float]:
        """Of what was collected since the last point of the curves, over all processes, which hold the same sums from
        then on: the main one's in a saved state are enough. `Stop` if not finite."""
        self.sums = {key: (self.accelerator.reduce(total, "mean"), n) for key, (total, n) in self.sums.items()}
        means = {key: float(total / n) for key, (total, n) in self.sums.items()}
        if not all(map(math.isfinite, means.values())):
            self.fail(means)
        return means

    def fail(self, what: object) -> NoReturn:
        raise Stop(f"not finite by step {self.step}: {what}; the last good state is {self.state_path}. "
                   "Lower lr, or use precision fp32")  # fmt: skip

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

    def run(self, trainer: Trainer) -> None:
        """Steps until `images` are shown. `Stop` after saving when asked to end by SIGTERM or Ctrl-C, and without when
        something is not finite."""
        config, stop = self.config, []
        handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
        steps = math.ceil(config.images / config.batch)
        self.bar = tqdm(total=steps * config.batch, initial=self.step * config.batch, unit="img", smoothing=0.02,
                        disable=not self.accelerator.is_main_process)  # fmt: skip
        saved = time.monotonic()
        try:
            while self.step < steps:
                torch.manual_seed(step_seed(config.seed, self.step, self.accelerator.process_index))
                self.log(trainer.step())
                self.step += 1
                self.bar.update(config.batch)
                new = self.shown // config.grid_every > (self.shown - config.batch) // config.grid_every
                if new and self.accelerator.is_main_process:
                    trainer.grid(self.run_dir / f"samples-{self.shown:08d}.png")
                    atomic_write(self.run_dir / "history.json", json.dumps(self.history).encode())
                due = torch.tensor([time.monotonic() - saved > config.save_every, bool(stop)], dtype=torch.float32)
                due = self.accelerator.reduce(due.to(self.accelerator.device), "sum") > 0  # every process agrees
                if due.any():
                    self.save(trainer.state())
                    saved = time.monotonic()
                if due[1]:
                    raise Stop(f"asked to end at {self.shown:,} of {config.images:,} images; state saved in "
                               f"{self.run_dir}, the same command goes on from there")  # fmt: skip
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.save(trainer.state())
        self.write_curves()
