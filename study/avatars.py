"""The avatars domain: cartoon heads rendered from known attributes, so that true results of edits exist.

The drawings are the style "Avataaars" by Pablo Stanley (https://avataaars.com, free for personal and
commercial use), through `dicebear-core` and `dicebear-styles`, rasterised by `resvg_py`. These three are
imported on first use: reading a rendered dataset needs none of them.

An avatar is a dict of the keys of `SHAPES` and `COLOURS`. Facial hair has the colour of the hair and a hat
that of the clothes, so that nearly every image shows each of its four colours; a hat hides the hair.
"""

import io
import json
import random
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Attributes = dict[str, str]


def _even(names: str) -> dict[str, float]:
    return dict.fromkeys(names.split(), 1)


# Options and their weights, of a sub-set of the style without what is unreadable at 64 px. The generator is trained on
# images with options of INSIDE alone; encoders train on images with those of OUTSIDE too; those of NEW are in test
# images only. So the domain of the generator is known, and what lies outside it can be measured apart.
INSIDE: dict[str, dict[str, float]] = {
    "hair": _even(
        "bob bun curly dreads01 fro longButNotTooLong miaWallace shaggy shortCurly shortFlat straight01 theCaesar"
    ),
    "hat": {"none": 12, **_even("winterHat03")},
    "glasses": {"none": 9, **_even("prescription02 round sunglasses")},
    "facial_hair": {"none": 12, **_even("beardLight beardMedium moustacheFancy")},
    "eyes": {"default": 3, **_even("closed happy side squint surprised wink")},
    "eyebrows": {"default": 2, **_even("angryNatural flatNatural raisedExcited sadConcerned upDown")},
    "mouth": {"smile": 2, **_even("default concerned disbelief grimace sad serious twinkle")},
    "clothes": _even("blazerAndShirt blazerAndSweater collarAndSweater hoodie shirtCrewNeck shirtScoopNeck"),
}
OUTSIDE: dict[str, dict[str, float]] = {
    "hair": _even("bigHair dreads shaggyMullet shortWaved straightAndStrand"),
    "hat": _even("turban winterHat02"),
    "glasses": _even("kurt wayfarers"),
    "facial_hair": _even("beardMajestic"),
    "mouth": _even("screamOpen tongue"),
    "clothes": _even("overall shirtVNeck"),
}
NEW: dict[str, dict[str, float]] = {
    "hair": _even("dreads02 froBand shavedSides"),
    "hat": _even("hijab winterHat1"),
    "glasses": _even("eyepatch prescription01"),
    "facial_hair": _even("moustacheMagnum"),
    "mouth": _even("eating"),
}
FOREIGN = {"inside": {}, "outside": OUTSIDE, "new": NEW}  # by domain, what its images have at least one option of
SHAPES: dict[str, tuple[str, ...]] = {
    name: (*INSIDE[name], *OUTSIDE.get(name, ()), *NEW.get(name, ())) for name in INSIDE
}
COLOURS: dict[str, dict[str, float]] = {
    "skin": _even("#6d4a3a #8d5a3c #ae5d29 #d08b5b #edb98a #ffdbb4"),
    "hair_colour": {
        "#2c1b18": 3,
        "#4a312c": 2,
        "#724133": 2,
        "#a55728": 2,
        "#b58143": 2,
        "#d6b370": 2,
        **_even("#c93305 #e8e1e1 #f59797 #5b7fd0"),
    },
    "clothes_colour": _even("#262e33 #3c4f5c #25557c #5199e4 #65c9ff #3fa66b #ff5c5c #ff488e #f2c84b #f4f4f4"),
    "background": _even("#b6e3f4 #c0aede #d1d4f9 #ffd5dc #ffdfbf #cdeac0 #f5efc9 #a9d6d0"),
}
ATTRIBUTES = (*SHAPES, *COLOURS)

# Customised edits: the attribute, its value in the "before" image and in the "after" image. Where the old
# value is "none" the targets have "none" too (something is added); elsewhere any value but the new one. The generator
# never drew what those of "_outside" add.
EDITS: dict[str, tuple[str, str, str]] = {
    "glasses": ("glasses", "none", "prescription02"),
    "hair": ("hair", "shortFlat", "longButNotTooLong"),
    "facial_hair": ("facial_hair", "none", "beardMedium"),
    "mouth": ("mouth", "serious", "smile"),
    "clothes": ("clothes", "shirtCrewNeck", "hoodie"),
    "hat": ("hat", "none", "winterHat03"),
    "glasses_outside": ("glasses", "none", "kurt"),
    "hair_outside": ("hair", "shortFlat", "bigHair"),
    "facial_hair_outside": ("facial_hair", "none", "beardMajestic"),
    "mouth_outside": ("mouth", "serious", "tongue"),
    "clothes_outside": ("clothes", "shirtCrewNeck", "overall"),
    "hat_outside": ("hat", "none", "turban"),
}

# The head, with enough of the shoulders that an edit of the clothes shows; units of the 280 x 280 canvas.
VIEW_BOX = (34.5, 11, 211, 211)
CANVAS = 256  # pixels along a side that are drawn, at least, and averaged down


def held_out(attributes: Attributes) -> bool:
    """Whether an avatar is on the test side. Its four colours decide: one combination in eight, spread so
    that every pair of colours is on both sides. So no true result of an edit is a training image."""
    return sum(list(COLOURS[k]).index(attributes[k]) for k in COLOURS) % 8 == 0


def sample(seed: int, split: str, index: int, domain: str = "inside") -> Attributes:
    """Attributes of avatar `index` of a split; the split "train" never has held-out colours, all others have
    only those. Outside the generator's domain one to three attributes have a foreign option (see `FOREIGN`), and no hat
    of the generator's hides foreign hair. Uses only `random.Random(str).random()`, a sequence that Python keeps across
    its versions. ValueError for another domain."""
    if domain not in FOREIGN:
        raise ValueError(f"domain: got {domain!r}, expected one of {list(FOREIGN)}")
    rng = random.Random(f"{seed}/{split}/{index}")
    while True:
        found = {name: _pick(rng.random(), options) for name, options in (INSIDE | COLOURS).items()}
        if held_out(found) == (split != "train"):
            break
    foreign = dict(FOREIGN[domain])
    for _ in range(1 + int(3 * rng.random()) if foreign else 0):
        name = _pick(rng.random(), _even(" ".join(foreign)))
        found[name] = _pick(rng.random(), foreign.pop(name))
        if name == "hair" and found["hat"] in INSIDE["hat"]:
            found["hat"] = "none"
    return found


def domain_of(attributes: Attributes) -> str:
    """The innermost domain that has all options: "inside", "outside" or "new"."""
    foreign = {name for name, options in FOREIGN.items() for k in options if attributes[k] in options[k]}
    return "new" if "new" in foreign else "outside" if foreign else "inside"


def _pick(u: float, options: dict[str, float]) -> str:
    u *= sum(options.values())
    for value, weight in options.items():
        u -= weight
        if u < 0:
            return value
    return value  # u was 1 - epsilon and rounded up


def blend(a: Attributes, b: Attributes) -> Attributes:
    """The true result of blending: the shapes of `a` in the colours of `b`."""
    return {k: (a if k in SHAPES else b)[k] for k in ATTRIBUTES}


def blending_attributes(seed: int, count: int = 200) -> list[tuple[Attributes, Attributes, Attributes]]:
    """[(a, b, truth)], inside and outside the generator's domain in turns. `b` wears no hat: the truth is decidable
    only if the colour of its hair shows."""
    found = []
    for i in range(count):
        a, b = (sample(seed, f"blending-{role}", i, ("inside", "outside")[i % 2]) for role in "ab")
        b["hat"] = "none"
        found.append((a, b, blend(a, b)))
    return found


def editing_attributes(
    seed: int, edit: str, count: int = 100
) -> tuple[Attributes, Attributes, list[Attributes], list[Attributes]]:
    """(before, after, targets, truths) of one of `EDITS`. The pair is a plain face, bare of additions;
    the targets are inside the generator's domain."""
    name, old, new = EDITS[edit]
    plain = {"hat": "none", "glasses": "none", "facial_hair": "none", "eyes": "default"}
    before = sample(seed, f"pair-{edit}", 0) | plain | {name: old}
    targets: list[Attributes] = []
    index = 0
    while len(targets) < count:
        target = sample(seed, f"target-{edit}", index)
        hidden = name == "hair" and target["hat"] != "none"
        if not hidden and (target[name] == "none" if old == "none" else target[name] != new):
            targets.append(target)
        index += 1
    return before, before | {name: new}, targets, [t | {name: new} for t in targets]


@cache
def _renderer():
    try:
        import resvg_py
        from dicebear import Avatar, Style

        style = Style(json.loads(files("dicebear_styles").joinpath("avataaars.json").read_text("utf-8")))
    except ImportError as e:
        raise ImportError(
            f"rendering avatars needs dicebear-core, dicebear-styles and resvg_py ({e}); "
            "install them with: pip install dicebear-core dicebear-styles resvg_py"
        ) from e
    return lambda options: str(Avatar(style, options)), resvg_py.svg_to_bytes


def svg(attributes: Attributes) -> str:
    """The drawing as SVG, every option given explicitly, cropped to `VIEW_BOX`. Keys that are no attributes
    are ignored (a row of labels.csv will do). ValueError for an attribute that is missing or unknown."""
    for name, values in (SHAPES | COLOURS).items():
        if attributes.get(name) not in values:
            raise ValueError(f"attributes[{name!r}]: got {attributes.get(name)!r}, expected one of {list(values)}")
    parts = {
        "top": attributes["hair"] if attributes["hat"] == "none" else attributes["hat"],
        "accessories": attributes["glasses"],
        "facialHair": attributes["facial_hair"],
        **{k: attributes[k] for k in ("eyes", "eyebrows", "mouth", "clothes")},
    }
    hair, cloth = attributes["hair_colour"], attributes["clothes_colour"]
    options = {
        "seed": "padinv",
        "backgroundColor": attributes["background"],
        "skinColor": attributes["skin"],
        "hairColor": hair,
        "facialHairColor": hair,
        "clothesColor": cloth,
        "hatColor": cloth,
        "accessoriesColor": "#262e33",
    }
    for part, value in parts.items():
        options |= (
            {f"{part}Probability": 0} if value == "none" else {f"{part}Probability": 100, f"{part}Variant": value}
        )
    drawing, _ = _renderer()
    whole, cropped = 'viewBox="0 0 280 280"', 'viewBox="{} {} {} {}"'.format(*VIEW_BOX)
    return drawing(options).replace(whole, cropped, 1)


def render(attributes: Attributes, resolution: int = 64) -> Tensor:
    """Draws an avatar: uint8 [3, R, R], rendered larger and averaged down. Equal input, equal pixels."""
    factor = max(CANVAS // resolution, 1)
    drawing, size = svg(attributes), factor * resolution
    _, rasterise = _renderer()
    png = rasterise(svg_string=drawing, width=size, height=size, skip_system_fonts=True)
    small = Image.open(io.BytesIO(png)).convert("RGB").reduce(factor)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()  # [3, R, R]
