"""Invert faces of another data set, FFHQ, which no training used, as padinv invert does.

python elsewhere.py sources/ffhq-256-sample.zip      in this folder, after dvc repro train-encoder@faces-padinv-f

Writes results/tables/faces-elsewhere.*, a row for each way to invert, and results/figures/faces-elsewhere.png of faces
that are hard. What was found lies in runs/faces-elsewhere; the same command again does only what is missing there.
"""

import sys
import zipfile
from pathlib import Path

import torch

from padinv.images.viz import panel, read_grid, show
from padinv.photos.folder import Results, invert_photos
from study.tables import summary, write_table

WAYS = {  # the encoder, steps of gradient, and what they move
    "PadInv": ("padinv", 0, "w+p"),
    "PadInv-F": ("padinv-f", 0, "w+p"),
    "W+ by search": (None, 100, "w+"),
    "W+ & P by search": (None, 100, "w+p"),
    "PadInv + 100 steps": ("padinv", 100, "w+p"),
}
COUNT = 64  # photographs, the first by name
HARD = [f"ffhq{i:05d}" for i in (27, 47, 50, 10, 46, 52, 61, 44)]  # hands, hats, glasses, from the side
METRICS = ["mse", "psnr", "ssim", "lpips_alex"]
NOTE = """{n} faces of FFHQ at 64², found in whole photographs and framed as those of UTKFace (`padinv invert --crop
tight --largest`); means ± standard errors. Steps of gradient are from the encoder's answer, of a search from the mean
w."""


def network(name: str) -> str:
    return f"checkpoints/faces-64/{name}.safetensors"


def main(photographs: str) -> None:
    rows, pictures, place = [], {}, Path("runs/faces-elsewhere")
    with zipfile.ZipFile(photographs) as file:
        file.extractall(place / "photographs", sorted(file.namelist())[:COUNT])
    for way, (encoder, steps, space) in WAYS.items():
        out = place / way.replace(" ", "-")
        invert_photos([place / "photographs"], network("generator"), encoder and network(encoder), out, steps=steps,
                      space=space, template="tight", largest=True, pasted=False, batch=16)  # fmt: skip
        records = Results(out, numbered=True, pasted=False).records.values()
        faces = [record["faces"][0] for record in records if "error" not in record]
        values = {key: torch.tensor([face[key] for face in faces]) for key in METRICS}
        rows.append({"way": way, "steps": steps} | summary(values))
        pairs = torch.stack([read_grid(out / f"compare/{name}-1.png", 64, 2) for name in HARD])  # [N, 2, 3, 64, 64]
        pictures["original"], pictures[way] = pairs.unbind(dim=1)
    columns = ["way", "steps", *METRICS, "n_images"]
    whole = (rows, [*columns, *(f"{name}_error" for name in METRICS)])
    write_table("results/tables/faces-elsewhere", rows, columns, NOTE.format(n=rows[0]["n_images"]), whole=whole)
    show(panel(pictures, cell=64), "results/figures/faces-elsewhere.png", limit=150_000)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("elsewhere.py: expected a zip of photographs")
    main(sys.argv[1])
