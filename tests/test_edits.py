"""The editing table: distances by region, and every method of it on small networks."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from padinv import Edit, Encoder, Generator, GeneratorConfig
from padinv.files.checkpoints import save_encoder, save_generator
from padinv.measure.lpips import lpips
from study import edits
from study.edits import METHODS, by_region, mean_rows, region_rows
from study.sets import write_photos
from study.stickers import STICKERS


def test_regions():
    torch.manual_seed(0)
    source = torch.rand(70, 3, 32, 32) * 2 - 1
    truth = source.clone()
    truth[:, :, 8:24, 8:24] = 0.5
    y = truth.clone()
    y[:, 0, 10, 10] += 0.3  # one number of 3 · 16² that should change
    found = by_region(y, truth, source)
    assert torch.allclose(found["changed"]["mse"], torch.full((70,), 0.09 / (3 * 256)))
    assert torch.allclose(found["all"]["mse"], torch.full((70,), 0.09 / (3 * 1024)))
    assert not found["kept"]["mse"].any() and found["kept"]["lpips_alex"].abs().max() < 1e-6
    assert torch.allclose(found["changed"]["lpips_alex"], found["all"]["lpips_alex"], atol=1e-6)
    y = y + 0.2 * (truth == source)  # and an error in all that should not
    found = by_region(y, truth, source)
    assert torch.allclose(found["kept"]["mse"], torch.full((70,), 0.04), atol=0.02)  # some are clamped
    composed = torch.where((truth != source).any(dim=1, keepdim=True), truth, y.clamp(-1, 1))
    assert torch.allclose(found["kept"]["lpips_alex"], lpips("alex")(composed, truth), atol=1e-5)


def test_a_region_without_pixels_counts_as_right():
    x = torch.rand(2, 3, 32, 32)
    found = by_region(x * 0.5, x, x)  # nothing should change
    assert not found["changed"]["mse"].any() and found["changed"]["lpips_alex"].abs().max() < 1e-6
    assert (found["kept"]["mse"] > 0).all() and torch.equal(found["kept"]["mse"], found["all"]["mse"])


def test_rows():
    x = torch.rand(2, 3, 32, 32)
    rows = region_rows("hat", "nothing", x, 0.5 * x, x)
    assert [(row["task"], row["method"], row["region"], row["n_images"]) for row in rows] == [
        ("hat", "nothing", region, 2) for region in ("all", "changed", "kept")
    ]
    assert rows[0]["mse"] == rows[1]["mse"] > 0 and rows[0]["lpips_alex"] > 0
    for wrong in (x[:1], x[..., :31], x.double().long()):
        with pytest.raises((TypeError, ValueError), match="source"):
            by_region(x, x, wrong)


def test_means_over_tasks():
    x = torch.rand(3, 3, 32, 32)
    tables = [region_rows(task, "nothing", y, 0.5 * x[: len(y)], x[: len(y)]) for task, y in (("a", x), ("b", x[:1]))]
    means = mean_rows("both", tables)
    assert [(row["task"], row["method"], row["region"], row["n_images"]) for row in means] == [
        ("both", "nothing", region, 4) for region in ("all", "changed", "kept")
    ]
    assert means[0]["mse"] == pytest.approx((tables[0][0]["mse"] + tables[1][0]["mse"]) / 2, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The whole table

SETTINGS = {"n_choice": 1, "n_targets": 2, "n_triples": 2, "refine_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Networks of 32², and blends and edits made from pictures, as from photographs."""
    folder = tmp_path_factory.mktemp("edits")
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(32, 8, 8, 2, 128, 8)).eval().requires_grad_(False)
    small = {"widths": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "pyramid_channels": 8, "head_channels": 4,
             "padding_channels": 4, "se_reduction": 2, "input_resolution": 32}  # fmt: skip
    save_generator(G, folder / "generator.safetensors")
    for name, with_p in (("psp", False), ("padinv", True), ("padinv-split", True)):
        E = Encoder.for_generator(G, **small, padded_resolutions=3 * with_p, replace_const=with_p)
        save_encoder(E.eval(), folder / f"{name}.safetensors")
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(7):
        picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        picture.resize((32, 32), Image.Resampling.BICUBIC).save(folder / "pictures" / f"{i}.png")
    write_photos(folder / "pictures", folder / "data", 32, 5, progress=False)
    (folder / "params.yaml").write_text(yaml.safe_dump({"customized_editing": SETTINGS}))
    return folder


def test_choices_and_measurements_share_no_image(folder):
    G, E = edits.networks(folder, "padinv-split", "cpu")
    for of in (edits.triples, lambda *args: [sets["hat"] for sets in edits.targets(*args)]):
        chosen, kept = of(folder / "data", G, 2, 2)
        role = "truth" if "truth" in chosen else "truths"
        assert len(chosen[role]) == len(kept[role]) == 2
        assert not any(torch.equal(x, y) for x in chosen[role] for y in kept[role])
    assert [set(sets) for sets in edits.targets(folder / "data", G, 1, 1)] == [set(STICKERS)] * 2


def test_every_method_is_measured_and_described(folder, tmp_path):
    arguments = ["--data", str(folder / "data"), "--checkpoints", str(folder), "--params", str(folder / "params.yaml")]
    for out in ("a", "b"):
        edits.main([*arguments, "--results", str(tmp_path / out)])
    tables = [f"tables/{name}.{end}" for name in ("editing", "editing_ablation") for end in ("csv", "md")]
    written = ["metrics/editing.json", *tables]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in written)

    file = json.loads((tmp_path / "a" / written[0]).read_text())
    rows, head = file["rows"], file["protocol"]
    assert {row["method"] for row in rows} == set(head["methods"]) == {name.format(k=2) for name in METHODS}
    assert {row["task"] for row in rows} == {"blend", "edits", *STICKERS}
    assert {row["n_images"] for row in rows if row["task"] == "edits"} == {2 * len(STICKERS)}
    assert head["checkpoints"].keys() == {"generator", "psp", "padinv", "padinv-split"}
    with open(tmp_path / "a/tables/editing.csv", newline="") as table:
        lines = {(line["task"], line["method"]): line for line in csv.DictReader(table)}
    (row,) = (row for row in rows if (row["task"], row["method"], row["region"]) == ("edits", "drawing", "changed"))
    assert float(lines["edits", "drawing"]["lpips_changed"]) == row["lpips_alex"]
    assert ("hat", "drawn+2") in lines and ("hat", "drawn") not in lines, "of single edits only a few"
    assert len((tmp_path / "a/tables/editing_ablation.md").read_text().splitlines()) == 2 + 18


def test_an_offset_is_cut_to_where_it_is_large(code):
    edit = Edit.between(code[0], code[1], w=1)
    for t, whole in zip(edits.where_large(edit, 0.5).offset.tensors, edit.offset.tensors, strict=True):
        norms, kept = whole.norm(dim=1), t.norm(dim=1)
        assert torch.equal(kept, norms * (norms > 0.5 * norms.amax()))


def test_style_mixing_keeps_p_and_takes_w_from_the_cut_on(code):
    mixed = edits.mix(code[0], code[1], cut=3)
    assert torch.allclose(mixed.w[:, :3], code.w[:1, :3]) and torch.allclose(mixed.w[:, 3:], code.w[1:2, 3:], atol=1e-6)
    assert torch.allclose(mixed.p.const, code.p.const[:1], atol=1e-6)
