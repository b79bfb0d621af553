"""Rows of the ablation: what they measure, and that params.yaml, dvc.yaml and study.ablation name the same encoders."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from padinv import Encoder
from padinv.files.checkpoints import save_encoder, save_generator
from padinv.inversion.optimise import draw, invert
from padinv.measure import metrics
from padinv.model.codes import Code
from padinv.model.encoder import EncoderConfig
from padinv.model.tensors import file_hash
from padinv.training.encoder import EncoderTraining
from study import ablation
from study.sets import encode_webp, write_zip
from study.tables import summary

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"widths": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "pyramid_channels": 8, "head_channels": 4,
         "padding_channels": 4, "se_reduction": 2, "input_resolution": 32}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    save_generator(tiny, folder / "G.safetensors")
    torch.manual_seed(0)
    for name, settings in {"padinv": {}, "w-only": {"padded_resolutions": 0, "replace_const": False}}.items():
        E = Encoder.for_generator(tiny, **SMALL, **settings).eval()
        with torch.no_grad():  # a new encoder predicts no P
            for parameter in E.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        save_encoder(E, folder / f"{name}.safetensors", images=7)
    for part in ablation.SETS:
        images = [(f"{i}.webp", encode_webp(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8))) for i in range(4)]
        write_zip(folder / f"{part}.zip", images, [{"file": name} for name, _ in images])
    for name in ("padinv", "w-only"):
        run(folder, name)
    return folder


def run(folder, name, generator="G", out="rows"):
    ablation.main([name, "--data", str(folder), "--generator", str(folder / f"{generator}.safetensors"), "--encoder",
                   str(folder / f"{name}.safetensors"), "--out", str(folder / out), "--n_images", "3",
                   "--n_native", "2"])  # fmt: skip


def test_a_row_draws_from_the_code_and_from_its_w_alone(folder, tiny):
    from padinv.files.checkpoints import load_encoder
    from padinv.images.datasets import ImageDataset, to_float

    protocol, rows, values = ablation.read_rows(folder / "rows")
    assert list(rows) == ["padinv", "w-only"] and protocol["n_images"] == 3
    assert protocol["checkpoints"] == {
        "generator": file_hash(folder / "G.safetensors"), "padinv": file_hash(folder / "padinv.safetensors"),
        "w-only": file_hash(folder / "w-only.safetensors"),
    }  # fmt: skip
    x = to_float(ImageDataset(folder / "outside.zip").tensor(range(3)))
    code = invert(x, load_encoder(folder / "padinv.safetensors"), tiny)
    for prefix, part in {"": code, "w_": Code(code.w)}.items():
        found = metrics.compare(draw(part, tiny), x, nets=("alex",))
        for key in ("mse", "lpips_alex"):
            assert values["padinv"]["outside"][prefix + key].tolist() == pytest.approx(found[key].tolist(), abs=2e-6)
    assert (values["padinv"]["outside"]["mse"] != values["padinv"]["outside"]["w_mse"]).all()
    for own in values["w-only"].values():  # no P, so that w alone draws all there is
        assert own["mse"].tolist() == own["w_mse"].tolist()
    for name, row in rows.items():
        assert json.loads((folder / f"rows/{name}.json").read_text())["trained"] == {"images": 7}
        assert row["native"]["n_images"] == 2 and row["native"]["edit_nothing"] > 0
        for part in ablation.SETS:
            assert row[part] == summary(values[name][part])


def test_rows_that_do_not_compare_are_refused(folder, tiny, tmp_path):
    with pytest.raises(SystemExit, match="study.ablation: name: expected one of .*, got 'psp'"):
        run(folder, "psp")
    for name in ("padinv", "w-only"):
        for end in ("json", "csv"):
            (tmp_path / f"{name}.{end}").write_bytes((folder / "rows" / f"{name}.{end}").read_bytes())
    file = json.loads((tmp_path / "w-only.json").read_text())
    for change in ({"n_images": 2}, {"checkpoints": file["protocol"]["checkpoints"] | {"generator": "another"}}):
        (tmp_path / "w-only.json").write_text(json.dumps(file | {"protocol": file["protocol"] | change}))
        with pytest.raises(ValueError, match="w-only was measured otherwise than padinv"):
            ablation.read_rows(tmp_path)


def test_settings_stages_and_groups_name_the_same_encoders():
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())["train_ablation"]
    methods = settings.pop("methods")
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    named = [name for group in ablation.GROUPS.values() for name in group]
    trained = [name for key in ("row-variant", "train-variant") for name in stages[key]["foreach"]]
    assert set(trained) == set(methods) <= set(named) and len(set(named)) == len(named) and len(methods) > 10
    assert methods["padinv"] == {}  # of which each other one is a change
    kinds = {field.name for field in dataclasses.fields(EncoderTraining)}
    avatars = {"num_ws": 12, "w_dim": 256, "channels": (256, 256, 192, 96, 48, 24)}
    for name, method in methods.items():
        assert set(method) <= kinds, name
        encoder = settings["encoder"] | method.get("encoder", {})
        EncoderConfig(**avatars, **encoder)  # raises if its fields do not go together


def test_networks_that_notebooks_draw_with_are_those_of_the_rows():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name in stages["row-variant"]["foreach"]:
        protocol = json.loads((ROOT / f"results/ablation/{name}.json").read_text())["protocol"]
        assert protocol["checkpoints"][name] == file_hash(ROOT / f"checkpoints/avatars-128/ablation/{name}.safetensors")
