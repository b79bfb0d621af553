"""Animations, grids that are read again, and points with names."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from padinv.images.datasets import to_float, to_uint8
from padinv.images.viz import FIGURE_BYTES, animate, axes, panel, png, read_grid, save_grid, scatter


@pytest.fixture
def frames():
    """A square that moves over a gradient, 6 frames [24, 40, 3]."""
    background = np.broadcast_to(np.linspace(0, 255, 40, dtype=np.uint8)[None, :, None], (24, 40, 3))
    frames = [background.copy() for _ in range(6)]
    for i, frame in enumerate(frames):
        frame[8:16, 4 * i : 4 * i + 8] = (200, 30, 30)
    return frames


def test_an_animation_shows_its_frames_and_is_the_same_bytes(frames, tmp_path, capsys):
    for name in ("a.gif", "b.gif"):
        animate(frames, tmp_path / name, ms=50)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0 and gif.info["duration"] == 50 and gif.n_frames == 6
        for frame, expected in zip(ImageSequence.Iterator(gif), frames, strict=True):
            assert np.abs(np.array(frame.convert("RGB")).astype(int) - expected).max() < 12


def test_a_large_animation_keeps_fewer_colours(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3), dtype=np.uint8)
    animate(list(noise), tmp_path / "noise.gif")
    data = (tmp_path / "noise.gif").read_bytes()
    assert len(data) < FIGURE_BYTES
    with Image.open(io.BytesIO(data)) as gif:
        assert gif.n_frames == 8 and len(np.unique(np.array(gif.convert("RGB")).reshape(-1, 3), axis=0)) < 256


def test_a_large_picture_keeps_the_colours_of_its_small_parts():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:200, :300]
    pixels = np.stack([80 + x / 3, 60 + y / 2, 150 - x / 4], axis=-1) + rng.normal(0, 8, (200, 300, 3))
    spots = rng.integers(0, 256, (6, 3))
    for i, colour in enumerate(spots):
        pixels[20:36, 20 + 40 * i : 36 + 40 * i] = colour
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    data = png(picture, 50_000)
    assert len(data) < 50_000 and data == png(picture, 50_000)
    with Image.open(io.BytesIO(data)) as reduced:
        assert len(reduced.getcolors()) <= 128
        found = np.array(reduced.convert("RGB"))[28, 28:268:40].astype(int)
    assert np.abs(found - spots).max() < 12, "by colours that most pixels have, over 90 off"


def test_a_grid_is_read_as_it_was_written(tmp_path):
    x = to_float(torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    save_grid(x, tmp_path / "grid.png", columns=5)
    assert torch.equal(to_uint8(read_grid(tmp_path / "grid.png", 16, 4)), to_uint8(x[:4]))


def test_names_lie_on_no_point_and_on_no_other_name():
    rng = np.random.default_rng(0)
    points = {f"method {i}": tuple(xy) for i, xy in enumerate(rng.normal(0, 0.1, (12, 2)))} | {"alone": (1, 1)}
    figure, (ax,) = axes(width=6, height=4)
    scatter(ax, points, dict.fromkeys(points, "#000000"), xlim=(-1, 1.2))
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
    assert [text.get_text() for text in ax.texts if text.get_text()] == list(points)
    for i, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:i] + boxes[i + 1 :])
        assert not any(box.contains(*xy) for xy in ax.transData.transform(list(points.values())))
        assert ax.bbox.contains(*box.min) and ax.bbox.contains(*box.max)
    at = np.array(points["alone"])
    assert np.hypot(*(boxes[-1].min - ax.transData.transform(at))) < 20, "a name with room stays beside its point"


def test_a_panel_keeps_groups_of_columns_apart():
    white, black = torch.ones(3, 8, 8), -torch.ones(3, 8, 8)
    images, maps = [black] * 3, [torch.zeros(8, 8)] * 3
    wide = {}
    for name, titles in {"none": (), "columns": ["a", "a", ""], "groups": {"a": 2, "b": 1}}.items():
        figure = panel({"x": images, "y": maps, "z": [white] * 3}, titles, cell=32)
        assert [text.get_text() for text in figure.texts][3:] == ([] if name == "none" else list(titles))
        wide[name] = round(figure.get_figwidth() * 100)
    assert wide["none"] == wide["columns"] == wide["groups"] - 16
