"""Files of one tensor: .npy, and what torch.save or pickle writes; read as data, nothing in them is executed."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from padinv.files.foreign import described
from padinv.files.pickles import printable, read_file, tensor


def read_array(path) -> Tensor:
    """The tensor or array in a file, over the mapped file; its first bytes tell what it is, whatever its name.

    Raises:
        ValueError: as `read_file`; it holds another thing than one tensor; or a .npy that is damaged or of objects.
            Broken structure raises what `errors_of` catches.
    """
    if not is_npy(path):
        contents = read_file(path)
        if isinstance(contents, dict | list | tuple):
            raise ValueError(f"expected one tensor alone, found {described(contents)}")
        return tensor(contents)
    try:
        # Mapped, so that a shape beyond the file allocates nothing; privately, as torch wants memory to write to.
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except Exception as error:  # numpy lets out what its parsers of headers raise
        raise ValueError("expected an array of numbers, found a .npy that is truncated, damaged, of another type, or "
                         f"of objects: a pickle, not opened ({printable(error, 200)})") from error  # fmt: skip


def is_npy(path) -> bool:
    """By content."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(6) == b"\x93NUMPY"
