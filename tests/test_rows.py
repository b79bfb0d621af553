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
from study import pace, rows
from study.domain_table import on_first, on_same, ratios, read_rows
from study.rows import Method, editability, solve
from study.sets import encode_webp, write_zip
from study.tables import ratio

TABLE = {
    "encoded": {"sets": ["inside", "outside"], "n_images": 6, "n_native": 4},
    "touched": {"sets": ["inside", "outside"], "n_images": 4, "n_native": 3},
    "refined": {"sets": ["outside"], "n_images": 3, "n_native": 2},
    "searched": {"sets": ["outside"], "n_images": 2, "n_native": 2},
    "n_show": 2,
}
ROWS = {
    "w": {"project": "w", "steps": 2},
    "w+p": {"project": "w+p", "steps": 2},
    "pti": {"project": "w", "steps": 2, "tune": 2},
    "padinv": {"encoder": "padinv"},
    "padinv-w-alone": {"encoder": "padinv", "part": "w+"},
    "restyle": {"encoder": "padinv", "residual": "restyle"},
    "padinv+2": {"encoder": "padinv", "steps": 2},
    "padinv+11": {"encoder": "padinv", "steps": 11},
}
DISTANCES = {"mse", "psnr", "ssim", "lpips_alex", "lpips_vgg", "style_distance"}
OF_EDITS = {"native_lpips", "edit_lpips", "edit_nothing", "style_distance"}


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
    for part in ("inside", "outside"):
        images = [(f"{i}.webp", encode_webp(torch.from_numpy(rng.integers(0, 256, (3, 32, 32), dtype=np.uint8))))
                  for i in range(16)]  # fmt: skip
        write_zip(folder / f"{part}.zip", images, [{"file": name} for name, _ in images])
    (folder / "params.yaml").write_text(yaml.safe_dump({"rows": ROWS, "table": TABLE}))
    return folder


def run(folder, name, out):
    rows.main([name, "--data", str(folder), "--checkpoints", str(folder), "--out", str(out),
                    "--timing", str(out / "timing"), "--params", str(folder / "params.yaml")])  # fmt: skip
    return json.loads((out / f"{name}.json").read_text())


@pytest.mark.parametrize("name, kind, passes", [
    ("w", "searched", 3), ("w+p", "searched", 3), ("pti", "searched", 5), ("padinv", "encoded", 1),
    ("padinv-w-alone", "encoded", 1), ("restyle", "encoded", 5), ("padinv+2", "touched", 3),
    ("padinv+11", "refined", 12),
])  # fmt: skip
def test_a_row_says_what_it_measured(folder, tmp_path, name, kind, passes):
    file, settings = run(folder, name, tmp_path), TABLE[kind]
    row, head = file["row"], file["protocol"]
    assert (row.pop("method"), row.pop("kind"), row.pop("generator_passes")) == (name, kind, passes)
    n, parts = settings["n_images"], settings["sets"]
    assert set(row) == {*parts, "native"} and head["n_images"] == n
    wanted = {part: (n, DISTANCES) for part in parts} | {"native": (settings["n_native"], OF_EDITS)}
    for part, (count, keys) in wanted.items():
        assert row[part]["n_images"] == count
        assert set(row[part]) == {"n_images", *keys, *(f"{key}_error" for key in keys)}
        assert all(row[part][f"{key}_error"] > 0 for key in keys - {"style_distance"})
    used = {"generator", ROWS[name].get("encoder"), ROWS[name].get("residual")} - {None}
    assert head["checkpoints"] == {key: file_hash(folder / f"{key}.safetensors") for key in used}
    assert Image.open(tmp_path / f"{name}.png").size == (2 * len(parts) * 33 + 1, 34)
    seconds = json.loads((tmp_path / "timing" / f"{name}.json").read_text())
    assert seconds["seconds_per_image"] > 0 and seconds["n_images"] == n * len(parts)


def test_the_same_row_twice_gives_the_same_bytes(folder, tmp_path):
    for out in (tmp_path / "a", tmp_path / "b"):
        run(folder, "w", out)
    for name in ("w.json", "w.csv", "w.png"):
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
    assert true["native_lpips"].max() < 1e-6 and true["edit_lpips"].max() < 1e-6 < found["edit_lpips"].min()
    assert true["edit_nothing"].min() > 1e-4 and torch.equal(true["edit_nothing"], found["edit_nothing"])


def test_what_w_draws_alone_is_without_the_padding(folder):
    G = rows.load_generator(folder / "generator.safetensors")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    code, draw = solve(Method(encoder="padinv", part="w+"), G, folder)(x)
    both, _ = solve(Method(encoder="padinv"), G, folder)(x)
    assert code.p is None and torch.equal(code.w, both.w) and torch.equal(draw(code), G.synthesis(both.w))


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
    with pytest.raises(ValueError, match="part: expected .* got 'p'"):
        Method(encoder="psp", part="p")
    (folder / "wrong.yaml").write_text(yaml.safe_dump({"rows": {"x": {"enkoder": "psp"}}, "table": TABLE}))
    with pytest.raises(SystemExit, match="enkoder"):
        rows.main(["x", "--data", str(folder), "--checkpoints", str(folder), "--out", str(tmp_path),
                        "--params", str(folder / "wrong.yaml")])  # fmt: skip


def test_a_table_holds_rows_that_were_measured_alike(folder, tmp_path):
    for name in ("padinv", "padinv+2", "w"):
        run(folder, name, tmp_path)
    protocol, found, values = read_rows(tmp_path, ["padinv+2", "padinv", "w"])
    assert list(found) == list(values) == ["padinv+2", "padinv", "w"] and protocol["n_images"] == 6
    for name, part in (("padinv", "inside"), ("padinv+2", "native"), ("w", "outside")):
        (again,) = on_first({name: values[name]}, part, found[name][part]["n_images"])
        assert again == {"method": name, "set": part} | found[name][part]
    table = {(line["kind"], line["set"], line["method"]): line["n_images"] for line in on_same(found, values)}
    assert table == {
        **{("encoded", part, "padinv"): n for part, n in (("inside", 6), ("outside", 6), ("native", 4))},
        **{("touched", part, m): n for part, n in (("inside", 4), ("outside", 4), ("native", 3))
           for m in ("padinv", "padinv+2")},
        **{("searched", part, m): 2 for part in ("outside", "native") for m in ("padinv", "padinv+2", "w")},
    }  # fmt: skip
    share = {line["set"]: line for line in ratios(values, [("padinv+2", "padinv")])}
    assert set(share) == {"inside", "outside", "native"} and share["native"]["n_images"] == 3
    assert share["outside"]["lpips_alex"] < 1 and "edit_lpips" not in share["outside"] and share["native"]["edit_lpips"]
    file = json.loads((tmp_path / "padinv+2.json").read_text())
    (tmp_path / "other.csv").touch()
    for change in ({"resolution": 64}, {"checkpoints": file["protocol"]["checkpoints"] | {"generator": "another"}}):
        (tmp_path / "other.json").write_text(json.dumps(file | {"protocol": file["protocol"] | change}))
        with pytest.raises(ValueError, match="not measured as the other rows .(resolution|generator)"):
            read_rows(tmp_path, ["padinv", "other"])


def test_a_ratio_knows_its_error():
    b = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    assert ratio(0.7 * b, b) == (0.7, 0.0)  # image by image the same: no doubt, however much images differ
    a = 0.7 * b + 0.1 * torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, error = ratio(a, b)
    draws = [torch.randint(2000, (2000,), generator=torch.Generator().manual_seed(i)) for i in range(200)]
    assert torch.tensor([ratio(a[i], b[i])[0] for i in draws]).std().item() == pytest.approx(error, rel=0.2)


def test_the_pace_of_p_is_looked_at_on_images_of_ones_own(folder, capsys):
    pace.main(["padinv", "--data", str(folder / "inside.zip"), "--checkpoints", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 6 + 1 and lines[2].startswith("| 10 | 0.1 | ") and lines[7].endswith(" | 16 |")
