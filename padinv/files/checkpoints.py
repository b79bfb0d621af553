"""Files of networks: safetensors with a JSON of the architecture.

Networks are also read from, and generators written to, the formats of other projects (`padinv.files.foreign`). Reading
executes nothing.
"""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from padinv.files import foreign
from padinv.model.encoder import Encoder, EncoderConfig
from padinv.model.generator import Generator, GeneratorConfig
from padinv.model.tensors import atomic_write, map_tensors, save_tensors


class Blank(TorchFunctionMode):
    """Within it no initial weights are drawn: a file's take their place, and their memory is never touched."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (nn.init.kaiming_uniform_, nn.init.uniform_):
            return kwargs["tensor"]
        return (torch.empty if function is torch.randn else function)(*args, **kwargs or {})


def build(network_class, config, tensors: dict[str, Tensor], source) -> nn.Module:
    """A network of that config with copies of these tensors in float32, frozen and in eval mode.

    Raises:
        ValueError: a tensor is missing, unknown or of another size; names the source.
    """
    try:
        with Blank():
            network = network_class(config)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: sizes that torch refuses
        kind = network_class.__name__.lower()
        raise ValueError(f"{source}: its config is not that of a {kind} of this version of padinv ({error})") from error
    state = network.state_dict()
    wrong = [f"{name} is missing" for name in state.keys() - tensors.keys()]
    wrong += [f"{name} is unknown" for name in tensors.keys() - state.keys()]
    for name, t in tensors.items():
        if name in state and [n for n in t.shape if n > 1] != [n for n in state[name].shape if n > 1]:
            wrong.append(f"{name} is {list(t.shape)}, expected {list(state[name].shape)}")
    if wrong:
        raise ValueError(f"{source}: tensors of another architecture than its config: {'; '.join(sorted(wrong)[:4])}"
                         + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""))  # fmt: skip
    for name, t in tensors.items():  # one copy of each, in its place
        dtype = torch.float32 if t.is_floating_point() else t.dtype
        state[name] = t.detach().reshape(state[name].shape).to(dtype, copy=True, memory_format=torch.contiguous_format)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def save_network(network: nn.Module, kind: str, path, half: bool, meta: dict) -> None:
    # Vectors and buffers are small, and statistics need float32; only weights are worth halving.
    weights = {name for name, p in network.named_parameters() if p.ndim > 1} if half else ()
    tensors = {}
    for name, t in network.state_dict().items():
        halved = t.half() if name in weights else t
        tensors[name] = halved if halved.isfinite().all() else t
    config = json.dumps(dataclasses.asdict(network.config))
    save_tensors(path, tensors, {"kind": kind, "config": config, "meta": json.dumps(meta)})


def load_network(network_class, config_class, kind: str, path) -> nn.Module:
    tensors, metadata = map_tensors(path, kind)
    try:
        config = config_class(**json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its config is not that of a {kind} of this version of padinv ({error})") from error
    return build(network_class, config, tensors, path)


def is_safetensors(path) -> bool:
    """By content: a pickle or an archive has another ninth byte."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def save_generator(G: Generator, path, half: bool = False, **meta) -> None:
    """Write a generator; meta is anything JSON (images seen, hash of the data, …), read by `read_metadata`."""
    save_network(G, "generator", path, half, meta)


def load_generator(path, device="cpu") -> Generator:
    """Read a generator in float32, in eval mode and frozen. Nothing in the file is executed.

    Args:
        path: a file of `save_generator`, or of PadInv's authors (.pth; "generator_smooth" where it is there), of
            NVIDIA's stylegan2-ada-pytorch (.pkl; "G_ema") or TensorFlow StyleGAN2 (.pkl; the last of its three
            networks), or of rosinality's stylegan2-pytorch (.pt; "g_ema"). The content decides, not the name.
        device: where it goes.

    Raises:
        ValueError: the file is missing, truncated, damaged, asks for code to be run, or has no unconditional StyleGAN2
            generator (skip architecture, RGB); says what was found instead.
    """
    if is_safetensors(path):
        G = load_network(Generator, GeneratorConfig, "generator", path)
    else:
        G = build_generator(*foreign.read_generator(path), path)
    # oneDNN convolves channels_last up to a third faster in bfloat16, and no slower in float32
    return G.to(memory_format=torch.channels_last) if torch.device(device).type == "cpu" else G.to(device)


def save_encoder(E: Encoder, path, half: bool = True, **meta) -> None:
    """Write an encoder; half stores weights as float16: codes change by under a thousandth."""
    save_network(E, "encoder", path, half, meta)


def load_encoder(path, device="cpu") -> Encoder:
    """Read an encoder of `save_encoder`, or of PadInv's authors with its generator beside it. As `load_generator`."""
    if is_safetensors(path):
        return load_network(Encoder, EncoderConfig, "encoder", path).to(device)
    return build(Encoder, *foreign.read_encoder(path), path).to(device)


def build_generator(config: GeneratorConfig, tensors: dict[str, Tensor], source) -> Generator:
    """`build`; a w_avg that a training checkpoint of rosinality's lacks is estimated, as that project does on use."""
    if "mapping.w_avg" in tensors:
        return build(Generator, config, tensors, source)
    G = build(Generator, config, tensors | {"mapping.w_avg": torch.zeros(config.w_dim)}, source)
    z = torch.randn(10_000, config.z_dim, generator=torch.Generator().manual_seed(0))
    G.mapping.w_avg.copy_(G.mapping(z)[:, 0].mean(dim=0))
    return G


def generator_from_state(state: dict[str, Tensor], format: str) -> Generator:
    """The generator of a state dict of another project, as `load_generator`.

    Args:
        state: its tensors; rosinality's "g_ema" with "latent_avg", TensorFlow's variables without network names.
        format: one of `padinv.files.foreign.CONST`.
    """
    with foreign.errors_of("state"):
        config, tensors = foreign.generator_tensors(state, format)
    return build_generator(config, tensors, "state")


def encoder_from_padinv_official(state: dict[str, Tensor], G: Generator) -> Encoder:
    """The "encoder" of PadInv's authors for its generator G, as plain tensors; it goes where G is.

    Raises:
        ValueError: it is no such encoder, or that of another generator.
    """
    with foreign.errors_of("state"):
        config, tensors = foreign.encoder_tensors(state, G.config, G.w_avg, G.const.detach())
    return build(Encoder, config, tensors, "state").to(G.const.device)


def export_generator(G: Generator, path, format: str) -> None:
    """Write a generator in the format of another project; `load_generator` gives every bit of it back.

    Args:
        G: any generator; in float32 in the file.
        path: parent folders are made.
        format: "padinv_official": both "generator" and "generator_smooth", without an encoder. "rosinality": that
            project's `Generator` takes it where its fixed table of channels allows. "nvlabs_ada": a pickle of plain
            tensors. NVIDIA's own loader refuses it, since it wants modules with their source code; the file says how to
            build one in a line. "stylegan2_tf": (None, None, Gs), whose source is one line that imports NVIDIA's
            `training.networks_stylegan2`, so that their loader needs their code on the path; it was not tried there.

    Raises:
        ValueError: another format.
        OSError: as `atomic_write`.
    """
    if format not in foreign.CONST:
        raise ValueError(f"format: expected one of {', '.join(foreign.CONST)}, got {format!r}")
    atomic_write(path, foreign.exported(G, format))
