"""Labels of images, what reads them, and which change when codes move along a direction (notebook 06).

python -m study.attributes --data build/avatars-128/train.zip --out checkpoints/avatars-128/classifier.safetensors
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from padinv.images.datasets import ImageDataset, to_float
from padinv.inversion.directions import linear_svm, move
from padinv.inversion.optimise import draw
from padinv.model.codes import Code
from padinv.model.generator import Generator
from padinv.model.tensors import file_hash, load_tensors, save_tensors
from padinv.ops.memory import keep_memory
from padinv.training.loop import origin
from study import tables
from study.avatars import ATTRIBUTES

# What labels.csv says of an image: label -> column, and the values for which the label is true.
COLUMNS = {
    "light skin": ("skin", "#d08b5b #edb98a #ffdbb4"),
    "light hair": ("hair_colour", "#b58143 #d6b370 #c93305 #e8e1e1 #f59797 #5b7fd0"),
    "long hair": ("hair", "bigHair bob bun curly dreads fro longButNotTooLong miaWallace straight01 straightAndStrand"),
    "hat": ("hat", "turban winterHat02 winterHat03"),
    "glasses": ("glasses", "kurt prescription02 round sunglasses wayfarers"),
    "beard": ("facial_hair", "beardLight beardMajestic beardMedium"),
    "open mouth": ("mouth", "screamOpen grimace tongue smile"),
    "bright clothes": ("clothes_colour", "#5199e4 #65c9ff #3fa66b #ff5c5c #ff488e #f2c84b #f4f4f4"),
    "backdrop": ("background", "#ffd5dc #ffdfbf #f5efc9"),  # warm
    "woman": ("gender", "1"),
    "over 40": ("age", " ".join(str(years) for years in range(41, 120))),
}


def labelled(path: str, G: Generator, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """The first images of a zip [N, 3, R, R], their labels, bool [N, K], and the names of these: of avatars what their
    labels.csv says; of photographs that too, if they have one, and what their pixels show."""
    data = ImageDataset(path, G.resolution)
    x = to_float(data.tensor(range(count), progress=False)).to(G.const.device)
    rows = (data.labels or [])[:count]
    labels = {name: torch.tensor([row[column] in values.split() for row in rows], device=x.device)
              for name, (column, values) in COLUMNS.items() if rows and column in rows[0]}  # fmt: skip
    labels |= {} if "light skin" in labels else pixel_labels(x)
    return x, torch.stack([*labels.values()], dim=1), list(labels)


def pixel_labels(x: Tensor) -> dict[str, Tensor]:
    """What any images [N, 3, R, R] show: {name: bool [N]}."""
    grey, (red, _, blue) = x.mean(dim=1), x.mean(dim=(2, 3)).T
    left, right = (half.mean(dim=(1, 2)) for half in grey.chunk(2, dim=-1))
    border = torch.cat((grey[..., :4], grey[..., -4:]), dim=-1).mean(dim=(1, 2))
    return {"bright": left + right > -0.2, "warm": red - blue > 0.3, "bright border": border > -0.1,
            "light from the left": left > right}  # fmt: skip


@dataclass
class Probes:
    """A linear probe per label that sees pixels at 32², so that no encoder has a say: images [N, 3, R, R] -> [N, K],
    about 0 without the label and 1 with it.

    Attributes:
        normals, start, gap: [3072, K], [K], [K], of the scores: those of images without a label, and the way from there
            to images with it.
    """

    normals: Tensor
    start: Tensor
    gap: Tensor

    @staticmethod
    def pixels(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x.clamp(-1, 1), 32).flatten(1)  # [N, 3072]

    @classmethod
    def fit(cls, x: Tensor, labels: Tensor) -> "Probes":
        """Probes that learn from four fifths of x and are scaled on the others; labels are bool [N, K]."""
        n = len(x) * 4 // 5
        normals, _ = linear_svm(cls.pixels(x[:n]), labels[:n], C=10.0)
        scores = cls.pixels(x[n:]) @ normals  # [N/5, K]
        pairs = list(zip(scores.T, labels[n:].T, strict=True))
        start, end = (torch.stack([score[true == kind].mean() for score, true in pairs]) for kind in (False, True))
        return cls(normals, start, end - start)

    def __call__(self, x: Tensor) -> Tensor:
        return (self.pixels(x) @ self.normals - self.start) / self.gap


def reader(checkpoints: str, images: str, G: Generator, count: int, names: list[str]) -> Callable[[Tensor], Tensor]:
    """What reads labels off images, [N, 3, R, R] -> [N, K], 0 without the label and 1 with it: the classifier of the
    checkpoints, where there is one; else, as of photographs, probes that learn from the first of a zip."""
    path = Path(checkpoints, "classifier.safetensors")
    if path.exists():
        network = load_classifier(path, G.const.device)
        return lambda x: network.chances(x, names)
    x, labels, _ = labelled(images, G, count)
    return Probes.fit(x, labels)


@torch.no_grad()
def samples(G: Generator, read: Callable[[Tensor], Tensor], count: int, seed: int) -> tuple[Code, Tensor]:
    """Codes of the generator's own images, and the labels that are read off these: Code of N, bool [N, K]."""
    z = torch.randn(count, G.config.z_dim, generator=torch.Generator().manual_seed(seed)).to(G.const.device)
    codes = Code(G.mapping(z))
    return codes, torch.cat([read(G(part)) > 0.5 for part in (codes[i : i + 50] for i in range(0, count, 50))])


def readings(
    read: Callable[[Tensor], Tensor], G: Generator, base: Code, directions: Code, amount: float = 3.0
) -> Tensor:
    """The labels of N codes moved along each of D directions, by −amount, 0 and amount standard deviations:
    [D, 3, N, K]."""
    rows = [[read(draw(move(base, d, a), G)) for a in (-amount, 0.0, amount)] for d in directions]
    return torch.stack([torch.stack(row) for row in rows])


def effect_row(read: Tensor, names: list[str]) -> dict:
    """From `readings` of as many directions as labels: how far labels move along their own direction ("target") and
    along those of others, from one end to the other, with standard errors over images; the ratio of the two; the share
    of other labels that stay on their side ("kept"); and each label."""
    change = (read[:, 2] - read[:, 0]).transpose(1, 2).cpu()  # [K, K, N], along and of
    own = torch.eye(len(names), dtype=torch.bool)
    row = {}
    for key, values in (("target", change[own]), ("others", change[~own].abs())):  # [K, N], [K(K − 1), N]
        row |= tables.summary({key: values.mean(dim=0)})  # of [N]
    stay = ((read[:, [0, 2]] > 0.5) == (read[:, 1:2] > 0.5)).float().mean(dim=(1, 2)).cpu()  # [K, K]
    row |= {"ratio": round(row["target"] / row["others"], 2), "kept": round(stay[~own].mean().item(), 4)}
    means = change.mean(dim=2)  # [K, K]
    others = (means.abs().sum(dim=1) - means.diagonal().abs()) / (len(names) - 1)
    pairs = zip(names, means.diagonal().tolist(), others.tolist(), strict=True)
    return row | {"labels": {name: {"target": round(t, 4), "others": round(o, 4)} for name, t, o in pairs}}


# ----------------------------------------------------------------------------------------------------------------------
# A classifier that reads the attributes of avatars


class Classifier(nn.Module):
    """Reads every attribute off an avatar, as a measure of generators and edits: trained on rendered images alone, of
    whatever domain, so that no network that it judges had a say.

    Attributes:
        options: {attribute: its values}, in the order of the logits.
    """

    def __init__(self, options: dict[str, list[str]], resolution: int = 128):
        super().__init__()
        self.options, self.resolution = options, resolution
        widths = (3, 32, 64, 96, 128)
        layers = []
        for i, o in itertools.pairwise(widths):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3))
        self.heads = nn.Linear(widths[-1] * (resolution // 16) ** 2, sum(map(len, options.values())))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[N, 3, R, R] in [−1, 1] -> {attribute: logits [N, options]}."""
        logits = self.heads(self.features(x)).split([len(values) for values in self.options.values()], dim=1)
        return dict(zip(self.options, logits, strict=True))

    def chances(self, x: Tensor, names: list[str]) -> Tensor:
        """How likely each image has labels of `COLUMNS`: [N, K]."""
        chance = {name: logits.softmax(dim=1) for name, logits in self(x.clamp(-1, 1)).items()}
        true = [(chance[column], self.options[column], values.split()) for column, values in map(COLUMNS.get, names)]
        return torch.stack([p[:, [value in values for value in options]].sum(dim=1) for p, options, values in true], 1)

    def read(self, x: Tensor) -> list[dict[str, str]]:
        """The attributes of each image."""
        found = []
        for part in x.split(256):
            best = {name: logits.argmax(dim=1).tolist() for name, logits in self(part).items()}
            found += [{name: self.options[name][i[n]] for name, i in best.items()} for n in range(len(part))]
        return found

    def accuracy(self, x: Tensor, rows: list[dict[str, str]]) -> dict[str, float]:
        """Share of images whose attributes are read as rows say, for each attribute."""
        pairs = list(zip(self.read(x), rows, strict=True))
        return {name: sum(got[name] == true[name] for got, true in pairs) / len(pairs) for name in self.options}


def train_classifier(data: str, out: str, epochs: int = 5, batch: int = 128, lr: float = 3e-3, seed: int = 0) -> None:
    """Train on a zip of avatars and write the network, with where it comes from, to `out`."""
    source = ImageDataset(data)
    images = source.tensor()  # uint8 [N, 3, R, R]
    options = {name: sorted({row[name] for row in source.labels}) for name in ATTRIBUTES}
    labels = torch.tensor([[options[name].index(row[name]) for name in options] for row in source.labels])
    torch.manual_seed(seed)
    network = Classifier(options, images.shape[-1]).to(memory_format=torch.channels_last)
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for step in tqdm(range(steps), desc="classifier", unit="step"):
        if step % (len(images) // batch) == 0:
            order = torch.randperm(len(images))
        chosen = order[:batch]
        order = order[batch:]
        x = to_float(images[chosen]).contiguous(memory_format=torch.channels_last)
        answers = network(x).values()
        loss = sum(F.cross_entropy(a, labels[chosen, i]) for i, a in enumerate(answers)) / len(options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in network.state_dict().items()}
    settings = {"epochs": epochs, "batch": batch, "lr": lr, "seed": seed}
    meta = {"training": settings, "data": file_hash(data), **origin()}
    save_tensors(out, tensors, {"kind": "classifier", "resolution": str(network.resolution),
                                "options": json.dumps(options), "meta": json.dumps(meta)})  # fmt: skip


def load_classifier(path, device="cpu") -> Classifier:
    """What `train_classifier` writes. ValueError on anything else."""
    tensors, metadata = load_tensors(path, "classifier", device)
    network = Classifier(json.loads(metadata["options"]), int(metadata["resolution"]))
    network.load_state_dict(tensors)
    return network.to(device).eval().requires_grad_(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m study.attributes", description="Train the classifier of avatars.")
    parser.add_argument("--data", required=True, help="zip of avatars with their labels")
    parser.add_argument("--out", required=True, help="safetensors file to write")
    arguments = parser.parse_args()
    keep_memory()
    train_classifier(arguments.data, arguments.out)
