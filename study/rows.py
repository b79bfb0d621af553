"""One row of the inversion table: a method of params.yaml, measured on test images.

    python -m study.rows padinv+100 --data data/avatars-64/test.zip --checkpoints checkpoints/avatars-64 --out .

A method is a few settings over shared parts: what starts (an encoder, or a search from w_avg in a space), what goes on
(a residual encoder, gradient steps), and whether the generator is tuned at the end.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from padinv.files.checkpoints import load_encoder, load_generator
from padinv.images.datasets import ImageDataset, to_float
from padinv.images.viz import save_grid
from padinv.inversion.directions import pca_directions
from padinv.inversion.optimise import draw, invert, project, tune
from padinv.measure import metrics
from padinv.model.codes import Code
from padinv.model.generator import Generator
from padinv.model.tensors import file_hash, write_json
from padinv.ops.frozen import keep_memory
from study import tables


@dataclass(frozen=True)
class Method:
    """Fields of `rows` in params.yaml."""

    encoder: str | None = None  # file name of the checkpoint that starts, without suffix
    residual: str | None = None  # of the residual encoder that goes on, to 5 passes in all
    project: str | None = None  # instead of an encoder: the space that is searched, "w", "w+" or "w+p"
    space: str = "w+p"  # refined: "w+p" or "w+"
    steps: int = 0  # of the search or the refinement
    domain_weight: float = 0.0
    tune: int = 0  # steps of the generator's own weights, for each image

    def __post_init__(self):
        if (self.encoder is None) == (self.project is None):
            raise ValueError("rows: a method names either an encoder or a space to project to")

    @property
    def generator_passes(self) -> int:
        """Images that the generator draws for one inversion, the result included."""
        return 1 + self.steps + self.tune + (4 if self.residual else 0)


def solve(method: Method, G: Generator, folder: Path) -> Callable[[Tensor], tuple[Code, Callable[[Code], Tensor]]]:
    """The function x -> (code, render) of a method, where render(code) gives images [N, 3, R, R] of codes of that
    batch: by G, or by generators tuned to each image."""
    device = G.const.device
    names = {"E": method.encoder, "residual": method.residual}
    encoders = {k: load_encoder(folder / f"{v}.safetensors", device) for k, v in names.items() if v}

    def run(x: Tensor) -> tuple[Code, Callable[[Code], Tensor]]:
        if method.project:
            code = project(x, G, method.project, method.steps, progress=True)
        else:
            code = invert(x, G=G, **encoders, steps=method.steps, space=method.space,
                          domain_weight=method.domain_weight, progress=True)  # fmt: skip
        if not method.tune:
            return code, partial(draw, G=G)
        with tqdm(total=len(x) * method.tune, unit="step") as bar:
            tuned = [tune(x[i : i + 1], code[i], G, method.tune, bar=bar) for i in range(len(x))]
        return code, lambda code: torch.cat([own(one) for own, one in zip(tuned, code, strict=True)])

    return run


@torch.no_grad()
def editability(run: Callable, G: Generator, n: int, seed: int = 0) -> dict[str, float]:
    """Does an edit do to the inversion what it does to the image? Known for images of the generator itself: their true
    code moves two deviations along the main axes of W, forth and back, and so does the code that the method finds;
    LPIPS-Alex between the two results.

    Returns:
        "edit_lpips", its mean over n images and the edits, and "native_lpips", the same before any edit.
    """
    z = torch.randn(n, G.config.z_dim, generator=torch.Generator().manual_seed(seed)).to(G.w_avg.device)
    w = G.mapping(z, truncation=0.7)  # [n, num_ws, w_dim]
    x = G.synthesis(w)
    code, render = run(x.clamp(-1, 1))
    found = {"native_lpips": metrics.compare(render(code), x.clamp(-1, 1), nets=("alex",))["lpips_alex"]}
    values, axes = [], pca_directions(G, 3).w
    for step in 2 * torch.cat((axes, -axes)):
        truth = G.synthesis(w + step).clamp(-1, 1)
        values.append(metrics.compare(render(Code(code.w + step, code.p)), truth, nets=("alex",))["lpips_alex"])
    return metrics.summarise(found | {"edit_lpips": torch.cat(values)})


def measure(name: str, method: Method, settings: dict, data: str, folder: str, out: str, timing: str | None) -> None:
    """Invert the test images by one method and write out/name.json and out/name.png (the first images, inverted).

    Args:
        settings: section `table` of params.yaml.
        data: folder or zip of test images.
        folder: of the checkpoints.
        timing: folder for the seconds per image, which differ from run to run; None: they are not written.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(folder)
    G = load_generator(folder / "generator.safetensors", device)
    run = solve(method, G, folder)
    fast = not (method.steps or method.tune)
    n = settings["n_images"] if fast else settings["n_tuned"] if method.tune else settings["n_common"]
    test = ImageDataset(data, G.resolution)
    x = to_float(test.tensor(range(min(n, len(test))))).to(device)  # [N, 3, R, R]
    start = time.perf_counter()
    code, render = run(x)
    seconds = (time.perf_counter() - start) / len(x)
    with torch.no_grad():
        y = render(code)
    values = metrics.compare(y, x)
    row = {"method": name, "n_images": len(x), "generator_passes": method.generator_passes, **metrics.summarise(values)}
    row["frechet"] = None
    if len(x) >= 500:
        real, fake = (metrics.frechet_features(images, "vgg16")[0] for images in (x, y))
        row["frechet"] = round(metrics.frechet_distance(real, fake), 4)
    some = {key: value[: settings["n_common"]] for key, value in values.items()}
    row["common"] = {"n_images": len(some["mse"]), **metrics.summarise(some)}
    row["style_distance"] = round(metrics.style_distance(code.w, G)[: settings["n_common"]].mean().item(), 4)
    row |= editability(run, G, settings["n_native"])
    paths = {key: folder / f"{key}.safetensors" for key in ("generator", method.encoder, method.residual) if key}
    hashes = {key: file_hash(path) for key, path in paths.items()}
    head = tables.protocol(len(x), G.resolution, metrics.vgg_label(G.resolution), device, hashes)
    head["n_native"] = settings["n_native"]  # images behind edit_lpips and native_lpips
    write_json(Path(out) / f"{name}.json", {"protocol": head, "row": row})
    save_grid(y[: settings["n_show"]].cpu(), Path(out) / f"{name}.png", columns=settings["n_show"])
    if timing:
        seconds = {"seconds_per_image": round(seconds, 6), "device": tables.device_name(device), "n_images": len(x)}
        write_json(Path(timing) / f"{name}.json", {"method": name, "precision": "float32", **seconds})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="study.rows", description=__doc__.split("\n\n")[0])
    parser.add_argument("method", help="entry of the section rows of params.yaml")
    parser.add_argument("--data", required=True, help="folder or zip of test images")
    parser.add_argument("--checkpoints", required=True, help="folder of generator.safetensors and the encoders")
    parser.add_argument("--out", required=True, help="folder for METHOD.json and METHOD.png")
    parser.add_argument("--timing", help="folder for the seconds per image")
    parser.add_argument("--params", default="params.yaml", help="parameters (default: %(default)s)")
    args = parser.parse_args(arguments)
    keep_memory()
    import yaml

    try:
        params = yaml.safe_load(Path(args.params).read_text())
        if args.method not in params["rows"]:
            raise ValueError(f"method: expected one of {sorted(params['rows'])}, got {args.method!r}")
        method = Method(**params["rows"][args.method])
        measure(args.method, method, params["table"], args.data, args.checkpoints, args.out, args.timing)
    except (TypeError, ValueError, OSError) as error:
        sys.exit(f"study.rows: {error}")


if __name__ == "__main__":
    main()
