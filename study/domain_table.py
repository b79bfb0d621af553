"""The inversion table of a domain, put together from the rows that `study.rows` measured one by one.

    python -m study.domain_table faces        table and figure of a domain of photographs

Notebook 08 has those of avatars.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from padinv.images.datasets import ImageDataset, to_float
from padinv.images.viz import panel, read_grid, show
from study import tables

LABELS = {
    "w": "optimisation in W", "w+": "optimisation in W+", "w+p": "optimisation in W+ & P", "pti": "PTI",
    "psp": "pSp", "e4e": "e4e", "restyle-psp": "ReStyle, pSp", "padinv": "PadInv", "restyle-padinv": "ReStyle, PadInv",
    "psp+100": "pSp + 100 steps", "psp+100-domain": "pSp + 100, in domain", "padinv+10": "PadInv + 10 steps",
    "padinv+100": "PadInv + 100 steps", "padinv+100-w": "PadInv + 100, W+ only",
    "padinv+100-domain": "PadInv + 100, in domain", "padinv-split": "PadInv, split",
}  # fmt: skip
COLUMNS = ["method", "mse", "psnr", "ssim", "lpips_alex", "lpips_vgg"]
OF_PHOTOGRAPHS = ("psp", "padinv", "padinv+10", "psp+100", "padinv+100")
SOURCES = {
    "faces": "UTKFace, tight crops of adults; non-commercial research only",
    "cats": "AFHQ cats, CC BY-NC 4.0",
}


def read_rows(folder: str | Path, methods: Iterable[str]) -> tuple[dict, dict[str, dict]]:
    """The rows of some methods: the protocol of the one with most images and the checkpoints of all; {method: row}.

    Raises ValueError if they differ in more than their number of images and the checkpoints that they used.
    """
    files = {method: json.loads(Path(folder, f"{method}.json").read_text()) for method in methods}
    protocol = max((file["protocol"] for file in files.values()), key=lambda p: p["n_images"])
    checkpoints = {}
    for file in files.values():
        checkpoints |= file["protocol"]["checkpoints"]
    for method, file in files.items():
        own = file["protocol"]
        expected = protocol | {key: own[key] for key in ("n_images", "checkpoints")}
        different = [key for key in expected if own.get(key) != expected[key]]
        different += [key for key, digest in own["checkpoints"].items() if digest != checkpoints[key]]
        if different:
            raise ValueError(f"{method}: not measured as the other rows ({', '.join(different)}); measure it again")
    return protocol | {"checkpoints": checkpoints}, {method: file["row"] for method, file in files.items()}


def same_images(rows: dict[str, dict]) -> list[dict]:
    """The first table: what each method does to the images that all of them inverted."""
    keys = ("edit_lpips", "style_distance", "generator_passes")
    return [{"method": method, **row["common"], **{key: row[key] for key in keys}} for method, row in rows.items()]


def all_images(rows: dict[str, dict]) -> list[dict]:
    """The second table: methods that are fast enough for more images."""
    return [row for row in rows.values() if row["n_images"] > row["common"]["n_images"]]


def note_of_avatars(protocol: dict, rows: dict[str, dict]) -> str:
    """What stands below both tables of notebook 08."""
    return (
        f"Test images of avatars at {protocol['resolution']}², in [−1, 1]; LPIPS v0.1. First table: the same images by "
        f"every method; second: the encoders on {protocol['n_images']:,} images, with the Fréchet distance of "
        f"{protocol['frechet']}. `+100`: steps of refinement, in W+ & P (psp, `-w`: in W+), `-domain`: held where "
        "the encoder maps back to, `-split`: trained on for blending. pti tunes the generator to each image and is "
        f"slow: {rows['pti']['n_images']} images. edit_lpips: LPIPS-Alex to the true result of moving along the main "
        "axes of W, on images of the generator; style_distance: 1 for codes of its mapping, 0 at their mean. "
        "generator_passes: images drawn for one inversion."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="study.domain_table", description=__doc__.split("\n\n")[0])
    parser.add_argument("domain", choices=SOURCES)
    domain = parser.parse_args(arguments).domain
    folder, results = f"{domain}-64", Path("results")
    protocol, rows = read_rows(results / folder / "rows", OF_PHOTOGRAPHS)
    many = all_images(rows)
    ratio = {key: rows["padinv"][key] / rows["psp"][key] for key in ("mse", "lpips_alex")}
    tables.write_table(
        results / "tables" / domain,
        same_images(rows),
        [*COLUMNS, "edit_lpips", "style_distance", "n_images"],
        tables.markdown_table(many, [*COLUMNS, "frechet", "n_images"]),
        f"Test images of {domain} at {protocol['resolution']}² ({SOURCES[domain]}), in [−1, 1]; LPIPS v0.1. First "
        f"table: the same images by every method; second: the encoders on {many[0]['n_images']:,}, where PadInv leaves "
        f"{ratio['mse']:.2f} of pSp's MSE and {ratio['lpips_alex']:.2f} of its LPIPS. Columns as in inversion.md.",
    )
    n, size = 8, protocol["resolution"]
    test = ImageDataset(f"data/{folder}/test.zip", size)
    shown = {"original": to_float(test.tensor(range(n), progress=False))}
    shown |= {LABELS[m]: read_grid(results / folder / "rows" / f"{m}.png", size, n) for m in rows}
    show(panel(shown), results / "figures" / f"{domain}.png")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"study.domain_table: {error}")
