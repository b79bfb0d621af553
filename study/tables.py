"""Seconds, the protocol beside numbers, and tables as CSV and Markdown.

Files are byte-stable: timings live in files of their own.
"""

import csv
import io
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from padinv.model.tensors import atomic_write

# ----------------------------------------------------------------------------------------------------------------------
# Time


def timing(fn: Callable, batch, device: torch.device | str, repeats: int = 10, warmup: int = 3) -> float:
    """Median seconds per image of fn(batch), where len(batch) counts the images; waits for the device."""
    seconds = []
    for i in range(warmup + repeats):
        synchronize(device)
        start = time.perf_counter()
        fn(batch)
        synchronize(device)
        if i >= warmup:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / len(batch)


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor's architecture with the number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


# ----------------------------------------------------------------------------------------------------------------------
# Files


def protocol(n_images: int, resolution: int, frechet: str = "not measured", device: torch.device | str = "cpu",
             checkpoints: dict[str, str] | None = None) -> dict:  # fmt: skip
    """How the numbers of a file came about: to be stored beside them.

    Args:
        n_images, resolution: of the images measured.
        frechet: label of `frechet_features`.
        device: where the networks ran; only its type is stored, so that files agree between machines.
        checkpoints: name of each checkpoint and its `file_hash`.
    """
    packages = {}
    for name in ("torch", "lpips", "torchmetrics", "pytorch-fid"):
        try:
            packages[name] = version(name).split("+")[0]  # the local part names a CUDA build
        except PackageNotFoundError:
            packages[name] = None
    return {
        "n_images": n_images,
        "resolution": resolution,
        "image_range": "[-1, 1], clamped",
        "mse": "mean over channels and pixels",
        "psnr": "dB, range 2, mean of images",
        "ssim": "torchmetrics defaults, range 2",
        "lpips_alex": "LPIPS v0.1, AlexNet, at the images' resolution",
        "lpips_vgg": "LPIPS v0.1, VGG16, at the images' resolution",
        "frechet": frechet,
        "device": torch.device(device).type,
        "packages": packages,
        "checkpoints": checkpoints or {},
    }


def summary(values: dict[str, Tensor]) -> dict:
    """Of numbers [N] of each image: {"n_images": N, NAME: their mean, …, NAME_error: the standard error of that mean}.

    One image alone has no error: None.
    """
    n = len(next(iter(values.values())))
    found: dict = {"n_images": n} | {name: round(v.double().mean().item(), 6) for name, v in values.items()}
    for name, v in values.items():
        found[f"{name}_error"] = round(v.double().std().item() / n**0.5, 6) if n > 1 else None
    return found


def ratio(a: Tensor, b: Tensor) -> tuple[float, float]:
    """mean(a) / mean(b) of the same images, [N] each, and its standard error to first order: that of a − ratio · b."""
    share = (a.mean() / b.mean()).item()
    return round(share, 4), round(((a - share * b).std() / len(a) ** 0.5 / b.mean()).item(), 4)


def markdown_table(rows: Sequence[dict], columns: Sequence[str]) -> str:
    """Rows as Markdown, floats with 4 decimals, and ± the number NAME_error behind that of a column NAME.

    A row that lacks a column leaves its cell empty; keys that are no column are left out.
    """

    def cell(row: dict, column: str) -> str:
        value, error = row.get(column), row.get(f"{column}_error")
        if isinstance(value, float):
            return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
        return "" if value is None else str(value).replace("|", "\\|")

    lines = [columns, ["---"] * len(columns), *([cell(row, c) for c in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_csv(path: str | Path, rows: Sequence[dict], columns: Sequence[str]) -> None:
    """Rows as CSV in full precision; likewise, and at once or not at all."""
    writer = csv.DictWriter(text := io.StringIO(), columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode())


def write_table(
    path: str | Path,
    rows: Sequence[dict],
    columns: Sequence[str],
    *below: str,
    whole: tuple[Sequence[dict], Sequence[str]] | None = None,
) -> str:
    """Write rows as `markdown_table` with what stands below it (another table, a note), and as CSV in full precision.

    Args:
        path: of both files, without suffix; "": none is written.
        whole: rows and columns of the CSV, where it has more than the page.

    Returns:
        The page.
    """
    page = "\n".join((markdown_table(rows, columns), *(part.rstrip("\n") + "\n" for part in below)))
    if path:
        write_csv(f"{path}.csv", *(whole or (rows, columns)))
        atomic_write(f"{path}.md", page.encode())
    return page


def show_table(*args, **settings) -> None:
    """Display what `write_table` writes, in a notebook."""
    from IPython.display import Markdown, display

    display(Markdown(write_table(*args, **settings)))
