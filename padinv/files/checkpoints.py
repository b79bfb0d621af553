"""Files of networks: safetensors with a JSON of the architecture.

Networks are also read from, and generators written to, the formats of other projects (`padinv.files.foreign`). Reading
executes nothing.
"""

import dataclasses
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from padinv.files import foreign
from padinv.files.pickles import errors_of, printable, read_file
from padinv.model.encoder import Encoder, EncoderConfig
from padinv.model.generator import Generator, GeneratorConfig
from padinv.model.tensors import atomic_write, map_tensors, read_metadata, save_tensors

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_CONFIG = 20_000  # characters


class Blank(TorchFunctionMode):
    """Within it no initial weights are drawn: a file's take their place, and their memory is never touched.

    Raises ValueError after so many calls.
    """

    def __init__(self, calls: int):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls -= 1
        if self.calls < 0:
            raise ValueError("it has more layers than there are tensors")
        if function in (nn.init.kaiming_uniform_, nn.init.uniform_):
            return kwargs["tensor"]
        return (torch.empty if function is torch.randn else function)(*args, **kwargs or {})


def blank(network_class, config, tensors: dict[str, Tensor]) -> nn.Module:
    """A network of that config, without weights.

    Raises:
        ValueError: sizes or types that make no network, or more layers than these tensors could fill.
    """
    try:
        if getattr(config, "mapping_layers", 0) > len(tensors):  # a list of so many would be made
            raise ValueError("it has more layers than there are tensors")
        with Blank(20 * len(tensors) + 200):
            return network_class(config)
    except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:  # RuntimeError: sizes that torch refuses
        kind = network_class.__name__.lower()
        raise ValueError(f"its config is not that of a {kind} of this version of padinv ({error})") from error


def check(network_class, config, tensors: dict[str, Tensor]) -> None:
    """Whether these are all the tensors of a network of that config; nothing is allocated.

    Raises:
        ValueError: a tensor is missing, unknown, of another size or type, or not finite.
    """
    with torch.device("meta"):
        state = blank(network_class, config, tensors).state_dict()
    wrong = [f"{name} is missing" for name in state.keys() - tensors.keys()]
    wrong += [f"{name} is unknown" for name in tensors.keys() - state.keys()]
    for name in state.keys() & tensors.keys():
        t, expected = tensors[name], state[name]
        if [n for n in t.shape if n != 1] != [n for n in expected.shape if n != 1]:
            wrong.append(f"{name} is {list(t.shape)}, expected {list(expected.shape)}")
        elif t.dtype not in FLOATS if expected.is_floating_point() else t.is_floating_point() or t.is_complex():
            wrong.append(f"{name} is of type {t.dtype}, expected {expected.dtype}")
    if wrong:
        raise ValueError(f"tensors of another architecture than its config: {foreign.some(wrong)}")
    for name, t in tensors.items():
        if t.is_floating_point() and t.numel() and not torch.stack(t.aminmax()).float().isfinite().all():
            raise ValueError(f"damaged: {name} has numbers that are not finite")


def build(network_class, config, tensors: dict[str, Tensor]) -> nn.Module:
    """A network of that config with copies of these tensors in float32, frozen and in eval mode.

    Args:
        tensors: is emptied on the way, to need no more memory than it must.

    Raises:
        ValueError: as `check`.
    """
    check(network_class, config, tensors)
    network = blank(network_class, config, tensors)
    state = network.state_dict()
    while tensors:  # one copy of each, in its place
        name, t = tensors.popitem()
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


def read_network(kind: str, path) -> tuple[object, dict[str, Tensor]]:
    """The config and the tensors, over the mapped file, of the "generator" or "encoder" in a file of any format.

    Raises:
        ValueError: as `load_generator`. Broken structure raises what `errors_of` catches.
    """
    if not is_safetensors(path):
        return (foreign.read_generator if kind == "generator" else foreign.read_encoder)(path)
    tensors, metadata = map_tensors(path, kind)
    try:
        if len(metadata["config"]) > MAX_CONFIG:
            raise ValueError(f"over {MAX_CONFIG} characters")
        fields = json.loads(metadata["config"])
        return (GeneratorConfig if kind == "generator" else EncoderConfig)(**fields), tensors
    except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"its config is not that of a {kind} of this version of padinv ({error})") from error


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
            networks), of rosinality's stylegan2-pytorch (.pt; "g_ema"), or of pSp or e4e (.pt; the decoder). The
            content decides, not the name.
        device: where it goes.

    Raises:
        ValueError: the file is missing, truncated, damaged, asks for code to be run, or has no unconditional StyleGAN2
            generator (skip architecture, RGB) with finite weights; says in a line what was found instead. Memory stays
            within about four times the size of the file.

    Warns:
        UserWarning: the file asks for a setting that is ignored, such as conv_clamp.
    """
    with errors_of(path):
        G = build_generator(*read_network("generator", path))
    # oneDNN convolves channels_last up to a third faster in bfloat16, and no slower in float32
    return G.to(memory_format=torch.channels_last) if torch.device(device).type == "cpu" else G.to(device)


def save_encoder(E: Encoder, path, half: bool = True, **meta) -> None:
    """Write an encoder; half stores weights as float16: codes change by under a thousandth."""
    save_network(E, "encoder", path, half, meta)


def load_encoder(path, device="cpu") -> Encoder:
    """Read an encoder of `save_encoder`, or of PadInv's authors, pSp or e4e with its generator beside it. As
    `load_generator`."""
    with errors_of(path):
        E = build(Encoder, *read_network("encoder", path))
    return E.to(device)


def build_generator(config: GeneratorConfig, tensors: dict[str, Tensor]) -> Generator:
    """`build`; a w_avg that a training checkpoint of rosinality's lacks is estimated, as that project does on use."""
    known = "mapping.w_avg" in tensors
    G = build(Generator, config, tensors if known else tensors | {"mapping.w_avg": torch.zeros(config.w_dim)})
    if not known:
        z = torch.randn(10_000, config.z_dim, generator=torch.Generator().manual_seed(0))
        G.mapping.w_avg.copy_(G.mapping(z)[:, 0].mean(dim=0))
    return G


def generator_from_state(state: dict[str, Tensor], format: str) -> Generator:
    """The generator of a state dict of another project, as `load_generator`.

    Args:
        state: its tensors; rosinality's "g_ema" with "latent_avg", TensorFlow's variables without network names.
        format: one of `padinv.files.foreign.CONST`.
    """
    with errors_of("state"):
        return build_generator(*foreign.generator_tensors(state, format))


def encoder_from_padinv_official(state: dict[str, Tensor], G: Generator, **settings) -> Encoder:
    """The "encoder" of PadInv's authors for its generator G, as plain tensors; it goes where G is.

    Args:
        state: its tensors.
        G: its generator.
        settings: arguments of its constructor, as its file states them.

    Raises:
        ValueError: it is no such encoder, or that of another generator.
    """
    with errors_of("state"):
        config, tensors = foreign.encoder_tensors(state, G.config, G.w_avg, G.const.detach(), settings)
        E = build(Encoder, config, tensors)
    return E.to(G.const.device)


def inspect(path) -> tuple[list[str], bool]:
    """What a file is, in lines: what is in it, its generator, its encoder; each network with whether it can be read
    and, if not, why. And whether one can be. Nothing in the file is executed, and no network is built."""
    lines, readable = [], False
    try:
        with errors_of(path):
            if is_safetensors(path):
                what = f"a file of padinv of kind {read_metadata(path).get('kind')!r}"
            else:
                what = foreign.described(read_file(path))
            lines.append(f"{printable(path, 5000)}: {printable(what)}")
    except ValueError as error:
        return [str(error)], False
    for kind, network in (("generator", Generator), ("encoder", Encoder)):
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            try:
                with errors_of(path):
                    config, tensors = read_network(kind, path)
                    if kind == "generator":
                        tensors.setdefault("mapping.w_avg", torch.zeros(config.w_dim))  # as `build_generator`
                    check(network, config, tensors)
                lines.append(f"{kind}: {summary(config)}; can be read")
                readable = True
            except ValueError as error:
                lines.append(f"{kind}: cannot be read: {str(error).removeprefix(printable(path, 5000) + ': ')}")
        lines += [f"{kind}: {note.message}" for note in notes]
    return lines, readable


def summary(config: GeneratorConfig | EncoderConfig) -> str:
    """In a line."""
    if isinstance(config, GeneratorConfig):
        channels = ", ".join(str(config.channels(r)) for r in config.resolutions)
        return (f"{config.resolution}², channels {channels}; z {config.z_dim}, w {config.w_dim}, mapping of "
                f"{config.mapping_layers} layers, {config.num_ws} codes")  # fmt: skip
    p = [f"{config.padded_resolutions} rings"] if config.padded_resolutions else []
    p += ["constant"] if config.replace_const else []
    p += [f"interior of {config.interior}²"] if config.interior else []
    return (f"{'residual, ' * config.residual}images of {config.input_resolution}², {sum(config.depths)} blocks, "
            f"channels {', '.join(map(str, config.widths))}; {config.num_ws} codes of {config.w_dim}, "
            f"{' and '.join(p) or 'no padding'}")  # fmt: skip


def export_generator(G: Generator, path, format: str) -> None:
    """Write a generator in the format of another project; `load_generator` gives every bit of it back.

    Args:
        G: a generator that the other project's code can hold; in float32 in the file.
        path: parent folders are made.
        format: "padinv_official": both "generator" and "generator_smooth", without an encoder. "rosinality".

    Raises:
        ValueError: another format, or a generator that the other project's code cannot build.
        OSError: as `atomic_write`.
    """
    if format not in foreign.EXPORTS:
        raise ValueError(f"format: expected one of {', '.join(foreign.EXPORTS)}, got {format!r}")
    foreign.check_export(G.config, format)
    atomic_write(path, foreign.exported(G, format))
