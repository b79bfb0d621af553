"""Images: a folder, zip or LMDB of any images as a dataset; writing the avatars domain with its ground truth.

Stored images are uint8 [N, 3, H, W]; networks see floats in [-1, 1], x = u8 / 127.5 - 1.
"""

import argparse
import csv
import hashlib
import io
import os
import sys
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from padinv import avatars

# ---------------------------------------------------------------- reading

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MIN_SIDE = 8  # pixels; anything smaller is no picture of anything
MAX_PIXELS = 89_478_485  # of one image, known before decoding; where Pillow starts to warn of bombs
MAX_BYTES = 1 << 28  # of one zip entry, known before unpacking
_databases = weakref.WeakValueDictionary()  # path -> LMDB in use: a process can open each only once


def to_float(images: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1], x / 127.5 - 1. TypeError for any other dtype."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images: got dtype {images.dtype}, expected uint8 in 0..255")
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] of any shape -> uint8, rounded to nearest; inverse of `to_float`. Values outside are
    clamped. ValueError for NaN, TypeError for integers."""
    if not images.is_floating_point():
        raise TypeError(f"images: got dtype {images.dtype}, expected floats in [-1, 1]")
    if images.isnan().any():
        raise ValueError("images: got NaN, expected floats in [-1, 1]")
    return (images.detach().float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def read_image(
    source: str | os.PathLike | bytes | io.IOBase, resolution: int | None = None, name: str | None = None
) -> Tensor:
    """Decodes an image from a path, its encoded bytes or an open binary file: uint8 [3, H, W].

    Converted: EXIF rotation is applied; grey, palette and CMYK become RGB; 16 bits are rounded to 8;
    transparency is composited on white; of an animation the first frame is taken. With `resolution` the
    largest centred square is cut out and resized to it, averaging over areas: [3, resolution, resolution].
    Refused, with a ValueError that gives the file's name (or `name`): what is no image, is truncated, has
    floating point or 32-bit values, a side under 8 pixels, or more than 89 million pixels."""
    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution: got {resolution}, expected a positive number of pixels or None")
    if isinstance(source, str | os.PathLike):
        name, source = name or os.fspath(source), Path(source).read_bytes()
    name = name or str(getattr(source, "name", "the image"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS refuses these
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        image = _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as e:
        raise ValueError(f"{name}: too large ({e}); expected at most {MAX_PIXELS} pixels") from e
    except Exception as e:  # decoders raise almost anything on damaged files
        what = "not an image" if isinstance(e, UnidentifiedImageError) else f"cannot be decoded ({e})"
        raise ValueError(f"{name}: {what}; expected a complete {', '.join(SUFFIXES)} file") from e
    side = min(image.size)
    if side < MIN_SIDE:
        raise ValueError(f"{name}: {image.width} x {image.height} pixels, expected {MIN_SIDE} or more a side")
    if resolution is not None:
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = (
            image.reduce(side // resolution, box)
            if side % resolution == 0  # exact pixel means
            else image.resize((resolution, resolution), Image.Resampling.BICUBIC, box)
        )  # anti-aliased
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # [3, H, W]


def _to_rgb(image: Image.Image) -> Image.Image:
    low, high = image.getextrema() if image.mode in ("I", "F") else (0, 0)
    if image.mode == "F" or low < 0 or high > 65535:
        raise ValueError(f"mode {image.mode}: the range of the values is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits: 65535 is white
        image = Image.fromarray(((np.array(image).astype(np.int64) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class ImageDataset:
    """The images of a folder (with its sub-folders) or of a zip, sorted by name; other files are passed over. A folder
    with a data.mdb is an LMDB, as LSUN is distributed: every value an encoded image, in the order of the keys. Its
    names are the keys where these are printable ASCII, else their hexadecimal digits after "0x".

    ds[i] is a uint8 tensor [3, R, R], or [3, H, W] without `resolution`; `read_image` says what is converted
    and what refused. `names` are the relative file names; `labels`, in the same order, the rows of a
    labels.csv at the top, else None. Nothing is unpacked or written to disk; safe to pickle and to share by
    forking and among threads. Raises FileNotFoundError for a path that is absent, ValueError for a damaged zip or LMDB
    or one without images, ImportError for an LMDB without the package lmdb."""

    def __init__(self, path: str | os.PathLike, resolution: int | None = None):
        self.path, self.resolution = Path(path), resolution
        self.bad: dict[str, str] = {}  # name -> reason, of what the last `tensor(skip_bad=True)` left out
        self._open: tuple[int, zipfile.ZipFile] | None = None
        self.is_lmdb, self._env = (self.path / "data.mdb").is_file(), None
        self._files: dict[str, Path | zipfile.ZipInfo] = {}
        if self.is_lmdb:
            with self._reading() as transaction:
                self.names = [_key_name(key) for key in transaction.cursor().iternext(values=False)]
        elif self.path.is_dir():
            found = (f for f in self.path.rglob("*") if f.is_file())
            self._files = {f.relative_to(self.path).as_posix(): f for f in found}
        elif self.path.is_file():
            self._files = {f.filename: f for f in self._zip().infolist() if not f.is_dir()}
        else:
            raise FileNotFoundError(f"path: {self.path} does not exist; expected a folder or .zip of images")
        if not self.is_lmdb:
            self.names = sorted(
                n
                for n in self._files
                if PurePosixPath(n).suffix.lower() in SUFFIXES and not PurePosixPath(n).name.startswith(".")
            )
        if not self.names:
            raise ValueError(f"path: no images in {self.path}; expected files named *{', *'.join(SUFFIXES)}")
        self.labels = self._labels()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        name = self.names[index]
        return read_image(self._bytes(name), self.resolution, f"{self.path}/{name}")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": None, "_env": None}

    def tensor(self, indices: Iterable[int] | None = None, progress: bool = True, skip_bad: bool = False) -> Tensor:
        """Decodes all images, or those of `indices`, into memory: uint8 [N, 3, R, R].

        If some cannot be read, a ValueError names them; with `skip_bad` they are left out instead, named in a
        warning and kept, with the reasons, in `bad`. ValueError if the images differ in size."""
        names = [self.names[i] for i in (range(len(self)) if indices is None else indices)]
        images = np.empty((0, 3, 0, 0), np.uint8)
        found, self.bad = 0, {}
        for name in _bar(names, len(names), f"reading {self.path.name}", progress):
            try:
                x = read_image(self._bytes(name), self.resolution, name).numpy()
            except ValueError as e:
                self.bad[name] = str(e)
                continue
            if not found:
                images = np.empty((len(names), *x.shape), np.uint8)  # [N, 3, R, R]
            elif x.shape != images.shape[1:]:
                raise ValueError(
                    f"{self.path}/{name}: {x.shape[2]} x {x.shape[1]} pixels, others have "
                    f"{images.shape[3]} x {images.shape[2]}; give ImageDataset a resolution"
                )
            images[found] = x
            found += 1
        if self.bad:
            reasons = list(self.bad.values())
            report = (
                f"{len(reasons)} of {len(names)} images of {self.path} cannot be read: "
                + "; ".join(reasons[:10])
                + ("; and more (see .bad)" if len(reasons) > 10 else "")
            )
            if not skip_bad or not found:
                raise ValueError(f"{report}. Repair them, or leave them out with tensor(skip_bad=True)")
            warnings.warn(f"{report}. They are left out", stacklevel=2)
        return torch.from_numpy(images[:found])

    def _zip(self) -> zipfile.ZipFile:
        if self._open is None or self._open[0] != os.getpid():  # a fork must not share a file position
            try:
                self._open = os.getpid(), zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, NotImplementedError, ValueError) as e:
                raise ValueError(f"path: {self.path} is no folder and no readable zip ({e})") from e
        return self._open[1]

    @contextmanager
    def _reading(self):
        """A transaction of the LMDB. It takes no lock, which nothing but a writer would need, and its pages are mapped:
        an open database serves forked processes and threads as well."""
        try:
            import lmdb
        except ImportError as e:
            raise ImportError(f"path: {self.path} is an LMDB; to read it: pip install lmdb") from e
        try:
            if self._env is None:
                where = self.path.resolve()
                self._env = _databases.get(where)
                if self._env is None:
                    self._env = lmdb.open(str(where), readonly=True, lock=False, create=False, readahead=False)
                    _databases[where] = self._env
                # A page that is beyond the end of the file would kill the process.
                size = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
                if (got := (where / "data.mdb").stat().st_size) < size:
                    self._env = None
                    raise lmdb.Error(f"truncated: {got} bytes, expected {size}; if it is whole, use mdb_copy -c")
            with self._env.begin() as transaction:
                yield transaction
        except lmdb.Error as e:
            raise ValueError(f"path: {self.path}/data.mdb is no readable LMDB ({e})") from e

    def _bytes(self, name: str) -> bytes:
        if self.is_lmdb:
            with self._reading() as transaction:
                return transaction.get(_key(name))
        entry = self._files[name]
        if isinstance(entry, Path):
            return entry.read_bytes()
        if entry.file_size > MAX_BYTES:
            raise ValueError(f"{name}: unpacks to {entry.file_size} bytes, expected at most {MAX_BYTES}")
        try:
            return self._zip().read(entry)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as e:  # damaged, encrypted
            raise ValueError(f"{name}: this entry of {self.path} cannot be unpacked ({e})") from e

    def _labels(self) -> list[dict[str, str]] | None:
        if "labels.csv" not in self._files:
            return None
        try:
            table = io.StringIO(self._bytes("labels.csv").decode("utf-8-sig"), newline="")
            rows = {row.get("file"): row for row in csv.DictReader(table, strict=True)}
        except (UnicodeDecodeError, csv.Error) as e:
            raise ValueError(f"{self.path}/labels.csv: no comma-separated values in UTF-8 ({e})") from e
        missing = [n for n in self.names if n not in rows]
        if missing:
            raise ValueError(
                f"{self.path}/labels.csv: {len(missing)} images have no row, the first is "
                f"{missing[0]!r}; expected a column 'file' that names every image"
            )
        return [rows[n] for n in self.names]


def _key_name(key: bytes) -> str:
    """A key of an LMDB as a readable name; `_key` gives it back."""
    text = key.decode("latin-1")
    return text if text.isascii() and text.isprintable() and text[:2] != "0x" else f"0x{key.hex()}"


def _key(name: str) -> bytes:
    return bytes.fromhex(name[2:]) if name[:2] == "0x" else name.encode()


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


def pixel_hash(images: Iterable[Tensor]) -> str:
    """sha256 over the pixels of uint8 images [3, H, W] (a list, an ImageDataset or one [N, 3, H, W] tensor),
    in order. It does not depend on how files are compressed: equal hashes mean equal pictures."""
    digest = hashlib.sha256()
    for x in images:
        if x.dtype != torch.uint8:
            raise TypeError(f"images: got dtype {x.dtype}, expected uint8 (see to_uint8)")
        digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _bar(items: Iterable, total: int, what: str, progress: bool) -> Iterable:
    try:
        from tqdm import tqdm
    except ImportError:  # a bare training machine may lack it
        return items
    return tqdm(items, total=total, desc=what, unit="image", disable=not progress)


# ---------------------------------------------------------------- writing

COUNTS = {"train": 13000, "test": 1000, "blending": 200, "editing": 100}  # images, triples, targets per edit


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
    """What one part of the avatars data holds, as the rows of its labels.csv: file, task, role, index and the
    attributes; nothing is rendered.

    part: "train" or "test" (role "image"), "blending" (roles a, b, truth) or "editing" (one task per edit of
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
        found = [(part, "image", i, avatars.sample(seed, part, i)) for i in range(count)]
    return [_role_row(task, role, i) | x for task, role, i, x in found]


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
    resolution: int = 64,
    seed: int = 0,
    count: int | None = None,
    workers: int = 2,
    progress: bool = True,
) -> None:
    """Renders one part of the avatars data (see `avatar_rows`) into a zip of lossless WebP."""
    rows = avatar_rows(part, seed, count)
    with ProcessPoolExecutor(workers) as pool:
        drawn = pool.map(partial(_render, resolution=resolution), rows, chunksize=16)
        write_zip(path, _bar(drawn, len(rows), part, progress), rows)


def write_photos(
    source: str | os.PathLike, folder: str | os.PathLike, resolution: int, n_test: int, progress: bool = True
) -> None:
    """Split a folder or zip of photographs, sorted by name, into folder/test.zip (the last n_test) and train.zip (the
    others): centred squares, resized, lossless WebP, with their labels. What cannot be read is left out, and named in
    a warning.

    blending.zip and editing.zip are made from the test images, as many as there are up to `COUNTS`: recoloured images,
    whose shapes are in the original and whose colours are in a warped copy too; and images with a sticker."""
    from padinv import synthetic

    photos = ImageDataset(source, resolution)
    if not 0 < n_test < len(photos):
        raise ValueError(f"test: expected 1 to {len(photos) - 1} of the {len(photos)} photographs, got {n_test}")

    def write(part: str, images: Iterable[Tensor], rows: list[dict[str, str]]) -> None:
        encoded = ((row["file"], encode_webp(image)) for row, image in zip(rows, images, strict=True))
        write_zip(Path(folder) / f"{part}.zip", _bar(encoded, len(rows), part, progress), rows)

    cut = len(photos) - n_test
    for part, indices in (("train", range(cut)), ("test", range(cut, len(photos)))):
        images = photos.tensor(indices, progress, skip_bad=True)
        kept = [i for i in indices if photos.names[i] not in photos.bad]
        rows = [{"file": PurePosixPath(photos.names[i]).with_suffix(".webp").as_posix()} for i in kept]
        if photos.labels:
            rows = [photos.labels[i] | row for i, row in zip(kept, rows, strict=True)]
        write(part, images, rows)

    originals = images[: COUNTS["blending"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        truths, details = (to_uint8(x) for x in synthetic.views(to_float(originals)))
    triples = ("a", originals), ("b", details), ("truth", truths)
    found = {"blending": [("blending", role, i, x) for role, several in triples for i, x in enumerate(several)]}
    found["editing"] = []
    for k, edit in enumerate(synthetic.STICKERS):
        before, *others = images.roll(-k, 0)
        before, targets = before[None], torch.stack(others or [before])[: COUNTS["editing"]]
        for one, many, stuck in (("before", "target", False), ("after", "truth", True)):
            for role, several in ((one, before), (many, targets)):
                several = synthetic.stick(several, edit) if stuck else several
                found["editing"] += [(edit, role, i, x) for i, x in enumerate(several)]
    for part, members in found.items():
        write(part, [x for *_, x in members], [_role_row(task, role, i) for task, role, i, _ in members])


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m padinv.data",
        description="Render the avatars data set, or split photographs into train.zip and test.zip.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="data/avatars-64", help="folder of the four zips that are written")
    parser.add_argument("--resolution", type=int, default=64, help="pixels along a side")
    parser.add_argument("--seed", type=int, default=0, help="decides every avatar")
    for part, what in zip(COUNTS, ("images", "images", "triples", "targets per edit"), strict=True):
        parser.add_argument(f"--{part}", type=int, default=COUNTS[part], help=f"{what} in {part}.zip")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--photos", help="folder or zip to split instead; the last --test of its images are the test")
    args = parser.parse_args()
    if args.photos:
        try:
            return write_photos(args.photos, args.out, args.resolution, args.test)
        except (ValueError, OSError) as error:
            sys.exit(f"padinv.data: {error}")
    for part in COUNTS:
        path = Path(args.out) / f"{part}.zip"
        write_avatars(path, part, args.resolution, args.seed, getattr(args, part), args.workers)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
