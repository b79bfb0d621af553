"""Training of a generator by regression on labelled images: for a renderer, whose labels decide the picture.

No discriminator is needed where the true picture of every label is known. A code is a sum of learned vectors, one for
each label of the image, and the synthesis network regresses the image on it; what labels do together follows from the
sum, so that combinations which no image showed are drawn too. The mapping network z -> w then is made rather than
trained (`mapping_of_labels`). Where labels do not decide the picture, as for photographs, the answer is a mean.
"""

import copy
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from padinv.files.checkpoints import save_generator
from padinv.images.datasets import ImageDataset, to_float
from padinv.images.viz import save_grid
from padinv.measure.lpips import lpips
from padinv.model.generator import Generator, Mapping
from padinv.model.tensors import load_tensors, save_tensors
from padinv.training.generator import Growing, inherit
from padinv.training.loop import Batches, Loop, average_gradients, follow, restore, step_seed

MOST_OPTIONS = 64  # of one label; a column with more is a name or a measurement


@dataclass(frozen=True)
class Regression(Growing):
    """L1 + LPIPS between the drawing of an image's labels and the image."""

    labels: tuple = ()  # columns of labels.csv that decide the picture; each is taken to be independent of the others
    where: dict = dataclasses.field(default_factory=dict)  # {column: value}: only these images
    batch: int = 32
    lr: float = 3e-3
    lr_final: float = 0.05  # factor on lr at the end; it falls by a cosine over the last third
    beta1: float = 0.9
    beta2: float = 0.99
    mapping_layers: int = 2
    channel_base: int = 4096
    channel_max: int = 256
    l1: float = 1.0
    lpips: float = 0.5  # AlexNet, from 32² on
    blend: float = 0.02  # share of z that lies between two options of a label, where the mapping passes over


class LabelCodes(nn.Module):
    """Labels -> w: the sum of one learned vector for each label.

    Attributes:
        options: {column: its values}, in the order of the vectors.
        vectors: [options of all columns, w_dim].
    """

    def __init__(self, options: dict[str, list[str]], w_dim: int):
        super().__init__()
        self.options = options
        self.vectors = nn.Parameter(0.3 * torch.randn(sum(map(len, options.values())), w_dim))

    def indices(self, rows: list[dict[str, str]]) -> Tensor:
        """[N, columns], of the vector of each label. ValueError for a value that no vector stands for."""
        first, found = 0, []
        for name, values in self.options.items():
            place = {value: first + i for i, value in enumerate(values)}
            if unknown := sorted({str(row.get(name)) for row in rows} - place.keys()):
                raise ValueError(f"labels: {name} has the values {unknown}, which were not trained; known: {values}")
            found.append(torch.tensor([place[row[name]] for row in rows]))
            first += len(values)
        return torch.stack(found, dim=1)

    def forward(self, indices: Tensor) -> Tensor:
        """[N, columns] -> [N, w_dim]."""
        return F.embedding(indices, self.vectors).sum(dim=1)


def save_label_codes(codes: LabelCodes, path) -> None:
    save_tensors(path, {"vectors": codes.vectors}, {"kind": "label_codes", "options": json.dumps(codes.options)})


def load_label_codes(path, device="cpu") -> LabelCodes:
    """What `train_by_labels` writes beside the generator. ValueError on anything else."""
    tensors, metadata = load_tensors(path, "label_codes", device)
    codes = LabelCodes(json.loads(metadata["options"]), tensors["vectors"].shape[1])
    codes.vectors = nn.Parameter(tensors["vectors"], requires_grad=False)
    return codes


def read_labels(dataset: ImageDataset, config: Regression) -> tuple[list[int], list[dict[str, str]]]:
    """Images of `config.where` with their labels.

    Raises:
        ValueError: no labels.csv, no such column or value, or a column of too many values.
    """
    if dataset.labels is None:
        raise ValueError(f"labels: {dataset.path} has no labels.csv; expected one with the columns {config.labels}")
    columns = sorted(dataset.labels[0].keys() - {"file"})
    if missing := [name for name in (*config.labels, *config.where) if name not in columns]:
        raise ValueError(f"labels: {dataset.path} has no columns {missing}; it has {columns}")
    chosen = [i for i, row in enumerate(dataset.labels) if all(row[k] == str(v) for k, v in config.where.items())]
    if not chosen:
        raise ValueError(f"where: no image of {dataset.path} has {config.where}")
    rows = [dataset.labels[i] for i in chosen]
    for name in config.labels:
        if (n := len({row[name] for row in rows})) > MOST_OPTIONS:
            raise ValueError(f"labels: {name} has {n} values, expected at most {MOST_OPTIONS}; leave it out, or sort "
                             "its values into classes")  # fmt: skip
    return chosen, rows


def mapping_of_labels(
    mapping: Mapping, codes: LabelCodes, shares: dict[str, list[float]], blend: float, seed: int
) -> Tensor:
    """Give a mapping network the weights that turn z into the codes of labels, in their shares of the images.

    Each label is read off one direction of z, all orthogonal: along it the options follow each other, each on as wide
    a stretch as its share of the images, with a ramp from one to the next. Two units of the first layer make a ramp
    (leaky ReLUs of opposite sign behind two thresholds), the second layer adds up the vectors. Negative sums would bend
    in its activation: w is shifted until all are positive.

    Args:
        mapping: two layers, changed in place; needs two units for each option but the first of a label.
        codes, shares: vectors, and for each column the share of each option.
        blend: share of z on the ramps, of each label.
        seed: of the directions.

    Returns:
        [w_dim], what w was shifted by, for the layers that take w.

    Raises:
        ValueError: z_dim is smaller than the number of labels, w_dim than that of units, or other than two layers.
    """
    layers, w_dim = list(mapping.layers), codes.vectors.shape[1]
    z_dim, units = layers[0].weight.shape[1], 2 * (len(codes.vectors) - len(shares))
    if units > w_dim or len(shares) > z_dim or len(layers) != 2:
        raise ValueError(f"w_dim, z_dim, mapping_layers: expected at least {units}, {len(shares)}, and 2 for these "
                         f"labels, got {w_dim}, {z_dim} and {len(layers)}")  # fmt: skip
    rng = torch.Generator().manual_seed(step_seed(seed, 0, -3))
    directions = torch.linalg.qr(torch.randn(z_dim, len(shares), generator=rng)).Q.T  # [columns, z_dim]
    quantile = torch.distributions.Normal(0.0, 1.0).icdf

    weight, bias = torch.zeros(w_dim, z_dim), torch.zeros(w_dim)
    steps, base, lowest = torch.zeros(w_dim, w_dim), torch.zeros(w_dim), torch.zeros(w_dim)
    groups = codes.vectors.detach().cpu().split([len(parts) for parts in shares.values()])
    unit = 0
    for direction, parts, own in zip(directions, shares.values(), groups, strict=True):
        base += own[0]
        lowest += own.amin(dim=0)
        half = 0.5 * blend / max(len(own) - 1, 1)
        for end, step in zip(torch.tensor(parts).cumsum(0), own.diff(dim=0), strict=False):  # ends all but the last
            low, high = quantile((end + half * torch.tensor([-1.0, 1.0])).clamp(1e-4, 1 - 1e-4))
            slope = 1 / (high - low)
            weight[unit : unit + 2] = slope * direction
            bias[unit : unit + 2] = -slope * torch.stack((low, high))
            steps[:, unit], steps[:, unit + 1] = step, -step
            base -= 0.25 * step  # the difference of the two goes from 0.2 to 1
            unit += 2
    shift = 0.1 - lowest
    gain = math.sqrt(2)  # of either activation
    with torch.no_grad():
        for layer, w, b in ((layers[0], weight, bias), (layers[1], steps / (0.8 * gain * gain), (base + shift) / gain)):
            layer.weight.copy_(w / layer.weight_gain)
            layer.bias.copy_(b / layer.bias_gain)
    return shift.to(codes.vectors.device)


def shift_w(G: Generator, shift: Tensor) -> None:
    """Let a generator take w + shift for w: it draws the same."""
    with torch.no_grad():
        for block in G.blocks:
            for layer in (block.conv0, block.conv1, block.to_rgb):
                if layer is not None:
                    affine = layer.affine
                    affine.bias -= (affine.weight * affine.weight_gain) @ shift / affine.bias_gain


def pace(progress: float, final: float) -> float:
    """Factor on lr: 1 for two thirds of a run, then down to `final` by a cosine."""
    t = min(1.0, max(0.0, 3 * progress - 2))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * t))


class RegressionTrainer:
    """Codes and generator, of the resolution that the loop has come to, and a step of them.

    Attributes:
        networks: codes, their average, generator, its average, optimiser: in the order of the saved state.
        labels: [images, columns], of every training image.
    """

    def __init__(self, config: Regression, loop: Loop, batches: Batches, codes: LabelCodes, labels: Tensor):
        self.config, self.loop, self.batches = config, loop, batches
        self.labels = labels.to(loop.device)
        self.perceptual = lpips("alex", loop.device) if config.lpips else None
        state = loop.load()
        codes = codes.to(loop.device)
        self.set(state["resolution"] if state else config.stage(loop.shown), codes, copy.deepcopy(codes))
        if state is not None:
            restore(self.networks, state["networks"])
        some = [batches.images[i] for i in range(min(32, len(labels)))]
        self.fixed = to_float(torch.stack(some).to(loop.device))  # images of the grid

    def set(self, resolution: int, codes: LabelCodes, codes_ema: LabelCodes, *old: Generator) -> None:
        """Networks and optimiser of a resolution, from those of a lower one, if any."""
        found = []
        for before in old or (None, None):
            self.loop.seed(resolution)
            G = Generator(self.config.architecture(resolution))
            if before is not None:
                inherit(G, before)
            found.append(G.to(self.loop.device, memory_format=torch.channels_last))
        G, G_ema = found
        trained = [*codes.parameters(), G.const, *G.blocks.parameters()]
        optimizer = Adam(trained, lr=self.config.lr, betas=(self.config.beta1, self.config.beta2), fused=True)
        self.resolution, self.networks = resolution, [codes, codes_ema, G, G_ema, optimizer]
        self.synthesis = self.loop.compiled(G.synthesis)

    def draw(self, codes: LabelCodes, synthesis: Callable[..., Tensor], labels: Tensor) -> Tensor:
        """[N, columns] -> [N, 3, r, r]."""
        w = codes(labels)[:, None].expand(-1, self.networks[2].num_ws, -1)  # [N, num_ws, w_dim]
        return synthesis(w, noise="none")

    def step(self) -> dict[str, Tensor]:
        config, shown = self.config, self.loop.shown
        if (resolution := config.stage(shown)) != self.resolution:
            self.set(resolution, *self.networks[:4])
        codes, codes_ema, G, G_ema, optimizer = self.networks
        x = F.adaptive_avg_pool2d(self.batches[self.loop.step], resolution)  # [N, 3, r, r]
        x = x.contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * pace(shown / config.images, config.lr_final)
        with self.loop.autocast():
            y = self.draw(codes, self.synthesis, self.labels[self.batches.indices(self.loop.step)])
            values = {"l1": (y - x).abs().mean()}
            if self.perceptual and resolution >= 32:
                values["lpips"] = self.perceptual(y, x).mean()
        optimizer.zero_grad(set_to_none=True)
        sum(getattr(config, name) * value for name, value in values.items()).backward()
        for module in (codes, G):
            average_gradients(self.loop.accelerator, module)
        optimizer.step()
        for average, module in ((codes_ema, codes), (G_ema, G)):
            follow(average, module, config.batch, config.half_life(shown))
        return values

    def state(self) -> dict:
        return {"networks": [item.state_dict() for item in self.networks], "resolution": self.resolution}

    def grid(self, path: Path) -> None:
        _, codes, _, G, _ = self.networks
        with torch.no_grad(), self.loop.autocast():
            y = self.draw(codes, G.synthesis, self.labels[: len(self.fixed)])
            x = F.adaptive_avg_pool2d(self.fixed, self.resolution)
            save_grid(torch.stack((x, y), dim=1).flatten(0, 1), path)  # pairs side by side


def train_by_labels(
    data: str, out: str, config: Regression, run_dir: str, curves: str | None = None
) -> tuple[Generator, LabelCodes]:
    """Train a generator by regression, or go on with a run that was cut off; write its moving average to `out`, and
    the codes of labels beside it (`load_label_codes`).

    Args:
        data: folder or zip of images with a labels.csv.
        out, config, run_dir, curves: as in `train_generator`.

    Raises:
        Stop, ValueError: as `train_generator`, and as `read_labels` and `mapping_of_labels`.
    """
    loop = Loop(config, run_dir, curves, data)
    chosen, rows = read_labels(ImageDataset(data), config)
    counts = {name: Counter(row[name] for row in rows) for name in config.labels}
    shares = {name: [counts[name][value] / len(rows) for value in sorted(counts[name])] for name in counts}
    loop.seed(0)
    codes = LabelCodes({name: sorted(count) for name, count in counts.items()}, config.w_dim)
    mapping_of_labels(Mapping(config.architecture(8)), codes, shares, config.blend, config.seed)  # refuses now, if ever
    batches = Batches(data, config.resolution, config, loop.accelerator, chosen)
    trainer = RegressionTrainer(config, loop, batches, codes, codes.indices(rows))
    loop.run(trainer)
    _, codes, _, G, _ = trainer.networks
    shift = mapping_of_labels(G.mapping, codes, shares, config.blend, config.seed)
    shift_w(G, shift)
    with torch.no_grad():
        codes.vectors += shift / len(shares)
        z = torch.randn(10_000, config.z_dim, generator=torch.Generator().manual_seed(config.seed))
        G.w_avg.copy_(G.mapping(z.to(loop.device))[:, 0].mean(dim=0))
    if loop.accelerator.is_main_process:
        save_generator(G, out, config.half, **loop.provenance())
        save_label_codes(codes, Path(out).with_suffix(".labels.safetensors"))
    return G.eval().requires_grad_(False), codes
