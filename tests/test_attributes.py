"""Labels of images, what reads them, and which change along a direction."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from padinv import Code
from padinv.images.datasets import ImageDataset, to_float, to_uint8
from study import avatars
from study.attributes import (
    COLUMNS,
    Probes,
    effect_row,
    labelled,
    load_classifier,
    pixel_labels,
    reader,
    readings,
    samples,
    train_classifier,
)  # fmt: skip
from study.avatars import COLOURS, SHAPES
from study.sets import encode_webp, write_zip


def test_labels_of_avatars_are_values_that_occur():
    options = SHAPES | COLOURS
    for column, values in COLUMNS.values():
        assert column not in options or set(values.split()) < set(options[column])


def test_a_classifier_reads_what_it_was_trained_to_read(renderer, tmp_path):
    rows = [avatars.sample(0, "train", i) for i in range(96)]
    images = [(f"{i:02}.webp", encode_webp(avatars.render(row, 32))) for i, row in enumerate(rows)]
    write_zip(
        tmp_path / "train.zip", images, [{"file": name} | row for (name, _), row in zip(images, rows, strict=True)]
    )
    train_classifier(str(tmp_path / "train.zip"), str(tmp_path / "c.safetensors"), epochs=12, batch=16)
    network = load_classifier(tmp_path / "c.safetensors")
    x = to_float(ImageDataset(tmp_path / "train.zip").tensor(progress=False))
    accuracy = network.accuracy(x, rows)
    chance = {name: max(Counter(row[name] for row in rows).values()) / len(rows) for name in accuracy}
    assert list(accuracy) == list(avatars.ATTRIBUTES) and accuracy["background"] > 0.9
    assert all(accuracy[name] > chance[name] for name in ("background", "skin", "clothes_colour", "hair"))
    assert network.read(x[:1]) == [{name: network.read(x)[0][name] for name in accuracy}]

    column, values = COLUMNS["light skin"]
    chance = network.chances(x, ["light skin", "hat"])
    assert chance.shape == (96, 2) and ((chance >= 0) & (chance <= 1)).all()
    every = network(x)[column].softmax(dim=1)
    light = [network.options[column].index(value) for value in values.split()]
    assert torch.allclose(chance[:, 0], every[:, light].sum(dim=1))
    (tmp_path / "c.safetensors").rename(tmp_path / "classifier.safetensors")
    read = reader(str(tmp_path), "no file", SimpleNamespace(const=x), 0, ["light skin", "hat"])
    assert torch.equal(read(x), chance), "the classifier that is there"
    Code(torch.zeros(1, 2, 3)).save(tmp_path / "code.safetensors")
    with pytest.raises(ValueError, match="kind"):
        load_classifier(tmp_path / "code.safetensors")


def test_images_with_and_without_a_table_have_labels(tiny, tmp_path):
    x = torch.linspace(-1, 1, 4).view(4, 1, 1, 1).repeat(1, 3, 32, 32)
    images = [(f"{i}.webp", encode_webp(image)) for i, image in enumerate(to_uint8(x))]
    pixels = ["bright", "warm", "bright border", "light from the left"]
    avatar, person = {"hat": "turban", "skin": "#d08b5b"}, {"age": "50"}
    for row, names in ((avatar, ["light skin", "hat"]), (person, ["over 40", *pixels]), ({}, pixels)):
        write_zip(tmp_path / "x.zip", images, [{"file": name} | row for name, _ in images])
        found, labels, known = labelled(str(tmp_path / "x.zip"), tiny, 3)
        assert found.shape == (3, 3, 32, 32) and known == names and labels.shape == (3, len(names))
        assert not row or labels[:, 0].all()
    assert pixel_labels(x)["bright"].tolist() == [False, False, True, True]


def test_labels_are_read_off_what_changes(tiny):
    """The labels are whether the upper and the lower half are bright; directions lead to where they are."""
    z = torch.randn(900, 16, generator=torch.Generator().manual_seed(0))
    codes = Code(tiny.mapping(z))
    x = tiny(codes)
    halves = torch.stack([half.mean(dim=(1, 2, 3)) for half in x.chunk(2, dim=2)], dim=1)  # [N, 2]
    labels = halves > halves.median(dim=0).values
    probes = Probes.fit(x[:800], labels[:800])
    found = probes(x[800:])
    assert ((found > 0.5) == labels[800:]).float().mean() > 0.9 and probes.normals.shape == (3072, 2)
    assert abs(found[labels[800:, 0], 0].mean() - 1) < 0.3 and abs(found[~labels[800:, 0], 0].mean()) < 0.3
    own, known = samples(tiny, probes, 60, seed=1)
    assert len(own) == 60 and known.shape == (60, 2) and torch.equal(known, probes(tiny(own)) > 0.5)

    difference = [codes.w[labels[:, k]].mean(0) - codes.w[~labels[:, k]].mean(0) for k in range(2)]
    seen = readings(probes, tiny, codes[:4], Code(torch.stack(difference)), 2.0)
    assert seen.shape == (2, 3, 4, 2)
    assert torch.allclose(seen[:, 1], probes(tiny(codes[:4])).expand(2, -1, -1), atol=1e-5)
    assert ((seen[:, 2] - seen[:, 0]).mean(dim=1).diagonal() > 0.5).all()


def test_a_row_sets_own_labels_against_others():
    ends = torch.tensor([[[2.0, -0.5], [0.5, 1.0]], [[2.0, -0.5], [0.5, 1.0]]])  # [N, K, K]: two images alike
    seen = torch.stack((torch.zeros(2, 2, 2), torch.zeros(2, 2, 2), ends.transpose(0, 1)), dim=1)  # [K, 3, N, K]
    row = effect_row(seen, ["a", "b"])
    assert (row["target"], row["others"], row["ratio"]) == pytest.approx((1.5, 0.5, 3.0))
    assert row["target_error"] == row["others_error"] == 0
    assert row["kept"] == 1, "0.5 is not beyond the side that it was on"
    assert row["labels"] == {"a": {"target": 2.0, "others": 0.5}, "b": {"target": 1.0, "others": 0.5}}
