"""The inversion table of a domain, put together from the rows that `study.rows` measured one by one.

    python -m study.domain_table faces        table and figure of a domain of photographs

Notebook 08 has those of avatars.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from padinv.images.datasets import ImageDataset, to_float
from padinv.images.viz import COLOURS, panel, read_grid, show
from study import tables

LABELS = {
    "w": "optimisation in W", "w+": "optimisation in W+", "w+p": "optimisation in W+ & P", "pti": "PTI",
    "psp": "pSp", "e4e": "e4e", "padinv": "PadInv",
    "padinv-w-alone": "PadInv, w alone", "padinv-f": "PadInv-F", "padinv-f-w-alone": "PadInv-F, w alone",
    "padinv-split": "PadInv, split", "psp+10": "pSp + 10 steps", "padinv+10": "PadInv + 10 steps",
    "padinv-f+10": "PadInv-F + 10 steps", "psp+100": "pSp + 100 steps", "padinv+100": "PadInv + 100 steps",
    "padinv+100-w": "PadInv + 100, W+ only", "padinv-f+100": "PadInv-F + 100 steps",
}  # fmt: skip
PAIRS = (  # of equal budgets: what is compared, and against what
    ("e4e", "psp"), ("padinv", "psp"), ("padinv-w-alone", "psp"), ("padinv-f", "psp"), ("padinv-f", "padinv"),
    ("padinv-f-w-alone", "psp"), ("padinv+10", "psp+10"), ("padinv-f+10", "psp+10"), ("padinv+100", "psp+100"),
    ("padinv+100", "padinv+100-w"), ("padinv-f+100", "psp+100"), ("w+p", "w+"),
)  # fmt: skip
METRICS = ("mse", "psnr", "ssim", "lpips_alex", "lpips_vgg", "style_distance")
OF_EDITS = ("native_lpips", "edit_lpips", "edit_nothing", "style_distance")
DISTANCES = ("mse", "lpips_alex", "lpips_vgg", "native_lpips", "edit_lpips")
OF_PHOTOGRAPHS = ("psp", "padinv", "padinv-w-alone", "padinv-f", "padinv+10", "padinv-f+10", "psp+100", "padinv+100")
SOURCES = {
    "faces": "UTKFace, tight crops of adults; non-commercial research only",
    "cats": "AFHQ cats, CC BY-NC 4.0",
}
Values = dict[str, dict[str, dict[str, Tensor]]]  # {method: {set: {metric: [N]}}}, of each image


def read_rows(folder: str | Path, methods: Iterable[str]) -> tuple[dict, dict[str, dict], Values]:
    """The rows of some methods: the protocol of the one with most images and the checkpoints of all; {method: row}; and
    the numbers of each image, float64, of the first images of the sets.

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
    values: Values = {}
    for method in files:
        with open(Path(folder, f"{method}.csv"), newline="") as file:
            lines = list(csv.DictReader(file))
        for part in dict.fromkeys(line["set"] for line in lines):
            own = [line for line in lines if line["set"] == part]
            keys = [key for key, value in own[0].items() if key not in ("set", "image") and value]
            found = {key: torch.tensor([float(line[key]) for line in own], dtype=torch.float64) for key in keys}
            values.setdefault(method, {})[part] = found
    return protocol | {"checkpoints": checkpoints}, {method: file["row"] for method, file in files.items()}, values


def colour(method: str) -> str:
    """Of a method in figures: one for codes without P, one for those with P, one for those with an interior too."""
    if method.endswith("alone") or not ("padinv" in method or method == "w+p"):
        return COLOURS["psp"]
    return COLOURS["mark" if "padinv-f" in method else "padinv"]


def count(of: dict[str, dict[str, Tensor]], part: str) -> int:
    """Images of a set that a method inverted."""
    return len(of[part]["style_distance"]) if part in of else 0


def on_first(values: Values, part: str, n: int) -> list[dict]:
    """A table of the first n images of a set, with all methods that inverted so many."""
    return [{"method": method, "set": part} | tables.summary({key: v[:n] for key, v in of[part].items()})
            for method, of in values.items() if count(of, part) >= n]  # fmt: skip


def on_same(rows: dict[str, dict], values: Values) -> list[dict]:
    """The whole table: for each kind of method (see `study.rows.Method.kind`) and each set, those of this kind and all
    that are faster, on the images that all of them inverted. Its columns `kind` and `set` say which."""
    kinds: dict[str, dict[str, int]] = {}
    for method, of in values.items():
        smallest = kinds.setdefault(rows[method]["kind"], {})
        for part in of:
            smallest[part] = min(smallest.get(part, sys.maxsize), count(of, part))
    passes = {method: {"generator_passes": row["generator_passes"]} for method, row in rows.items()}
    return [{"kind": kind} | line | passes[line["method"]]
            for kind, parts in kinds.items() for part, n in parts.items()
            for line in on_first(values, part, n)]  # fmt: skip


def ratios(values: Values, pairs: Iterable[tuple[str, str]] = PAIRS) -> list[dict]:
    """A table of ratios between methods, of each set that both inverted: `method` of `against`, on the same images."""
    found = []
    for method, against in pairs:
        for part in [part for part in values[method] if part in values[against]]:
            n = min(count(values[name], part) for name in (method, against))
            line = {"method": method, "against": against, "set": part, "n_images": n}
            for key in [key for key in DISTANCES if key in values[method][part]]:
                both = tables.ratio(*(values[name][part][key][:n] for name in (method, against)))
                line |= dict(zip((key, f"{key}_error"), both, strict=True))
            found.append(line)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="study.domain_table", description=__doc__.split("\n\n")[0])
    parser.add_argument("domain", choices=SOURCES)
    domain = parser.parse_args(arguments).domain
    folder, results = f"{domain}-64", Path("results")
    protocol, _, values = read_rows(results / folder / "rows", OF_PHOTOGRAPHS)
    few, many = (pick(count(of, "test") for of in values.values()) for pick in (min, max))
    edits = on_first(values, "native", min(count(of, "native") for of in values.values()))
    same = [line | {key: edit[key] for key in edit if key.startswith("edit")}
            for line, edit in zip(on_first(values, "test", few), edits, strict=True)]  # fmt: skip
    against_psp = ratios(values, [("padinv", "psp")])[0]
    tables.write_table(
        results / "tables" / domain,
        same,
        ["method", *METRICS, "edit_lpips", "edit_nothing", "n_images"],
        tables.markdown_table(on_first(values, "test", many), ["method", *METRICS, "n_images"]),
        f"Test images of {domain} at {protocol['resolution']}² ({SOURCES[domain]}), in [−1, 1]; LPIPS v0.1; means ± "
        f"standard errors. First table: the same images by every method, edits on {edits[0]['n_images']} images of the "
        f"generator; second: the encoders on {many:,}, where PadInv leaves {against_psp['mse']:.2f} of pSp's MSE and "
        f"{against_psp['lpips_alex']:.2f} of its LPIPS.",
    )
    n, size = 8, protocol["resolution"]
    test = ImageDataset(f"data/{folder}/test.zip", size)
    shown = {"original": to_float(test.tensor(range(n), progress=False))}
    shown |= {LABELS[m]: read_grid(results / folder / "rows" / f"{m}.png", size, n) for m in values}
    show(panel(shown), results / "figures" / f"{domain}.png", limit=400_000)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"study.domain_table: {error}")
