"""Files of tensors and of JSON, written at once or not at all; of tensors as safetensors, with a kind beside them."""

import errno
import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = "padinv"
MAX_HEADER = 1 << 20  # bytes; a network's has 100 kB, and takes ten times its size when read


def atomic_write(path, data: bytes | memoryview) -> None:
    """Replace the file at path by data, or leave it as it was.

    Raises:
        OSError: the data could not be written, a full disk included; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        kept = "the file that was there is unchanged" if path.exists() else "nothing was written"
        raise OSError(errno.ENOSPC, f"no space for {len(data) / 1e6:.1f} MB; {kept}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content) -> None:
    """Write JSON at once or not at all, keys in order, the same bytes for the same content.

    Raises:
        ValueError: NaN or an infinity, which JSON lacks.
    """
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    atomic_write(path, (text + "\n").encode())


def file_hash(path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors to a safetensors file of ours; the same contents give the same bytes.

    Args:
        path: parent folders are made.
        tensors: on any device, with gradients or without.
        metadata: holds at least "kind".

    Raises:
        OSError: as `atomic_write`.
    """
    tensors = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}  # views may share memory
    data = save(tensors, {**metadata, "format": FORMAT})
    # The library writes metadata in random order; sort the header: its length in 8 bytes, JSON, spaces to align.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    atomic_write(path, len(header).to_bytes(8, "little") + header + data[end:])


def open_file(path):
    """The safetensors file at path, with a clear ValueError where it is none."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a .safetensors file, found {'a folder' if path.is_dir() else 'nothing'}")
    with open(path, "rb") as file:
        start = file.read(9)
    # A safetensors header may begin with the byte of a pickle, but its JSON always opens at the ninth.
    if start[8:] != b"{" and (start[:1] == b"\x80" or start[:4] == b"PK\x03\x04"):
        raise ValueError(f"{path}: a Python pickle (.pkl, .pt, .pth) can run code when it is opened, so it was not; "
                         "expected a .safetensors file")  # fmt: skip
    if (size := int.from_bytes(start[:8], "little")) > MAX_HEADER and start[8:] == b"{" and size < path.stat().st_size:
        raise ValueError(f"{path}: refused: its header has {size} bytes, which no file of padinv needs")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a .safetensors file, found one that is truncated, damaged or of another "
                         f"format ({path.stat().st_size} bytes: {str(error)[:200]!r})") from error  # fmt: skip


def read_metadata(path) -> dict[str, str]:
    """What is written beside the tensors: "format", "kind", and for networks "config" and "meta", both JSON.

    Raises:
        ValueError: path is not a safetensors file of ours.
    """
    with open_file(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: a safetensors file that padinv did not write (format {metadata.get('format')!r}); "
                         f"expected format {FORMAT!r}")  # fmt: skip
    return metadata


def map_tensors(path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `load_tensors` on the CPU, but mapped from the file: they would change or vanish with it."""
    metadata = read_metadata(path)
    if metadata.get("kind") != kind:
        raise ValueError(f"{path}: its kind is {metadata.get('kind')!r}, expected {kind!r}")
    with open_file(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, metadata


def load_tensors(path, kind: str, device="cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of `save_tensors`: the tensors on the device, and the metadata.

    Raises:
        ValueError: the file is missing, truncated, of another format, or of another kind.
    """
    tensors, metadata = map_tensors(path, kind)
    return {key: t.to(device, copy=True) for key, t in tensors.items()}, metadata
