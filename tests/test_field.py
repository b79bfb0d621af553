"""Files as the projects of the field write them, and hostile ones: read right, or refused; never silently wrong."""

import argparse
import copy
import json
import pickle
import re
import struct
import subprocess
import sys
import types
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from padinv.__main__ import main
from padinv.files import foreign
from padinv.files.checkpoints import build, load_encoder, load_generator, save_encoder, save_generator
from padinv.model.encoder import Encoder
from padinv.model.generator import Generator, GeneratorConfig
from padinv.model.tensors import load_tensors, save_tensors

FIXTURES = Path(__file__).parent / "fixtures"
OPTS = {"encoder_type": "GradualStyleEncoder", "output_size": 64, "start_from_latent_avg": True, "learn_in_w": False}


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def refuse(load, path, message):
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ") and str(error.value).isprintable() and len(str(error.value)) < 1500


# ----------------------------------------------------------------------------------------------------------------------
# What the authors' runner writes


@pytest.fixture
def runner(official, monkeypatch, tmp_path):
    """Writes a file as the runner does, with changes of the encoder's state and of the arguments of both networks."""

    class EasyDict(dict):
        pass

    class LPIPS(nn.Module):
        pass

    def write(state=None, encoder=(), generator=(), path=tmp_path / "checkpoint.pth"):
        for thing, home in ((EasyDict, "easydict"), (LPIPS, "models.perceptual")):
            thing.__module__, thing.__qualname__ = home, thing.__name__
            module = types.ModuleType(home)
            setattr(module, thing.__name__, thing)
            monkeypatch.setitem(sys.modules, home, module)
        monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
        lpips = LPIPS()
        lpips.net, lpips.kind = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.Conv2d
        state = official.encoder_state if state is None else state
        kwargs = {
            "encoder": EasyDict({
                "model_type": "PadInvEncoder", "resolution": 256, "latent_dim": [32] * 10, "image_channels": 3,
                "num_latents_per_level": [3, 4, 3], "final_res": 4, "start_from_latent_avg": True, "network_depth": 50,
                "inplanes": 8, "use_se": True, "se_reduction": 4, "norm_layer": nn.BatchNorm2d, "fpn_channels": 16,
                "use_padding_space": True, "encode_const_input": True, "only_pad_even": True, "pad_layer_num": 4,
                "depth_padding_extractor": 2, "use_padding_modulation_head": True, **dict(encoder),
            }),
            "generator": EasyDict({
                "model_type": "StyleGAN2GeneratorPadInv", "resolution": 64, "image_channels": 3, "init_res": 4,
                "z_dim": 32, "mapping_layers": 4, "architecture": "skip", "fmaps_base": 512, "conv_clamp": None,
                **dict(generator),
            }),
        }  # fmt: skip
        adam = torch.optim.Adam(lpips.parameters())
        contents = {
            "models": {"encoder": state, "generator": official.state, "generator_smooth": official.state},
            "model_kwargs_init": EasyDict(kwargs), "model_kwargs_train": {"generator": EasyDict(noise_mode="const")},
            "model_kwargs_val": EasyDict(), "model_has_unused_param": {"encoder": False},
            "running_metadata": {"iter": 7, "seen_img": 56}, "optimizers": {"encoder": adam.state_dict()},
            "opt_config": EasyDict(encoder=EasyDict(lr=1e-4, betas=(0.9, 0.999))), "learning_rates": {"encoder": 1e-4},
            "loss": {"weights": {"pix": 1.0}, "models": {"mse": nn.MSELoss(), "lpips": lpips}}, "augment": None,
        }  # fmt: skip
        torch.save(contents, path)
        for home in ("easydict", "models.perceptual", "models"):  # a reader that imports them fails
            monkeypatch.delitem(sys.modules, home)
        return path

    return write


def without(state: dict, *starts: str) -> dict:
    return {name: t for name, t in state.items() if not name.startswith(starts)}


def test_files_of_the_runner(runner, official):
    path = runner()
    assert b"easydict" in path.read_bytes() and b"MSELoss" in path.read_bytes()
    G, E = load_generator(path), load_encoder(path)
    close(G.synthesis(G.mapping(official.io["z"])), official.io["image_from_z"])
    with torch.no_grad():
        close(G(E(official.x)), official.io["image_padded"])


def test_psp_of_the_runner(runner, official):
    state = without(official.encoder_state, "padding_")
    paths = [runner(state, {"use_padding_space": False})]
    torch.save({"models": {"encoder": state, "generator": official.state}}, paths[0].with_name("plain.pth"))
    for path in [*paths, paths[0].with_name("plain.pth")]:
        E = load_encoder(path)
        assert E.padding is None
        with torch.no_grad():
            code = E(official.x)
        assert code.p is None
        close(code.w, official.io["style_latents"])


def test_an_encoder_of_the_runner_without_heads_of_the_padding(runner, official):
    """Their default: the maps of the P branch are the padding. It is as if each head were the identity."""
    state = without(official.encoder_state, "padding_modulation_heads")
    E = load_encoder(runner(state, {"use_padding_modulation_head": False}))
    expected = copy.deepcopy(official.E)
    for head in expected.padding.rings:
        head.weight.copy_(torch.eye(16)[:, :, None])
        head.bias.zero_()
    with torch.no_grad():
        code, expected = E(official.x), expected(official.x)
    assert len(code.p.rings) == 4
    close(code.p.const, expected.p.const)
    for ring, other in zip(code.p.rings, expected.p.rings, strict=True):
        close(ring, other)
    torch.save({"models": {"encoder": state, "generator": official.state}}, path := runner().with_name("plain.pth"))
    refuse(load_encoder, path, "pad_layer_num None; expected a number, as there are no padding_modulation_heads")


def test_an_encoder_of_the_runner_that_keeps_the_constant(runner, official):
    with torch.no_grad():
        code = load_encoder(runner(encoder={"encode_const_input": False}))(official.x)
    assert code.p.const is None
    for ring, expected in zip(code.p.rings, official.p.rings, strict=True):
        close(ring, expected)


def test_an_encoder_of_the_runner_that_does_not_start_from_the_mean(runner, official):
    with torch.no_grad():
        code = load_encoder(runner(encoder={"start_from_latent_avg": False}))(official.x)
    close(code.w, official.io["style_latents"] - official.G.w_avg)


@pytest.mark.parametrize("settings, message", [
    ({"only_pad_even": False}, "an encoder with only_pad_even False; expected True"),
    ({"use_padding_space": False}, "an encoder with use_padding_space False; expected True"),
    ({"use_padding_modulation_head": False}, "an encoder with use_padding_modulation_head False; expected True"),
    ({"pad_layer_num": 5}, "an encoder with pad_layer_num 5; expected 4"),
    ({"resolution": 128}, "an encoder with resolution 128; expected 256"),
    ({"final_res": 8}, "an encoder with final_res 8; only 4 is supported"),
    ({"norm_layer": nn.InstanceNorm2d}, "norm_layer .*InstanceNorm2d.*; only BatchNorm2d is supported"),
    ({"model_type": "RestyleEncoder"}, "model_type RestyleEncoder, expected PadInvEncoder"),
    ({"use_wonder": True}, "settings of its encoder that are not known here: use_wonder"),
])  # fmt: skip
def test_encoders_of_the_runner_with_other_settings(settings, message, runner):
    refuse(load_encoder, runner(encoder=settings), message)


@pytest.mark.parametrize("settings, message", [
    ({"final_tanh": True}, "a generator with final_tanh True; only False is supported"),
    ({"use_wscale": False}, "use_wscale False; only True"),
    ({"demodulate": False}, "demodulate False; only True"),
    ({"mapping_lr_mul": 1.0}, "mapping_lr_mul 1.0; only 0.01"),
    ({"normalize_z": False}, "normalize_z False; only True"),
    ({"filter_kernel": (1, 2, 1)}, r"filter_kernel \[1, 2, 1\]; only \[1, 3, 3, 1\]"),
    ({"kernel": [1, 2, 1]}, r"kernel \[1, 2, 1\]; only \[1, 3, 3, 1\]"),
    ({"use_wonder": True}, "settings of its generator that are not known here: use_wonder"),
    ({"architecture": "resnet"}, "architecture 'resnet'; only 'skip'"),
    ({"label_dim": 10}, "a conditional generator with label_dim 10"),
    ({"model_type": "StyleGANGenerator"}, "model_type StyleGANGenerator, expected StyleGAN2GeneratorPadInv"),
])  # fmt: skip
def test_generators_of_the_runner_with_other_settings(settings, message, runner):
    path = runner(generator=settings)
    refuse(load_generator, path, message)
    refuse(load_encoder, path, message)


@pytest.mark.parametrize("settings, name", [({"conv_clamp": 0.5}, "conv_clamp 0.5"), ({"noise_mode": "none"}, "noise")])
def test_what_is_ignored_is_said(settings, name, runner):
    with pytest.warns(UserWarning, match=f"the file asks for {name}.*, which is ignored"):
        load_generator(runner(generator=settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_generator(runner(generator={"conv_clamp": None, "noise_mode": "const", "normalize_z": True}))


# ----------------------------------------------------------------------------------------------------------------------
# pSp and e4e


def psp_names(state: dict) -> dict:
    """The encoder of PadInv's authors, without P, with the names of pSp's."""
    starts = np.cumsum([0, 3, 4, 14])

    def renamed(name: str) -> str:
        name = re.sub(r"backbone_stages\.(\d)\.(\d+)", lambda m: f"body.{starts[int(m[1])] + int(m[2])}", name)
        name = name.replace("fpn.lateral_layers.0", "latlayer2").replace("fpn.lateral_layers.1", "latlayer1")
        return f"encoder.{name.replace('latent_heads', 'styles')}"

    return {renamed(name): t for name, t in without(state, "padding_").items()}


def psp_file(official, rosinality, **changes) -> dict:
    decoder = {f"decoder.{name}": t for name, t in rosinality.state.items() if name != "latent_avg"}
    # Of the two fixtures the decoder's shapes are the same, so that each may stand beside the other.
    return {
        "state_dict": psp_names(official.encoder_state) | decoder, "opts": dict(OPTS),
        "latent_avg": rosinality.state["latent_avg"].expand(10, -1).clone(), **changes,
    }  # fmt: skip


@pytest.mark.parametrize("wrap", [dict, lambda opts: argparse.Namespace(**opts)])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_psp(wrap, zipped, official, rosinality, tmp_path):
    contents = psp_file(official, rosinality, opts=wrap(OPTS))
    torch.save(contents, tmp_path / "psp.pt", _use_new_zipfile_serialization=zipped)
    G, E = load_generator(tmp_path / "psp.pt"), load_encoder(tmp_path / "psp.pt")
    close(G.synthesis(rosinality.io["wp"]), rosinality.io["image_wp"])
    assert torch.equal(G.w_avg, rosinality.state["latent_avg"]) and E.padding is None
    with torch.no_grad():
        close(E(official.x).w, official.io["style_latents"] - official.G.w_avg + G.w_avg)


def test_a_mean_of_no_size_that_a_file_could_hold_is_refused(official, rosinality, tmp_path):
    """A view of strides 0 takes no bytes in the file, and half a gigabyte once it is reshaped."""
    contents = psp_file(official, rosinality, latent_avg=torch.zeros(4096).as_strided((3500, 600, 64), (1, 0, 1)))
    torch.save(contents, tmp_path / "psp.pt")
    with pytest.raises(ValueError, match=r"latent_avg is \[3500, 600, 64\], expected \[num_ws, w_dim\]"):
        load_generator(tmp_path / "psp.pt")


def test_files_of_e4e(official, rosinality, tmp_path):
    contents = psp_file(official, rosinality, opts=OPTS | {"encoder_type": "Encoder4Editing"}, global_step=3,
                        latent_avg=rosinality.state["latent_avg"])  # fmt: skip
    torch.save(contents, tmp_path / "e4e.pt")
    offsets = official.io["style_latents"] - official.G.w_avg
    offsets[:, 1:] += offsets[:, :1].clone()
    with torch.no_grad():
        close(load_encoder(tmp_path / "e4e.pt")(official.x).w, offsets + rosinality.G.w_avg)
    contents["opts"] = OPTS | {"encoder_type": "Encoder4Editing", "start_from_latent_avg": False}
    torch.save(contents, tmp_path / "e4e.pt")
    with torch.no_grad():
        close(load_encoder(tmp_path / "e4e.pt")(official.x).w, offsets)


@pytest.fixture(scope="module")
def by_rule() -> dict:
    """The state of an encoder of pSp or e4e at full size, each tensor drawn from its name: 1.1 GB."""
    with np.load(FIXTURES / "psp_encoder_1024.npz") as arrays:
        names = [str(name) for name in arrays["names"]]
    state = {}
    for line in names:
        name, shape = line.split(" ", 1)
        shape = json.loads(shape)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
            continue
        if name.endswith("running_var"):
            t = 0.5 + rng.random(shape)
        else:
            t = rng.standard_normal(shape)
            if name.endswith("running_mean"):
                t *= 0.1
            elif len(shape) > 1:
                t *= 1 if "linear" in name else np.sqrt(2 / np.prod(shape[1:]))
                t *= 0.25 if "res_layer" in name else 1
            elif name.endswith("bias"):
                t *= 0.1
            elif name.endswith("weight") and "input_layer.2" not in name and not name.endswith("2.weight"):
                t = 1 + 0.1 * t
            else:
                t = 0.25 + 0.05 * t
        state[name] = torch.from_numpy(t.astype(np.float32))
    return state


@pytest.mark.parametrize("project, kind", [("psp", "GradualStyleEncoder"), ("e4e", "Encoder4Editing")])
def test_encoders_of_psp_and_e4e_at_full_size(project, kind, by_rule):
    """Codes are those of the original modules."""
    with np.load(FIXTURES / f"{project}_encoder_1024.npz") as arrays:
        assert [str(name).split()[0] for name in arrays["names"]] == list(by_rule)
        x = torch.from_numpy(arrays["input_uint8"]).float() / 127.5 - 1
        expected = torch.from_numpy(arrays["codes"])
    state, settings, base_w = foreign.psp_encoder({"opts": {"encoder_type": kind}}, by_rule)
    G = GeneratorConfig(1024, 512, 512)
    E = build(
        Encoder,
        *foreign.encoder_tensors(state, G, torch.zeros(512), torch.zeros(1, 512, 4, 4), settings, base_w),
    )
    with torch.no_grad():
        w = E(x).w
    close(w, expected, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("change, message", [
    (lambda c: c["opts"].update(encoder_type="BackboneEncoderUsingLastLayerIntoW"), "found BackboneEncoder"),
    (lambda c: c["opts"].update(encoder_type=None, output_size=64) or c["opts"].pop("output_size"), "found None"),
    (lambda c: c["opts"].update(learn_in_w=True), "not to learn_in_w"),
    (lambda c: c.update(latent_avg=None), "its encoder starts from latent_avg, which is missing"),
    (lambda c: c.update(latent_avg=torch.randn(10, 32)), "latent_avg differs between the layers"),
    (lambda c: c["state_dict"].update({"encoder.input_layer.0.weight": torch.zeros(8, 1, 3, 3)}), "of 1 channels"),
    (lambda c: c.update(state_dict=without(c["state_dict"], "encoder.")), "found none"),
    (lambda c: c.update(state_dict=without(c["state_dict"], "decoder.")), "needs the w_avg and constant"),
    (lambda c: c["state_dict"].pop("encoder.styles.9.linear.bias"), r"latent_heads\.9\.linear\.bias' is missing"),
    (lambda c: c["state_dict"].update({"encoder.styles.2.convs.8.bias": torch.zeros(32)}), "2.convs.8.bias is unknown"),
    (lambda c: c["opts"].update(n_iters_per_batch=5), "networks of ReStyle, .* not supported"),
    (lambda c: c["state_dict"].update({"encoder.input_layer.0.weight": torch.zeros(8, 6, 3, 3)}), "of ReStyle"),
    (lambda c: c["state_dict"].update({"hypernet.x": torch.zeros(1)}), "networks of HyperStyle, .* not supported"),
    (lambda c: c["state_dict"].update({"residue.x": torch.zeros(1)}), "adds to pSp's encoder and decoder.*residue"),
])  # fmt: skip
def test_other_files_of_their_kind(change, message, official, rosinality, tmp_path):
    contents = psp_file(official, rosinality)
    change(contents)
    torch.save(contents, tmp_path / "x.pt")
    refuse(load_encoder, tmp_path / "x.pt", message)


# ----------------------------------------------------------------------------------------------------------------------
# Other projects, precisions and words


def test_other_projects_are_known_by_name(official, rosinality, tmp_path):
    genforce = {"truncation.w_avg" if name == "w_avg" else name: t for name, t in official.state.items()}
    swagan = rosinality.state | {"iwt.ll": torch.zeros(2, 2), "to_rgbs.0.dwt.ll": torch.zeros(2, 2)}
    lucidrains = {"S.net.0.weight": torch.zeros(1), "G.initial_block": torch.zeros(1, 4, 4, 4),
                  "G.blocks.0.to_style1.weight": torch.zeros(1), "D.blocks.0.net.0.bias": torch.zeros(1)}  # fmt: skip
    contents = {"genforce": {"generator": genforce}, "SWAGAN": {"g_ema": swagan},
                "lucidrains": {"GAN": lucidrains, "version": "1.8.2"}}  # fmt: skip
    for project, file in contents.items():
        torch.save(file, tmp_path / "x.pt")
        refuse(load_generator, tmp_path / "x.pt", f"expected a.* StyleGAN2 generator of .*, found .* {project}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("source", ["official", "nvlabs", "rosinality"])
def test_other_precisions(dtype, source, request, tmp_path):
    network = request.getfixturevalue(source)
    state = {name: t.to(dtype) for name, t in network.state.items()}
    name = {"official": "generator", "nvlabs": "G_ema", "rosinality": "g_ema"}[source]
    extra = {"latent_avg": state.pop("latent_avg")} if source == "rosinality" else {}
    torch.save({name: state} | extra, tmp_path / "x.pt")
    G = load_generator(tmp_path / "x.pt")
    for name, t in G.state_dict().items():
        assert torch.equal(t, network.G.state_dict()[name].to(dtype).float())


def test_a_half_encoder(official, tmp_path):
    models = {"encoder": official.encoder_state, "generator": official.state}
    halves = {name: {k: t.half() if t.is_floating_point() else t for k, t in s.items()} for name, s in models.items()}
    torch.save({"models": halves}, tmp_path / "x.pt")
    E = load_encoder(tmp_path / "x.pt")
    for name, t in E.state_dict().items():
        expected = official.E.state_dict()[name]
        assert torch.equal(t, expected.half().float() if t.is_floating_point() else expected)


@pytest.mark.parametrize("change, message", [
    (lambda t: t > 0, "weight is of type torch.bool, expected torch.float32"),
    (lambda t: t.long(), "weight is of type torch.int64, expected torch.float32"),
    (lambda t: t.to(torch.complex64), "weight is of type torch.complex64, expected torch.float32"),
    (lambda t: t.double() * 1e300, "weight has numbers that are not finite"),
    (lambda t: t * float("nan"), "weight has numbers that are not finite"),
    (lambda t: t.where(t != t.flatten()[0], float("-inf")), "weight has numbers that are not finite"),
    (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "no plain tensor but of type .*_rebuild_qtensor"),
    (lambda t: t.to_sparse(), "its pickle asks for torch.serialization._get_layout"),
])  # fmt: skip
def test_weights_that_are_no_finite_numbers(change, message, rosinality, tiny, tmp_path):
    state = rosinality.state | {"convs.0.conv.weight": change(rosinality.state["convs.0.conv.weight"])}
    torch.save({"g_ema": state}, tmp_path / "x.pt")
    refuse(load_generator, tmp_path / "x.pt", message)
    save_generator(tiny, tmp_path / "x.safetensors")
    tensors, metadata = load_tensors(tmp_path / "x.safetensors", "generator")
    name = "blocks.0.conv1.weight"
    if "weight" in message:
        save_tensors(tmp_path / "x.safetensors", tensors | {name: change(tensors[name])}, metadata)
        refuse(load_generator, tmp_path / "x.safetensors", message)


def test_generators_that_differ_in_what_shapes_show(official, rosinality, tmp_path):
    hidden = official.state | {"mapping.dense0.weight": torch.zeros(20, 32), "mapping.dense0.bias": torch.zeros(20),
                               "mapping.dense1.weight": torch.zeros(32, 20)}  # fmt: skip
    grey = {
        name: t[..., :1, :, :] if re.match(r"to_rgb\w*(\.\d)?\.bias", name) else t
        for name, t in rosinality.state.items()
    }
    old = without(rosinality.state, "noises.")
    for state, message in (
        (hidden, r"a mapping with layers of \[20, 32\] numbers; only the 32 of w are supported"),
        (grey, "a generator of images of 1 channels; only RGB is supported"),
        (old, "a generator of rosinality's project as of 2019"),
    ):
        torch.save({"g_ema": state}, tmp_path / "x.pt")
        refuse(load_generator, tmp_path / "x.pt", message)


def test_numbers_that_changed_on_the_way(rosinality, tmp_path):
    torch.save({"g_ema": rosinality.state}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data[largest.header_offset + largest.file_size // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    refuse(load_generator, tmp_path / "x.pt", "damaged: the numbers data/.* do not have the checksum beside them")


# ----------------------------------------------------------------------------------------------------------------------
# python -m padinv inspect


def test_inspect(runner, tiny, official, rosinality, tmp_path, capsys):
    def inspect(path) -> tuple[int, str]:
        return main(["inspect", str(path)]), capsys.readouterr().out

    status, text = inspect(runner(generator={"conv_clamp": 256}))
    assert status == 0 and "checkpoint.pth: 'encoder' " in text
    assert (
        "generator: 64², channels 16, 16, 16, 16, 8; z 32, w 32, mapping of 4 layers, 10 codes; can be read\n" in text
    )
    assert "generator: the file asks for conv_clamp 256, which is ignored" in text
    assert "encoder: images of 256², 24 blocks, channels 8, 8, 16, 16; 10 codes of 32, 4 rings and constant; c" in text
    torch.save(psp_file(official, rosinality), tmp_path / "psp.pt")
    status, text = inspect(tmp_path / "psp.pt")
    assert status == 0 and "10 codes of 32, no padding; can be read" in text
    save_generator(tiny, tmp_path / "G.safetensors")
    status, text = inspect(tmp_path / "G.safetensors")
    assert status == 0 and "a file of padinv of kind 'generator'\ngenerator: 32², " in text
    assert "encoder: cannot be read: its kind is 'generator', expected 'encoder'" in text
    save_encoder(Encoder.for_generator(tiny, interior=8, widths=(8, 8, 8, 8)), tmp_path / "E.safetensors")
    status, text = inspect(tmp_path / "E.safetensors")
    assert status == 0 and "4 rings and constant and interior of 8²; can be read" in text
    status, text = inspect(runner(generator={"final_tanh": True}))
    assert status == 1 and text.count("cannot be read") == 2 and "final_tanh True" in text
    torch.save({"g_ema": without(rosinality.state, "noises.")}, tmp_path / "old.pt")
    status, text = inspect(tmp_path / "old.pt")
    assert status == 1 and "'g_ema' (a generator of format rosinality)" in text and "as of 2019" in text
    (tmp_path / "text").write_bytes(b"hello")
    assert inspect(tmp_path / "text")[0] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Hostile files: memory of about four times the file, and seconds

CHILD = """
import json, os, resource, sys, time, warnings
from pathlib import Path
from padinv.files.checkpoints import inspect, load_encoder, load_generator
warnings.simplefilter("ignore")
folder, room = Path(sys.argv[1]), int(sys.argv[2])
page = resource.getpagesize()
for path in sorted(folder.iterdir()):
    size, said, start = path.stat().st_size, [], time.process_time()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * page
    resource.setrlimit(resource.RLIMIT_AS, (used + room + 4 * size, resource.RLIM_INFINITY))
    for door in (load_generator, load_encoder, inspect):
        try:
            door(path)
            said.append(None)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    print(json.dumps({"name": path.name, "said": said, "seconds": time.process_time() - start}))
"""


def put_to_the_doors(folder: Path, room: int) -> dict[str, dict]:
    """What each file of a folder gives at each door, in a process with memory for it of room + 4 times its size."""
    command = [sys.executable, "-c", CHILD, str(folder), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    for name, line in found.items():
        for said in line["said"]:
            assert said is None or said.startswith(f"ValueError: {folder / name}: "), said[:500]
            assert said is None or said.isprintable() and len(said) < 1500
    return found


class Reduced:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function, args):
        self.parts = function, args

    def __reduce__(self):
        return self.parts


linux = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")


def text(data: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(data)) + data


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def config_header(config: str, kind: str = "generator") -> bytes:
    metadata = {"format": "padinv", "kind": kind, "config": config, "meta": "{}"}
    tensors = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(200)}
    return safetensors(json.dumps({"__metadata__": metadata} | tensors).encode(), bytes(800))


def many_tensors(n: int) -> bytes:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {"__metadata__": {"format": "padinv", "kind": "generator", "config": "{}"}}
    return safetensors(json.dumps(header | {f"mapping.layers.{i}.bias": entry for i in range(n)}).encode())


ENCODE = b"c_codecs\nencode\n"
HOSTILE = {
    "text-to-bytes": b"\x80\x02" + b"](" + text(b"a" * 10_000_000) + b"q\x00" + (
        ENCODE + b"h\x00" + text(b"latin1") + b"\x86R") * 3000 + b"e.",
    "sets": b"\x80\x02](" + b"K\x01" * 25_000 + b"eq\x00](" + b"cbuiltins\nset\nh\x00\x85R" * 5_000 + b"e.",
    "bytearray": b"\x80\x04cbuiltins\nbytearray\n\x8a\x05" + (8_200_000_000).to_bytes(5, "little") + b"\x85R.",
    "names": b"\x80\x04" + text(b"a" * 5_000_000) + b"\x94" + b"h\x00h\x00\x93" * 5_000 + b".",
    "dictionaries": b"\x80\x04" + b"}" * 10_000_000 + b".",
    "tuples": b"\x80\x04" + b")\x85" * 5_000_000 + b".",
    "emoji": b"\x80\x04" + text("😀".encode() + b"a" * 5_000_000) + b".",
    "layers": config_header('{"mapping_layers": 2000000}'),
    "width": config_header('{"w_dim": 100000, "z_dim": 100000}'),
    "codes": config_header('{"num_ws": 1000000000}', "encoder"),
    "blocks": config_header('{"depths": [1000000000, 1, 1, 1]}', "encoder"),
    "stride": config_header('{"strides": [0, 2, 2, 2]}', "encoder"),
    "resolution": config_header(f'{{"resolution": {2**5000}}}'),
    "nested": config_header("[" * 9_000),
    "deeply-nested": config_header("[" * 400_000),
    "nested-header": safetensors(b'{"a":' + b"[" * 1_000_000),
    "many-tensors": many_tensors(200_000),
    "named": config_header('{"' + "\\u001b[31m" * 100 + '": 1}'),
}  # fmt: skip


@linux
def test_hostile_files_take_no_more_than_their_size(tiny, rosinality, nvlabs, tmp_path):
    for name, data in HOSTILE.items():
        (tmp_path / name).write_bytes(data)
    with open(tmp_path / "sparse", "wb") as file:  # bytes of almost 2 GB, then an end
        file.write(b"\x80\x04\x8e" + struct.pack("<Q", 2_000_000_000 - 12))
        file.truncate(2_000_000_000)
    with open(tmp_path / "sparse-text", "wb") as file:
        file.write(b"\x80\x04\x8d" + struct.pack("<Q", 1_000_000_000 - 12))
        file.truncate(1_000_000_000)
    torch.save({"g_ema": rosinality.state | {"a" * 20_000_000: torch.zeros(1)}}, tmp_path / "long-name")
    torch.save({"g_ema": rosinality.state | {"\x1b[2J\n\u202e": torch.zeros(1)}}, tmp_path / "control-codes")
    torch.save({"g_ema": Reduced(bytearray, (8_200_000_000,))}, tmp_path / "bytearray-of-torch")
    settings = {"z_dim": 32}
    for _ in range(60):  # 2⁶⁰ dictionaries, were each followed
        settings = {"a": settings, "b": settings}
    state = {"init_kwargs": settings, "state_dict": {"synthesis.b4.const": 1.0}}
    (tmp_path / "settings").write_bytes(pickle.dumps({"G_ema": state}))
    with zipfile.ZipFile(tmp_path / "entries", "w") as archive:
        for i in range(20_000):
            archive.writestr(f"a/{i}", b"")
    found = put_to_the_doors(tmp_path, 200_000_000)
    assert found.keys() == {path.name for path in tmp_path.iterdir()}
    for name, line in found.items():
        assert line["said"][0] and line["said"][1], name
        assert line["seconds"] < 20, name
    for name in ("layers", "resolution", "nested", "deeply-nested"):
        assert "its config is not that of a generator" in found[name]["said"][0], name
    assert "asks for builtins.bytearray, which no network needs" in found["bytearray"]["said"][0]
    assert r"\x1b[2J\n\u202e is unknown" in found["control-codes"]["said"][0]


@linux
def test_mutated_files(runner, tiny, official, rosinality, tmp_path):
    """500 of them: each loads, or is refused with the name of the file, in bounded memory and time."""
    (folder := tmp_path / "mutated").mkdir()
    G = Generator(GeneratorConfig(8, 4, 4, 2, 32, 4))
    save_generator(G, tmp_path / "G.safetensors")
    small = {"widths": (4, 4, 4), "depths": (1, 1, 1), "strides": (2, 2, 2), "pyramid_channels": 4, "head_channels": 4}
    E = Encoder.for_generator(G, **small, input_resolution=32, padding_channels=4, padding_depth=1, se_reduction=2)
    save_encoder(E, tmp_path / "E.safetensors")
    states = {format: foreign_state(G, format) for format in foreign.EXPORTS}
    torch.save({"g_ema": states["rosinality"]}, tmp_path / "rosinality.pt")
    torch.save({"g_ema": states["rosinality"]}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    runner()
    torch.save(psp_file(official, rosinality), tmp_path / "psp.pt")
    (tmp_path / "nvlabs.pkl").write_bytes((FIXTURES / "nvlabs_ada_tiny.pkl").read_bytes())
    seeds = sorted(path for path in tmp_path.iterdir() if path.is_file())
    assert len(seeds) == 7
    rng = np.random.default_rng(0)
    for i in range(500):
        data = bytearray(seeds[i % len(seeds)].read_bytes())
        for _ in range(rng.integers(1, 5)):
            # Structure is dense at both ends, and numbers fill the middle.
            at = int(rng.choice([rng.integers(min(4000, len(data))), rng.integers(len(data)), -rng.integers(1, 2000)]))
            match rng.integers(6):
                case 0 | 1:
                    data[at] = rng.integers(256)
                case 2:
                    data[at] ^= 1 << rng.integers(8)
                case 3:
                    data[at:at] = rng.bytes(rng.integers(1, 9))
                case 4:
                    del data[at : at + int(rng.integers(1, 100))]
                case 5:
                    data[at : at + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff"])
        (folder / f"{i:03d}").write_bytes(data)
    found = put_to_the_doors(folder, 300_000_000)
    assert len(found) == 500 and max(line["seconds"] for line in found.values()) < 10
    refused = sum(line["said"][0] is not None for line in found.values())
    assert 100 < refused < 500


def foreign_state(G, format) -> dict:
    state = {foreign.their_name(name, format): t for name, t in G.state_dict().items()}
    return {
        k: foreign.their_layout(t, name, format) for (k, t), name in zip(state.items(), G.state_dict(), strict=True)
    }
