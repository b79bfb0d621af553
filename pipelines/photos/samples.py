"""Judge a domain's generator, and those kept on the way to it, by a network that no discriminator used.

python samples.py faces      in this folder, after dvc repro train-generator@faces

Writes results/tables/DOMAIN-samples.* with a row for each of runs/DOMAIN-64/generator/kept/ and for the last; of that
the first 64 samples, results/figures/DOMAIN-samples.png, and the training images that are nearest to eight of them,
results/DOMAIN-64/figures/nearest.png.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from padinv import load_generator
from padinv.images.datasets import ImageDataset, to_float
from padinv.images.viz import panel, show, tile
from padinv.measure.lpips import LPIPS, lpips
from padinv.measure.metrics import frechet_distance
from padinv.model.generator import Generator
from padinv.model.tensors import read_metadata
from study.tables import summary, write_table

METRICS = ["frechet_alex", "precision", "recall"]
NOTE = """{domain} at {size}²: {n:,} samples without truncation against {n:,} training images, by the training images
that the generator has seen; means ± standard errors over {draws} draws of z. Fréchet distance of LPIPS-AlexNet's
features (conv2 to conv5, means over positions, joined): no discriminator used them, the autoencoder's loss did.
Precision: share of the samples that lie nearer to a training image than its third neighbour; recall, the other way
round (Kynkäänniemi et al. 2019). First row: the same of real images. Such numbers compare only among
themselves."""


@torch.no_grad()
def features(network: LPIPS, images: Tensor) -> Tensor:
    """[N, 3, R, R] in [−1, 1] -> [N, 1088], on the CPU: maps of AlexNet but the first, means over positions, joined."""
    maps = (network.maps(x.to(network.mean.device).clamp(-1, 1))[1:] for x in images.split(250))
    return torch.cat([torch.cat([m.mean(dim=(2, 3)) for m in part], dim=1).cpu() for part in maps])


@torch.no_grad()
def draw(G: Generator, n: int, seed: int) -> Tensor:
    """n samples, without truncation: [n, 3, R, R]."""
    torch.manual_seed(seed)  # of the noise
    z = torch.randn(n, G.config.z_dim, generator=torch.Generator().manual_seed(seed)).to(G.w_avg.device)
    return torch.cat([G.synthesis(G.mapping(part), noise="random").cpu() for part in z.split(64)])


def radii(points: Tensor, k: int = 3) -> Tensor:
    """Distance of each point of [N, D] to its k-th neighbour among the others: [N]."""
    return torch.cdist(points, points).kthvalue(k + 1, dim=1).values  # the nearest of all is the point itself


def judged(real: Tensor, draws: Iterator[Tensor]) -> dict:
    """Means over draws of features [N, 1088] against those of real images, with standard errors."""
    found, known = [], radii(real)
    for fake in draws:
        distances = torch.cdist(fake, real)
        precision = (distances <= known).any(dim=1).float().mean().item()
        recall = (distances <= radii(fake)[:, None]).any(dim=0).float().mean().item()
        found.append((frechet_distance(real, fake), precision, recall))
    return summary(dict(zip(METRICS, torch.tensor(found, dtype=torch.float64).T, strict=True)))


def judge(domain: str, n: int, draws: int) -> None:
    """Write table and figures. ValueError where there are too few training images."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    last = Path(f"checkpoints/{domain}-64/generator.safetensors")
    G = load_generator(last, device)
    source = ImageDataset(f"data/{domain}-64/train.zip", G.resolution)
    if len(source) < 2 * n:
        raise ValueError(f"--samples: expected at most half of the {len(source)} training images, got {n}")
    images, network = to_float(source.tensor()), lpips("alex", device)
    known = features(network, images)  # [N, 1088]
    real, other = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))].split(n)[:2]
    rows = [{"from": "other training images"} | judged(real, iter([other]))]
    kept = sorted(Path(f"runs/{domain}-64/generator/kept").glob("*.safetensors"))
    for path in tqdm([*kept, last], unit="generator"):
        other, seen = load_generator(path, device), json.loads(read_metadata(path)["meta"])["images"]
        if other.resolution != G.resolution:
            continue  # not there yet: nothing to compare with these images
        drawn = (features(network, draw(other, n, seed)) for seed in range(draws))
        rows.append({"from": "generator", "images": seen} | judged(real, drawn))
    columns = ["from", "images", *METRICS]
    note = NOTE.format(domain=domain.capitalize(), size=G.resolution, n=n, draws=draws)
    whole = (rows, [*columns, *(f"{name}_error" for name in METRICS)])
    write_table(f"results/tables/{domain}-samples", rows, columns, note, whole=whole)

    samples = draw(G, 64, 0)
    nearest = images[torch.cdist(features(network, samples[:8]), known).argmin(dim=1)]
    figures = Path(f"results/{domain}-64/figures")
    figures.mkdir(parents=True, exist_ok=True)
    show(tile(samples, columns=16), f"results/figures/{domain}-samples.png", limit=300_000)
    show(panel({"samples": samples[:8], "nearest": nearest}), figures / "nearest.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="samples.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("domain", choices=("faces", "cats"))
    parser.add_argument("--samples", type=int, default=2000, metavar="N", help="of a draw (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=3, metavar="N", help="of z (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        judge(args.domain, args.samples, args.draws)
    except (ValueError, OSError) as error:
        sys.exit(f"samples.py: {error}")


if __name__ == "__main__":
    main()
