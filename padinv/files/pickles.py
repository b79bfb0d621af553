"""Pickles and files of torch.save as plain data and CPU tensors; nothing in them is executed.

A file of torch.save goes through `torch.load(weights_only=True)`. Any other pickle is interpreted by `read_pickle`,
which calls nothing: where the pickle asks for a call, a `Record` of its name and arguments is kept, and only names
that networks need are let in.
"""

import argparse
import io
import mmap
import pickletools
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"  # a module, of NVIDIA's PyTorch projects
NETWORK = "dnnlib.tflib.network.Network"  # a network, of their TensorFlow projects
DTYPES = {  # storages of torch and codes of numpy
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool, "f8": torch.float64, "f4": torch.float32, "f2": torch.float16, "i8": torch.int64,
    "i4": torch.int32,
}  # fmt: skip
MAPPINGS = ("collections.OrderedDict", "dnnlib.util.EasyDict")
ALLOWED = {
    PERSISTENT, NETWORK, *MAPPINGS, *(name for name in DTYPES if "." in name), "_codecs.encode", "builtins.set",
    "__builtin__.set",  # in protocol 2
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes",
    "torch.device", "torch.Size", "numpy.ndarray", "numpy.dtype",
    *(f"numpy.{core}.{name}" for core in ("core", "_core")  # renamed by numpy 2
      for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")),
}  # fmt: skip
VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
MAX_OPCODES = 300_000  # a file of three networks of 1024² has some 50,000


# ----------------------------------------------------------------------------------------------------------------------
# Pickles


@dataclass(frozen=True)
class Global:
    """A name that a pickle would import."""

    name: str


@dataclass
class Record:
    """A call that a pickle asks for: not made."""

    name: str
    args: tuple
    state: object = None  # what it would set on the result

    def __repr__(self) -> str:
        return f"<{self.name}>"  # the arguments may be huge


def read_pickle(file) -> object:
    """The next pickle of a file as dictionaries, lists, tuples, numbers, strings, bytearrays and `Record`s.

    Every byte of the result comes from the file: no number in it makes us allocate.

    Raises:
        ValueError: the pickle asks for a name outside `ALLOWED`, has an opcode or size that no network needs, or ends
            early. Broken structure raises AttributeError, LookupError or TypeError.
    """
    stack, marks, memo = [], [], {}

    def marked() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def put(key, value):
        if not isinstance(key, str | int | float | None):  # hashing nested tuples could exhaust the stack
            raise ValueError(f"refused: its pickle has a dictionary with a key of type {type(key).__name__}")
        stack[-1][key] = value

    for count, (op, arg, _) in enumerate(opcodes(file)):
        if count > MAX_OPCODES:
            raise ValueError(f"refused: its pickle has over {MAX_OPCODES} opcodes, which no network needs")
        match op.name:
            case name if name in VALUES:
                stack.append(arg)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(bytearray(arg))  # mutable, as tensors that share its memory are
            case "TUPLE":
                stack.append(tuple(marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(op.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS" | "ADDITEMS":
                items = marked()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                put(key, value)
            case "SETITEMS":
                items = marked()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    put(key, value)
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL" | "STACK_GLOBAL":
                name = arg.replace(" ", ".") if op.name == "GLOBAL" else ".".join((stack.pop(-2), stack.pop()))
                if name not in ALLOWED:
                    raise ValueError(f"refused: its pickle asks for {name[:100]}, which no network needs; only "
                                     "tensors, arrays and containers are read, and nothing was executed")  # fmt: skip
                stack.append(Global(name))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                stack.append(called(function.name, args))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Record):
                    stack[-1].state = state
            case "BINPERSID":
                stack.append(Record("storage", stack.pop()))
            case "PROTO" | "FRAME" | "STOP":
                pass
            case name:
                raise ValueError(f"refused: its pickle has the opcode {name}, which no network needs")
    return stack.pop()


def opcodes(file):
    """(opcode, argument, position) of each, up to the end of one pickle."""
    try:
        yield from pickletools.genops(file)
    except ValueError as error:
        raise ValueError(f"a truncated or damaged pickle ({error})") from error


def called(name: str, args: tuple) -> object:
    """What a call gives where it only makes a container or bytes, else its record."""
    if name in MAPPINGS and not args:
        return {}
    if name in ("builtins.set", "__builtin__.set"):
        return list(*args)
    if name == "_codecs.encode":  # how protocol 2 writes bytes
        return bytearray(args[0], "latin-1")
    return Record(name, args)


# ----------------------------------------------------------------------------------------------------------------------
# Tensors in them


def tensor(value: Record | float) -> Tensor:
    """The tensor, array or number that a value of a pickle stands for, over the bytes that were read.

    Raises:
        ValueError, LookupError, TypeError, RuntimeError: it stands for none, or reaches beyond its bytes.
    """
    if isinstance(value, int | float):
        return torch.tensor(float(value))
    name = value.name.rpartition(".")[2]
    match name:
        case "_rebuild_parameter":
            return tensor(value.args[0])
        case "_rebuild_tensor_v2":
            file, offset, size, stride = value.args[:4]
            return storage(*file.args).as_strided(size, stride, offset)  # checks the bounds
        case "scalar":
            code, data = value.args
            return torch.frombuffer(data, dtype=dtype(code)).reshape(())
        case "_reconstruct":
            _, shape, code, fortran, data = value.state
        case "_frombuffer":  # protocol 5
            data, code, shape, order = value.args[:4]
            fortran = {"C": False, "F": True}[order]
        case _:
            raise ValueError(f"expected a tensor or an array, found {value.name}")
    flat = torch.frombuffer(data, dtype=dtype(code))
    return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape)))) if fortran else flat.reshape(shape)


def storage(data: bytearray) -> Tensor:
    """The numbers of a tensor, [n], which a pickle holds as a whole file of torch's older format."""
    header = io.BytesIO(data[:4096])
    record = [read_pickle(header) for _ in range(5)][3]  # magic number, version, system, storage, keys
    _, kind, _, _, n, _ = record.args
    return torch.frombuffer(data, dtype=DTYPES[kind.name], count=n, offset=header.tell() + 8)  # n stands there again


def dtype(value: Record) -> torch.dtype:
    """Of a numpy.dtype."""
    if value.state[1] not in ("<", "|", "="):
        raise ValueError(f"an array of byte order {value.state[1]!r}, expected little-endian")
    return DTYPES[value.args[0]]


# ----------------------------------------------------------------------------------------------------------------------
# Files


def read_file(path) -> object:
    """What a .pth, .pt or .pkl file holds. Its first bytes tell what it is, whatever its name.

    Raises:
        ValueError: there is no such file, it is of another kind or damaged, or would have to be executed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a file, found {'a folder' if path.is_dir() else 'nothing'}")
    with open(path, "rb") as file:
        start = file.read(64)
        if start[:4] == b"PK\x03\x04" or b"l\xfc\x9cF\xf9 j\xa8P\x19" in start:  # zip; torch's older magic number
            return read_torch(path, archive=start[:2] == b"PK")
        if start[:1] == b"\x80":
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return read_pickle(view)
    raise ValueError(f"expected a .safetensors, .pth, .pt or .pkl file, found one that is truncated, damaged or of "
                     f"another format ({path.stat().st_size} bytes, beginning with {start[:12]!r})")  # fmt: skip


def read_torch(path: Path, archive: bool) -> object:
    """A file of torch.save; the tensors of a zip archive are mapped, not read."""
    if archive:
        with zipfile.ZipFile(path) as entries:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.infolist()):
                raise ValueError("a compressed zip archive, no file of torch.save")
    try:
        # rosinality's training keeps its command line beside the networks.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # damaged files make torch raise almost anything
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"refused: its pickle asks for {wanted[1][:100]}, which no network needs; only tensors "
                             "and containers are read, and nothing was executed") from error  # fmt: skip
        line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(f"truncated or damaged, or no file of torch.save ({line})") from error


@contextmanager
def errors_of(source):
    """Name the source in ValueErrors, and make ValueErrors of what broken structure raises."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"{source}: truncated or damaged ({type(error).__name__}: {error})") from error
