"""The editing table: distances by region, formulas and their choice, and every method of it on small networks."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from padinv import Code, Edit, Encoder, Generator, GeneratorConfig, Padding
from padinv.files.checkpoints import save_encoder, save_generator
from padinv.measure.lpips import lpips
from study import edits
from study.edits import METHODS, Regions, Way, joined, lines_of
from study.sets import write_photos
from study.stickers import STICKERS


def test_regions():
    torch.manual_seed(0)
    source = torch.rand(70, 3, 32, 32) * 2 - 1
    truth = source.clone()
    truth[:, :, 8:24, 8:24] = 0.5
    y = truth.clone()
    y[:, 0, 10, 10] += 0.3  # one number of 3 · 16² that should change
    against = Regions(truth, source)
    found = against.distances(y)
    assert torch.allclose(found["mse_changed"], torch.full((70,), 0.09 / (3 * 256)))
    assert torch.allclose(found["mse_all"], torch.full((70,), 0.09 / (3 * 1024)))
    assert not found["mse_kept"].any() and found["lpips_kept"].abs().max() < 1e-6
    assert torch.allclose(found["lpips_changed"], found["lpips_all"], atol=1e-6)
    y = y + 0.2 * (truth == source)  # and an error in all that should not
    found = against.distances(y)
    assert torch.allclose(found["mse_kept"], torch.full((70,), 0.04), atol=0.02)  # some are clamped
    composed = torch.where((truth != source).any(dim=1, keepdim=True), truth, y.clamp(-1, 1))
    assert torch.allclose(found["lpips_kept"], lpips("alex")(composed, truth), atol=1e-5)


def test_a_region_without_pixels_counts_as_right():
    x = torch.rand(2, 3, 32, 32)
    found = Regions(x, x, vgg=True).distances(x * 0.5)  # nothing should change
    assert not found["mse_changed"].any() and found["lpips_changed"].abs().max() < 1e-6
    assert (found["mse_kept"] > 0).all() and torch.equal(found["mse_kept"], found["mse_all"])
    assert torch.allclose(found["lpips_vgg"], lpips("vgg")(x * 0.5, x))
    for wrong in (x[:1], x[..., :31], x.double().long()):
        with pytest.raises((TypeError, ValueError), match="source"):
            Regions(x, wrong)
    with pytest.raises(ValueError, match="y: expected the shape of truth"):
        Regions(x, x).distances(x[:1])


def test_lines_stand_beside_those_of_psp_by_the_same_means():
    """Of offsets beside the best, of blends beside style mixing; the error is that of the same images."""
    truth, chosen = torch.tensor([0.1, 0.2, 0.3]), {"psp": "W+"}
    ways = {Way("offset", "psp", "P"): 3 * truth, Way("offset", "psp", "W+"): truth, Way("mix", "psp", "w"): truth,
            Way("offset", "padinv", "W+ & P"): 0.5 * truth, Way("blend", "padinv"): 2 * truth, Way("drawing"): truth,
            Way("offset", "padinv", "W+ & P", 10): truth}  # fmt: skip
    found = {way: joined([{"lpips_all": x[:1]}, {"lpips_all": x[1:]}]) for way, x in ways.items()}
    found = lines_of("hat", found, chosen)
    assert [line["of_psp"] for line in found] == [3, 1, 1, 0.5, 2, None, None]
    assert found[3]["lpips_all"] == 0.1 and found[3]["n_images"] == 3 and found[3]["task"] == "hat"
    assert found[3]["of_psp_error"] == 0 < found[3]["lpips_all_error"]
    alone = lines_of("hat", {way: joined([{"lpips_all": x[:1]}]) for way, x in ways.items()}, chosen)
    assert [line["of_psp"] for line in alone] == [line["lpips_all_error"] for line in alone] == [None] * 7


# ----------------------------------------------------------------------------------------------------------------------
# Formulas


@pytest.fixture
def code(code) -> Code:
    """Codes with an interior at 8²."""
    return Code(code.w, Padding(code.p.const, code.p.rings, interior=torch.randn(len(code), 12, 8, 8)))


def test_an_edit_is_cut_to_where_the_pair_differs(code):
    edit, changed = Edit.between(code[0], code[1], w=1), torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    changed[..., :8, 20:] = True  # a corner, and nothing else
    cut = edits.local(edit, changed).offset
    assert torch.equal(cut.w, edit.offset.w), "w has no place"
    interior = torch.zeros(8, 8, dtype=torch.bool)
    interior[:2, 5:] = True
    assert torch.equal(cut.p.interior, edit.offset.p.interior * interior)
    assert cut.p.const[..., 0, 2:].any() and not cut.p.const[..., 1:, :].any() and not cut.p.const[..., :2].any()
    for t, whole in zip(cut.p.rings, edit.offset.p.rings, strict=True):
        assert 0 < (t != 0).sum() < (whole != 0).sum() and torch.equal(t[t != 0], whole[t != 0])
    everywhere = edits.local(edit, torch.ones_like(changed)).offset
    assert all(torch.equal(a, b) for a, b in zip(everywhere.tensors, edit.offset.tensors, strict=True))


def test_formulas_are_parts_of_the_offset(code):
    changed = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    found = edits.formulas(code[0], code[1], changed)
    whole = code[1] - code[0]
    both, w, p = (found[part].offset for part in ("W+ & P", "W+", "P"))
    assert torch.allclose(both.w, whole.w) and torch.allclose(both.p.interior, whole.p.interior)
    assert torch.equal(w.w, both.w) and not any(t.any() for t in w.p.tensors), "the target's P is kept"
    assert not p.w.any() and torch.equal(p.p.rings[0], both.p.rings[0])
    assert not found["W+ & P without interior"].offset.p.interior.any()
    assert torch.allclose(found["half of W+ × 0.7"].offset.w[:, :4], 0.7 * both.w[:, :4])
    assert not found["half of W+ × 0.7"].offset.w[:, 4:].any()
    without = edits.formulas(Code(code.w[:1]), Code(code.w[1:2]), changed)
    assert {part.split(" × ")[0] for part in without} == {"W+", "half of W+"}, "of codes without P"


def test_style_mixing_keeps_p_and_takes_w_from_the_cut_on(code):
    mixed = edits.mix(code[0], code[1], cut=3)
    assert torch.allclose(mixed.w[:, :3], code.w[:1, :3]) and torch.allclose(mixed.w[:, 3:], code.w[1:2, 3:], atol=1e-6)
    assert torch.allclose(mixed.p.const, code.p.const[:1], atol=1e-6)


def test_edits_of_refined_codes_are_the_same_edits(code):
    sharp = code.map(lambda t: t + 1)
    found = edits.at_both("psp", code, sharp, {("nothing", ""): code, ("offset", "W+"): 2 * code}, 5)
    assert [(way.method, way.steps) for way in found] == [("nothing", 0), ("nothing", 5), ("offset", 0), ("offset", 5)]
    assert torch.equal(found[Way("nothing", "psp", "", 5)].w, sharp.w)
    assert torch.allclose(found[Way("offset", "psp", "W+", 5)].w, sharp.w + code.w)


# ----------------------------------------------------------------------------------------------------------------------
# The whole table

SETTINGS = {"n_choice": 1, "n_targets": 2, "n_triples": 2, "refine_steps": 2, "vgg": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Networks of 32², and blends and edits made from pictures, as from photographs."""
    folder = tmp_path_factory.mktemp("edits")
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(32, 8, 8, 2, 128, 8)).eval().requires_grad_(False)
    small = {"widths": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "pyramid_channels": 8, "head_channels": 4,
             "padding_channels": 4, "se_reduction": 2, "input_resolution": 32}  # fmt: skip
    save_generator(G, folder / "generator.safetensors")
    for name, interior in (("psp", 0), ("padinv", 0), ("padinv-f", 8)):  # and no padinv-split
        p = name != "psp"
        E = Encoder.for_generator(G, **small, padded_resolutions=3 * p, replace_const=p, interior=interior)
        for head in E.parameters():
            head.data += 0.05 * torch.randn_like(head)
        save_encoder(E.eval(), folder / f"{name}.safetensors")
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(9):
        picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        picture.resize((32, 32), Image.Resampling.BICUBIC).save(folder / "pictures" / f"{i}.png")
    write_photos(folder / "pictures", folder / "data", 32, 8, progress=False)
    (folder / "params.yaml").write_text(yaml.safe_dump({"customized_editing": SETTINGS}))
    return folder


def test_choices_and_measurements_share_no_image(folder):
    G, E = edits.networks(folder, "cpu")
    assert list(E) == ["psp", "padinv", "padinv-f"], "those that the folder has"
    for of in (edits.triples, lambda *args: [sets["hat"] for sets in edits.targets(*args)]):
        chosen, kept = of(folder / "data", G, 2, 2)
        role = "truth" if "truth" in chosen else "truths"
        assert len(chosen[role]) == len(kept[role]) == 2
        assert not any(torch.equal(x, y) for x in chosen[role] for y in kept[role])
    found = edits.targets(folder / "data", G, 4, 8)
    choice, kept = ([x for roles in sets.values() for x in roles["targets"]] for sets in found)
    assert len(kept) > len(STICKERS) and not any(torch.equal(x, y) for x in choice for y in kept), "of no edit"
    choice, kept = edits.targets(folder / "data", G, 1, 1)
    assert set(choice) == set(kept) == set(STICKERS)
    assert not any(torch.equal(x, choice["hat"]["truths"][0]) for x in choice["hat"]["more_after"])
    assert len(edits.targets(folder / "data", G, 1, 1, kinds="hat")[0]) == 1


def test_every_method_is_measured_and_described(folder, tmp_path):
    arguments = ["--data", str(folder / "data"), "--checkpoints", str(folder), "--params", str(folder / "params.yaml")]
    for out in ("a", "b"):
        edits.main([*arguments, "--results", str(tmp_path / out)])
    tables = [f"tables/{name}.{end}" for name in ("editing", "editing_ablation") for end in ("csv", "md")]
    written = ["metrics/editing.json", *tables]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in written)

    file = json.loads((tmp_path / "a" / written[0]).read_text())
    rows, head = file["rows"], file["protocol"]
    assert {row["method"] for row in rows} == set(head["methods"]) == set(METHODS)
    assert {row["task"] for row in rows} == {"blend", "inside"}, "no sticker is called outside"
    assert {row["n_images"] for row in rows if row["task"] == "inside"} == {2 * len(STICKERS)}
    assert head["checkpoints"].keys() == {"generator", "psp", "padinv", "padinv-f"}
    ways = {(row["method"], row["encoder"], row["part"]): set() for row in rows if row["method"] != "drawing"}
    for row in rows:
        ways.get((row["method"], row["encoder"], row["part"]), set()).add(row["steps"])
    assert set(map(frozenset, ways.values())) == {frozenset({0, 2})}, "every row at both budgets"
    for name in ("psp", "padinv", "padinv-f"):
        assert ("offset", name, head["chosen"][name]) in ways and ("drawn", name, "") in ways
    with open(tmp_path / "a/tables/editing.csv", newline="") as table:
        lines = list(csv.DictReader(table))
    assert {line["task"] for line in lines} == {"blend", "inside", *STICKERS}
    page = (tmp_path / "a/tables/editing.md").read_text()
    assert page.count("| edits inside |") == page.count("| blends |") == 1 and "edits outside" not in page
    assert page.count("| offset | padinv |") >= 3 and page.count("| offset | padinv-f |") == 1
    (line,) = (line for line in lines if (line["task"], line["method"]) == ("inside", "drawing"))
    (row,) = (row for row in rows if (row["task"], row["method"]) == ("inside", "drawing"))
    assert float(line["lpips_changed"]) == row["lpips_changed"] and float(line["lpips_changed_error"]) > 0


def test_the_best_formula_of_an_encoder_is_chosen(folder):
    G, E = edits.networks(folder, "cpu", ("padinv",))
    choice, _ = edits.targets(folder / "data", G, 2, 1, kinds="hat")
    chosen, lines = edits.choose(G, E, choice, 1)
    fair = {line["part"]: line["lpips_all"] for line in lines if "," not in line["part"] and line["part"] != "nothing"}
    assert chosen == {"padinv": min(fair, key=fair.get)}
    assert [line["part"] for line in lines if line["chosen"]] == list(chosen.values())
    assert {"W+ & P, 5 pairs", "W+ & P, the true pairs", "W+ & P, refined pair"} <= {line["part"] for line in lines}
