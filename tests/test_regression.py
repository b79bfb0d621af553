"""Training by regression: what labels decide is learned, the mapping follows them, and runs resume to the bit."""

import csv
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from padinv import load_generator
from padinv.images.datasets import ImageDataset
from padinv.model.generator import Generator, GeneratorConfig
from padinv.training.__main__ import main
from padinv.training.regression import (
    LabelCodes,
    Regression,
    load_label_codes,
    mapping_of_labels,
    read_labels,
    shift_w,
    train_by_labels,
)  # fmt: skip

TINY = {"labels": ("left", "right"), "z_dim": 8, "w_dim": 8, "channel_base": 128, "channel_max": 8, "resolution": 16,
        "batch": 4, "log_every": 1, "lr_final": 1.0, "ema_images": 16.0}  # fmt: skip
EXACT = "donot_use_mm_for_euclid_dist"
PAINT = {"black": 0, "grey": 128, "white": 255}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of two halves, each painted as its label says; "kept" says which were kept back."""
    folder = tmp_path_factory.mktemp("labelled")
    rows = []
    for i, (left, right) in enumerate(itertools.product(PAINT, PAINT)):
        image = np.zeros((32, 32, 3), np.uint8)
        image[:, :16], image[:, 16:] = PAINT[left], PAINT[right]
        Image.fromarray(image).save(folder / f"{i}.png")
        rows.append({"file": f"{i}.png", "left": left, "right": right, "kept": str(left == right == "white")})
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(folder)


def train(data, folder, images, name="g", **settings):
    config = Regression(**(TINY | settings), images=images)
    return train_by_labels(data, str(folder / f"{name}.safetensors"), config, str(folder / name))


def test_unbroken_and_resumed_runs_end_in_the_same_weights(data, tmp_path):
    train(data, tmp_path, 32, "whole", grow=[[8, 12]])
    for images in (8, 16, 32):  # stops before and after the generator grows
        train(data, tmp_path, images, "parts", grow=[[8, 12]])
    for suffix in (".safetensors", ".labels.safetensors"):
        whole, parts = (load_file(tmp_path / f"{name}{suffix}") for name in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole | parts)


def test_it_draws_labels_also_in_a_combination_that_it_was_never_shown(data, tmp_path):
    train(data, tmp_path, 1600, where={"kept": "False"}, lr=0.01, lr_final=0.05, seed=1)
    G, codes = load_generator(tmp_path / "g.safetensors"), load_label_codes(tmp_path / "g.labels.safetensors")
    dataset = ImageDataset(data, 16)
    w = codes(codes.indices(dataset.labels))  # [9, w_dim], white beside white among them
    drawn = G.synthesis(w[:, None].expand(-1, G.num_ws, -1), noise="none")
    for y, row in zip(drawn, dataset.labels, strict=True):
        for half, side in ((y[..., 1:7], "left"), (y[..., 9:15], "right")):
            assert abs(half.mean().item() - (PAINT[row[side]] / 127.5 - 1)) < 0.3
    z = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    nearest = torch.cdist(G.mapping(z)[:, 0], w, compute_mode=EXACT).min(dim=1).values
    assert (nearest < 1e-3).float().mean() > 0.9  # samples are labelled images, but for those on a ramp


def test_the_mapping_gives_each_option_its_share_of_z():
    torch.manual_seed(0)
    shares = {"a": [0.5, 0.3, 0.2], "b": [0.9, 0.1]}
    codes = LabelCodes({name: [str(i) for i in range(len(parts))] for name, parts in shares.items()}, 16)
    G = Generator(GeneratorConfig(8, 64, 16, 2, 64, 4))
    before = G.synthesis(codes.vectors[:1].expand(G.num_ws, -1)[None], noise="none")
    shift = mapping_of_labels(G.mapping, codes, shares, 0.02, seed=0)
    shift_w(G, shift)
    after = G.synthesis((codes.vectors[:1] + shift).expand(G.num_ws, -1)[None], noise="none")
    assert torch.allclose(before, after, atol=1e-5)
    pairs = list(itertools.product(range(3), range(3, 5)))
    points = torch.stack([codes.vectors[i] + codes.vectors[j] for i, j in pairs]) + shift
    w = G.mapping(torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)))[:, 0]
    assert w.min() > 0
    distance, nearest = torch.cdist(w, points, compute_mode=EXACT).min(dim=1)
    assert (distance < 1e-3).float().mean() == pytest.approx(0.96, abs=0.01)  # 2 % of each label lie between options
    found = nearest.bincount(minlength=6) / len(w)
    wanted = torch.tensor([shares["a"][i] * shares["b"][j - 3] for i, j in pairs])
    assert torch.allclose(found, wanted, atol=0.015)


def test_labels_that_cannot_be_trained_are_named(data, tmp_path):
    dataset = ImageDataset(data)
    with pytest.raises(ValueError, match=r"has no columns \['up'\]; it has \['kept', 'left', 'right'\]"):
        read_labels(dataset, Regression(labels=("up",)))
    with pytest.raises(ValueError, match=r"where: no image of .* has \{'kept': 'maybe'\}"):
        read_labels(dataset, Regression(labels=("left",), where={"kept": "maybe"}))
    with pytest.raises(ValueError, match="w_dim, z_dim, mapping_layers: expected at least 8, 2, and 2"):
        train(data, tmp_path, 4, w_dim=4)
    codes = LabelCodes({"left": ["black", "grey"], "right": list(PAINT)}, 8)
    with pytest.raises(ValueError, match=r"left has the values \['white'\], which were not trained"):
        codes.indices(dataset.labels)
    for row in dataset.labels:
        row["left"] = row["file"]
    many = [{**row, "left": f"{row['file']}{i}"} for i in range(8) for row in dataset.labels]
    dataset.labels = many
    with pytest.raises(ValueError, match="left has 72 values, expected at most 64"):
        read_labels(dataset, Regression(labels=("left",)))


def test_the_command_line_takes_labels(data, tmp_path, capsys):
    params = tmp_path / "params.yaml"
    settings = "".join(f"{key}: {value}, " for key, value in TINY.items() if key != "labels")
    params.write_text(f"train_generator: {{{settings}images: 8}}\n")
    out = tmp_path / "g.safetensors"
    arguments = ["generator", "--data", data, "--out", str(out), "--workdir", str(tmp_path / "run")]
    main([*arguments, "--params", str(params), "--labels", "left", "right"])
    assert load_generator(out).resolution == 16 and load_label_codes(out.with_suffix(".labels.safetensors"))
    with pytest.raises(SystemExit, match="has no columns"):
        main([*arguments, "--params", str(params), "--labels", "leftt"])
