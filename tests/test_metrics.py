import csv
import json
import math
import time
from urllib.error import URLError

import pytest
import torch

from padinv.measure import metrics
from padinv.measure.lpips import lpips, vgg_features
from padinv.measure.metrics import compare, frechet_distance, frechet_features, summarise
from padinv.model.tensors import write_json
from study.tables import protocol, timing, write_table

torch.manual_seed(0)
Y = torch.rand(3, 3, 64, 64) * 1.6 - 0.8
X = (Y + 0.1 * torch.randn_like(Y)).clamp(-1, 1)


# Distances per image


def test_closed_forms():
    y = torch.zeros(2, 3, 64, 64)
    x = torch.stack([y[0] + 0.5, y[1] - 0.1])
    values = compare(x, y, nets=())
    assert set(values) == {"mse", "psnr", "ssim"}
    torch.testing.assert_close(values["mse"], torch.tensor([0.25, 0.01]))
    torch.testing.assert_close(values["psnr"], torch.tensor([10 * math.log10(16), 10 * math.log10(400)]))
    c1 = (0.01 * 2) ** 2  # constant images: only SSIM's luminance term is left, its numerator C1
    torch.testing.assert_close(values["ssim"], c1 / (torch.tensor([0.25, 0.01]) + c1))


def test_equal_images():
    values = compare(Y, Y)
    assert set(values) == {"mse", "psnr", "ssim", "lpips_alex", "lpips_vgg"}
    for name, best in {"mse": 0, "ssim": 1, "lpips_alex": 0, "lpips_vgg": 0}.items():
        torch.testing.assert_close(values[name], torch.full((3,), float(best)))
    assert all(v.isfinite().all() and v.dtype == torch.float32 for v in values.values())


def test_every_image_on_its_own(monkeypatch):
    whole = compare(X, Y, nets=["alex"])
    monkeypatch.setattr(metrics, "chunks", lambda x: x.split(1))
    for name, value in compare(X, Y, nets=["alex"]).items():
        assert value.shape == (3,)
        torch.testing.assert_close(value, whole[name], msg=name)
    torch.testing.assert_close(whole["lpips_alex"], lpips("alex")(X, Y))


def test_ms_ssim_from_176_pixels():
    y = torch.rand(1, 3, 176, 180) * 2 - 1
    assert compare(y, y, nets=())["ms_ssim"].item() == pytest.approx(1)
    assert 0 < compare(y + 0.3 * torch.randn_like(y), y, nets=())["ms_ssim"].item() < 0.99
    assert "ms_ssim" not in compare(y[:, :, :175], y[:, :, :175], nets=())


def test_overshoot_is_clamped_and_arguments_are_kept():
    x = X * 1.5
    before = x.clone()
    clamped = compare(x.clamp(-1, 1), Y, nets=())
    assert torch.equal(compare(x, Y, nets=())["mse"], clamped["mse"]) and torch.equal(x, before)


@pytest.mark.parametrize(
    "x, y, error, words",
    [
        (X, Y.byte(), TypeError, "y: .*to_float"),
        (X * 127.5 + 127.5, Y, ValueError, "x: .*to_float"),
        (X, Y * 127.5 + 127.5, ValueError, "y: .*to_float"),
        (X, Y * 2, ValueError, "y: "),
        (X.where(X < 0.5, math.nan), Y, ValueError, "x: .*nan"),
        (X[:2], Y, ValueError, "one shape"),
        (X[:0], Y[:0], ValueError, "N > 0"),
        (X[0], Y[0], ValueError, r"\[N, 3, H, W\]"),
        (X[..., :16], Y[..., :16], ValueError, "from 32"),
    ],
)
def test_refuses_other_images(x, y, error, words):
    with pytest.raises(error, match=words):
        compare(x, y)


def test_summary():
    assert summarise({"mse": torch.tensor([1.0, 2.0, 2.0])}) == {"mse": 1.666667}


# Fréchet distance


def gaussian(n, d, mean=0.0, std=1.0):
    """Samples whose mean and covariance are exactly mean and std² I."""
    x = torch.randn(n, d, dtype=torch.float64)
    x -= x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x * std + mean


def test_frechet_closed_form():
    a, b = gaussian(500, 8), gaussian(400, 8, mean=0.5, std=3.0)
    assert frechet_distance(a, b) == pytest.approx(8 * (0.5**2 + (3 - 1) ** 2), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(frechet_distance(b, a), rel=1e-5)


def test_frechet_refuses_and_warns():
    a = gaussian(20, 4)
    with pytest.raises(ValueError, match="fake"):
        frechet_distance(a, a[:, :3])
    with pytest.raises(ValueError, match="real"):
        frechet_distance(a[:1], a)
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(a, a * math.nan)
    with pytest.warns(UserWarning, match="fake: 3 samples of 4"):
        frechet_distance(a, a[:3])


def test_vgg16_features_and_label():
    features, label = frechet_features(X, network="vgg16")
    assert label == "vgg16-conv5_3-gap-512@64" and features.shape == (3, 512)
    torch.testing.assert_close(features, vgg_features(lpips("vgg"), X))
    features, label = frechet_features(torch.zeros(1, 3, 80, 300), network="vgg16")
    assert label == "vgg16-conv5_3-gap-512@80" and features.shape == (1, 512)


@pytest.mark.parametrize("size", [256, 257])
def test_vgg16_reduces_large_images(size, monkeypatch):
    sizes = []
    monkeypatch.setattr(metrics, "vgg_features", lambda model, x: sizes.append(x.shape[2:]) or x.mean((2, 3)))
    label = frechet_features(torch.zeros(1, 3, size, size), "vgg16")[1]
    assert label == metrics.vgg_label(size) == "vgg16-conv5_3-gap-512@256"
    assert sizes == [(256, 256)]


def test_inception(monkeypatch):
    from pytorch_fid import inception

    class Found(Exception):
        pass

    def weights(url, progress):
        raise Found

    monkeypatch.setattr(inception, "load_state_dict_from_url", weights)
    for network in ("inception", "auto"):
        with pytest.raises(Found):  # its weights are the first choice
            frechet_features(X, network)
    seen = []
    model = torch.nn.Identity()
    model.forward = lambda x: seen.append(x) or [x.mean((2, 3), keepdim=True)]
    monkeypatch.setattr(metrics, "load_inception", lambda: model)
    features, label = frechet_features(X, "auto")
    assert label == "fid-inception-v3-pool3-2048" and len(features) == 3
    levels = torch.cat(seen) * 255  # what pytorch-fid would read from the saved images
    assert torch.equal(levels.round(), ((X + 1) * 127.5).round())


def test_without_inception_weights(monkeypatch):
    from pytorch_fid import inception

    def weights(url, progress):
        raise URLError("no network")

    monkeypatch.setattr(inception, "load_state_dict_from_url", weights)
    with pytest.raises(FileNotFoundError, match="no network"):
        frechet_features(X, "inception")
    with pytest.warns(UserWarning, match="VGG16"):
        _, label = frechet_features(X, "auto")
    assert label.startswith("vgg16")


def test_frechet_refuses_other_networks_and_images():
    with pytest.raises(ValueError, match="resnet"):
        frechet_features(X, "resnet")
    with pytest.raises(ValueError, match="to_float"):
        frechet_features(X * 255, "vgg16")


# Time and files


def test_timing_per_image():
    calls = []
    seconds = timing(lambda b: calls.append(len(b)) or time.sleep(0.02), X, "cpu", repeats=3, warmup=2)
    assert calls == [3] * 5 and 0.02 / 3 <= seconds < 0.2


def test_protocol_is_complete(tmp_path):
    p = protocol(1000, 64, "vgg16-conv5_3-gap-512@64", checkpoints={"generator": "abc"})
    assert p["n_images"] == 1000 and p["checkpoints"] == {"generator": "abc"} and p["device"] == "cpu"
    assert p["frechet"] == "vgg16-conv5_3-gap-512@64"
    assert set(p["packages"]) == {"torch", "lpips", "torchmetrics", "pytorch-fid"}
    assert all(p["packages"].values())
    write_json(tmp_path / "p.json", p)
    assert json.loads((tmp_path / "p.json").read_text()) == p


def test_json_bytes_are_stable(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"b": 0.1, "a": ["é"]})
    assert path.read_bytes() == '{\n  "a": [\n    "é"\n  ],\n  "b": 0.1\n}\n'.encode()
    first = path.read_bytes()
    write_json(path, {"a": ["é"], "b": 0.1})
    assert path.read_bytes() == first
    with pytest.raises(ValueError):
        write_json(path, {"a": math.inf})
    assert path.read_bytes() == first and [f.name for f in path.parent.iterdir()] == ["a.json"]


def test_table(tmp_path):
    rows = [{"method": "a|b", "mse": 0.123456, "n": 3, "other": 1}, {"method": "c, d", "n": 4}]
    columns = ["method", "mse", "n"]
    text = write_table(tmp_path / "t", rows, columns)
    assert (tmp_path / "t.md").read_text() == text
    lines = ["| method | mse | n |", "| --- | --- | --- |", "| a\\|b | 0.1235 | 3 |", "| c, d |  | 4 |"]
    assert text.splitlines() == lines
    assert write_table("", rows, columns, "A note.", text) == f"{text}\nA note.\n\n{text}"
    assert {path.name for path in tmp_path.iterdir()} == {"t.csv", "t.md"}
    with open(tmp_path / "t.csv") as file:
        assert list(csv.DictReader(file)) == [
            {"method": "a|b", "mse": "0.123456", "n": "3"},
            {"method": "c, d", "mse": "", "n": "4"},
        ]
    write_table(tmp_path / "t", rows, columns, whole=(rows[:1], ["other"]))
    assert (tmp_path / "t.md").read_text() == text and (tmp_path / "t.csv").read_text() == "other\n1\n"
