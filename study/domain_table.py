"""The inversion table and the figure of a domain of photographs: python -m study.domain_table faces"""

import argparse
import json
import sys
from pathlib import Path

from padinv.images.datasets import ImageDataset, to_float
from padinv.images.viz import panel, read_grid, show
from padinv.model.tensors import atomic_write
from study import tables

METHODS = {
    "psp": "pSp", "padinv": "PadInv", "padinv+10": "PadInv + 10 steps", "psp+100": "pSp + 100 steps",
    "padinv+100": "PadInv + 100 steps",
}  # fmt: skip
SOURCES = {
    "faces": "UTKFace, tight crops of adults; non-commercial research only",
    "cats": "AFHQ cats, CC BY-NC 4.0",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="study.domain_table", description=__doc__)
    parser.add_argument("domain", choices=SOURCES)
    domain = parser.parse_args(arguments).domain
    folder, results = f"{domain}-64", Path("results")
    files = {m: json.loads((results / folder / "rows" / f"{m}.json").read_text()) for m in METHODS}
    protocols = [file["protocol"] for file in files.values()]
    same = ("resolution", "image_range", "lpips_alex", "packages")
    if any(p[key] != protocols[0][key] for p in protocols for key in same):
        sys.exit(f"table: the rows of {domain} were not measured alike ({', '.join(same)}); measure them again")

    columns = ["method", "mse", "psnr", "ssim", "lpips_alex", "lpips_vgg", "edit_lpips", "style_distance", "n_images"]
    common = [{**file["row"], **file["row"]["common"], "method": m} for m, file in files.items()]
    fast = [file["row"] for file in files.values() if file["row"]["n_images"] > file["row"]["common"]["n_images"]]
    target = results / "tables" / domain
    second = tables.markdown_table(fast, [*columns[:6], "frechet", "n_images"])
    first = tables.write_table(common, columns, f"{target}.csv", f"{target}.md")
    head, row = protocols[0], {m: file["row"] for m, file in files.items()}
    ratio = {key: row["padinv"][key] / row["psp"][key] for key in ("mse", "lpips_alex")}
    note = (
        f"Test images of {domain} at {head['resolution']}² ({SOURCES[domain]}), in [−1, 1]; LPIPS v0.1. First table: "
        f"the same images by every method; second: the encoders on {fast[0]['n_images']:,}, where PadInv leaves "
        f"{ratio['mse']:.2f} of pSp's MSE and {ratio['lpips_alex']:.2f} of its LPIPS. Columns as in inversion.md."
    )
    atomic_write(f"{target}.md", f"{first}\n{second}\n{note}\n".encode())

    n = 8
    test = ImageDataset(f"data/{folder}/test.zip", head["resolution"])
    rows = {"original": to_float(test.tensor(range(n), progress=False))}
    pictures = results / folder / "rows"
    rows |= {name: read_grid(pictures / f"{m}.png", head["resolution"], n) for m, name in METHODS.items()}
    show(panel(rows), results / "figures" / f"{domain}.png")


if __name__ == "__main__":
    main()
