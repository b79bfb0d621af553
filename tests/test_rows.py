"""Rows of the inversion table: every kind of method runs, and is measured as it says."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from padinv import Encoder, Generator, GeneratorConfig
from padinv.files.checkpoints import save_encoder, save_generator
from padinv.inversion.optimise import project
from padinv.measure import metrics
from padinv.model.codes import Code
from padinv.model.tensors import file_hash
from study import rows
from study.domain_table import all_images, read_rows, same_images
from study.rows import Method, editability, solve

TABLE = {"n_images": 6, "n_common": 4, "n_tuned": 2, "n_native": 2, "n_show": 2}
ROWS = {
    "w": {"project": "w", "steps": 2},
    "w+p": {"project": "w+p", "steps": 2},
    "pti": {"project": "w", "steps": 2, "tune": 2},
    "padinv": {"encoder": "padinv"},
    "restyle": {"encoder": "padinv", "residual": "restyle"},
    "padinv+2": {"encoder": "padinv", "steps": 2},
    "padinv+2-domain": {"encoder": "padinv", "steps": 2, "domain_weight": 1.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(32, 8, 8, 2, 128, 8)).eval().requires_grad_(False)
    small = {"widths": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "pyramid_channels": 8, "head_channels": 4,
             "padding_channels": 4, "se_reduction": 2, "input_resolution": 32}  # fmt: skip
    E = Encoder.for_generator(G, **small).eval()
    save_generator(G, folder / "generator.safetensors")
    save_encoder(E, folder / "padinv.safetensors")
    save_encoder(Encoder.residual_of(E).eval(), folder / "restyle.safetensors")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
    (folder / "params.yaml").write_text(yaml.safe_dump({"rows": ROWS, "table": TABLE}))
    return folder


def run(folder, name, out):
    rows.main([name, "--data", str(folder / "images"), "--checkpoints", str(folder), "--out", str(out),
                    "--timing", str(out / "timing"), "--params", str(folder / "params.yaml")])  # fmt: skip
    return json.loads((out / f"{name}.json").read_text())


@pytest.mark.parametrize("name, images, passes", [
    ("w", 4, 3), ("w+p", 4, 3), ("pti", 2, 5), ("padinv", 6, 1), ("restyle", 6, 5), ("padinv+2", 4, 3),
    ("padinv+2-domain", 4, 3),
])  # fmt: skip
def test_a_row_says_what_it_measured(folder, tmp_path, name, images, passes):
    file = run(folder, name, tmp_path)
    row, head = file["row"], file["protocol"]
    assert (row["method"], row["n_images"], row["generator_passes"]) == (name, images, passes)
    assert row["common"]["n_images"] == min(images, 4) and head["n_images"] == images and row["frechet"] is None
    assert head["n_native"] == TABLE["n_native"] and head["frechet"] == "vgg16-conv5_3-gap-512@32"
    assert set(row) >= {
        "mse",
        "psnr",
        "ssim",
        "lpips_alex",
        "lpips_vgg",
        "edit_lpips",
        "native_lpips",
        "style_distance",
    }
    used = {"generator", ROWS[name].get("encoder"), ROWS[name].get("residual")} - {None}
    assert head["checkpoints"] == {key: file_hash(folder / f"{key}.safetensors") for key in used}
    assert Image.open(tmp_path / f"{name}.png").size == (2 * 33 + 1, 34)
    seconds = json.loads((tmp_path / "timing" / f"{name}.json").read_text())
    assert seconds["seconds_per_image"] > 0 and seconds["n_images"] == images


def test_the_same_row_twice_gives_the_same_bytes(folder, tmp_path):
    for out in (tmp_path / "a", tmp_path / "b"):
        run(folder, "w", out)
    for name in ("w.json", "w.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_tuned_generator_draws_closer_than_its_pivot(folder):
    G = rows.load_generator(folder / "generator.safetensors")
    x = G.synthesis(G.mapping(torch.randn(2, 8, generator=torch.Generator().manual_seed(5)))).clamp(-1, 1)
    x = 0.5 * x + 0.2
    code, draw = solve(Method(project="w", steps=5, tune=40), G, folder)(x)
    assert ((draw(code) - x).square().mean((1, 2, 3)) < (G(code) - x).square().mean((1, 2, 3))).all()


def test_true_codes_are_perfectly_editable_and_others_less(folder):
    G = rows.load_generator(folder / "generator.safetensors")
    w = G.mapping(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), truncation=0.7)
    true = editability(lambda x: (Code(w), G), G, 2)  # the codes that `editability` itself draws from
    found = editability(lambda x: (project(x, G, "w+", 20), G), G, 2)
    assert true["native_lpips"] < 1e-6 and true["edit_lpips"] < 1e-6 < found["edit_lpips"]


def test_styles_of_the_mapping_lie_at_one_and_others_further():
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(32, 8, 8, 2, 128, 8)).eval()
    w = G.mapping(torch.randn(500, 8))
    own = metrics.style_distance(w, G)
    assert own.shape == (500,) and own.mean().item() == pytest.approx(1, abs=0.1)
    away = metrics.style_distance(w + 2 * (w - w.mean(dim=0)), G)
    assert (away > own).float().mean() > 0.95 and away.mean() > 2.5 * own.mean()


def test_errors_say_what_is_known(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"method: expected one of \['padinv', .* got 'hfgi'"):
        run(folder, "hfgi", tmp_path)
    with pytest.raises(ValueError, match="either an encoder or a space"):
        Method(encoder="psp", project="w")
    (folder / "wrong.yaml").write_text(yaml.safe_dump({"rows": {"x": {"enkoder": "psp"}}, "table": TABLE}))
    with pytest.raises(SystemExit, match="enkoder"):
        rows.main(["x", "--data", str(folder), "--checkpoints", str(folder), "--out", str(tmp_path),
                        "--params", str(folder / "wrong.yaml")])  # fmt: skip


def test_a_table_holds_rows_that_were_measured_alike(folder, tmp_path):
    for name in ("padinv", "padinv+2"):
        run(folder, name, tmp_path)
    protocol, found = read_rows(tmp_path, ["padinv+2", "padinv"])
    assert list(found) == ["padinv+2", "padinv"] and protocol["n_images"] == 6
    assert [row["n_images"] for row in same_images(found)] == [4, 4] and all_images(found) == [found["padinv"]]
    file = json.loads((tmp_path / "padinv+2.json").read_text())
    for change in ({"resolution": 64}, {"checkpoints": file["protocol"]["checkpoints"] | {"generator": "another"}}):
        (tmp_path / "other.json").write_text(json.dumps(file | {"protocol": file["protocol"] | change}))
        with pytest.raises(ValueError, match="not measured as the other rows .(resolution|generator)"):
            read_rows(tmp_path, ["padinv", "other"])
