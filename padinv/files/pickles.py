"""Pickles and files of torch.save as plain data; nothing in them is executed, and no number in them makes us allocate.

`read_file` maps a file and interprets its pickle: bytes stay views of the file, instances and calls become `Record`s,
and calls of functions that no network needs are refused. `tensor` makes a tensor of a record.
"""

import io
import mmap
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"  # a module, of NVIDIA's PyTorch projects
NETWORK = "dnnlib.tflib.network.Network"  # a network, of their TensorFlow projects
NAMESPACE = "argparse.Namespace"
DTYPES = {  # storages of torch and codes of numpy
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool, "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128, "f8": torch.float64, "f4": torch.float32, "f2": torch.float16,
    "i8": torch.int64, "i4": torch.int32, "c8": torch.complex64, "b1": torch.bool,
}  # fmt: skip
MAPPINGS = {"collections.OrderedDict", "collections.defaultdict", "dnnlib.util.EasyDict", "easydict.EasyDict"}
SETS = {"builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset"}  # the latter in protocol 2
CALLS = {  # functions that files of networks call; the arguments are kept
    PERSISTENT, "torch.storage._load_from_bytes", "torch.device", "torch.Size", "numpy.dtype", "functools.partial",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath",
    *(f"numpy.{core}.{name}" for core in ("core", "_core")  # renamed by numpy 2
      for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")),
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
SIZES = {  # of the number before an operand
    pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4, pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}  # fmt: skip
MAX_NAME = 256  # bytes
MAX_DIRECTORY = 1 << 20  # bytes, of an archive; with optimisers beside the networks it has some 200 kB
MAGIC = 0x1950A86A20F9469CFC6C  # of torch's older format


# ----------------------------------------------------------------------------------------------------------------------
# Pickles


@dataclass(frozen=True, slots=True)
class Global:
    """A name that a pickle would import."""

    name: str


@dataclass(slots=True)
class Record:
    """An instance or a call that a pickle asks for: not made."""

    name: str
    args: tuple
    state: object = None  # what it would set on the result

    def __repr__(self) -> str:
        return f"<{self.name}>"  # the arguments may be huge


def max_opcodes(size: int) -> int:
    """For a file of so many bytes: an opcode makes up to 100. Tiny networks have one for 20 bytes, and a training
    checkpoint of theirs, with optimisers and modules of losses, some 100,000."""
    return min(150_000 + size // 20, 1_000_000)


def read_pickle(
    data: memoryview, at: int = 0, limit: int | None = None, stored: Callable[[tuple], object] | None = None
) -> tuple[object, int]:
    """The pickle from data[at] as dictionaries, lists, tuples, numbers, strings, views and `Record`s; and its end.

    Dictionaries keep only keys of plain types. What an instance would be filled with, but for its state, is dropped.

    Args:
        data: bytes.
        at: where it starts.
        limit: most opcodes; None for `max_opcodes` of data.
        stored: what to make of a reference to a storage beside the pickle; None where there is none.

    Raises:
        ValueError: the pickle asks for a call outside `CALLS`, has an opcode or size that no network needs, or ends
            early. Broken structure raises AttributeError, LookupError or TypeError.
    """
    stack, marks, memo, encoded = [], [], {}, {}
    limit = max_opcodes(len(data)) if limit is None else limit

    def take(size: int) -> memoryview:
        nonlocal at
        if size > len(data) - at:
            raise ValueError("a truncated or damaged pickle (it ends early)")
        at += size
        return data[at - size : at]

    def line() -> str:
        text, end, _ = bytes(data[at : at + MAX_NAME]).partition(b"\n")
        take(len(text) + 1 if end else MAX_NAME)
        return str(text, "utf-8")

    def marked() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def fill(items: list) -> None:
        if isinstance(stack[-1], dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            # Hashing nested tuples could exhaust the stack.
            stack[-1].update((k, v) for k, v in pairs if isinstance(k, str | int | float | None))
        elif isinstance(stack[-1], list):
            stack[-1].extend(items)
        elif not isinstance(stack[-1], Record):
            raise TypeError("items for what is no container")

    def called(name: str, args: tuple) -> object:
        """What a call gives where it only makes a container or bytes, else its record."""
        if name in MAPPINGS:
            return {}
        if name in SETS:
            return args[0] if args else []
        if name == "_codecs.encode":  # how protocol 2 writes bytes; once for each text
            text = args[0]
            if id(text) not in encoded:
                encoded[id(text)] = text, memoryview(bytearray(text, "latin-1"))
            return encoded[id(text)][1]
        if name in CALLS or name.startswith(("torch._utils._rebuild", "torch._tensor._rebuild")):
            return Record(name, args)
        raise ValueError(f"refused: its pickle asks for {name}, which no network needs; only tensors, arrays and "
                         "containers are read, and nothing was executed")  # fmt: skip

    for _ in range(limit):
        code = chr(take(1)[0])
        if code not in pickletools.code2op:
            raise ValueError(f"a truncated or damaged pickle ({code!r} is no opcode)")
        op = pickletools.code2op[code]
        size = op.arg.n if op.arg else 0
        if size in SIZES:
            size = int.from_bytes(take(SIZES[size]), "little")
        operand = take(max(size, 0))
        match op.name:
            case "BININT1" | "BININT2":
                stack.append(int.from_bytes(operand, "little"))
            case "BININT" | "LONG1":
                stack.append(int.from_bytes(operand, "little", signed=True))
            case "BINFLOAT":
                stack.append(struct.unpack(">d", operand)[0])
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(str(operand, "utf-8", "surrogatepass"))
            case "BINSTRING" | "SHORT_BINSTRING":
                stack.append(str(operand, "latin-1"))
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(operand)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "TUPLE" | "FROZENSET":
                stack.append(tuple(marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(op.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND":
                fill([stack.pop()])
            case "SETITEM":
                fill([stack.pop(-2), stack.pop()])
            case "APPENDS" | "ADDITEMS" | "SETITEMS":
                fill(marked())
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[int.from_bytes(operand, "little")] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[int.from_bytes(operand, "little")])
            case "GLOBAL" | "STACK_GLOBAL":
                module, name = (line(), line()) if op.name == "GLOBAL" else (stack.pop(-2), stack.pop())
                if len(module) + len(name) > MAX_NAME:
                    raise ValueError(f"refused: its pickle asks for a name of over {MAX_NAME} characters")
                stack.append(Global(f"{module}.{name}"))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                stack.append(called(function.name, args))
            case "NEWOBJ":
                args, kind = stack.pop(), stack.pop()
                stack.append({} if kind.name in MAPPINGS else Record(kind.name, args))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Record):
                    stack[-1].state = state
            case "BINPERSID":
                pid = stack.pop()
                if stored is None or pid[0] != "storage" or not isinstance(pid[2], str):
                    raise ValueError("damaged: its pickle refers to what is not in the file")
                stack.append(stored(pid))
            case "STOP":
                return stack.pop(), at
            case "PROTO" | "FRAME":
                pass
            case name:
                raise ValueError(f"refused: its pickle has the opcode {name}, which no network needs")
    raise ValueError(f"refused: its pickle has over {limit} opcodes, which no network of its size needs")


# ----------------------------------------------------------------------------------------------------------------------
# Tensors in them


def tensor(value: Tensor | Record | float) -> Tensor:
    """The tensor, array or number that a value of a pickle stands for, over the bytes that were read.

    Raises:
        ValueError, LookupError, TypeError, RuntimeError: it stands for none, or reaches beyond its bytes.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, int | float):
        return torch.tensor(float(value))
    name = type(value).__name__ if not isinstance(value, Record) else value.name.rpartition(".")[2]
    match name:
        case "_rebuild_parameter":
            return tensor(value.args[0])
        case "_rebuild_tensor" | "_rebuild_tensor_v2":
            file, offset, size, stride = value.args[:4]
            return storage(file).as_strided(size, stride, offset)  # checks the bounds
        case "scalar":
            code, data = value.args
            return numbers(data, dtype(code)).reshape(())
        case "_reconstruct":
            _, shape, code, fortran, data = value.state
        case "_frombuffer":  # protocol 5
            data, code, shape, order = value.args[:4]
            fortran = {"C": False, "F": True}[order]
        case _:
            raise ValueError(f"no plain tensor but of type {getattr(value, 'name', name)}")
    flat = numbers(data, dtype(code))
    return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape)))) if fortran else flat.reshape(shape)


def numbers(data: memoryview, dtype: torch.dtype, count: int = -1) -> Tensor:
    """[count], or as many as there are."""
    return torch.frombuffer(data, dtype=dtype, count=count) if count and len(data) else torch.empty(0, dtype=dtype)


def storage(record: Record) -> Tensor:
    """The numbers of a storage, [n], which lies in an archive or which a pickle holds as a file of the older format."""
    if record.name == "torch.storage._load_from_bytes":
        record = read_legacy(record.args[0], limit=100)
    _, kind, key, _, n = record.args[:5]
    if any(record.args[5:]):
        raise ValueError("a part of another storage, as no torch of these years writes")
    data, checksum = record.state[key]
    if checksum is not None and zlib.crc32(data) != checksum:
        raise ValueError(f"damaged: the numbers data/{key[:20]} do not have the checksum beside them")
    record.state[key] = data, None
    if kind.name not in DTYPES:
        raise ValueError(f"no plain tensor but of {kind.name}")
    return numbers(data, DTYPES[kind.name], n)


def dtype(value: Record) -> torch.dtype:
    """Of a numpy.dtype."""
    if value.state[1] not in ("<", "|", "="):
        raise ValueError(f"an array of byte order {value.state[1]!r}, expected little-endian")
    if value.args[0] not in DTYPES:
        raise ValueError(f"an array of numpy's type {value.args[0]!r}, expected numbers")
    return DTYPES[value.args[0]]


# ----------------------------------------------------------------------------------------------------------------------
# Files


def read_file(path) -> object:
    """What a .pth, .pt or .pkl file holds. Its first bytes tell what it is, whatever its name.

    Tensors are `Record`s over the mapped file: they change or vanish with it.

    Raises:
        ValueError: there is no such file, it is of another kind or damaged, or would have to be executed. Broken
            structure raises what `errors_of` catches.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a file, found {'a folder' if path.is_dir() else 'nothing'}")
    with open(path, "rb") as file:
        start = file.read(64)
        if start[:1] in (b"\x80", b"P"):  # a private copy: torch wants memory that could be written to
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    if start[:4] == b"PK\x03\x04":
        return read_archive(data, path)
    if start[:1] == b"\x80":
        old = MAGIC.to_bytes(10, "little") in start
        return read_legacy(data) if old else read_pickle(data)[0]
    raise ValueError(f"expected a .safetensors, .pth, .pt or .pkl file, found one that is truncated, damaged or of "
                     f"another format ({path.stat().st_size} bytes, beginning with {start[:12]!r})")  # fmt: skip


class Bounded(io.FileIO):
    """A file that is read in small pieces only: zipfile makes objects of a whole directory at once."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise ValueError("refused: an archive of more entries than any network needs")
        return super().read(size if size >= 0 else MAX_DIRECTORY)


def read_archive(data: memoryview, path: Path) -> object:
    """A file of torch.save: a zip archive of a pickle and of the numbers of each storage."""
    with Bounded(path) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    parts = {}
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a compressed zip archive, no file of torch.save")
        at = entry.header_offset
        at += 30 + sum(int.from_bytes(data[i : i + 2], "little") for i in (at + 26, at + 28))  # its name, and more
        part = data[at : at + entry.file_size]
        if len(part) != entry.file_size:
            raise ValueError("truncated or damaged: an entry ends beyond the file")
        parts[entry.filename.partition("/")[2]] = part, entry.CRC
    if "data.pkl" not in parts:
        raise ValueError("truncated or damaged, or no file of torch.save: there is no data.pkl in it")
    if bytes(parts.get("byteorder", (b"little",))[0]) != b"little":
        raise ValueError("numbers of another byte order, expected little-endian")
    pickle, checksum = parts["data.pkl"]
    if zlib.crc32(pickle) != checksum:
        raise ValueError("damaged: data.pkl does not have the checksum beside it")
    storages = {name[5:]: part for name, part in parts.items() if name.startswith("data/")}
    return read_pickle(pickle, 0, max_opcodes(len(data)), lambda pid: Record("storage", pid, storages))[0]


def read_legacy(data: memoryview, limit: int | None = None) -> object:
    """A file of torch's older format: pickles of a magic number, version, system, the contents, keys of the storages;
    then for each of these its length in 8 bytes and its numbers."""
    storages, kinds = {}, {}

    def stored(pid: tuple) -> Record:
        kinds[pid[2]] = pid[1].name
        return Record("storage", pid, storages)

    at, found = 0, []
    for _ in range(5):
        part, at = read_pickle(data, at, limit, stored)
        found.append(part)
    magic, _, system, contents, keys = found
    if magic != MAGIC or not system["little_endian"]:
        raise ValueError("truncated or damaged, or numbers of another byte order than little-endian")
    for key in keys:
        size = int.from_bytes(data[at : at + 8], "little") * DTYPES[kinds[key]].itemsize
        if size > len(data) - at - 8:
            raise ValueError("truncated or damaged, or no file of torch.save: its numbers end early")
        storages[key] = data[at + 8 : at + 8 + size], None
        at += 8 + size
    return contents


def printable(text: object, limit: int = 1000) -> str:
    """In one line, without control codes, of at most so many characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def errors_of(source):
    """Name the source in ValueErrors, in one printable line, and make ValueErrors of what broken structure raises."""
    broken = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError,
              struct.error, zipfile.BadZipFile)  # fmt: skip
    try:
        yield
    except ValueError as error:
        text = str(error).removeprefix(f"{source}: ")
        raise ValueError(f"{printable(source, 5000)}: {printable(text)}") from error
    except broken as error:
        text = f"truncated or damaged ({type(error).__name__}: {printable(error, 200)})"
        raise ValueError(f"{printable(source, 5000)}: {text}") from error
