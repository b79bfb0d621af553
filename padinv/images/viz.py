"""Pictures: grids of images, and the figures that notebooks share.

Figures are PNGs without volatile metadata: the same arrays give the same bytes. matplotlib is imported where it is
used, since training needs only `save_grid`.
"""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from padinv.images.datasets import read_image, to_float, to_uint8
from padinv.model.codes import Padding
from padinv.model.tensors import atomic_write
from padinv.ops import pad_ring

COLOURS = {"padinv": "#c8553d", "psp": "#33658a", "other": "#8d99ae", "mark": "#e0a030"}  # of curves and bars
FIGURE_BYTES = 140_000  # a figure above it keeps fewer colours
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e6e6e6", "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Grids of images


def tile(images: Tensor, columns: int | None = None, pad: int = 1, scale: int = 1) -> np.ndarray:
    """Images beside and below each other on white: [N, 3, H, W] in [−1, 1] -> uint8 [rows·(H + pad) + pad, …, 3];
    `scale` repeats every pixel."""
    n, _, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, 3), 255, dtype=np.uint8)
    for i, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):  # [N, H, W, 3]
        y, x = pad + i // columns * (h + pad), pad + i % columns * (w + pad)
        canvas[y : y + h, x : x + w] = image
    return canvas.repeat(scale, axis=0).repeat(scale, axis=1)


def save_grid(images: Tensor, path: str | Path, columns: int | None = None, scale: int = 1) -> None:
    """Write `tile(images)` as a PNG without volatile metadata."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tile(images, columns, scale=scale)).save(path, optimize=True)


def read_grid(path: str | Path, size: int, count: int) -> Tensor:
    """The first images, of one size, in the first row of what `save_grid` wrote: [count, 3, size, size]."""
    picture = to_float(read_image(path))  # [3, 1 + rows·(size + 1), …]
    starts = (1 + i * (size + 1) for i in range(count))
    return torch.stack([picture[:, 1 : 1 + size, x : x + size] for x in starts])


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def axes(columns: int = 1, rows: int = 1, width: float = 4.0, height: float = 2.6):
    """A figure of rows × columns axes, each width × height inches, in the look of all figures: (figure, [axes])."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def panel(
    rows: dict[str, Sequence[Tensor]],
    titles: Sequence[str] | dict[str, int] = (),
    cell: int = 128,
    shared: Sequence[str] = (),
    font: int = 9,
):
    """A figure with one row of square pictures per entry, enlarged without interpolation.

    Args:
        rows: label -> pictures of any size: images [3, H, W] in [−1, 1], and maps [H, W] from 0 drawn as heat, NaN left
            white. A batch [N, …] is such a sequence. The label of a row with maps gets their range of colours.
        titles: of the columns; or of groups of them, title -> number of columns, with space between the groups.
        cell: pixels along a side of a picture.
        shared: labels of the rows that share one range of colours; any other has its own.
        font: size of labels and titles.

    Returns:
        A matplotlib figure for `show`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    tops = {label: max((float(m.nan_to_num().max()) for m in row if m.ndim == 2), default=None)
            for label, row in rows.items()}  # fmt: skip
    tops |= dict.fromkeys(shared, max((tops[label] for label in shared), default=None))
    names = [label if tops[label] is None else f"{label}\n0 … {tops[label]:.2g}" for label in rows]
    grouped = isinstance(titles, dict)
    spans = list(titles.items()) if grouped else [(title, 1) for title in titles]
    gap, top = 4, 2 * font + 2 if titles else 4
    left = 12 + 7 * font * max(len(line) for name in names for line in name.split("\n")) // 9
    # Left edge of each column, and one more; groups lie apart.
    apart = [4 * gap * i for i, (_, n) in enumerate(spans) for _ in range(n)] if grouped else []
    apart += apart[-1:] or [0] * (max(map(len, rows.values())) + 1)
    lefts = [left + j * (cell + gap) + space for j, space in enumerate(apart)]
    width, height = lefts[-1], top + len(rows) * (cell + gap)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    for i, (label, row) in enumerate(rows.items()):
        y = top + i * (cell + gap)
        figure.text((left - 8) / width, 1 - (y + cell / 2) / height, names[i], ha="right", va="center", fontsize=font)
        for j, picture in enumerate(row):
            if picture.ndim == 2:
                heat = matplotlib.colormaps["magma"]((picture / (tops[label] or 1)).detach().cpu().numpy())
                pixels = (heat[..., :3] * 255).round().astype(np.uint8)  # [H, W, 3]
                pixels[picture.isnan().cpu().numpy()] = 255
            else:
                pixels = to_uint8(picture).permute(1, 2, 0).cpu().numpy()  # [H, W, 3]
            down, across = (np.arange(cell) * size // cell for size in pixels.shape[:2])
            canvas[y : y + cell, lefts[j] : lefts[j] + cell] = pixels[down][:, across]
    first = 0
    for title, n in spans:
        x, first = (lefts[first] + lefts[first + n - 1] + cell) / 2, first + n
        figure.text(x / width, 1 - top / 2 / height, title, ha="center", va="center", fontsize=font)
    figure.figimage(canvas)
    return figure


def show(figure, path: str | Path = "", limit: int = FIGURE_BYTES) -> None:
    """Display a matplotlib figure, or an array as of `tile`, and with a path write it: the same PNG, the same bytes for
    the same picture. One that is large keeps fewer colours; `limit` is the most bytes of the file."""
    from IPython.display import Image as Displayed
    from IPython.display import display

    if isinstance(figure, np.ndarray):
        picture = Image.fromarray(figure)
    else:
        figure.savefig(buffer := io.BytesIO(), format="png")
        picture = Image.open(buffer).convert("RGB")  # drops matplotlib's metadata
    display(Displayed(png(picture, FIGURE_BYTES)))
    if path:
        atomic_write(path, png(picture, limit))


def png(picture: Image.Image, limit: int) -> bytes:
    """With as many colours as so many bytes allow, 32 at least, the nearest to those of every fourth pixel."""
    some = picture.resize((picture.width // 4 + 1, picture.height // 4 + 1), Image.Resampling.NEAREST)
    for colours in (None, 256, 128, 64, 32):
        reduced = picture
        if colours:
            reduced = picture.quantize(palette=some.quantize(colours, kmeans=1), dither=Image.Dither.NONE)
        reduced.save(buffer := io.BytesIO(), "PNG", optimize=True)
        if buffer.tell() <= limit:
            break
    return buffer.getvalue()


def animate(frames: Sequence[np.ndarray], path: str | Path = "", ms: int = 100) -> None:
    """Display arrays of one size, as of `tile`, as an endless animation, each so long and three times enlarged; with a
    path write it: a GIF, the same bytes for the same frames. One palette serves all; a large file has fewer colours."""
    from IPython.display import Image as Displayed
    from IPython.display import display

    height, width, _ = frames[0].shape
    strip = Image.fromarray(np.concatenate(frames))  # below each other, for the common palette
    for colours in (256, 128, 64, 32):
        reduced = strip.quantize(colours, dither=Image.Dither.NONE)
        first, *rest = (reduced.crop((0, i * height, width, (i + 1) * height)) for i in range(len(frames)))
        first.save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=rest, duration=ms, loop=0)
        if buffer.tell() <= FIGURE_BYTES:
            break
    display(Displayed(buffer.getvalue(), format="gif", width=3 * width))
    if path:
        atomic_write(path, buffer.getvalue())


def curve(folder: str | Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """A training curve that dvclive wrote to a folder: thousands of images shown, values.

    Raises FileNotFoundError if there is none.
    """
    with open(Path(folder) / "plots" / "metrics" / f"{metric}.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return np.array([int(row["step"]) / 1000 for row in rows]), np.array([float(row[metric]) for row in rows])


def log_scale(axis, at: Sequence[int] = (1, 2, 5)) -> None:
    """Make a matplotlib axis logarithmic, with plain numbers at so many times 1, 10, 100, …"""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=at))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def scatter(ax, points: dict[str, tuple[float, float]], colours: dict[str, str], named: Sequence[str] = (), **settings):
    """Points with their names, or some of them, beside them: each where it lies on no point and on no other name.

    `settings` are those of the axes, limits among them, which the places depend on: nothing may change them afterwards.
    """
    from matplotlib.path import Path as Line
    from matplotlib.transforms import Bbox

    for name, point in points.items():
        ax.plot(*point, "o", color=colours[name])
    ax.set(**settings)
    ax.figure.draw_without_rendering()  # fixes where the axes lie
    places = dict(zip(points, ax.transData.transform(list(points.values())), strict=True))  # in pixels
    dots, names = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places.values()], []
    ways = [(1, 0.5), (1, -0.5), (-1, 0.5), (-1, -0.5), (0, 1), (0, -1), (0.6, 1), (0.6, -1), (-0.6, 1), (-0.6, -1)]
    for name in named or points:
        text = ax.annotate(name, points[name], xytext=(0, 0), textcoords="offset points", fontsize=7)
        for reach, (dx, dy) in [(reach, way) for reach in (5, 12, 20, 30, 42, 56) for way in ways]:
            text.set(ha="left" if dx > 0 else "right" if dx < 0 else "center", va=("bottom" if dy > 0 else "top"))
            text.xyann = reach * dx, reach * dy
            box = text.get_window_extent()
            line = Line([places[name], places[name] + np.array(text.xyann) * ax.figure.dpi / 72])
            free = not box.count_overlaps(dots + names) and not any(map(line.intersects_bbox, names))
            if free and ax.bbox.contains(*box.min) and ax.bbox.contains(*box.max):
                break
        names.append(box)
        if reach > 5:
            line = {"arrowstyle": "-", "color": colours[name], "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
            ax.annotate("", points[name], xytext=text.xyann, textcoords="offset points", arrowprops=line)


def heat(ax, values: Tensor, rows: Sequence[str], columns: Sequence[str], ends: tuple[float, float], colours: str):
    """A table of numbers, each on its colour between two ends."""
    image = ax.imshow(values.cpu(), cmap=colours, vmin=ends[0], vmax=ends[1], aspect="auto")
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            ink = "white" if sum(image.cmap(image.norm(value))[:3]) < 1.2 else "black"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(False)


def smooth(values: np.ndarray, window: int = 15) -> np.ndarray:
    """Running median, of the same length: a curve without its outliers."""
    padded = np.pad(values, window // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=-1)


# ----------------------------------------------------------------------------------------------------------------------
# The padding space


def ring_maps(p: Padding) -> dict[str, Tensor]:
    """What p holds, as maps for `panel`: norms over channels, [N, 4, 4] of the constant, [N, r + 2, r + 2] of each ring
    in its place, NaN inside, and [N, r, r] of the interior."""
    maps = {} if p.const is None else {"constant": p.const.norm(dim=1)}
    for ring in p.rings:
        r = ring.shape[-1] // 4 - 1
        inside = torch.full((len(ring), 1, r, r), math.nan, device=ring.device)
        maps[f"ring {r}²"] = pad_ring(inside, ring.norm(dim=1, keepdim=True))[:, 0]  # [N, r + 2, r + 2]
    if p.interior is not None:
        maps[f"interior {p.interior.shape[-1]}²"] = p.interior.norm(dim=1)
    return maps
