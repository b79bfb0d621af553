"""The comparison of searches: its settings do what they say, every space gets equal time, tables are written."""

import csv
import json
import zipfile

import pytest
import torch

from benchmarks import search
from padinv import Code, project
from padinv.files.checkpoints import save_generator
from padinv.measure.lpips import lpips
from tests.test_commands import picture


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_what_is_turned(tiny, x):
    plain = project(x, tiny, "w+p", steps=3)
    with search.turned():
        assert project(x, tiny, "w+p", steps=3).w.equal(plain.w)
    with search.turned(pace=0.0):
        still = project(x, tiny, "w+p", steps=3)
    assert not any(ring.any() for ring in still.p.rings) and any(ring.any() for ring in plain.p.rings)


def test_the_nearest_sample_starts(tiny, x):
    w = search.nearest(x, tiny, 20)
    samples = tiny.mapping(torch.randn(20, 16, generator=torch.Generator().manual_seed(2)))
    images, network = tiny(Code(samples)).clamp(-1, 1), lpips("alex")
    for image, found in zip(x, w, strict=True):
        distances = network(images, image.expand_as(images))
        assert found.equal(samples[distances.argmin(), :1])
    with search.turned(near=20):
        assert torch.allclose(project(x, tiny, "w+", steps=1, lr=1e-9).w, w.expand(-1, tiny.num_ws, -1))


def test_tables(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(search.TURNED, "from the nearest of 1,000 samples", {"near": 5})
    save_generator(tiny, tmp_path / "g.safetensors")
    for name in ("choice", "test"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as z:
            for i in range(3):
                z.write(picture(tmp_path / f"{i}.png", seed=i), f"{i}.png")
    files = {"--generator": "g.safetensors", "--choice": "choice.zip", "--test": "test.zip", "--out": "found"}
    arguments = [word for key, name in files.items() for word in (key, f"{tmp_path}/{name}")]
    search.main([*arguments, "--n-choice", "2", "--n-test", "3", "--steps", "2"])
    report = json.loads((tmp_path / "found.json").read_text())
    assert [row["way"] for row in report["rows"]] == [*search.TURNED, *search.SPACES]
    steps, cost = {row["way"]: row["steps"] for row in report["rows"]}, report["ms_per_step"]
    assert steps["w+p"] == 2 and steps["w+"] == pytest.approx(2 * cost["w+p"] / cost["w+"], abs=0.6)
    assert all(row["lpips_vgg"] > 0 and row["mse_error"] > 0 for row in report["rows"])
    lines = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert [line["images"] for line in lines] == ["choice"] * len(search.TURNED) + ["test"] * 2
