"""Search for codes without an encoder, settings and spaces at equal time: `python -m benchmarks.search --help`.

First `padinv.project` as it is, and with one of its settings turned, on a few images; then its spaces on others, on
which nothing was chosen. Every search gets the seconds that W+ & P takes for --steps, timed in the same run.
"""

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

import padinv
from padinv import Code, Generator, load_generator
from padinv.images.datasets import ImageDataset, to_float
from padinv.inversion import optimise
from padinv.measure.lpips import lpips
from padinv.measure.metrics import compare
from padinv.model.tensors import write_json
from padinv.ops.memory import keep_memory
from study import tables

SPACES = ("w+", "w+p")
TURNED = {  # what `turned` and `padinv.project` take
    "as it is": {},
    "P at 0.1 of w's rate": {"pace": 0.1},
    "P at 0.3": {"pace": 0.3},
    "P at 3": {"pace": 3.0},
    "lr 0.05": {"lr": 0.05},
    "lr 0.2": {"lr": 0.2},
    "noise on w, as StyleGAN2's projector": {"noise": 0.05},
    "from the nearest of 1,000 samples": {"near": 1000},  # the time that they take is not counted
}
MEASURES = ("mse", "lpips_alex", "lpips_vgg")


@contextlib.contextmanager
def turned(pace: float | None = None, near: int = 0) -> Iterator[None]:
    """Within it, `padinv.project` moves P at another pace, or starts at the nearest of samples."""
    descend = optimise.descend

    def other(x: Tensor, start: Code, G: Generator, steps: int, paces: dict, *settings, **options) -> Code:
        w = nearest(x, G, near).expand_as(start.w).clone() if near else start.w
        paces = {w: paces.pop(start.w)} | {t: rate if pace is None else pace for t, rate in paces.items()}
        return descend(x, Code(w, start.p), G, steps, paces, *settings, **options)

    with mock.patch.object(optimise, "descend", other):
        yield


@torch.no_grad()
def nearest(x: Tensor, G: Generator, n: int) -> Tensor:
    """Of n samples of the generator, the w of the one that is nearest to each image by LPIPS-Alex: [N, 1, w_dim]."""
    network = lpips("alex", x.device)
    w = G.mapping(torch.randn(n, G.config.z_dim, generator=torch.Generator().manual_seed(2)).to(x.device))
    target = network.features(x)
    apart = [torch.cdist(target, network.features(G(Code(part)).clamp(-1, 1))) for part in w.split(8)]
    return w[torch.cat(apart, dim=1).argmin(dim=1), :1]


def seconds_per_step(x: Tensor, G: Generator) -> dict[str, float]:
    """Of each space, for these images together: the fastest of three turns."""
    best = dict.fromkeys(SPACES, float("inf"))
    for _ in range(3):
        for space in SPACES:
            start = time.perf_counter()
            padinv.project(x, G, space, steps=4)
            best[space] = min(best[space], (time.perf_counter() - start) / 5)  # the last pass measures alone
    return best


def rows_of(images: Tensor, G: Generator, batch: int, ways: dict[str, dict], note: dict) -> list[dict]:
    """A row for each way: `padinv.project` of the images with its settings, and how far what is drawn is from them."""
    rows = []
    for name, settings in ways.items():
        known = {key: settings[key] for key in ("space", "steps", "lr", "noise") if key in settings}
        with turned(**{key: value for key, value in settings.items() if key not in known}):
            code = padinv.project(images, G, batch=batch, progress=True, **known)
        values = compare(optimise.draw(code, G), images)
        row = note | {"way": name, "steps": known["steps"]}
        rows.append(row | tables.summary({key: values[key] for key in MEASURES}))
        tqdm.write(str(rows[-1]))
    return rows


def write(report: dict, out: Path) -> None:
    write_json(out.with_suffix(".json"), report)
    cost = ", ".join(f"{space} {value:g}" for space, value in report["ms_per_step"].items())
    note = (f"Means ± standard errors; each way took as long as w+p for its steps. Milliseconds of a step of "
            f"{report['batch']} images: {cost} ({report['device']}).")  # fmt: skip
    columns = ["images", "n_images", "way", "steps", *MEASURES]
    errors = [f"{name}_error" for name in MEASURES]
    tables.write_table(out, report["rows"], columns, note, whole=(report["rows"], columns + errors))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.search", description=__doc__.split("\n\n")[0])
    parser.add_argument("--generator", required=True, metavar="FILE")
    parser.add_argument("--choice", metavar="ZIP", help="images on which settings are compared; without it none are")
    parser.add_argument("--n-choice", type=int, default=16, metavar="N", help="so many of them (%(default)s)")
    parser.add_argument("--test", nargs="+", required=True, metavar="ZIP", help="images on which spaces are")
    parser.add_argument("--n-test", type=int, default=32, metavar="N", help="so many of each (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of w+p; others get its time (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images at once (%(default)s)")
    parser.add_argument("--out", required=True, metavar="STEM", help="files to write: STEM.json, STEM.csv, STEM.md")
    args = parser.parse_args(arguments)
    keep_memory()
    G = load_generator(args.generator)

    def read(path: str, n: int) -> Tensor:
        return to_float(ImageDataset(path, G.resolution).tensor(range(n)))

    tests = {Path(path).stem: read(path, args.n_test) for path in args.test}
    cost = seconds_per_step(next(iter(tests.values()))[: args.batch], G)
    ways = {space: {"space": space, "steps": round(args.steps * cost["w+p"] / cost[space])} for space in SPACES}
    rows = []
    if args.choice:
        turns = {name: {**ways["w+p"], **settings} for name, settings in TURNED.items()}
        rows = rows_of(read(args.choice, args.n_choice), G, args.batch, turns, {"images": Path(args.choice).stem})
    for name, images in tests.items():
        rows += rows_of(images, G, args.batch, ways, {"images": name})
    report = {
        "generator": Path(args.generator).as_posix(), "batch": args.batch, "torch": torch.__version__,
        "device": tables.device_name("cpu"), "ms_per_step": {key: round(1e3 * value, 1) for key, value in cost.items()},
        "rows": rows,
    }  # fmt: skip
    write(report, Path(args.out))


if __name__ == "__main__":
    main()
