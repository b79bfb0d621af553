"""Files of other projects: read by content, equal to their own outputs, written back exactly, never executed."""

import argparse
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from padinv.files import foreign
from padinv.files.checkpoints import (
    export_generator,
    generator_from_state,
    load_encoder,
    load_generator,
    save_generator,
)
from padinv.files.pickles import read_pickle
from padinv.model.codes import Code
from padinv.model.generator import Generator, GeneratorConfig, ModulatedConv
from padinv.model.tensors import load_tensors
from padinv.ops import fir_filter, upfirdn2d

FIXTURES = Path(__file__).parent / "fixtures"
FILES = {
    "padinv_official": FIXTURES / "padinv_official_tiny.pth",
    "nvlabs_ada": FIXTURES / "nvlabs_ada_tiny.pkl",
    "rosinality": FIXTURES / "rosinality_tiny.pt",
}
DOORS = [load_generator, load_encoder, lambda path: load_tensors(path, "generator")]


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def random_generator(*args, **kwargs) -> Generator:
    """With biases, noise strengths and w_avg that are not what networks start with."""
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(*args, **kwargs)).eval().requires_grad_(False)
    for t in G.state_dict().values():
        t += 0.1 * torch.randn_like(t)
    return G


# ----------------------------------------------------------------------------------------------------------------------
# Pickles as other projects write them: the classes exist only while a test writes


@pytest.fixture
def fake(monkeypatch):
    """Modules under the names that NVIDIA's pickles hold, with classes that pickle as theirs do."""

    class Network:  # dnnlib.tflib.network
        def __init__(self, **state):
            self.state = state

        def __getstate__(self):
            return self.state

    class EasyDict(dict):  # dnnlib.util
        pass

    class Module:  # any class with the decorator of torch_utils.persistence
        def __init__(self, class_name, source="", parameters=(), buffers=(), modules=(), **fields):
            hidden = {"_parameters": dict(parameters), "_buffers": dict(buffers), "_modules": dict(modules)}
            self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name}
            self.meta["state"] = {"training": False, **hidden, "_non_persistent_buffers_set": set(), **fields}

        def __reduce__(self):
            return reconstruct, (self.meta,)

    def reconstruct(meta):
        raise AssertionError("nobody rebuilds a module")

    reconstruct.__name__ = reconstruct.__qualname__ = "_reconstruct_persistent_obj"
    homes = {"dnnlib.tflib.network": Network, "dnnlib.util": EasyDict, "torch_utils.persistence": reconstruct}
    for home, thing in homes.items():
        module, thing.__module__, thing.__qualname__ = types.ModuleType(home), home, thing.__name__
        setattr(module, thing.__name__, thing)
        for i in range(home.count(".")):
            monkeypatch.setitem(sys.modules, home.rsplit(".", i + 1)[0], types.ModuleType(home.rsplit(".", i + 1)[0]))
        monkeypatch.setitem(sys.modules, home, module)
    return types.SimpleNamespace(Network=Network, EasyDict=EasyDict, Module=Module)


def write(path, contents, protocol=4, without=("dnnlib", "torch_utils")):
    """Pickle, and forget the modules: a reader that imports them fails."""
    data = pickle.dumps(contents, protocol=protocol)
    for name in [name for name in sys.modules if name.partition(".")[0] in without]:
        del sys.modules[name]
    Path(path).write_bytes(data)
    return path


def tf_variables(state) -> tuple[dict, dict, dict]:
    """NVIDIA's own PyTorch state as the variables that the TensorFlow networks Gs, G_mapping and G_synthesis hold."""

    def kernel(name, turn=False):
        w = state[name].numpy().transpose(2, 3, 1, 0)  # [k, k, C_in, C_out]
        return w[::-1, ::-1].copy() if turn else np.asfortranarray(w)

    def layer(ours, theirs, turn=False, noise=True):
        variables = {
            f"{theirs}/weight": kernel(f"{ours}.weight", turn),
            f"{theirs}/mod_weight": state[f"{ours}.affine.weight"].numpy().T,
            f"{theirs}/mod_bias": state[f"{ours}.affine.bias"].numpy() - 1,
            f"{theirs}/bias": state[f"{ours}.bias"].numpy(),
        }
        if noise:
            variables[f"{theirs}/noise_strength"] = np.float32(state[f"{ours}.noise_strength"])
        return variables

    mapping = {
        f"Dense{i}/{part}": state[f"mapping.fc{i}.{part}"].numpy().T for i in range(4) for part in ("weight", "bias")
    }
    synthesis = {"4x4/Const/const": state["synthesis.b4.const"].numpy()[None], "lod": np.float32(0)}
    names = [f"b{r}.conv{c}" for r in (4, 8, 16, 32, 64) for c in (0, 1) if (r, c) != (4, 0)]
    for i, name in enumerate(names):
        synthesis[f"noise{i}"] = state[f"synthesis.{name}.noise_const"].numpy()[None, None]
        r, c = name[1:].split(".conv")
        theirs = "Conv" if r == "4" else {"0": "Conv0_up", "1": "Conv1"}[c]
        synthesis |= layer(f"synthesis.{name}", f"{r}x{r}/{theirs}", turn=c == "0")
    for r in (4, 8, 16, 32, 64):
        synthesis |= layer(f"synthesis.b{r}.torgb", f"{r}x{r}/ToRGB", noise=False)
    return {"dlatent_avg": state["mapping.w_avg"].numpy()}, mapping, synthesis


def tf_networks(fake, state, prefix=False, settings=(), source="", Dict=dict, **changes):
    """(G, D, Gs) of a TensorFlow file; changes are further variables of G_synthesis."""
    settings = Dict({"num_channels": 3, "resolution": 64, "label_size": 0, "fmap_max": 16}, **dict(settings))
    own, mapping, synthesis = tf_variables(state)

    def network(name, variables, **components):
        at = f"{name}/" if prefix else ""
        variables = [(at + key, value) for key, value in variables.items()]
        return fake.Network(version=4, name=name, static_kwargs=settings, components=Dict(components),
                            variables=variables, build_module_src=source, build_func_name=name)  # fmt: skip

    parts = {"synthesis": network("G_synthesis", synthesis | changes), "mapping": network("G_mapping", mapping)}
    D = network(
        "D", {"64x64/FromRGB/weight": np.zeros((1, 1, 3, 8), np.float32), "Output/bias": np.zeros(1, np.float32)}
    )
    return network("G", {}), D, network("Gs", own, **parts)


def nvlabs_module(fake, state, name="", source="", settings=()):
    """A state dict as nested persistent modules."""
    children = sorted({key.partition(".")[0] for key in state if "." in key})
    parts = {c: {k.partition(".")[2]: t for k, t in state.items() if k.startswith(f"{c}.")} for c in children}
    own = {key: t for key, t in state.items() if "." not in key}
    parameters = {
        k: torch.nn.Parameter(t) for k, t in own.items() if k in ("weight", "bias", "const", "noise_strength")
    }
    buffers = {k: t for k, t in own.items() if k not in parameters}
    modules = {c: nvlabs_module(fake, part, c, source) for c, part in parts.items()}
    return fake.Module(name or "Generator", source, parameters, buffers, modules, _init_kwargs=dict(settings))


# ----------------------------------------------------------------------------------------------------------------------
# The networks are theirs


def check_official(G, io, p):
    close(G.synthesis(G.mapping(io["z"])), io["image_from_z"])
    close(G.synthesis(io["style_latents"], p), io["image_padded"])


def check_nvlabs(G, io):
    close(G.mapping(io["z"], truncation=0.7), io["ws_psi0.7"])
    close(G.synthesis(G.mapping(io["z"])), io["image"])
    close(G.synthesis(io["ws"], noise="none"), io["image_no_noise"])


def check_rosinality(G, io):
    close(G.mapping(io["z"])[:, 0], io["w"])
    close(G.synthesis(io["wp"]), io["image_wp"])


def test_official_file(official):
    G = load_generator(FILES["padinv_official"])
    assert same(G, official.G) and not G.training and not any(p.requires_grad for p in G.parameters())
    check_official(G, official.io, official.p)


def test_official_encoder(official):
    E, G = load_encoder(FILES["padinv_official"]), load_generator(FILES["padinv_official"])
    assert E.config == official.E.config and same(E, official.E)
    with torch.no_grad():
        code = E(official.x)
    close(code.w, official.io["style_latents"])
    for ring, expected in zip(code.p.rings, official.p.rings, strict=True):
        close(ring, expected)
    close(G(code), official.io["image_padded"])


def test_nvlabs_file(nvlabs):
    G = load_generator(FILES["nvlabs_ada"])
    assert same(G, nvlabs.G)
    check_nvlabs(G, nvlabs.io)


def test_rosinality_file(rosinality):
    G = load_generator(FILES["rosinality"])
    assert same(G, rosinality.G)
    check_rosinality(G, rosinality.io)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("prefix", [False, True])
def test_tensorflow_file(protocol, prefix, fake, nvlabs, tmp_path):
    nets = tf_networks(fake, nvlabs.state, prefix, Dict=fake.EasyDict if prefix else dict)
    G = load_generator(write(tmp_path / "network.pkl", nets, protocol))
    assert G.config == nvlabs.G.config
    check_nvlabs(G, nvlabs.io)


def test_the_kernel_of_tensorflows_up_sampling_convolution():
    """It is: insert zeros, filter with gain 4, then an ordinary convolution; only the border differs when fused."""
    layer = ModulatedConv(5, 7, 4, 16, up=True).requires_grad_(False)
    w = torch.randn(3, 3, 5, 7)  # [k, k, C_in, C_out]
    layer.weight.copy_(foreign.our_layout(w, "blocks.1.conv0.weight", "stylegan2_tf"))
    x, code = torch.randn(2, 5, 8, 8), torch.randn(2, 4)
    style = layer.affine(code)
    up = upfirdn2d(x * style[:, :, None, None], fir_filter(), up=2, pad=(2, 1, 2, 1), gain=4)
    y = F.conv2d(up, w.permute(3, 2, 0, 1))  # [2, 7, 14, 14]
    power = torch.einsum("ni,klio->no", style.square(), w.square())
    expected = F.leaky_relu(y * torch.rsqrt(power)[:, :, None, None], 0.2) * 2**0.5
    close(layer(x, code, None, "none", fir_filter())[..., 1:-1, 1:-1], expected, atol=1e-5)


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("name", ["network", "network.png", "network.safetensors", "network.pkl", "network.pt"])
def test_names_of_files_mean_nothing(format, name, tmp_path):
    (tmp_path / name).write_bytes(FILES[format].read_bytes())
    assert same(load_generator(tmp_path / name), load_generator(FILES[format]))


def test_ours_under_another_name(tiny, tmp_path):
    save_generator(tiny, tmp_path / "G.pkl")
    assert same(load_generator(tmp_path / "G.pkl"), tiny)


def test_the_average_over_training_is_preferred(tmp_path):
    contents = torch.load(FILES["padinv_official"], weights_only=True)
    contents["models"]["generator"] = {k: t + 1 for k, t in contents["models"]["generator_smooth"].items()}
    torch.save(contents, tmp_path / "both.pth")
    assert same(load_generator(tmp_path / "both.pth"), load_generator(FILES["padinv_official"]))
    del contents["models"]["generator_smooth"]
    contents["models"]["generator"] = contents["models"]["generator"] | {"synthesis.filter": fir_filter()}
    contents["models"]["generator"] |= {k: fir_filter() for k in contents["models"]["generator"] if "filter" in k}
    torch.save(contents, tmp_path / "one.pth")
    w_avg = load_generator(FILES["padinv_official"]).w_avg
    assert torch.equal(load_generator(tmp_path / "one.pth").w_avg, w_avg + 1)
    assert torch.equal(load_encoder(tmp_path / "one.pth").w_avg, w_avg + 1)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_old_and_new(zipped, rosinality, tmp_path):
    contents = torch.load(FILES["rosinality"], weights_only=True)
    torch.save(contents, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    check_rosinality(load_generator(tmp_path / "x.pt"), rosinality.io)


@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoints_of_rosinality(zipped, rosinality, tmp_path):
    """They hold the command line and optimisers, and no mean of w."""
    state = {key: t for key, t in rosinality.state.items() if key != "latent_avg"}
    contents = {
        "g": state, "d": {"final_conv.0.weight": torch.zeros(3)}, "g_ema": state, "args": argparse.Namespace(size=64),
        "g_optim": {"state": {0: {"step": torch.tensor(3.0)}}}, "ada_aug_p": 0.1,
    }  # fmt: skip
    torch.save(contents, tmp_path / "010000.pt", _use_new_zipfile_serialization=zipped)
    G = load_generator(tmp_path / "010000.pt")
    check_rosinality(G, rosinality.io)
    w = G.mapping(torch.randn(40_000, 32, generator=torch.Generator().manual_seed(5)))[:, 0]
    close(G.w_avg, w.mean(dim=0), atol=0.05 * w.std().item())
    assert G.w_avg.abs().max() > 0.3 * w.std()
    assert torch.equal(G.w_avg, load_generator(tmp_path / "010000.pt").w_avg)


def test_state_dicts_alone(nvlabs, tmp_path):
    torch.save(nvlabs.state, tmp_path / "state.pt")
    assert same(load_generator(tmp_path / "state.pt"), nvlabs.G)


def test_networks_do_not_depend_on_the_file(rosinality, tmp_path):
    path = tmp_path / "G.pt"
    path.write_bytes(FILES["rosinality"].read_bytes())
    G = load_generator(path)
    os.truncate(path, 0)  # what was mapped would fault
    check_rosinality(G, rosinality.io)


@pytest.mark.parametrize("format", FILES)
def test_networks_own_their_memory_and_no_more(format):
    for t in load_generator(FILES[format]).state_dict().values():
        assert t.dtype == torch.float32
        assert t.is_contiguous(memory_format=torch.channels_last if t.ndim == 4 else torch.contiguous_format)
        assert t.untyped_storage().nbytes() == t.numel() * 4


def test_states_are_copied(nvlabs):
    before = nvlabs.state["synthesis.b4.const"].clone()
    generator_from_state(nvlabs.state, "nvlabs_ada").const.data.zero_()
    assert torch.equal(nvlabs.state["synthesis.b4.const"], before)


# ----------------------------------------------------------------------------------------------------------------------
# Ours as theirs


@pytest.mark.parametrize("resolution, layers, base", [
    (8, 1, 64), (32, 8, 512), (64, 2, 256), (128, 8, 512), (256, 3, 256), (1024, 8, 1024),
])  # fmt: skip
def test_round_trips_are_exact(resolution, layers, base, tmp_path):
    """Channels as in config F and in half width, at a 64th of their number."""
    G = random_generator(resolution, 6, 10, layers, base, 8)
    export_generator(G, tmp_path / "folder" / "G", "padinv_official")
    loaded = load_generator(tmp_path / "folder" / "G")
    assert same(loaded, G)
    assert [loaded.config.channels(r) for r in G.config.resolutions] == [
        G.config.channels(r) for r in G.config.resolutions
    ]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["G"]


@pytest.mark.parametrize("resolution, layers, base", [(8, 1, 4096), (64, 2, 32768), (128, 8, 16384)])
def test_round_trips_to_rosinality_are_exact(resolution, layers, base, tmp_path):
    G = random_generator(resolution, 10, 10, layers, base, 512)
    export_generator(G, tmp_path / "G", "rosinality")
    assert same(load_generator(tmp_path / "G"), G)


@pytest.mark.parametrize("format, config, message", [
    ("rosinality", (64, 10, 10, 2, 512, 16), r"channels \[16, 16, 16, 16, 8\] from 4² on, but rosinality"),
    ("rosinality", (64, 10, 10, 2, 8192, 512), r"but rosinality's code has \[512, 512, 512, 512, 512\] or, with cha"),
    ("rosinality", (8, 6, 10, 2, 4096, 512), "z of 6 and w of 10 numbers, but rosinality's code has one number"),
    ("padinv_official", (2048, 6, 6, 1, 2048, 2), "the code of padinv_official has no resolution beyond 1024²"),
])  # fmt: skip
def test_exports_that_the_other_project_could_not_build(format, config, message, tmp_path):
    with torch.device("meta"):
        G = Generator(GeneratorConfig(*config))
    with pytest.raises(ValueError, match=message):
        export_generator(G, tmp_path / "G", format)
    assert list(tmp_path.iterdir()) == []


def foreign_state(G, format) -> dict:
    contents = torch.load(io.BytesIO(foreign.exported(G, format)), weights_only=True)
    if format == "padinv_official":
        return contents["models"]["generator_smooth"]
    return contents["g_ema"] | {"latent_avg": contents["latent_avg"]}


@pytest.mark.parametrize("format, source", [("padinv_official", "official"), ("rosinality", "rosinality")])
def test_exports_are_what_the_other_project_writes(format, source, request):
    """Every name, shape and value of the state that the other project's own code made."""
    network = request.getfixturevalue(source)
    state = foreign_state(network.G, format)
    assert {k: list(t.shape) for k, t in state.items()} == {k: list(t.shape) for k, t in network.state.items()}
    assert all(torch.equal(state[key], t) for key, t in network.state.items())


@pytest.mark.parametrize("format", ["onnx", "nvlabs_ada", "stylegan2_tf"])
def test_formats_that_are_not_written(format, tiny, tmp_path):
    with pytest.raises(ValueError, match=f"format: expected one of padinv_official, rosinality, got '{format}'"):
        export_generator(tiny, tmp_path / "G", format)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------
# Nothing is executed


class Attack:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def target(tmp_path):
    """The file that attacks write, and did not."""
    yield tmp_path / "written"
    assert not (tmp_path / "written").exists()


def test_attacks_are_real(tmp_path):
    for data in (pickle.dumps(Attack(tmp_path / "a")), pickle.dumps([{"x": (Attack(tmp_path / "b"),)}])):
        pickle.loads(data)
    torch.save({"g_ema": Attack(tmp_path / "c")}, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    exec(source_that_writes(tmp_path / "d"))
    assert all((tmp_path / name).exists() for name in "abcd")


def source_that_writes(path) -> str:
    return f"open({str(path)!r}, 'w').close()\n"


class Reduced:
    """Pickles as a call of a function with arguments, which may hold attacks, and a state."""

    def __init__(self, function, args, state=None):
        self.parts = (function, args, state)

    def __reduce__(self):
        return self.parts


def array_with(attack, at):
    """A numpy array whose pickle holds an attack: in place of its type, its dtype, in the state of that, or as data."""
    rebuild, (kind, shape, code), (version, size, dtype, order, data) = np.zeros(3, np.float32).__reduce__()
    make, args, state = dtype.__reduce__()
    bad = {"name": Reduced(make, (attack, False, True), state), "state": Reduced(make, args, (3, attack, *state[2:])),
           "dtype": attack}.get(at, dtype)  # fmt: skip
    data = attack if at == "data" else data
    return Reduced(rebuild, (attack if at == "type" else kind, shape, code), (version, size, bad, order, data))


ATTACKS = {
    "top": lambda fake, state, attack: attack,
    "list": lambda fake, state, attack: [1, [2, (3, attack)]],
    "key": lambda fake, state, attack: {"G_ema": {(attack,): 1}},
    "state dict": lambda fake, state, attack: {"G_ema": state | {"synthesis.b4.const": attack}},
    "unused network": lambda fake, state, attack: {"G_ema": nvlabs_module(fake, state), "D": attack},
    "state of a module": lambda fake, state, attack: {"G_ema": fake.Module("Generator", z_dim=attack)},
    "parameter": lambda fake, state, attack: {"G_ema": fake.Module("Generator", parameters={"weight": attack})},
    "submodule": lambda fake, state, attack: {"G_ema": fake.Module("Generator", modules={"mapping": attack})},
    "hook": lambda fake, state, attack: {"G_ema": fake.Module("Generator", _forward_hooks={1: attack})},
    "state of a call": lambda fake, state, attack: {"G_ema": Reduced(torch._utils._rebuild_parameter, (), attack)},
    "variable": lambda fake, state, attack: tf_networks(fake, state, **{"4x4/Conv/bias": attack}),
    "settings": lambda fake, state, attack: tf_networks(fake, state, settings={"func": attack}),
    "discriminator": lambda fake, state, attack: (None, attack, tf_networks(fake, state)[2]),
    "EasyDict": lambda fake, state, attack: fake.EasyDict(G_ema=state, training_set_kwargs=fake.EasyDict(x=attack)),
    **{f"{at} of an array": lambda fake, state, attack, at=at: tf_networks(fake, state, **{
        "4x4/Conv/bias": array_with(attack, at)}) for at in ("type", "name", "state", "dtype", "data")},
    "array of objects": lambda fake, state, attack: tf_networks(fake, state, **{"x": np.array([attack], object)}),
    "storage": lambda fake, state, attack: {"G_ema": {"synthesis.b4.const": Reduced(
        torch._utils._rebuild_tensor_v2, (attack, 0, (1,), (1,), False, {}))}},
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("place", ATTACKS)
def test_pickles_that_would_run_code(door, protocol, place, fake, nvlabs, target, tmp_path):
    contents = ATTACKS[place](fake, nvlabs.state, Attack(target))
    write(tmp_path / "network.pkl", contents, protocol)
    with pytest.raises(
        ValueError, match=r"network\.pkl: (refused: its pickle asks for \S*io\.open, which no|a Python pickle)"
    ):
        door(tmp_path / "network.pkl")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["top", "models", "state", "average", "beside", "key"])
def test_torch_files_that_would_run_code(door, zipped, place, rosinality, target, tmp_path):
    attack = Attack(target)
    state = rosinality.state
    contents = {"top": attack, "models": {"models": attack}, "state": {"g_ema": state | {"input.input": attack}},
                "average": {"g_ema": state, "latent_avg": attack}, "beside": {"g_ema": state, "args": [attack]},
                "key": {"g_ema": state, attack: 1}}[place]  # fmt: skip
    torch.save(contents, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"x\.pt: (refused: its pickle asks for \S+open, which no|a Python pickle)"):
        door(tmp_path / "x.pt")


def test_source_in_a_module_is_not_executed(fake, nvlabs, target, tmp_path):
    """NVIDIA's loader executes it; ours reads the state beside it."""
    module = nvlabs_module(fake, nvlabs.state, source=source_that_writes(target))
    write(tmp_path / "network.pkl", {"G": None, "D": None, "G_ema": module})
    assert source_that_writes(target).encode() in (tmp_path / "network.pkl").read_bytes()
    G = load_generator(tmp_path / "network.pkl")
    check_nvlabs(G, nvlabs.io)


def test_source_in_a_tensorflow_network_is_not_executed(fake, nvlabs, target, tmp_path):
    write(tmp_path / "network.pkl", tf_networks(fake, nvlabs.state, source=source_that_writes(target)))
    check_nvlabs(load_generator(tmp_path / "network.pkl"), nvlabs.io)


def test_pickles_inside_tensors_are_not_executed(target, tmp_path):
    """A tensor's bytes are a torch file, whose pickles torch would execute."""
    inner = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, Attack(target), ["0"]]
    data = b"".join(pickle.dumps(x, protocol=2) for x in inner)
    file = Reduced(torch.storage._load_from_bytes, (data,))
    const = Reduced(torch._utils._rebuild_tensor_v2, (file, 0, (1,), (1,), False, {}))
    write(tmp_path / "network.pkl", {"G_ema": {"state_dict": {"synthesis.b4.const": const}, "init_kwargs": {}}})
    with pytest.raises(ValueError, match=r"network\.pkl: refused: its pickle asks for \S*open"):
        load_generator(tmp_path / "network.pkl")


@pytest.mark.parametrize("name", [
    "os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__",
    "subprocess.Popen", "torch.load", "torch.hub.load", "torch.storage._load_from_bytes.__globals__", "numpy.load",
    "dnnlib.util.open_url", "dnnlib.tflib.network.Network.__init__", "padinv.files.pickles.Record", "runpy._run_code",
])  # fmt: skip
@pytest.mark.parametrize("stacked", [True, False])
def test_names_that_no_network_needs(name, stacked, tmp_path):
    module, _, attribute = name.rpartition(".")
    text = pickle.dumps(module)[11:-2] + pickle.dumps(attribute)[11:-2]  # without opcodes of start, memo and end
    get = text + b"\x93" if stacked else f"c{module}\n{attribute}\n".encode()
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + get + b")R.")
    with pytest.raises(ValueError, match=rf"x\.pkl: refused: its pickle asks for {name}, which no network needs"):
        load_generator(tmp_path / "x.pkl")


@pytest.mark.parametrize("opcodes, name", [
    (b"(ios\nsystem\n.", "INST"), (b"(cos\nsystem\no.", "OBJ"), (b"\x82\x01.", "EXT1"), (b"Px\n.", "PERSID"),
    (b"\x97.", "NEXT_BUFFER"), (b"N0.", "POP"), (b"Vx\n.", "UNICODE"), (b"I1\n.", "INT"),
])  # fmt: skip
def test_opcodes_that_no_network_needs(opcodes, name, tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02" + opcodes)
    with pytest.raises(ValueError, match=rf"x\.pkl: refused: .*({name}|os\.system), which no network needs"):
        load_generator(tmp_path / "x.pkl")


def test_calls_are_kept_as_records():
    record = read_pickle(memoryview(pickle.dumps({"x": torch.ones(2)}, protocol=4)))[0]["x"]
    assert record.name == "torch._utils._rebuild_tensor_v2" and record.args[2:4] == ((2,), (1,))
    assert repr(record) == "<torch._utils._rebuild_tensor_v2>"
    # A state for an allowed function sets nothing on it.
    before = dict(vars(torch.storage._load_from_bytes))
    read_pickle(memoryview(b"\x80\x02ctorch.storage\n_load_from_bytes\n}(X\x01\x00\x00\x00aK\x01ub."))
    assert vars(torch.storage._load_from_bytes) == before


# ----------------------------------------------------------------------------------------------------------------------
# Small files that would take much memory


def legacy_storage(count: int, data=b"") -> bytes:
    """The bytes of a tensor in torch's older format, which declares so many numbers."""
    head = [
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        *(pickle.dumps(x, protocol=2) for x in (1001, {"little_endian": True})),
    ]
    number = pickle.dumps(count, protocol=2)[2:-1]
    text = [b"X" + struct.pack("<I", len(t)) + t for t in (b"storage", b"0", b"cpu")]
    stored = b"\x80\x02(" + text[0] + b"ctorch\nFloatStorage\n" + text[1] + text[2] + number + b"Nt"
    return b"".join(head) + stored + b"Q.\x80\x02](" + text[1] + b"e." + struct.pack("<q", count) + data


def tensor_of(storage: bytes, size, stride, offset=0):
    file = Reduced(torch.storage._load_from_bytes, (storage,))
    return Reduced(torch._utils._rebuild_tensor_v2, (file, offset, size, stride, False, {}))


@pytest.mark.parametrize("tensor", [
    tensor_of(legacy_storage(2**40), (2**40,), (1,)),
    tensor_of(legacy_storage(4, bytes(16)), (2**40,), (1,)),
    tensor_of(legacy_storage(4, bytes(16)), (2**20, 2**20), (0, 0)),
    tensor_of(legacy_storage(4, bytes(16)), (2,), (1,), offset=3),
    tensor_of(legacy_storage(4, bytes(16)), (2,), (1,), offset=-1),
    tensor_of(legacy_storage(4, bytes(16)), (2,), (2**62,)),
    tensor_of(legacy_storage(4, bytes(15)), (4,), (1,)),
], ids=["storage", "size", "expanded", "offset", "before", "stride", "short"])  # fmt: skip
def test_tensors_that_claim_more_than_their_bytes(tensor, tmp_path):
    write(tmp_path / "x.pkl", {"G_ema": {"init_kwargs": {}, "state_dict": {"synthesis.b4.const": tensor}}})
    with pytest.raises(ValueError, match=r"x\.pkl: ((truncated or )?damaged|.*buffer)"):
        load_generator(tmp_path / "x.pkl")


def test_such_tensors_are_read_where_they_are_honest(nvlabs, tmp_path):
    """Or the tests above would hold for any tensor."""
    const = nvlabs.state["synthesis.b4.const"]
    tensor = tensor_of(legacy_storage(256, const.numpy().tobytes()), (16, 4, 4), (16, 4, 1))
    write(
        tmp_path / "x.pkl", {"G_ema": {"init_kwargs": {}, "state_dict": nvlabs.state | {"synthesis.b4.const": tensor}}}
    )
    assert same(load_generator(tmp_path / "x.pkl"), nvlabs.G)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_tensors_that_claim_more_than_the_file(zipped, rosinality, tmp_path):
    state = rosinality.state | {"conv1.conv.weight": torch.zeros(1).expand(1, 2**20, 2**20, 3, 3)}
    torch.save({"g_ema": state}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"x\.pt: damaged: its tensors claim \d{14} bytes, the file has"):
        load_generator(tmp_path / "x.pt")


def test_a_torch_file_that_declares_a_huge_storage(tmp_path):
    (tmp_path / "x.pt").write_bytes(legacy_storage(2**44))
    with pytest.raises(ValueError, match=r"x\.pt: truncated or damaged, or no file of torch\.save"):
        load_generator(tmp_path / "x.pt")


def test_compressed_archives(tmp_path):
    torch.save({"g_ema": torch.zeros(10**6)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    with pytest.raises(ValueError, match=r"y\.pt: a compressed zip archive, no file of torch\.save"):
        load_generator(tmp_path / "y.pt")


@pytest.mark.parametrize("opcodes", [
    b"}" * 400_000 + b".",  # many objects
    b"N" + b"\x85" * 200_000 + b".",  # one in another
    b"}N" + b"\x85" * 200_000 + b"Ns.",  # the same as a key
    b"Nr\xff\xff\xff\xff.",  # a memo of four thousand million entries
    b"\x8e" + struct.pack("<Q", 2**62) + b".",  # bytes without end
    b"\x8b" + struct.pack("<i", 2**31 - 1) + b".",  # a number without end
    b"]\x94" + b"h\x00a" * 100_000 + b".",  # a list in itself
], ids=["many", "nested", "key", "memo", "bytes", "number", "cycle"])  # fmt: skip
def test_pickles_that_would_exhaust_memory(opcodes, tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + opcodes)
    with pytest.raises(ValueError, match=r"x\.pkl: (refused|a truncated or damaged pickle|no StyleGAN2 generator)"):
        load_generator(tmp_path / "x.pkl")


def test_modules_inside_themselves(fake, tmp_path):
    inner = fake.Module("Block", parameters={"x": torch.zeros(1)})
    for _ in range(40):  # 2⁴⁰ modules, were each followed
        inner = fake.Module("Block", modules={"a": inner, "b": inner})
    with pytest.raises(ValueError, match=r"x\.pkl: damaged: the module [ab.]+ is there twice"):
        load_generator(write(tmp_path / "x.pkl", {"G_ema": inner}))


# ----------------------------------------------------------------------------------------------------------------------
# Other networks and broken files are refused by name


def refuse(path, message):
    with pytest.raises(ValueError, match=message) as error:
        load_generator(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("changes, message", [
    ({"mapping.embed.weight": torch.zeros(32, 5)}, "found a conditional generator.*mapping.embed.weight is unknown"),
    ({"synthesis.b8.resample_filter": torch.eye(4)}, "synthesis.b8.resample_filter is not the low-pass filter"),
    ({"synthesis.b8.skip.weight": torch.zeros(16, 16, 1, 1)}, 'another architecture; only "skip" is supported'),
    ({"synthesis.b4.torgb.weight": torch.zeros(1, 16, 1, 1), "synthesis.b4.torgb.bias": torch.zeros(1)},
     "a generator of images of 1 channels; only RGB is supported"),
    ({"synthesis.b8.torgb.bias": None}, "a whole .* nvlabs_ada, found another: synthesis.b8.torgb.bias is missing"),
    ({"synthesis.b64.torgb.bias": None}, "synthesis.b64.torgb.bias is missing"),
    ({"mapping.fc2.bias": None}, "mapping.fc2.bias is missing|mapping.fc3.bias is unknown"),
    ({"mapping.w_avg": None}, "mapping.w_avg is missing"),
    ({"synthesis.b16.conv0.noise_strength": None}, "synthesis.b16.conv0.noise_strength is missing"),
    ({"synthesis.b16.conv0.weight": torch.zeros(16, 16, 5, 5)}, r"weight is \[16, 16, 5, 5\], expected \[16, 16, 3"),
    ({"synthesis.b16.conv1.bias": torch.zeros(13)}, "tensors of another architecture than its config"),
    ({"synthesis.b4.const": torch.zeros(16, 8, 8)}, r"const is \[16, 8, 8\], expected \[1, 16, 4, 4\]"),
    ({"mapping.fc0.weight": torch.zeros(32)}, "truncated or damaged"),
    ({"mapping.fc999999999.bias": torch.zeros(32)}, "mapping.fc999999999.bias is unknown"),
    ({"synthesis.b1073741824.torgb.bias": torch.zeros(3)}, "synthesis.b1073741824.torgb.bias is unknown"),
])  # fmt: skip
def test_states_of_another_generator(changes, message, nvlabs, tmp_path):
    state = {key: t for key, t in (nvlabs.state | changes).items() if t is not None}
    torch.save({"G_ema": state}, tmp_path / "x.pt")
    refuse(tmp_path / "x.pt", message)


@pytest.mark.parametrize("settings, message", [
    ({"c_dim": 10}, "a conditional generator with c_dim 10; only 0 is supported"),
    ({"mapping_kwargs": {"lr_multiplier": 1}}, "a generator with lr_multiplier 1; only 0.01 is supported"),
    ({"synthesis_kwargs": {"block_kwargs": {"activation": "relu"}}}, "a generator with activation 'relu'; only 'lre"),
    ({"synthesis_kwargs": {"architecture": "resnet"}}, "a generator with architecture 'resnet'; only 'skip' is"),
])  # fmt: skip
def test_settings_of_another_nvidia_generator(settings, message, fake, nvlabs, tmp_path):
    module = nvlabs_module(fake, nvlabs.state, settings=settings)
    refuse(write(tmp_path / "x.pkl", {"G_ema": module}), message)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_settings_that_change_nothing(protocol, fake, nvlabs, tmp_path):
    kwargs = {"num_fp16_res": 4, "conv_clamp": 256, "channel_base": 512}
    settings = {"c_dim": 0, "mapping_kwargs": {"num_layers": 4, "lr_multiplier": 0.01}, "synthesis_kwargs": kwargs}
    write(tmp_path / "x.pkl", {"G_ema": nvlabs_module(fake, nvlabs.state, settings=settings)}, protocol)
    assert same(load_generator(tmp_path / "x.pkl"), nvlabs.G)


@pytest.mark.parametrize("settings, changes, message", [
    ({"label_size": 10}, {}, "a conditional generator with label_size 10; only 0 is supported"),
    ({"architecture": "resnet"}, {}, "architecture 'resnet'; only 'skip' is supported"),
    ({"mapping_lrmul": 1.0}, {}, "mapping_lrmul 1.0; only 0.01 is supported"),
    ({"resample_kernel": [1, 2, 1]}, {}, r"resample_kernel \[1, 2, 1\]; only \[1, 3, 3, 1\] is supported"),
    ({}, {"LabelConcat/weight": np.zeros((10, 32), np.float32)}, "a conditional generator"),
    ({}, {"4x4/Conv/StyleMod/weight": np.zeros((32, 32), np.float32)}, "a StyleGAN1 generator"),
    ({}, {"8x8/Skip/weight": np.zeros((1, 1, 16, 16), np.float32)}, 'another architecture; only "skip"'),
    ({}, {"lod": np.float32(2.5)}, "still growing .lod 2.5., expected lod 0"),
    ({}, {"8x8/Conv1/weight": np.zeros((3, 3, 16, 16), ">f4")}, "an array of byte order '>', expected little-endian"),
    ({}, {"8x8/Conv1/weight": np.zeros((3, 3, 16, 8), np.float32)}, r"expected \[16, 16, 3, 3\]"),
])  # fmt: skip
def test_other_tensorflow_networks(settings, changes, message, fake, nvlabs, tmp_path):
    refuse(write(tmp_path / "x.pkl", tf_networks(fake, nvlabs.state, settings=settings, **changes)), message)


def test_settings_of_tensorflow_that_change_nothing(fake, nvlabs, tmp_path):
    settings = {"resample_kernel": (1, 3, 3, 1), "mapping_lrmul": 0.01, "truncation_psi": 0.5, "randomize_noise": False}
    write(tmp_path / "x.pkl", tf_networks(fake, nvlabs.state, settings=settings))
    check_nvlabs(load_generator(tmp_path / "x.pkl"), nvlabs.io)


def test_files_without_a_generator(fake, nvlabs, tmp_path):
    D = fake.Module("Discriminator", modules={"b4": fake.Module("DiscriminatorEpilogue")})
    nets = tf_networks(fake, nvlabs.state)
    layer = fake.Module("SynthesisLayer", buffers={"up_filter": torch.zeros(12)})
    three = fake.Module(
        "Generator", modules={"synthesis": fake.Module("SynthesisNetwork", modules={"L0_36_32": layer})}
    )
    pickles = {
        "D.pkl": (
            {"G": None, "D": D, "G_ema": None},
            "no StyleGAN2 generator in it, found 'D' .a module 'Discriminator'",
        ),
        "3.pkl": ({"G_ema": three}, "found a StyleGAN3 generator"),
        "tfD.pkl": ((None, nets[1], None), "found a discriminator"),
        "oneD.pkl": (nets[1], "found a discriminator"),
        "none.pkl": ((None, None, None), "found nothing"),
        "empty.pkl": ((), "found nothing"),
        "list.pkl": ([1, 2], "found of type list"),
        "dict.pkl": ({"a": 1}, "found 'a' .of type int"),
    }
    data = {name: pickle.dumps(contents) for name, (contents, _) in pickles.items()}
    for name, (_, message) in pickles.items():
        (tmp_path / name).write_bytes(data[name])
        refuse(tmp_path / name, message)
    torches = {
        "D.pt": (
            {"d": {"final_linear.0.weight": torch.zeros(1), "convs.1.skip.1.weight": torch.zeros(1)}},
            "a discriminator",
        ),
        "1.pt": ({"g_running": {"generator.progression.0.conv.weight": torch.zeros(1)}}, "a StyleGAN1 generator"),
        "other.pt": ({"state_dict": {"fc.weight": torch.zeros(1)}, "epoch": 3}, "'epoch' .of type int"),
        "tensor.pt": (torch.zeros(2), "found of type Tensor"),
        "text.pt": ({"g_ema": {"input.input": "text"}}, "no plain tensor but of type str .input.input."),
        "meta.pt": ({"g_ema": {"input.input": torch.empty(3, device="meta")}}, "no plain tensor .*input.input"),
    }
    for name, (contents, message) in torches.items():
        torch.save(contents, tmp_path / name)
        refuse(tmp_path / name, message)


def test_files_without_an_encoder(tmp_path):
    with pytest.raises(
        ValueError, match=r"tiny\.pkl: no encoder of PadInv's authors in it, found 'G_ema' .a module 'Gen"
    ):
        load_encoder(FILES["nvlabs_ada"])
    with pytest.raises(ValueError, match=r"tiny\.pt: no encoder of PadInv's authors in it, found 'g_ema'"):
        load_encoder(FILES["rosinality"])
    contents = torch.load(FILES["padinv_official"], weights_only=True)
    models = contents["models"]
    torch.save({"models": {"encoder": models["encoder"]}}, tmp_path / "E.pth")
    with pytest.raises(
        ValueError, match=r"E\.pth: its encoder needs the w_avg and constant of its generator; no Style"
    ):
        load_encoder(tmp_path / "E.pth")
    refuse(tmp_path / "E.pth", "no StyleGAN2 generator in it, found 'encoder'")
    broken = {key: t for key, t in models["encoder"].items() if "latent_heads.3" not in key}
    torch.save({"models": models | {"encoder": broken}}, tmp_path / "E.pth")
    with pytest.raises(
        ValueError, match=r"E\.pth: not an encoder of PadInv's authors .* 'latent_heads\.3\.convs\.0\.weight'"
    ):
        load_encoder(tmp_path / "E.pth")


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("keep", [0, 1, 3, 10, 100, 1000, 50_000, -1, -100])
def test_truncated_files(format, keep, tmp_path):
    (tmp_path / "x.pkl").write_bytes(FILES[format].read_bytes()[:keep])
    refuse(tmp_path / "x.pkl", "truncated|damaged")


@pytest.mark.parametrize("keep", [64, 1000, 30_000, -1])
def test_truncated_older_torch_files(keep, tmp_path):
    torch.save(
        torch.load(FILES["rosinality"], weights_only=True), tmp_path / "x.pt", _use_new_zipfile_serialization=False
    )
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:keep])
    refuse(tmp_path / "x.pt", "truncated or damaged")


def test_files_of_other_kinds(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    refuse(tmp_path / "x.npz", r"truncated or damaged, or no file of torch\.save")
    (tmp_path / "x.pkl").write_bytes(b"<!DOCTYPE html><html>Quota exceeded</html>")
    refuse(tmp_path / "x.pkl", r"found one that is .* of another format \(42 bytes, beginning with b'<!DOCTYPE ht'\)")
    (tmp_path / "old.pkl").write_bytes(pickle.dumps({"G_ema": None}, protocol=0))
    refuse(tmp_path / "old.pkl", "of another format")


@pytest.mark.parametrize("source", ["official", "nvlabs", "rosinality"])
def test_formats_taken_for_one_another(source, official, nvlabs, rosinality):
    states = {"official": official.state, "nvlabs": nvlabs.state, "rosinality": rosinality.state, "nothing": {}}
    format = {"official": "padinv_official", "nvlabs": "nvlabs_ada", "rosinality": "rosinality"}[source]
    for other, state in states.items():
        if other != source:
            with pytest.raises(
                ValueError, match=f"state: expected a whole StyleGAN2 generator of format {format}, found"
            ):
                generator_from_state(state, format)


def test_codes_are_no_networks(code, tmp_path):
    code.save(tmp_path / "code.safetensors")
    with pytest.raises(ValueError, match="its kind is 'code', expected 'generator'"):
        load_generator(tmp_path / "code.safetensors")
    assert isinstance(Code.load(tmp_path / "code.safetensors"), Code)
