"""Attributes of images, and which of them change when codes move along a direction (notebook 06)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from padinv.images.datasets import ImageDataset, to_float
from padinv.inversion.directions import balanced_accuracy, linear_svm, move
from padinv.inversion.optimise import draw
from padinv.model.codes import Code
from padinv.model.generator import Generator

# What labels.csv says of an image: label -> column, and the values for which the label is true.
COLUMNS = {
    "light skin": ("skin", "#d08b5b #edb98a #ffdbb4"),
    "light hair": ("hair_colour", "#b58143 #d6b370 #c93305 #e8e1e1 #f59797 #5b7fd0"),
    "long hair": ("hair", "bob bun curly dreads fro longButNotTooLong miaWallace straight01 straightAndStrand"),
    "hat": ("hat", "hat turban winterHat02 winterHat03"),
    "glasses": ("glasses", "prescription01 prescription02 round sunglasses wayfarers"),
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
    """A linear probe per label that sees pixels at 32², so that no encoder has a say.

    Attributes:
        normals: [3072, K].
        gap: [K], of the scores: from images without a label to images with it.
        accuracy: [K], balanced, on images that the probes did not learn from.
    """

    normals: Tensor
    gap: Tensor
    accuracy: Tensor

    @staticmethod
    def pixels(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x.clamp(-1, 1), 32).flatten(1)  # [N, 3072]

    @classmethod
    def fit(cls, x: Tensor, labels: Tensor, others: Tensor, labels_of_others: Tensor) -> "Probes":
        """Probes that learn from x and are checked and scaled on others; labels are bool [N, K]."""
        normals, biases = linear_svm(cls.pixels(x), labels, C=10.0)
        scores = cls.pixels(others) @ normals + biases  # [N, K]
        pairs = zip(scores.T, labels_of_others.T, strict=True)
        gap = torch.stack([score[true].mean() - score[~true].mean() for score, true in pairs])
        return cls(normals, gap, balanced_accuracy(scores, labels_of_others))

    def effect(self, G: Generator, base: Code, directions: Code, amount: float = 2.0) -> Tensor:
        """Mean change of each label from −amount to +amount standard deviations: [directions, K]; 1 is the way from
        images without a label to images with it."""
        seen = [[self.pixels(draw(move(base, d, a), G)) for a in (amount, -amount)] for d in directions]
        return torch.stack([((plus - minus) @ self.normals / self.gap).mean(dim=0) for plus, minus in seen])


def effect_row(effect: Tensor, names: list[str]) -> dict:
    """How far labels move along their own direction, and along those of others: means, their ratio, and each label."""
    target = effect.diagonal()  # [K]
    others = (effect.abs().sum(dim=1) - target.abs()) / (len(names) - 1)  # [K]
    row = {key: round(values.mean().item(), 4) for key, values in (("target", target), ("others", others))}
    pairs = zip(names, target.tolist(), others.tolist(), strict=True)
    each = {name: {"target": round(t, 4), "others": round(o, 4)} for name, t, o in pairs}
    return row | {"ratio": round(row["target"] / row["others"], 2), "labels": each}
