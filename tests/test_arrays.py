"""Directions of other projects: what fits is read exactly, what does not is refused by name, nothing is executed."""

import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from padinv import Code
from padinv.__main__ import main
from padinv.files.arrays import read_array
from padinv.files.checkpoints import load_generator, save_generator
from padinv.photos.networks import Networks
from tests.test_commands import tiny
from tests.test_foreign import Attack, Reduced, array_with, legacy_storage, target, tensor_of  # noqa: F401

WRITERS = {
    "npy": lambda path, d: path.write_bytes(saved(d.numpy())),
    "npy of Fortran": lambda path, d: path.write_bytes(saved(np.asfortranarray(d.numpy()))),
    "pt": lambda path, d: torch.save(d, path),
    "old pt": lambda path, d: torch.save(d, path, _use_new_zipfile_serialization=False),
    "parameter": lambda path, d: torch.save(torch.nn.Parameter(d), path),
    "array in pt": lambda path, d: torch.save(d.numpy(), path),
    "pkl": lambda path, d: path.write_bytes(pickle.dumps(d.numpy())),
}


@pytest.fixture(scope="module")
def nets() -> Networks:
    return Networks(tiny(), batch=1)  # 8 w of 16


def npy(header: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def saved(array, save=np.save) -> bytes:
    save(file := io.BytesIO(), array)
    return file.getvalue()


def torch_saved(value) -> bytes:
    torch.save(value, file := io.BytesIO())
    return file.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# What fits


@pytest.mark.parametrize("name", ["age.npy", "age.pt", "age"])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("shape", [(16,), (1, 16), (1, 8, 16)])
def test_directions_of_others(shape, writer, name, nets, tmp_path):
    d = torch.randn(shape)
    WRITERS[writer](tmp_path / name, d)
    names, found = nets.load_directions(tmp_path / name)
    assert names == ["age"] and found.p is None and found.w.shape == (1, 8, 16)
    assert found.w.equal(d.expand(1, 8, 16)), "at the length that it has"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_precisions(dtype, nets, tmp_path):
    d = torch.randn(1, 16).to(dtype)
    np.save(tmp_path / "a.npy", d.numpy())
    torch.save(d, tmp_path / "a.pt")
    for path in tmp_path.iterdir():
        assert nets.load_directions(path)[1].w.equal(d.float().expand(1, 8, 16))


@pytest.mark.parametrize("name", ["a.npy", "a.pt"])
def test_they_do_not_depend_on_the_file(name, nets, tmp_path):
    (tmp_path / name).write_bytes((saved if name == "a.npy" else torch_saved)(torch.ones(16).numpy()))
    _, found = nets.load_directions(tmp_path / name)
    (tmp_path / name).write_bytes(b"")  # what was mapped would fault
    assert (found.w == 1).all()


def test_ours_with_names_and_without(nets, tmp_path):
    (d := Code(torch.randn(2, 8, 16))).save(tmp_path / "bare.pt")  # content decides, not the name
    d.save(tmp_path / "named.npy", names=["hat", "glasses"])
    for name, expected in (("bare.pt", ["0", "1"]), ("named.npy", ["hat", "glasses"])):
        names, found = nets.load_directions(tmp_path / name)
        assert names == expected and found.w.equal(d.w)


def test_moves_along_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_generator(tiny(), "g.safetensors")
    (code := Code(torch.randn(1, 8, 16))).save("code.safetensors")
    np.save("age.npy", d := np.random.RandomState(0).randn(1, 16).astype(np.float32))
    move = ["move", "code.safetensors", "--direction", "age.npy", "--generator", "g.safetensors", "--device", "cpu"]
    assert main([*move, "--strength", "-2", "0.5", "--layers", "2-3", "--name", "age", "--out", "m"]) == 0
    expected = code.w.repeat(2, 1, 1)
    expected[:, 2:4] += torch.tensor([-2, 0.5])[:, None, None] * torch.from_numpy(d)
    torch.testing.assert_close(Code.load("m.safetensors").w, expected)
    with pytest.raises(SystemExit, match="^padinv: --name: expected one of age, or 0 to 0, got 'pose'$"):
        main([*move, "--name", "pose", "--out", "m"])
    torch.save(torch.zeros(1, 24), "wide.pt")
    move[3] = "wide.pt"
    with pytest.raises(SystemExit, match=r"^padinv: wide.pt: a direction \[1, 24\] does not fit this gen[^\n]*$"):
        main([*move, "--out", "m"])


# ----------------------------------------------------------------------------------------------------------------------
# What does not


@pytest.mark.parametrize("write", [saved, torch_saved], ids=["npy", "pt"])
@pytest.mark.parametrize(("array", "message"), [
    (np.zeros(24, "f4"), r"a direction \[24\] does not fit .* expected \[16\], \[1, 16\] or \[1, 8, 16\]$"),
    (np.zeros((1, 24), "f4"), r"a direction \[1, 24\] does not fit"),
    (np.zeros((1, 18, 16), "f4"), r"a direction \[1, 18, 16\] does not fit"),
    (np.zeros((8, 16), "f4"), r"a direction \[8, 16\] does not fit"),
    (np.zeros((2, 8, 16), "f4"), r"a direction \[2, 8, 16\] does not fit"),
    (np.zeros((1, 1, 8, 16), "f4"), r"a direction \[1, 1, 8, 16\] does not fit"),
    (np.zeros((1, 0), "f4"), ""),
    (np.float32(3), ""),
    (np.full((1, 16), np.nan, "f4"), "a direction with NaN or an infinity"),
    (np.full((1, 8, 16), -np.inf, "f4"), "a direction with NaN or an infinity"),
    (np.full(16, 1e300), "a direction with NaN or an infinity"),
    (np.zeros(16, "i8"), "expected a direction of real numbers, found torch.int64"),
    (np.zeros(16, "c8"), "expected a direction of real numbers, found torch.complex64"),
    (np.zeros(16, ">f4"), ".*byte order"),
    (np.zeros(16, "S4"), ""),
])  # fmt: skip
def test_arrays_that_are_no_directions(array, message, write, nets, tmp_path):
    (tmp_path / "age.pt").write_bytes(write(array))
    with pytest.raises(ValueError, match=f"age.pt: {message}") as error:
        nets.load_directions(tmp_path / "age.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "expected a .safetensors, .pth, .pt or .pkl file, found one that is truncated"),
    (b"\x89PNG....", "expected a .safetensors, .pth, .pt or .pkl file"),
    (saved(np.zeros(16, "f4"))[:-1], "expected an array of numbers, found a .npy that is truncated"),
    (torch_saved(torch.zeros(16))[:-100], ""),
    (b"\x93NUMPY", "expected an array"),
    (b"\x93NUMPY\x09\x00", "expected an array"),
    (npy(b"{"), "expected an array"),  # an error of tokenize, which is none of the usual
    (npy(b"-" * 9000 + b"1"), "expected an array"),
    (npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 16)}"), "expected an array"),
    (npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-16,)}", bytes(64)), "expected an array"),
    (npy(b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (16,)}", bytes(64)), "expected an array"),
    (saved(np.zeros(16), np.savez), "a compressed|truncated or damaged, or no file of torch.save"),
    (torch_saved({"lat_mean": torch.zeros(1, 16)}), r"expected one tensor alone, found 'lat_mean' \(of type Tensor\)"),
    (torch_saved([torch.zeros(1, 16)]), "expected one tensor alone, found of type list"),
    (torch_saved("age"), "no plain tensor but of type str"),
    (torch_saved(torch.eye(16).to_sparse()), "refused: its pickle asks for torch.serialization._get_layout"),
    (pickle.dumps(tensor_of(legacy_storage(2**40), (16,), (1,))), "(truncated or )?damaged"),
    (pickle.dumps(tensor_of(legacy_storage(4, bytes(16)), (16,), (1,))), "truncated or damaged"),
    (pickle.dumps(tensor_of(legacy_storage(4, bytes(16)), (2**40, 16), (0, 0))), r"a direction \[1099511627776, 16\]"),
])  # fmt: skip
def test_files_that_hold_no_direction(content, message, nets, tmp_path):
    (tmp_path / "age.npy").write_bytes(content)
    with pytest.raises(ValueError, match=f"age.npy: ({message})") as error:
        nets.load_directions(tmp_path / "age.npy")
    assert "\n" not in str(error.value)


def test_no_file(nets, tmp_path):
    for path in (tmp_path, tmp_path / "absent.npy"):
        with pytest.raises(ValueError, match=f"{path.name}: expected a file, found"):
            nets.load_directions(path)


@pytest.mark.parametrize(("w", "metadata", "message"), [
    (torch.zeros(0, 8, 16), {}, "expected a name for each of 0 directions"),
    (torch.zeros(2, 8, 16), {"names": ["hat"]}, r"expected a name for each of 2 directions, found \['hat'\]"),
    (torch.zeros(2, 8, 16), {"names": [1, 2]}, "expected a name for each of 2"),
    (torch.zeros(2, 8, 16), {"names": 5}, "truncated or damaged"),
    (torch.full((1, 8, 16), torch.nan), {}, "a direction with NaN or an infinity"),
    (torch.zeros(1, 8, 24), {}, "made with another generator"),
])  # fmt: skip
def test_files_of_ours_that_are_no_directions(w, metadata, message, nets, tmp_path):
    Code(w).save(tmp_path / "d.safetensors", **metadata)
    with pytest.raises(ValueError, match=f"d.safetensors: {message}"):
        nets.load_directions(tmp_path / "d.safetensors")


def test_a_generator_is_no_direction(nets):
    path = Path(__file__).parent / "fixtures/rosinality_tiny.pt"
    assert load_generator(path) is not None
    with pytest.raises(ValueError, match=r"rosinality_tiny.pt: expected one tensor alone, found 'g_ema' \(a generator"):
        nets.load_directions(path)


# ----------------------------------------------------------------------------------------------------------------------
# Nothing is executed


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: {"age": a}, lambda a: [torch.zeros(16), a],
                                  lambda a: Reduced(torch._utils._rebuild_parameter, (a, False, {}))])  # fmt: skip
def test_torch_files_that_would_run_code(wrap, zipped, target, nets, tmp_path):  # noqa: F811
    torch.save(wrap(Attack(target)), tmp_path / "age.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"age.pt: refused: its pickle asks for \S*open, .* nothing was executed"):
        nets.load_directions(tmp_path / "age.pt")


@pytest.mark.parametrize("at", ["type", "name", "state", "dtype", "data"])
def test_pickled_arrays_that_would_run_code(at, target, nets, tmp_path):  # noqa: F811
    (tmp_path / "age.npy").write_bytes(pickle.dumps(array_with(Attack(target), at)))
    with pytest.raises(ValueError, match=r"age.npy: refused: its pickle asks for \S*open"):
        nets.load_directions(tmp_path / "age.npy")


def test_arrays_of_objects_would_run_code_and_are_not_opened(target, nets, tmp_path):  # noqa: F811
    np.save(tmp_path / "age.npy", np.array([Attack(target)], object), allow_pickle=True)
    np.save(tmp_path / "own.npy", np.array([Attack(tmp_path / "real")], object), allow_pickle=True)
    np.load(tmp_path / "own.npy", allow_pickle=True)
    assert (tmp_path / "real").exists(), "the attack is real"
    with pytest.raises(ValueError, match="expected an array of numbers, .* of objects: a pickle, not opened"):
        read_array(tmp_path / "age.npy")
    with pytest.raises(ValueError, match="^[^\n]*age.npy: expected an array of numbers"):
        nets.load_directions(tmp_path / "age.npy")
