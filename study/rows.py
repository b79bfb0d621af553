"""One row of the inversion table: a method of params.yaml, measured on test sets and on images of the generator itself.

    python -m study.rows padinv+10 --data data/avatars-128 --checkpoints checkpoints/avatars-128 --out results/rows

A method is a few settings over shared parts: what starts (an encoder, or a search from w_avg in a space), what goes on
(a residual encoder, gradient steps), whether the generator is tuned at the end, and which part of the code draws.
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
from padinv.measure.lpips import lpips
from padinv.model.codes import Code
from padinv.model.generator import Generator
from padinv.model.tensors import file_hash, write_json
from padinv.ops.memory import keep_memory
from study import tables


@dataclass(frozen=True)
class Method:
    """Fields of `rows` in params.yaml."""

    encoder: str | None = None  # file name of the checkpoint that starts, without suffix
    residual: str | None = None  # of the residual encoder that goes on, to 5 passes in all
    project: str | None = None  # instead of an encoder: the space that is searched, "w", "w+" or "w+p"
    space: str = "w+p"  # refined: "w+p" or "w+"
    steps: int = 0  # of the search or the refinement
    tune: int = 0  # steps of the generator's own weights, for each image
    part: str = "w+p"  # of the code that draws: all of it, or "w+", beside the padding that the generator has itself

    def __post_init__(self):
        if (self.encoder is None) == (self.project is None):
            raise ValueError("rows: a method names either an encoder or a space to project to")
        if self.part not in ("w+p", "w+"):
            raise ValueError(f'rows: part: expected "w+p" or "w+", got {self.part!r}')

    @property
    def generator_passes(self) -> int:
        """Images that the generator draws for one inversion, the result included."""
        return 1 + self.steps + self.tune + (4 if self.residual else 0)

    @property
    def kind(self) -> str:
        """Entry of `table` in params.yaml: what takes longer is measured on fewer images, the first of each set."""
        if self.project or self.tune:
            return "searched"
        return "refined" if self.steps > 10 else "touched" if self.steps else "encoded"


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
            code = invert(x, G=G, **encoders, steps=method.steps, space=method.space, progress=True)
        if method.part == "w+":
            code = Code(code.w)
        if not method.tune:
            return code, partial(draw, G=G, batch=16)
        with tqdm(total=len(x) * method.tune, unit="step") as bar:
            tuned = [tune(x[i : i + 1], code[i], G, method.tune, bar=bar) for i in range(len(x))]
        return code, lambda code: torch.cat([own(one) for own, one in zip(tuned, code, strict=True)])

    return run


@torch.no_grad()
def editability(run: Callable, G: Generator, n: int, seed: int = 0) -> dict[str, Tensor]:
    """Does an edit do to the inversion what it does to the image? Known for images of the generator itself: their true
    code moves two deviations along the main axes of W, forth and back, and so does the code that the method finds.

    Returns:
        LPIPS-Alex [N] of each image: "native_lpips", between image and inversion; means over the edits: "edit_lpips",
        between the edited image and the edited inversion, and "edit_nothing", between the edited image and the image,
        which is what no edit at all scores. And "style_distance".
    """
    perceptual = lpips("alex", G.const.device)

    def distances(truth: Tensor, *several: Tensor) -> Tensor:
        """[images that are compared with the truth, N]"""
        found = []
        for true, *others in zip(*map(metrics.chunks, (truth, *several)), strict=True):
            features = perceptual.features(true.clamp(-1, 1))
            found.append([perceptual.distance(perceptual.features(y.clamp(-1, 1)), features).cpu() for y in others])
        return torch.stack([torch.cat(part) for part in zip(*found, strict=True)])

    z = torch.randn(n, G.config.z_dim, generator=torch.Generator().manual_seed(seed)).to(G.w_avg.device)
    w = G.mapping(z, truncation=0.7)  # [n, num_ws, w_dim]
    x = draw(Code(w), G, batch=16).clamp(-1, 1)
    code, render = run(x)
    (native,), axes = distances(x, render(code)), pca_directions(G, 3).w
    steps = 2 * torch.cat((axes, -axes))
    edited = [distances(draw(Code(w + s), G, batch=16), render(Code(code.w + s, code.p)), x) for s in steps]
    edit, nothing = torch.stack(edited).mean(dim=0)
    found = {"native_lpips": native, "edit_lpips": edit, "edit_nothing": nothing}
    return found | {"style_distance": metrics.style_distance(code.w, G)}


def measure(name: str, method: Method, settings: dict, data: str, folder: str, out: str, timing: str | None) -> None:
    """Invert the first images of each test set by one method, and images of the generator, and write to `out`:

    name.json (means and their standard errors by set, the generator's own as "native"), name.csv (the same distances,
    image by image) and name.png (the first inversions of each set, in one row).

    Args:
        settings: section `table` of params.yaml.
        data: folder of SET.zip for each set.
        folder: of the checkpoints.
        timing: folder for the seconds per image, which differ from run to run; None: they are not written.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, kind = Path(folder), settings[method.kind]
    G = load_generator(folder / "generator.safetensors", device)
    run = solve(method, G, folder)
    values, shown, seconds = {}, [], 0.0
    for part in kind["sets"]:
        test = ImageDataset(f"{data}/{part}.zip", G.resolution)
        x = to_float(test.tensor(range(min(kind["n_images"], len(test))))).to(device)  # [N, 3, R, R]
        tables.synchronize(device)
        start = time.perf_counter()
        code, render = run(x)
        tables.synchronize(device)
        seconds += time.perf_counter() - start
        with torch.no_grad():
            y = render(code)
        values[part] = metrics.compare(y, x) | {"style_distance": metrics.style_distance(code.w, G)}
        shown.append(y[: settings["n_show"]].cpu())
    n_images = sum(len(v["mse"]) for v in values.values())
    values["native"] = editability(run, G, kind["n_native"])
    values = {part: {key: v.double().round(decimals=6) for key, v in found.items()} for part, found in values.items()}
    row = {"method": name, "kind": method.kind, "generator_passes": method.generator_passes}
    row |= {part: tables.summary(found) for part, found in values.items()}
    paths = {key: folder / f"{key}.safetensors" for key in ("generator", method.encoder, method.residual) if key}
    hashes = {key: file_hash(path) for key, path in paths.items()}
    head = tables.protocol(kind["n_images"], G.resolution, device=device, checkpoints=hashes)
    head["edits"] = "two deviations along the first three axes of W, forth and back; LPIPS AlexNet, mean over the edits"
    head["errors"] = "standard errors of the means over images"
    write_json(Path(out) / f"{name}.json", {"protocol": head, "row": row})
    images = [{"set": part, "image": i} | {key: v[i].item() for key, v in found.items()}
              for part, found in values.items() for i in range(len(found["style_distance"]))]  # fmt: skip
    tables.write_csv(Path(out) / f"{name}.csv", images, list(dict.fromkeys(key for one in images for key in one)))
    save_grid(torch.cat(shown), Path(out) / f"{name}.png", columns=sum(map(len, shown)))
    if timing:
        seconds = {"seconds_per_image": round(seconds / n_images, 6), "device": tables.device_name(device)}
        write_json(
            Path(timing) / f"{name}.json", {"method": name, "precision": "float32", "n_images": n_images} | seconds
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="study.rows", description=__doc__.split("\n\n")[0])
    parser.add_argument("method", help="entry of the section rows of params.yaml")
    parser.add_argument("--data", required=True, help="folder of the test sets")
    parser.add_argument("--checkpoints", required=True, help="folder of generator.safetensors and the encoders")
    parser.add_argument("--out", required=True, help="folder for METHOD.json, METHOD.csv and METHOD.png")
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
