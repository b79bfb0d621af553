"""The data sets of the experiments: avatars with their ground truth, and photographs split for training and test.

python -m study.sets --out data/avatars-128
"""

import argparse
import csv
import io
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import Tensor

from padinv.images.datasets import ImageDataset, bar, to_float, to_uint8
from padinv.model.tensors import file_hash
from padinv.training.views import views
from study import avatars, stickers


def blending_set(path: str | os.PathLike, resolution: int | None = None) -> dict[str, Tensor]:
    """Ground truth of blending, from blending.zip: {"a", "b", "truth"}, each uint8 [N, 3, R, R]. The truth
    has the shapes of a and the colours of b."""
    return {role: x for _, role, x in _roles(path, resolution)}


def editing_set(path: str | os.PathLike, resolution: int | None = None) -> dict[str, dict[str, Tensor]]:
    """Ground truth of customised editing, from editing.zip: {edit: {"before", "after", "targets", "truths"}},
    uint8 [1, 3, R, R] for the pair and [N, 3, R, R] for the targets and their true results."""
    sets: dict[str, dict[str, Tensor]] = {}
    for task, role, x in _roles(path, resolution):
        sets.setdefault(task, {})[{"target": "targets", "truth": "truths"}.get(role, role)] = x
    return sets


def _roles(path: str | os.PathLike, resolution: int | None) -> Iterator[tuple[str, str, Tensor]]:
    ds = ImageDataset(path, resolution)
    if ds.labels is None or not {"task", "role", "index"} <= ds.labels[0].keys():
        raise ValueError(f"path: {path} has no ground truth; expected a labels.csv with task, role, index")
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for i, row in enumerate(ds.labels):
        groups.setdefault((row["task"], row["role"]), []).append((int(row["index"]), i))
    for (task, role), members in groups.items():
        yield task, role, ds.tensor([i for _, i in sorted(members)], progress=False)


# ----------------------------------------------------------------------------------------------------------------------
# Writing


# Images, triples of blending, targets of each edit. Of train and choice, every second image is outside the generator's
# domain (see `study.avatars`); choices are made on choice, and nothing but tables on inside, outside and new.
SHIFT = 16  # test images from one edit of photographs to the next
COUNTS = {"train": 24000, "choice": 500, "inside": 500, "outside": 500, "new": 500, "blending": 200, "editing": 100}


def write_zip(path: str | os.PathLike, images: Iterable[tuple[str, bytes]], rows: list[dict[str, str]]) -> None:
    """Writes encoded images (name, bytes) and `rows` as labels.csv into an uncompressed zip with fixed time
    stamps: equal content gives equal bytes. The file appears only when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    part = path.with_name(path.name + ".part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as z:
            for name, data in chain(images, [("labels.csv", table.getvalue().encode())]):
                info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                info.external_attr = 0o644 << 16
                z.writestr(info, data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def avatar_rows(part: str, seed: int = 0, count: int | None = None) -> list[dict[str, str]]:
    """What one part of the avatars data holds, as the rows of its labels.csv: file, task, role, index, domain and
    the attributes; nothing is rendered.

    part: one of images (role "image"), "blending" (roles a, b, truth) or "editing" (one task per edit of
    `avatars.EDITS`; roles before, after, target, truth). count: see `COUNTS`."""
    if part not in COUNTS:
        raise ValueError(f"part: got {part!r}, expected one of {list(COUNTS)}")
    count = COUNTS[part] if count is None else count
    found: list[tuple[str, str, int, avatars.Attributes]] = []  # task, role, index, attributes
    if part == "blending":
        for i, triple in enumerate(avatars.blending_attributes(seed, count)):
            found += [(part, role, i, x) for role, x in zip(("a", "b", "truth"), triple, strict=True)]
    elif part == "editing":
        for edit in avatars.EDITS:
            before, after, targets, truths = avatars.editing_attributes(seed, edit, count)
            found += [(edit, "before", 0, before), (edit, "after", 0, after)]
            found += [(edit, "target", i, x) for i, x in enumerate(targets)]
            found += [(edit, "truth", i, x) for i, x in enumerate(truths)]
    else:
        domains = (part,) if part in avatars.FOREIGN else ("inside", "outside")
        drawn = (avatars.sample(seed, part, i, domains[i % len(domains)]) for i in range(count))
        found = [(part, "image", i, x) for i, x in enumerate(drawn)]
    return [_role_row(task, role, i) | {"domain": avatars.domain_of(x)} | x for task, role, i, x in found]


def _role_row(task: str, role: str, i: int) -> dict[str, str]:
    """The first columns of labels.csv, which `_roles` reads."""
    file = f"{i:05d}.webp" if role == "image" else f"{task}-{role}-{i:03d}.webp"
    return {"file": file, "task": task, "role": role, "index": str(i)}


def _render(row: dict[str, str], resolution: int) -> tuple[str, bytes]:
    torch.set_num_threads(1)
    return row["file"], encode_webp(avatars.render(row, resolution))


def encode_webp(image: Tensor) -> bytes:
    """Lossless WebP of a uint8 image [3, H, W]."""
    out = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture.save(out, "WEBP", lossless=True, quality=100, method=4)
    return out.getvalue()


def write_avatars(
    path: str | os.PathLike,
    part: str,
    resolution: int = 128,
    seed: int = 0,
    count: int | None = None,
    workers: int = 2,
    progress: bool = True,
) -> None:
    """Renders one part of the avatars data (see `avatar_rows`) into a zip of lossless WebP."""
    rows = avatar_rows(part, seed, count)
    with ProcessPoolExecutor(workers) as pool:
        drawn = pool.map(partial(_render, resolution=resolution), rows, chunksize=16)
        write_zip(path, bar(drawn, len(rows), part, progress), rows)


def write_photos(
    source: str | os.PathLike, folder: str | os.PathLike, resolution: int, n_test: int, progress: bool = True
) -> None:
    """Split a folder or zip of photographs, sorted by name, into folder/test.zip (the last n_test) and train.zip (the
    others): centred squares, resized, lossless WebP, with their labels. What cannot be read is left out, and named in
    a warning.

    blending.zip and editing.zip are made from the test images, as many as there are up to `COUNTS`: recoloured images,
    whose shapes are in the original and whose colours are in a warped copy too; and images with a sticker."""

    photos = ImageDataset(source, resolution)
    if not 0 < n_test < len(photos):
        raise ValueError(f"test: expected 1 to {len(photos) - 1} of the {len(photos)} photographs, got {n_test}")

    def write(part: str, images: Iterable[Tensor], rows: list[dict[str, str]]) -> None:
        encoded = ((row["file"], encode_webp(image)) for row, image in zip(rows, images, strict=True))
        write_zip(Path(folder) / f"{part}.zip", bar(encoded, len(rows), part, progress), rows)

    cut = len(photos) - n_test
    for part, indices in (("train", range(cut)), ("test", range(cut, len(photos)))):
        images = photos.tensor(indices, progress, skip_bad=True)
        kept = [i for i in indices if photos.names[i] not in photos.bad]
        rows = [{"file": PurePosixPath(photos.names[i]).with_suffix(".webp").as_posix()} for i in kept]
        if len(twice := {row["file"] for row in rows}) < len(rows):
            raise ValueError(f"{source}: {len(rows) - len(twice)} photographs have the name of another, suffix aside")
        if photos.labels:
            rows = [photos.labels[i] | row for i, row in zip(kept, rows, strict=True)]
        write(part, images, rows)

    originals = images[: COUNTS["blending"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        truths, details = (to_uint8(x) for x in views(to_float(originals)))
    triples = ("a", originals), ("b", details), ("truth", truths)
    found = {"blending": [("blending", role, i, x) for role, several in triples for i, x in enumerate(several)]}
    found["editing"] = []
    for k, edit in enumerate(stickers.STICKERS):
        # By an even number past the targets that are measured: what choices are made on stays odd in all edits.
        before, *others = images.roll(-SHIFT * k, 0)
        before, targets = before[None], torch.stack(others or [before])[: COUNTS["editing"]]
        for one, many, stuck in (("before", "target", False), ("after", "truth", True)):
            for role, several in ((one, before), (many, targets)):
                several = stickers.stick(several, edit) if stuck else several
                found["editing"] += [(edit, role, i, x) for i, x in enumerate(several)]
    for part, members in found.items():
        write(part, [x for *_, x in members], [_role_row(task, role, i) for task, role, i, _ in members])


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m study.sets",
        description="Render the avatars data set, or split photographs into train.zip and test.zip.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="data/avatars-128", help="folder of the zips that are written")
    parser.add_argument("--resolution", type=int, default=128, help="pixels along a side")
    parser.add_argument("--seed", type=int, default=0, help="decides every avatar")
    parser.add_argument("--parts", nargs="+", choices=COUNTS, default=list(COUNTS), metavar="PART", help="to write")
    parser.add_argument("--count", type=int, help=f"images, triples, targets per edit (default: {COUNTS})")
    parser.add_argument("--sha256", help="of the one part that is written, which is refused if it comes out otherwise")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--photos", help="folder or zip to split into train.zip and test.zip instead")
    parser.add_argument("--test", type=int, default=1000, help="photographs that are the test, the last ones")
    args = parser.parse_args()
    if args.photos:
        try:
            return write_photos(args.photos, args.out, args.resolution, args.test)
        except (ValueError, OSError) as error:
            sys.exit(f"study.sets: {error}")
    if args.sha256 and len(args.parts) > 1:
        parser.error("--sha256: is of one part; name it with --parts")
    for part in args.parts:
        path = Path(args.out) / f"{part}.zip"
        if args.sha256 and path.exists() and file_hash(path) == args.sha256:
            print(f"{path}: is there already")
            continue
        write_avatars(path, part, args.resolution, args.seed, args.count, args.workers)
        if args.sha256 and (found := file_hash(path)) != args.sha256:
            sys.exit(f"--sha256: expected {args.sha256}, {path} has {found}: the renderer is of another version, or "
                     "--seed, --resolution or --count differ")  # fmt: skip
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
