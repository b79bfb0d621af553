"""A row of the ablation: a small encoder that differs from PadInv's in one thing, drawn with its P and from w alone.

    python -m study.ablation L2 --data data/avatars-128 --generator generator.safetensors --encoder L2.safetensors \\
        --out results/ablation

writes results/ablation/L2.json (means and standard errors by set) and L2.csv (image by image).
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from padinv.files.checkpoints import load_encoder, load_generator
from padinv.images.datasets import ImageDataset, to_float
from padinv.inversion.optimise import draw, invert
from padinv.measure import metrics
from padinv.model.codes import Code
from padinv.model.encoder import Encoder
from padinv.model.generator import Generator
from padinv.model.tensors import file_hash, read_metadata, write_json
from padinv.ops.memory import keep_memory
from study import tables
from study.rows import editability

SETS = ("inside", "outside")
MEASURES = ("mse", "lpips_alex", "w_mse", "w_lpips_alex", "style_distance")
GROUPS = {  # methods of section train_ablation of params.yaml, by what they vary
    "chance": {"padinv": "PadInv: L = 4, constant, W+ and P", "seed-1": "from another seed"},
    "where P is": {
        "w-only": "nowhere: W+ alone (pSp)", "L0": "L = 0: the constant alone", "L1": "L = 1", "L2": "L = 2",
        "L3": "L = 3", "L5": "L = 5", "L6": "L = 6", "no-const": "L = 4, no constant",
        "interior-8": "and an interior of 8²", "interior-16": "and an interior of 16²",
        "interior-32": "and an interior of 32²",
    },
    "how P is predicted": {
        "centre": "one map, cut at its centre",
        "wide": "by a branch of 256 channels", "outright": "by it, outright: no offset from the generator's own",
        "released": "by it, outright, cut at the centre: as released", "shared-head": "one head for all rings",
        "modulated": "before the style modulates it",
    },
    "what holds w to the image": {
        "shared-none": "nothing: the losses of the paper", "norm-0": "nothing, and no norm of w",
        "p-drop": "P dropped for half of the images", "w-first": "w alone for the first third",
        "hinge": "a hinge in place of the norm of w", "edited": "edits of the generator's own images",
    },
}  # fmt: skip


def measure(E: Encoder, G: Generator, x: Tensor) -> dict[str, Tensor]:
    """MEASURES of each image of x [N, 3, R, R]: w_… of what its w draws without its P. [N] each, on the CPU."""
    code = invert(x, E, G)
    found = {}
    for prefix, part in {"": code, "w_": Code(code.w)}.items():
        values = metrics.compare(draw(part, G), x, nets=("alex",))
        found |= {prefix + key: values[key] for key in ("mse", "lpips_alex")}
    return found | {"style_distance": metrics.style_distance(code.w, G).cpu()}


def write_row(name: str, generator: str, encoder: str, data: str, n_images: int, n_native: int, out: Path) -> None:
    """NAME.json and NAME.csv in `out`: how an encoder was trained, the first images of each set through it, and its
    edits of images of the generator. The arguments are those of the command.

    Raises ValueError as `load_generator` and `load_encoder` do.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    G, E = load_generator(generator, device), load_encoder(encoder, device)
    sets = {}
    for part in SETS:
        images = ImageDataset(f"{data}/{part}.zip", G.resolution)
        sets[part] = to_float(images.tensor(range(min(n_images, len(images))))).to(device)  # [N, 3, R, R]
    found = {part: measure(E, G, x) for part, x in sets.items()}
    found = {part: {key: v.double().round(decimals=6) for key, v in own.items()} for part, own in found.items()}
    row = {"method": name} | {part: tables.summary(own) for part, own in found.items()}
    row["native"] = tables.summary(
        editability(lambda images: (invert(images, E, G), lambda code: draw(code, G)), G, n_native)
    )
    hashes = {"generator": file_hash(generator), name: file_hash(encoder)}
    head = tables.protocol(max(map(len, sets.values())), G.resolution, device=device, checkpoints=hashes)
    trained = json.loads(read_metadata(encoder)["meta"])
    write_json(out / f"{name}.json", {"protocol": head, "row": row, "trained": trained})
    images = [{"set": part, "image": i} | {key: v[i].item() for key, v in own.items()}
              for part, own in found.items() for i in range(len(own["mse"]))]  # fmt: skip
    tables.write_csv(out / f"{name}.csv", images, ["set", "image", *MEASURES])


def read_rows(folder: str | Path) -> tuple[dict, dict[str, dict], dict[str, dict[str, dict[str, Tensor]]]]:
    """Of the methods of GROUPS that were measured, in its order: their protocol, with the checkpoints of all; {method:
    row}; and {method: {set: {measure: [N]}}}.

    Raises ValueError if they are of different images, generators or ways to measure.
    """
    names = [name for group in GROUPS.values() for name in group if Path(folder, f"{name}.json").is_file()]
    files = [json.loads(Path(folder, f"{name}.json").read_text()) for name in names]
    protocol = dict(files[0]["protocol"], checkpoints={}) if files else {}
    values = {}
    for name, file in zip(names, files, strict=True):
        own = file["protocol"]["checkpoints"]
        if file["protocol"] | {"checkpoints": {}} != protocol | {"checkpoints": {}} or (
            protocol["checkpoints"].get("generator", own["generator"]) != own["generator"]
        ):
            raise ValueError(f"{folder}: {name} was measured otherwise than {names[0]}; measure it again")
        protocol["checkpoints"] |= own
        with open(Path(folder, f"{name}.csv"), newline="") as lines:
            lines = list(csv.DictReader(lines))
        values[name] = {
            part: {key: torch.tensor([float(line[key]) for line in lines if line["set"] == part]).double()
                   for key in MEASURES} for part in SETS
        }  # fmt: skip
    return protocol, {name: file["row"] for name, file in zip(names, files, strict=True)}, values


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="study.ablation", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", help="a method of section train_ablation of params.yaml")
    parser.add_argument("--data", required=True, help="folder of inside.zip and outside.zip")
    parser.add_argument("--generator", required=True, metavar="FILE")
    parser.add_argument("--encoder", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, help="folder for NAME.json and NAME.csv")
    parser.add_argument("--n_images", type=int, default=120, help="of each set (default: %(default)s)")
    parser.add_argument("--n_native", type=int, default=100, help="images of the generator (default: %(default)s)")
    args = parser.parse_args(arguments)
    keep_memory()
    try:
        if args.name not in (known := [name for group in GROUPS.values() for name in group]):
            raise ValueError(f"name: expected one of {known}, got {args.name!r}")
        write_row(**vars(args) | {"out": Path(args.out)})
    except (ValueError, OSError) as error:
        sys.exit(f"study.ablation: {error}")


if __name__ == "__main__":
    main()
