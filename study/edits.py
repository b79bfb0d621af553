"""Blends and customised edits, measured against their true results.

    python -m study.edits --data data/avatars-64 --checkpoints checkpoints/avatars-64 --results results

writes tables/editing.*, tables/editing_ablation.* and metrics/editing.json. Notebooks 04, 05 and 11 show some of it on
few images, by the functions here. Whatever is chosen is so on odd targets and even triples, and measured on the others.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from padinv.files.checkpoints import load_encoder, load_generator
from padinv.images.datasets import to_float
from padinv.inversion.editing import Edit, analogy, blend, customize
from padinv.inversion.optimise import draw, invert
from padinv.measure.lpips import check_images, lpips
from padinv.model.codes import Code
from padinv.model.encoder import Encoder
from padinv.model.generator import Generator
from padinv.model.tensors import file_hash, write_json
from study import tables
from study.sets import blending_set, editing_set

METHODS = {  # k: steps of refinement
    "nothing": "the target (of a blend: the contour), inverted by PadInv",
    "nothing+{k}": "refined",
    "psp": "W+ only: the offset of the pair's pSp codes",
    "padinv": "padinv.customize: offset in P; padinv.blend",
    "padinv-w": "offset in W+, P kept",
    "padinv-wp": "offset in both",
    "padinv+{k}": "target or contour refined",
    "drawn": "padinv.analogy, inverted by PadInv",
    "drawn+{k}": "and refined in W+ & P",
    "psp-drawn+{k}": "the same drawing, inverted by pSp, refined in W+",
    "drawing": "the drawing, not inverted",
    "mix": "pSp, W+ of the details from the best cut on",
    "mix-plain": "likewise, with P of the contour, plain PadInv",
    "mix-padinv": "likewise, the encoder to edit with",
    "interpolation": "half way between the codes",
    "plain": "P of the contour, W+ of the details, plain PadInv",
}


def networks(folder: str | Path, encoder: str, device: torch.device | str) -> tuple[Generator, dict[str, Encoder]]:
    """The generator, and the encoders "psp", "padinv" and, to edit with, "edit", which is the one called `encoder`."""
    names = {"psp": "psp", "padinv": "padinv", "edit": encoder}
    G = load_generator(f"{folder}/generator.safetensors", device)
    return G, {key: load_encoder(f"{folder}/{name}.safetensors", device) for key, name in names.items()}


def every_second(roles: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
    """Of uint8 images by role every second from `first` on, as floats; a pair is shared."""
    return {role: to_float(x if len(x) == 1 else x[first::2][:count]) for role, x in roles.items()}


def triples(data: str, G: Generator, n_choice: int, n_kept: int) -> list[dict[str, Tensor]]:
    """Blends to choose on and to measure on: {"a", "b", "truth": [N, 3, R, R]} each."""
    roles = {role: x.to(G.const.device) for role, x in blending_set(f"{data}/blending.zip", G.resolution).items()}
    return [every_second(roles, first, count) for first, count in ((0, n_choice), (1, n_kept))]


def targets(data: str, G: Generator, n_choice: int, n_kept: int) -> list[dict[str, dict[str, Tensor]]]:
    """Edits to choose on and to measure on: {edit: {"before", "after", "targets", "truths"}} each, of [N, 3, R, R]."""
    sets = {edit: {role: x.to(G.const.device) for role, x in roles.items()}
            for edit, roles in editing_set(f"{data}/editing.zip", G.resolution).items()}  # fmt: skip
    return [{edit: every_second(roles, first, count) for edit, roles in sets.items()}
            for first, count in ((1, n_choice), (0, n_kept))]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Ways to blend and to edit


def mix(contour: Code, details: Code, cut: int) -> Code:
    """Style mixing: of the details the w from `cut` on, and P of the contour if there is one."""
    return blend(contour, details, w=[float(i >= cut) for i in range(contour.w.shape[1])])


def every_cut(G: Generator, contour: Code, details: Code, truth: Tensor) -> list[float]:
    """Mean LPIPS to the true blends of style mixing at each cut."""
    return [distance(draw(mix(contour, details, cut), G), truth) for cut in range(G.num_ws)]


def blends(
    G: Generator, E: dict[str, Encoder], choice: dict[str, Tensor], kept: dict[str, Tensor], steps: int
) -> dict[str, Code]:
    """Codes of the blends of `kept` by each method; style mixing cuts where it is best on `choice`."""
    pairs = {m: [[invert(x[role], E[m], G, batch=50) for role in "ab"] for x in (choice, kept)] for m in E}
    found = {}
    for method, name in (("psp", "mix"), ("padinv", "mix-plain"), ("edit", "mix-padinv")):
        chosen, measured = pairs[method]
        curve = every_cut(G, *chosen, choice["truth"])
        found[name] = mix(*measured, cut=curve.index(min(curve)))
    a, b = pairs["edit"][1]
    mine, sharp = blend(a, b), invert(kept["a"], E["edit"], G, steps=steps)
    return found | {
        "nothing": a,
        "interpolation": 0.5 * (a + b),
        "plain": blend(*pairs["padinv"][1]),
        "padinv": mine,
        f"padinv+{steps}": sharp + (mine - a),
    }


def offsets(G: Generator, E: dict[str, Encoder], roles: dict[str, Tensor], steps: int) -> dict[str, Code]:
    """Codes of the targets of one edit, with the offset that its pair defines, by each method."""
    psp, mine = (
        {role: invert(roles[role], E[m], G) for role in ("targets", "before", "after")} for m in ("psp", "edit")
    )
    x, *pair = mine.values()
    sharp = invert(roles["targets"], E["edit"], G, steps=steps)
    return {
        "nothing": x,
        "psp": customize(*psp.values()),
        "padinv": customize(x, *pair),
        "padinv-w": Edit.between(*pair, w=1, const=0, rings=0)(x),
        "padinv-wp": Edit.between(*pair, w=1)(x),
        f"nothing+{steps}": sharp,
        f"padinv+{steps}": customize(sharp, *pair),
    }


def drawings(G: Generator, E: dict[str, Encoder], roles: dict[str, Tensor], steps: int) -> dict[str, Code | Tensor]:
    """Codes of the targets of one edit, drawn into them and inverted, by each method; and the drawings themselves."""
    x = analogy(roles["targets"], roles["before"], roles["after"])
    return {
        "drawn": invert(x, E["edit"], G),
        f"psp-drawn+{steps}": invert(x, E["psp"], G, steps=steps, space="w+"),
        f"drawn+{steps}": invert(x, E["edit"], G, steps=steps),
        "drawing": x,
    }


def places(G: Generator, E: Encoder, roles: dict[str, Tensor], steps: int) -> dict[str, Code]:
    """Where an edit belongs: codes of the targets of one edit, by its offset in parts of W+ & P, cut to where it is
    large, between refined codes, and averaged from true pairs, which no method knows; and by copying and drawing."""
    codes = {role: invert(x, E, G) for role, x in roles.items()}
    fine = {role: invert(roles[role], E, G, steps=steps) for role in ("targets", "before", "after")}
    (x, *pair), (sharp, *sharp_pair) = ([c[role] for role in ("targets", "before", "after")] for c in (codes, fine))
    early = [float(i < G.num_ws // 2) for i in range(G.num_ws)]
    coarse = [float(i < 2) for i in range(len(x.p.rings))]
    parts = {"W+": (1, 0, 0), "W+, first half": (early, 0, 0), "W+ & P": (1, 1, 1), "P": (0, 1, 1),
             "constant": (0, 1, 0), "rings": (0, 0, 1), "constant, rings 4² and 8²": (0, 1, coarse)}  # fmt: skip
    plain, refined = Edit.between(*pair), Edit.between(*sharp_pair)
    found = {"nothing": x}
    found |= {name: Edit.between(*pair, w=w, const=c, rings=r)(x) for name, (w, c, r) in parts.items()}
    found["P, strength 0.7"] = plain(x, 0.7)
    found |= {f"P, where it exceeds {share:.0%}": where_large(plain, share)(x) for share in (0.2, 0.5)}
    found["P, refined pair"] = refined(x)
    found["nothing, refined targets"] = sharp
    found["P, refined targets"] = plain(sharp)
    found["P, all refined"] = refined(sharp)
    found["constant offset of the true pairs"] = Edit.between(x, codes["truths"], w=1)(x)
    copied = torch.where(roles["before"] != roles["after"], roles["after"], roles["targets"])
    found["copied, then inverted"] = invert(copied, E, G)
    found["drawn, then inverted"] = invert(analogy(roles["targets"], roles["before"], roles["after"]), E, G)
    return found


def where_large(edit: Edit, share: float) -> Edit:
    """The edit at those positions of each map where it exceeds a share of its largest difference there."""
    norms = [t.norm(dim=1, keepdim=True) for t in edit.offset.tensors]
    keep = iter([norm > share * norm.amax() for norm in norms])
    return Edit(edit.offset.map(lambda t: t * next(keep)), edit.name)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def distance(y: Tensor, truth: Tensor) -> float:
    """Mean LPIPS-Alex between images and their true results."""
    return lpips("alex", y.device)(y.clamp(-1, 1), truth).mean().item()


@torch.no_grad()
def by_region(y: Tensor, truth: Tensor, source: Tensor) -> dict[str, dict[str, Tensor]]:
    """Distances of edited images from the true results, in the pixels that should change and in those that should not.

    Args:
        y: edited images [N, 3, R, R] in [−1, 1]; overshoot is clamped.
        truth: their true results.
        source: the images before the edit. A pixel should change where truth and source differ at all.

    Returns:
        {"all" | "changed" | "kept": {"mse", "lpips_alex": [N] on the CPU}}: the mean square over the pixels of the
        region; and LPIPS between the truth and y inside the region with the truth around it, so that only the region
        can differ. Both are 0 where the region is empty.

    Raises:
        TypeError, ValueError: not images, or of different shapes.
    """
    for name, image in (("y", y), ("truth", truth), ("source", source)):
        check_images(name, image)
        if image.shape != y.shape:
            raise ValueError(f"{name}: expected the shape of y, {list(y.shape)}, got {list(image.shape)}")
    perceptual, found = lpips("alex", y.device), {}
    for part, true, old in zip(y.clamp(-1, 1).split(64), truth.split(64), source.split(64), strict=True):
        features, changed = perceptual.features(true), (true != old).any(dim=1, keepdim=True)  # [n, 1, R, R]
        for region, where in {"all": torch.ones_like(changed), "changed": changed, "kept": ~changed}.items():
            inside = torch.where(where, part, true)
            pixels = 3 * where.sum(dim=(1, 2, 3)).clamp_min(1)
            values = found.setdefault(region, {"mse": [], "lpips_alex": []})
            values["mse"].append((inside - true).square().sum(dim=(1, 2, 3)) / pixels)
            values["lpips_alex"].append(perceptual.distance(perceptual.features(inside), features))
    return {region: {key: torch.cat(v).cpu() for key, v in values.items()} for region, values in found.items()}


def region_rows(task: str, method: str, y: Tensor, truth: Tensor, source: Tensor) -> list[dict]:
    """Means of `by_region` as rows of results/metrics/editing.json."""
    found = by_region(y, truth, source)
    means = {region: {key: round(v.double().mean().item(), 6) for key, v in found[region].items()} for region in found}
    return [{"task": task, "method": method, "region": r, **means[r], "n_images": len(y)} for r in means]


def mean_rows(task: str, several: Sequence[list[dict]]) -> list[dict]:
    """One row of each region, the means over several tasks' `region_rows` of one method."""
    return [
        {**same[0], "task": task, "n_images": sum(row["n_images"] for row in same)}
        | {key: round(sum(row[key] for row in same) / len(same), 6) for key in ("mse", "lpips_alex")}
        for same in zip(*several, strict=True)
    ]


def measure(G: Generator, found: dict[str, dict[str, Code | Tensor]], sets: dict[str, dict[str, Tensor]]) -> list[dict]:
    """Rows of each method's {edit: {method: codes or images}}: the means over the edits as task "edits", then each."""
    rows = []
    for method in next(iter(found.values())):
        each = []
        for edit, roles in sets.items():
            y = found[edit][method]
            y = y if isinstance(y, Tensor) else draw(y, G)
            each.append(region_rows(edit, method, y, roles["truths"], roles["targets"]))
        rows += sum([mean_rows("edits", each), *each], [])
    return rows


def wide(rows: Sequence[dict]) -> list[dict]:
    """One line for each task and method, with a column for each region."""
    lines = {}
    for row in rows:
        line = {key: row[key] for key in ("task", "method", "n_images")}
        line = lines.setdefault((row["task"], row["method"]), line)
        line |= {f"{key.split('_')[0]}_{row['region']}": row[key] for key in ("lpips_alex", "mse")}
    return list(lines.values())


def write(data: str, checkpoints: str, results: str, encoder: str, settings: dict) -> None:
    """Measure everything, and write the tables and metrics.

    Args:
        data: folder of blending.zip and editing.zip.
        checkpoints: folder of the networks.
        results: folder of tables/ and metrics/.
        encoder: name of the one to edit with.
        settings: section `customized_editing` of params.yaml.
    """
    device, k = "cuda" if torch.cuda.is_available() else "cpu", settings["refine_steps"]
    G, E = networks(checkpoints, encoder, device)
    choice, kept = targets(data, G, settings["n_choice"], settings["n_targets"])
    found = {edit: places(G, E["edit"], roles, k) for edit, roles in tqdm(choice.items(), "where edits belong")}
    lines = [line | {"edit": line["method"]} for line in wide(measure(G, found, choice)) if line["task"] == "edits"]
    columns = ["edit", "lpips_changed", "lpips_kept", "lpips_all", "mse_changed", "mse_kept", "n_images"]
    tables.write_table(f"{results}/tables/editing_ablation", lines, columns)

    other, x = triples(data, G, settings["n_triples"], settings["n_triples"])
    rows = [region_rows("blend", method, draw(code, G), x["truth"], x["a"])[0]
            for method, code in blends(G, E, other, x, k).items()]  # fmt: skip
    found = {edit: offsets(G, E, roles, k) | drawings(G, E, roles, k) for edit, roles in tqdm(kept.items(), "edits")}
    rows += measure(G, found, kept)

    names = ("generator", "psp", "padinv", encoder)
    head = tables.protocol(
        0, G.resolution, "", device, {name: file_hash(f"{checkpoints}/{name}.safetensors") for name in names}
    )
    head = {key: head[key] for key in ("resolution", "image_range", "lpips_alex", "device", "packages", "checkpoints")}
    head |= {
        "methods": {name.format(k=k): text for name, text in METHODS.items()},
        "encoder": encoder,
        "refinement": f"+{k}: steps of padinv.invert",
        "regions": "changed: pixels where truth and source differ; kept: the others. LPIPS: true pixels around them",
        "choices": "on odd targets and even triples; these are the even targets and odd triples",
    }
    write_json(f"{results}/metrics/editing.json", {"protocol": head, "rows": rows})

    few = ("nothing", "psp", "padinv", f"drawn+{k}")  # of single edits; the JSON has all
    lines = [line for line in wide(rows) if line["task"] in ("blend", "edits") or line["method"] in few]
    lines.sort(key=lambda line: ("blend", "edits", *kept).index(line["task"]))
    columns = ["task", "method", *(f"{key}_{r}" for key in ("lpips", "mse") for r in ("changed", "kept", "all"))]
    note = (
        f"Even targets ({settings['n_targets']} of each edit) and odd triples of {Path(data).name.split('-')[0]} at "
        f"{G.resolution}²; LPIPS v0.1, AlexNet. Choices were made on the others. `+{k}`: steps of refinement. Methods: "
        "editing.json."
    )
    tables.write_table(f"{results}/tables/editing", lines, [*columns, "n_images"], note)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="study.edits", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder of blending.zip and editing.zip")
    parser.add_argument("--checkpoints", required=True, help="folder of the generator and the encoders")
    parser.add_argument("--results", required=True, help="folder for tables/ and metrics/")
    parser.add_argument("--encoder", default="padinv-split", help="to edit with (default: %(default)s)")
    parser.add_argument("--params", default="params.yaml", help="parameters (default: %(default)s)")
    args = parser.parse_args(arguments)
    import yaml

    try:
        settings = yaml.safe_load(Path(args.params).read_text())["customized_editing"]
        write(args.data, args.checkpoints, args.results, args.encoder, settings)
    except (ValueError, OSError) as error:
        sys.exit(f"study.edits: {error}")


if __name__ == "__main__":
    main()
