"""Blends and customised edits, measured against their true results.

    python -m study.edits --data data/avatars-128 --checkpoints checkpoints/avatars-128 --results results

writes tables/editing.*, tables/editing_ablation.* and metrics/editing.json. Notebooks 04, 05 and 11 show some of it on
few images, by the functions here. Whatever is chosen is so on odd targets, or on two of four triples, and measured on
the others; at each number of steps on the same images, by every method.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from padinv.files.checkpoints import load_encoder, load_generator
from padinv.images.datasets import to_float
from padinv.inversion.editing import Edit, analogy, blend
from padinv.inversion.optimise import draw, invert
from padinv.measure.lpips import LPIPS, check_images, lpips
from padinv.model.codes import Code
from padinv.model.encoder import Encoder
from padinv.model.generator import Generator
from padinv.model.tensors import file_hash, write_json
from padinv.ops import take_ring
from study import tables
from study.sets import blending_set, editing_set

ENCODERS = ("psp", "padinv", "padinv-f", "padinv-split")  # of a folder those that it has
EDITORS = ENCODERS[:3]  # the last is for blends
PLAIN = ("W+", "P", "W+ & P")  # formulas of offsets that the table has of every encoder, beside its best
STRENGTHS = (0.7, 1.3)  # of a formula, beside 1
MORE_PAIRS = 4  # of an edit, where several are averaged
TASKS = {"inside": "edits inside", "outside": "edits outside", "blend": "blends"}  # beside single edits
REGIONS = ("lpips_changed", "lpips_kept", "lpips_all", "lpips_vgg")  # columns of pages
OF_PSP = "of_psp"  # lpips_all, as a share of pSp's by the same means (of a blend by style mixing) on the same images
METHODS = {
    "nothing": "the target, or of a blend the contour, inverted",
    "mix": "w of the pair's `after`, from the target's code the others and P; of a blend the w of the details",
    "offset": "the offset of the pair's codes, in some parts",
    "copied": "what the pair changes, pasted into the target, then inverted",
    "drawn": "padinv.analogy, inverted",
    "drawing": "the drawing, not inverted",
    "blend": "padinv.blend: P of the contour, W+ of the details",
    "interpolation": "half way between the codes",
}


class Way(NamedTuple):
    """A row of the table."""

    method: str  # of METHODS
    encoder: str = ""
    part: str = ""  # of the code
    steps: int = 0  # of refinement, of the image that is edited


def networks(folder: str | Path, device: torch.device | str, names: Sequence[str] = ENCODERS):
    """The generator, and the encoders of these names that the folder has: (Generator, {name: Encoder})."""
    G = load_generator(f"{folder}/generator.safetensors", device)
    there = {name: path for name in names if (path := Path(folder, f"{name}.safetensors")).exists()}
    return G, {name: load_encoder(path, device) for name, path in there.items()}


def triples(data: str, G: Generator, n_choice: int, n_kept: int) -> list[dict[str, Tensor]]:
    """Blends to choose on and to measure on, of both kinds in turns: {"a", "b", "truth": [N, 3, R, R]} each."""
    roles = {
        role: to_float(x).to(G.const.device) for role, x in blending_set(f"{data}/blending.zip", G.resolution).items()
    }
    second = torch.arange(len(roles["a"])) % 4 > 1
    return [{role: x[chosen][:count] for role, x in roles.items()}
            for chosen, count in ((~second, n_choice), (second, n_kept))]  # fmt: skip


def targets(data: str, G: Generator, n_choice: int, n_kept: int, kinds: str = "") -> list[dict[str, dict[str, Tensor]]]:
    """Edits to choose on and to measure on, of kinds such as "glasses hair" ("": all) in both domains, those inside
    first: {edit: {"before", "after", "targets", "truths"}} each, of [N, 3, R, R]; those to choose on have more pairs,
    "more_before" and "more_after"."""
    sets = editing_set(f"{data}/editing.zip", G.resolution)
    names = [edit for edit in sets if not kinds or edit.removesuffix("_outside") in kinds.split()]
    names.sort(key=domain)
    choice, kept = {}, {}
    for edit in names:
        roles = {role: to_float(x).to(G.const.device) for role, x in sets[edit].items()}
        pair = {role: roles.pop(role) for role in ("before", "after")}
        choice[edit] = pair | {role: x[1::2][:n_choice] for role, x in roles.items()}
        kept[edit] = pair | {role: x[0::2][:n_kept] for role, x in roles.items()}
        for role, more in (("targets", "more_before"), ("truths", "more_after")):
            choice[edit][more] = roles[role][1::2][n_choice : n_choice + MORE_PAIRS]
    return [choice, kept]


def domain(edit: str) -> str:
    """Whether the generator knows what an edit adds."""
    return "outside" if edit.endswith("_outside") else "inside"


# ----------------------------------------------------------------------------------------------------------------------
# Ways to blend and to edit


def mix(contour: Code, details: Code, cut: int) -> Code:
    """Style mixing: of the details the w from `cut` on, and P of the contour if there is one."""
    return blend(contour, details, w=[float(i >= cut) for i in range(contour.w.shape[1])])


def every_cut(G: Generator, contour: Code, details: Code, truth: Tensor) -> list[float]:
    """Mean LPIPS to the true blends of style mixing at each cut."""
    return [distance(draw(mix(contour, details, cut), G), truth) for cut in range(G.num_ws)]


def at_both(encoder: str, x: Code, sharp: Code, codes: dict[tuple[str, str], Code], steps: int) -> dict[Way, Code]:
    """Edited codes by (method, part), and the same edits of refined codes: `sharp` are those of x."""
    found = {}
    for (method, part), code in codes.items():
        found[Way(method, encoder, part)] = code
        found[Way(method, encoder, part, steps)] = sharp + (code - x)
    return found


def blends(
    G: Generator, E: dict[str, Encoder], choice: dict[str, Tensor], kept: dict[str, Tensor], steps: int
) -> dict[Way, Code]:
    """Codes of the blends of `kept` by each method; style mixing cuts where it is best on `choice`."""
    found = {}
    for name, encoder in E.items():
        (one, other), (a, b) = ([invert(x[role], encoder, G) for role in "ab"] for x in (choice, kept))
        curve = every_cut(G, one, other, choice["truth"])
        cut = curve.index(min(curve))
        codes = {("nothing", ""): a, ("interpolation", ""): 0.5 * (a + b), ("mix", f"w from {cut} on"): mix(a, b, cut)}
        if a.p is not None:
            codes["blend", ""] = blend(a, b)
        found |= at_both(name, a, invert(kept["a"], encoder, G, steps=steps), codes, steps)
    return found


def where(roles: dict[str, Tensor]) -> Tensor:
    """The pixels that a pair changes: bool [1, 1, R, R]."""
    return (roles["before"] != roles["after"]).any(dim=1, keepdim=True)


def local(edit: Edit, changed: Tensor) -> Edit:
    """The edit with its P only where the pair's images differ, bool [1, 1, R, R]; W+, which has no place, is whole."""

    def kept(t: Tensor) -> Tensor:
        if t.ndim == 4:  # the constant, the interior: [1, C, r, r]
            return t * F.adaptive_max_pool2d(changed.to(t), t.shape[-1])
        near = F.adaptive_max_pool2d(changed.to(t), t.shape[-1] // 4 - 1)  # a ring: [1, C, 4(r + 1)]
        return t * take_ring(F.pad(near, (1,) * 4, mode="replicate"))

    return Edit(Code(edit.offset.w, edit.offset.p.map(kept)), edit.name)


def formulas(before: Code, after: Code, changed: Tensor) -> dict[str, Edit]:
    """Edits that a pair's codes define, by the part of the code that they are in: as they are, with P only where the
    pair's images differ, and each at several strengths. Names are those of the tables."""
    half = [float(i < before.w.shape[1] // 2) for i in range(before.w.shape[1])]
    kept = {"const": 0, "rings": 0, "interior": 0}
    parts = {"W+": {"w": 1} | kept, "half of W+": {"w": half} | kept}
    if before.p is not None:
        parts |= {"P": {"w": 0}, "W+ & P": {"w": 1}, "half of W+ & P": {"w": half}}
        if before.p.interior is not None:
            parts["W+ & P without interior"] = {"w": 1, "interior": 0}
    found = {part: Edit.between(before, after, part, **shares) for part, shares in parts.items()}
    found |= {f"{part} where the pair differs": local(edit, changed) for part, edit in found.items() if "P" in part}
    return found | {f"{part} × {s}": s * edit for part, edit in found.items() for s in STRENGTHS}


def tried(G: Generator, name: str, E: Encoder, roles: dict[str, Tensor], steps: int) -> dict[str, Code]:
    """Codes of the targets of one edit, by every formula, and by offsets of other pairs: of several true ones, of
    refined codes, and of the targets' own true results, which no method knows."""
    codes = {role: invert(x, E, G) for role, x in roles.items() if len(x)}
    x, pair = codes["targets"], [codes["before"], codes["after"]]
    found = {"nothing": x} | {part: edit(x) for part, edit in formulas(*pair, where(roles)).items()}
    whole = "W+" if x.p is None else "W+ & P"
    if "more_before" in codes:
        several = (Code.cat([c, codes[f"more_{role}"]]) for role, c in zip(("before", "after"), pair, strict=True))
        found[f"{whole}, {1 + MORE_PAIRS} pairs"] = Edit.between(*several)(x)
    fine = (invert(roles[role], E, G, steps=steps) for role in ("before", "after"))
    found[f"{whole}, refined pair"] = Edit.between(*fine)(x)
    found[f"{whole}, the true pairs"] = Edit.between(x, codes["truths"])(x)
    if name == "psp":
        found |= {f"mix, the target's w from {cut}": mix(pair[1], x, cut) for cut in range(1, G.num_ws)}
    return found


def choose(G: Generator, E: dict[str, Encoder], sets: dict[str, dict[str, Tensor]], steps: int):
    """Every formula of every encoder, and which is the best: the lowest mean LPIPS in all pixels.

    Returns:
        {encoder: formula, "mix": cut}, and lines of a table, by domain, encoder and part.
    """
    lines, chosen = [], {}
    for name, encoder in E.items():
        found = {}
        for edit, roles in tqdm(sets.items(), f"formulas of {name}"):
            codes = tried(G, name, encoder, roles, steps)
            against = Regions(roles["truths"], roles["targets"])
            for part, code in codes.items():
                found.setdefault(part, {}).setdefault(domain(edit), []).append(against.distances(draw(code, G)))
        mine = [{"task": task, "encoder": name, "part": part} | tables.summary(joined(several))
                for part, by_task in found.items() for task, several in by_task.items()]  # fmt: skip
        every = {part: joined(sum(by_task.values(), []))["lpips_all"].mean().item() for part, by_task in found.items()}
        mixed = {part: value for part, value in every.items() if part.startswith("mix")}
        fair = {part: value for part, value in every.items() if "," not in part and part != "nothing"}  # one pair
        chosen[name] = min(fair, key=fair.get)
        if mixed:
            chosen["mix"] = min(mixed, key=mixed.get)
        lines += [line | {"chosen": line["part"] in (chosen[name], chosen.get("mix"))} for line in mine]
    return chosen, lines


def offsets(
    G: Generator, E: dict[str, Encoder], roles: dict[str, Tensor], chosen: dict[str, str], steps: int
) -> dict[Way, Code]:
    """Codes of the targets of one edit, untouched and with what its pair defines, by each method and encoder."""
    found = {}
    for name, encoder in E.items():
        x, *pair = (invert(roles[role], encoder, G) for role in ("targets", "before", "after"))
        ways = formulas(*pair, where(roles))
        parts = dict.fromkeys((*(part for part in PLAIN if part in ways), chosen[name]))
        codes = {("nothing", ""): x} | {("offset", part): ways[part](x) for part in parts}
        if name == "psp":
            part = chosen["mix"]
            codes["mix", part.removeprefix("mix, ")] = mix(pair[1], x, cut=int(part.split()[-1]))
        found |= at_both(name, x, invert(roles["targets"], encoder, G, steps=steps), codes, steps)
    return found


def painted(G: Generator, E: dict[str, Encoder], roles: dict[str, Tensor], steps: int) -> dict[Way, Code | Tensor]:
    """Codes of the targets of one edit, copied or drawn into them and then inverted; and the drawings themselves."""
    drawing = analogy(roles["targets"], roles["before"], roles["after"])
    images = {"copied": torch.where(where(roles), roles["after"], roles["targets"]), "drawn": drawing}
    inverted = {Way(method, name, "", k): invert(x, encoder, G, steps=k) for name, encoder in E.items()
                for method, x in images.items() for k in (0, steps)}  # fmt: skip
    return inverted | {Way("drawing"): drawing}


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def distance(y: Tensor, truth: Tensor) -> float:
    """Mean LPIPS-Alex between images and their true results."""
    return lpips("alex", y.device)(y.clamp(-1, 1), truth).mean().item()


class Regions:
    """True results, against which edited images are measured: in the pixels that should change and in those that
    should not.

    Args:
        truth: the true results [N, 3, R, R] in [−1, 1].
        source: the images before the edit. A pixel should change where truth and source differ at all.
        vgg: whether to measure LPIPS-VGG of the whole image too.

    Raises:
        TypeError, ValueError: not images, or of different shapes.
    """

    def __init__(self, truth: Tensor, source: Tensor, vgg: bool = False):
        self.truth, self.networks = truth, {net: lpips(net, truth.device) for net in ("alex", "vgg")[: 1 + vgg]}
        self.check("truth", truth)
        self.check("source", source)
        changed = (truth != source).any(dim=1, keepdim=True)  # [N, 1, R, R]
        self.inside = {"all": torch.ones_like(changed), "changed": changed, "kept": ~changed}
        self.features = {net: self.seen(net, truth) for net in self.networks}  # serve every way to edit

    def check(self, name: str, x: Tensor) -> None:
        check_images(name, x)
        if x.shape != self.truth.shape:
            raise ValueError(f"{name}: expected the shape of truth, {list(self.truth.shape)}, got {list(x.shape)}")

    @torch.no_grad()
    def seen(self, net: str, x: Tensor) -> Tensor:
        return torch.cat([self.networks[net].features(part) for part in x.split(16)])

    @torch.no_grad()
    def distances(self, y: Tensor) -> dict[str, Tensor]:
        """Of edited images [N, 3, R, R] in [−1, 1], whose overshoot is clamped.

        Returns:
            {"lpips_all", "lpips_changed", "lpips_kept", "mse_all", …: [N] on the CPU}: the mean square over the pixels
            of the region; and LPIPS-Alex between the truth and y inside the region with the truth around it, so that
            only the region can differ. Both are 0 where the region is empty. "lpips_vgg": LPIPS-VGG of the whole image.
        """
        self.check("y", y)
        y, found = y.clamp(-1, 1), {}
        for region, inside in self.inside.items():
            composed = torch.where(inside, y, self.truth)
            found[f"lpips_{region}"] = LPIPS.distance(self.seen("alex", composed), self.features["alex"])
            pixels = 3 * inside.sum(dim=(1, 2, 3)).clamp_min(1)
            found[f"mse_{region}"] = (composed - self.truth).square().sum(dim=(1, 2, 3)) / pixels
        if "vgg" in self.features:
            found["lpips_vgg"] = LPIPS.distance(self.seen("vgg", y), self.features["vgg"])
        return {key: value.cpu() for key, value in found.items()}


def joined(several: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several `Regions.distances`, of all their images."""
    return {key: torch.cat([found[key] for found in several]).double() for key in several[0]}


def lines_of(task: str, found: dict[Way, dict[str, Tensor]], chosen: dict[str, str]) -> list[dict]:
    """A line for each way to edit or to blend the same images, of their distances: means and standard errors."""
    lines = []
    for way, values in found.items():
        method = "mix" if way.method == "blend" else way.method
        bars = [other for other in found if (other.method, other.encoder, other.steps) == (method, "psp", way.steps)
                and (method != "offset" or other.part == chosen.get("psp", "W+"))]  # fmt: skip
        share = error = None
        if bars and len(values["lpips_all"]) > 1:  # a share without an error would be read as one
            share, error = tables.ratio(values["lpips_all"], found[bars[0]]["lpips_all"])
        lines.append({"task": task, **way._asdict()} | tables.summary(values)
                     | {OF_PSP: share, f"{OF_PSP}_error": error})  # fmt: skip
    return lines


def measure(
    G: Generator,
    found: dict[str, dict[Way, Code | Tensor]],
    sets: dict[str, dict[str, Tensor]],
    chosen: dict[str, str] | None = None,
    vgg: bool = False,
) -> list[dict]:
    """Lines of each way of {edit: {way: codes or images}}: over the edits of a domain as task "inside" or "outside",
    then of each edit. chosen: as of `choose`; without it pSp's offset is that of W+."""
    lines, measured = [], {}
    for edit, roles in sets.items():
        against = Regions(roles["truths"], roles["targets"], vgg)
        for way, y in found[edit].items():
            y = y if isinstance(y, Tensor) else draw(y, G)
            measured.setdefault(edit, {})[way] = against.distances(y)
    tasks = {task: [edit for edit in sets if domain(edit) == task] for task in ("inside", "outside")}
    for task, edits in (tasks | {edit: [edit] for edit in sets}).items():
        if edits:
            ways = {way: joined([measured[edit][way] for edit in edits]) for way in measured[edits[0]]}
            lines += lines_of(task, ways, chosen or {})
    return lines


def beside(
    lines: Sequence[dict], over: str, keys: Sequence[str], columns: Sequence[str]
) -> tuple[list[dict], list[str]]:
    """Rows and columns of a page: a row for each value of `keys`, and in it for each value of `over` the columns, as
    mean ± standard error."""
    rows, names = {}, list(keys)
    for line in lines:
        row = rows.setdefault(tuple(line[key] for key in keys), {key: line[key] for key in keys})
        for column in (c for c in columns if line.get(c) is not None):
            name = f"{column}, {line[over]}" + (" steps" if over == "steps" else "")
            row[name] = f"{line[column]:.4f} ± {line[f'{column}_error']:.4f}"
            names += [name] if name not in names else []
    return list(rows.values()), names


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def write_ablation(path: str, lines: list[dict], n: int) -> None:
    """The formulas that were tried: all in the CSV, those of strength 1 and the best on the page."""
    few = [line for line in lines if line["chosen"] or not ("×" in line["part"] or line["part"].startswith("mix"))]
    rows, names = beside(few, "task", ("encoder", "part", "chosen"), REGIONS)
    note = (f"{n} odd targets of each edit, one pass of the encoder; LPIPS v0.1, AlexNet, mean ± standard error. "
            "`chosen`: of one pair as it is, the lowest lpips_all over all edits.")  # fmt: skip
    tables.write_table(path, [row | {"chosen": "yes" if row["chosen"] else ""} for row in rows], names, note,
                       whole=(lines, list(lines[0])))  # fmt: skip


def write_table(path: str, lines: list[dict], chosen: dict[str, str], note: str) -> None:
    """Every line in the CSV. On the page edits inside and outside the generator's domain and blends, a table each, with
    one pass beside steps; of offsets those of pSp and PadInv, and the best of the other encoders."""
    few = [line for line in lines if line["method"] != "offset" or line["encoder"] in ENCODERS[:2]
           or line["part"] == chosen[line["encoder"]]]  # fmt: skip
    pages = []
    for task in dict.fromkeys(line["task"] for line in lines if line["task"] in TASKS):
        some = [line | {TASKS[task]: line["method"]} for line in few if line["task"] == task]
        pages.append(beside(some, "steps", (TASKS[task], "encoder", "part"), (*REGIONS, OF_PSP)))
    columns = dict.fromkeys(key for line in lines for key in line)
    below = (tables.markdown_table(*page) for page in pages[1:])
    tables.write_table(path, *pages[0], *below, note, whole=(lines, list(columns)))


def write(data: str, checkpoints: str, results: str, settings: dict) -> None:
    """Measure everything, and write the tables and metrics.

    Args:
        data: folder of blending.zip and editing.zip.
        checkpoints: folder of the networks.
        results: folder of tables/ and metrics/.
        settings: section `customized_editing` of params.yaml.
    """
    device, k = "cuda" if torch.cuda.is_available() else "cpu", settings["refine_steps"]
    G, E = networks(checkpoints, device)
    choice, kept = targets(data, G, settings["n_choice"], settings["n_targets"])
    editors = {name: encoder for name, encoder in E.items() if name in EDITORS}
    chosen, lines = choose(G, editors, choice, k)
    write_ablation(f"{results}/tables/editing_ablation", lines, settings["n_choice"])

    found = {edit: offsets(G, editors, roles, chosen, k) | painted(G, editors, roles, k)
             for edit, roles in tqdm(kept.items(), "edits")}  # fmt: skip
    lines = measure(G, found, kept, chosen, settings["vgg"])
    other, x = triples(data, G, settings["n_triples"], settings["n_triples"])
    against = Regions(x["truth"], x["a"], settings["vgg"])
    values = {way: against.distances(draw(code, G)) for way, code in blends(G, E, other, x, k).items()}
    whole = {way: {key: v.double() for key, v in found.items() if key.endswith(("all", "vgg"))}
             for way, found in values.items()}  # fmt: skip
    lines += lines_of("blend", whole, chosen)
    note = (f"Even targets ({settings['n_targets']} of each edit), {settings['n_triples']} triples of "
            f"{Path(data).name.split('-')[0]} at {G.resolution}²; LPIPS v0.1, AlexNet, mean ± standard error over "
            "targets (each edit has one pair) and triples. of_psp: what is left of pSp's lpips_all by the same means "
            "(of its offsets the best, of its blends style mixing), on the same images. Choices were made on others. "
            f"Steps refine the image that is edited, by all methods; `{k} steps` compares with no other column. "
            "Methods: editing.json.")  # fmt: skip
    write_table(f"{results}/tables/editing", lines, chosen, note)

    hashes = {name: file_hash(f"{checkpoints}/{name}.safetensors") for name in ("generator", *E)}
    head = tables.protocol(0, G.resolution, "", device, hashes)
    names = ("resolution", "image_range", "lpips_alex", "lpips_vgg", "device", "packages", "checkpoints")
    head = {key: head[key] for key in names} | {
        "methods": METHODS,
        "chosen": chosen,
        "regions": "changed: pixels where truth and source differ; kept: the others. LPIPS: true pixels around them",
        "choices": "on odd targets and other triples: the lowest lpips_all",
    }
    rows = [line for line in lines if line["task"] in TASKS]
    write_json(f"{results}/metrics/editing.json", {"protocol": head, "rows": rows})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="study.edits", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder of blending.zip and editing.zip")
    parser.add_argument("--checkpoints", required=True, help="folder of the generator and the encoders")
    parser.add_argument("--results", required=True, help="folder for tables/ and metrics/")
    parser.add_argument("--params", default="params.yaml", help="parameters (default: %(default)s)")
    args = parser.parse_args(arguments)
    import yaml

    try:
        settings = yaml.safe_load(Path(args.params).read_text())["customized_editing"]
        write(args.data, args.checkpoints, args.results, settings)
    except (ValueError, OSError) as error:
        sys.exit(f"study.edits: {error}")


if __name__ == "__main__":
    main()
