"""Checkpoints of ours: exact round trips, and what becomes of broken and malicious files and of full disks."""

import copy
import errno
import hashlib
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from padinv.files.checkpoints import load_encoder, load_generator, save_encoder, save_generator
from padinv.model import tensors
from padinv.model.codes import Code
from padinv.model.encoder import Encoder
from padinv.model.tensors import atomic_write, file_hash, load_tensors, read_metadata, save_tensors


@pytest.fixture
def encoder(tiny) -> Encoder:
    torch.manual_seed(0)
    small = {"widths": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "pyramid_channels": 8, "head_channels": 4}
    E = Encoder.for_generator(tiny, **small, padding_channels=6, padding_depth=1).train()
    E(torch.randn(4, 3, 64, 64))  # moves the running statistics
    return E


def same_state(a, b, atol=0.0):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], rtol=0, atol=atol) for key in a)


def laid_out(G):
    """A copy as loading lays it out: other layouts sum in another order."""
    return copy.deepcopy(G).to(memory_format=torch.channels_last)


def frozen(network) -> bool:
    return not network.training and not any(p.requires_grad for p in network.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Round trips


@pytest.mark.parametrize("path", ["G.safetensors", "a/b/G.safetensors"])
def test_generator(tiny, code, tmp_path, path):
    save_generator(tiny, tmp_path / path, images=1000, data="0123")
    G = load_generator(tmp_path / path)
    assert G.config == tiny.config and frozen(G) and same_state(G, tiny)
    assert torch.equal(G(code), laid_out(tiny)(code))
    assert G.blocks[1].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    metadata = read_metadata(tmp_path / path)
    assert metadata["format"] == "padinv" and metadata["kind"] == "generator"
    assert json.loads(metadata["meta"]) == {"images": 1000, "data": "0123"}
    assert [p.name for p in (tmp_path / path).parent.iterdir()] == ["G.safetensors"]


def test_half_generator(tiny, tmp_path):
    save_generator(tiny, tmp_path / "full.safetensors")
    save_generator(tiny, tmp_path / "half.safetensors", half=True)
    G = load_generator(tmp_path / "half.safetensors")
    assert {t.dtype for t in G.state_dict().values()} == {torch.float32}
    for key, t in tiny.state_dict().items():
        assert torch.allclose(G.state_dict()[key], t, rtol=1e-3, atol=1e-6), key
    assert (tmp_path / "half.safetensors").stat().st_size < 0.75 * (tmp_path / "full.safetensors").stat().st_size


@pytest.mark.parametrize("half", [True, False])
def test_encoder(encoder, tmp_path, half):
    save_encoder(encoder, tmp_path / "E.safetensors", half=half, images=5)
    E = load_encoder(tmp_path / "E.safetensors")
    assert E.config == encoder.config and frozen(E) and same_state(E, encoder, atol=2e-3 if half else 0)
    for name, t in encoder.named_buffers():  # statistics, w_avg and const keep every bit
        assert torch.equal(E.get_buffer(name), t)
    assert {t.dtype for t in E.parameters()} == {torch.float32}
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        for a, b in zip(E(x).tensors, encoder.eval()(x).tensors, strict=True):
            assert torch.allclose(a, b, atol=1e-2 if half else 0)


def test_numbers_too_large_for_half_are_kept(encoder, tmp_path):
    encoder.heads[0].weight.data[0, 0, 0] = 1e5
    save_encoder(encoder, tmp_path / "E.safetensors")
    assert load_encoder(tmp_path / "E.safetensors").heads[0].weight[0, 0, 0] == 1e5


def test_the_same_network_gives_the_same_bytes(tiny, tmp_path):
    save_generator(tiny, tmp_path / "a.safetensors", images=3, note="é")
    for _ in range(8):
        save_generator(tiny, tmp_path / "b.safetensors", images=3, note="é")
        assert file_hash(tmp_path / "a.safetensors") == file_hash(tmp_path / "b.safetensors")


def test_channels_last_networks_are_saved(tiny, tmp_path):
    save_generator(tiny, tmp_path / "a.safetensors")
    G = load_generator(tmp_path / "a.safetensors").to(memory_format=torch.channels_last)
    save_generator(G, tmp_path / "b.safetensors")
    assert file_hash(tmp_path / "a.safetensors") == file_hash(tmp_path / "b.safetensors")


def test_file_hash(tmp_path):
    (tmp_path / "x").write_bytes(b"padding" * 100_000)
    assert file_hash(tmp_path / "x") == hashlib.sha256(b"padding" * 100_000).hexdigest()


def test_loading_draws_no_random_numbers(tiny, encoder, tmp_path):
    save_generator(tiny, tmp_path / "G.safetensors")
    save_encoder(encoder, tmp_path / "E.safetensors")
    before = torch.get_rng_state()
    load_generator(tmp_path / "G.safetensors")
    load_encoder(tmp_path / "E.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_networks_own_their_memory_and_no_more(tiny, code, tmp_path):
    path = tmp_path / "G.safetensors"
    save_generator(tiny, path)
    G = load_generator(path)
    os.truncate(path, 0)  # what was mapped would fault
    assert same_state(G, tiny) and torch.equal(G(code), laid_out(tiny)(code))
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in G.state_dict().values())


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1000)}, {"kind": "code"})
    tensors, _ = load_tensors(tmp_path / "x.safetensors", "code")
    os.truncate(tmp_path / "x.safetensors", 0)
    assert tensors["a"].sum() == 1000


# ----------------------------------------------------------------------------------------------------------------------
# Files that are not what was asked for


LOADERS = [load_generator, load_encoder, lambda path: load_tensors(path, "code")]


@pytest.mark.parametrize("load", LOADERS)
def test_missing_files_and_folders(load, tmp_path):
    with pytest.raises(ValueError, match=r"none\.safetensors: expected a .*file, found nothing"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="found a folder"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, 3000, -1])
def test_truncated_files(tiny, tmp_path, keep):
    path = tmp_path / "G.safetensors"
    save_generator(tiny, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r"G\.safetensors: expected a \.safetensors.* file, found one that is truncated"
    ):
        load_generator(path)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + bytes(100), b"hello, world", b"\xff" * 64, b"{}" * 40])
@pytest.mark.parametrize("load", LOADERS)
def test_files_of_another_format(load, tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors: expected .* truncated, damaged or of another format"):
        load(tmp_path / "x.safetensors")


def test_safetensors_of_another_project(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"that padinv did not write \(format 'pt'\); expected format 'padinv'"):
        load_encoder(tmp_path / "x.safetensors")


def test_an_encoder_is_no_generator(tiny, encoder, tmp_path):
    save_generator(tiny, tmp_path / "G.safetensors")
    save_encoder(encoder, tmp_path / "E.safetensors")
    with pytest.raises(ValueError, match="E.safetensors: its kind is 'encoder', expected 'generator'"):
        load_generator(tmp_path / "E.safetensors")
    with pytest.raises(ValueError, match="G.safetensors: its kind is 'generator', expected 'encoder'"):
        load_encoder(tmp_path / "G.safetensors")


def rewrite(path, change):
    tensors, metadata = load_tensors(path, "generator")
    config = json.loads(metadata["config"])
    change(tensors, config)
    save_tensors(path, tensors, metadata | {"config": json.dumps(config)})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, c: c.update(channel_max=6), r"tensors of another architecture than its config: .* expected \[6"),
        (lambda t, c: c.update(resolution=64), r"blocks\.4\.\S* is missing"),
        (lambda t, c: t.pop("const"), "const is missing"),
        (lambda t, c: t.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda t, c: c.update(depth=3), r"not that of a generator of this version of padinv \(.*depth"),
        (lambda t, c: c.update(resolution=33), "not that of a generator .*resolution: expected a power of two"),
        (lambda t, c: c.update(resolution="32"), "not that of a generator of this version"),
        (lambda t, c: c.update(w_dim=10**15), "not that of a generator of this version"),
        (lambda t, c: c.update(mapping_layers=3), r"mapping\.layers\.2\.weight is missing"),
        (lambda t, c: c.update(w_dim="a"), "not that of a generator of this version"),
    ],
)
def test_another_architecture(tiny, tmp_path, change, message):
    save_generator(tiny, tmp_path / "G.safetensors")
    rewrite(tmp_path / "G.safetensors", change)
    with pytest.raises(ValueError, match=rf"G\.safetensors: .*{message}"):
        load_generator(tmp_path / "G.safetensors")


class Attack:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [0, 2, 5, "torch"])
def test_pickles_of_codes_are_refused_unopened(protocol, tmp_path):
    target, path = tmp_path / "written", tmp_path / "code.safetensors"
    if protocol == "torch":
        torch.save({"w": Attack(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"w": Attack(target)}, protocol=protocol))
    expected = "another format" if protocol == 0 else "a Python pickle .* can run code when it is opened, so it was not"
    with pytest.raises(ValueError, match=expected):
        Code.load(path)
    assert not target.exists()


# ----------------------------------------------------------------------------------------------------------------------
# Full disks and interrupted writes


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tiny, tmp_path, monkeypatch, failing):
    path = tmp_path / "G.safetensors"
    save_generator(tiny, path, images=1)
    before = file_hash(path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensors.os, failing, full)
    with pytest.raises(
        OSError, match=r"no space for 0\.\d MB; the file that was there is unchanged.*G\.safetensors"
    ) as e:
        save_generator(tiny, path, images=2)
    assert e.value.errno == errno.ENOSPC
    assert file_hash(path) == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="no space .* nothing was written"):
        save_generator(tiny, tmp_path / "new.safetensors")
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    atomic_write(tmp_path / "x", b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensors.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_disk_that_is_full_for_real(tmp_path, monkeypatch):
    atomic_write(tmp_path / "x", b"old")
    monkeypatch.setattr(tensors, "open", lambda *_: open("/dev/full", "wb"), raising=False)
    with pytest.raises(OSError, match="no space"):
        atomic_write(tmp_path / "x", b"new" * 10_000)
    assert (tmp_path / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
