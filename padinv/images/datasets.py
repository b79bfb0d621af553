"""Images: a folder, zip or LMDB of any images as a dataset.

Stored images are uint8 [N, 3, H, W]; networks see floats in [-1, 1], x = u8 / 127.5 - 1.
"""

import csv
import functools
import hashlib
import io
import lzma
import os
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # and no other, whatever the name: Pillow runs PostScript
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
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
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
    labels.csv at the top, else None; who does not ask for them does not mind what is in it. Nothing is unpacked or
    written to disk; safe to pickle and to share by forking and among threads. Raises FileNotFoundError for a path that
    is absent, ValueError for a damaged zip or LMDB, one without images, or, when `labels` are asked for, a labels.csv
    that does not fit them, ImportError for an LMDB without the package lmdb."""

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
        for name in bar(names, len(names), f"reading {self.path.name}", progress):
            try:
                x = read_image(self._bytes(name), self.resolution, name).numpy()
            except (ValueError, OSError) as e:  # OSError: a file that is gone, or may not be read
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
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError) as e:  # or encrypted
            raise ValueError(f"{name}: this entry of {self.path} cannot be unpacked ({e})") from e

    @functools.cached_property
    def labels(self) -> list[dict[str, str]] | None:
        if "labels.csv" not in self._files:
            return None
        try:
            table = io.StringIO(self._bytes("labels.csv").decode("utf-8-sig"), newline="")
            rows = {row.get("file"): row for row in csv.DictReader(table, strict=True)}
        except (UnicodeDecodeError, csv.Error) as e:
            raise ValueError(f"{self.path}/labels.csv: no comma-separated values in UTF-8 ({e})") from e
        missing = [n for n in self.names if None in rows.get(n, {"file": None}).values()]
        if missing:
            raise ValueError(
                f"{self.path}/labels.csv: {len(missing)} images have no row, or a short one, the first is "
                f"{missing[0]!r}; expected a column 'file' that names every image"
            )
        return [rows[n] for n in self.names]


def _key_name(key: bytes) -> str:
    """A key of an LMDB as a readable name; `_key` gives it back."""
    text = key.decode("latin-1")
    return text if text.isascii() and text.isprintable() and text[:2] != "0x" else f"0x{key.hex()}"


def _key(name: str) -> bytes:
    return bytes.fromhex(name[2:]) if name[:2] == "0x" else name.encode()


def pixel_hash(images: Iterable[Tensor]) -> str:
    """sha256 over the pixels of uint8 images [3, H, W] (a list, an ImageDataset or one [N, 3, H, W] tensor),
    in order. It does not depend on how files are compressed: equal hashes mean equal pictures."""
    digest = hashlib.sha256()
    for x in images:
        if x.dtype != torch.uint8:
            raise TypeError(f"images: got dtype {x.dtype}, expected uint8 (see to_uint8)")
        digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()


def bar(items: Iterable, total: int, what: str, progress: bool) -> Iterable:
    try:
        from tqdm import tqdm
    except ImportError:  # a bare training machine may lack it
        return items
    return tqdm(items, total=total, desc=what, unit="image", disable=not progress)
