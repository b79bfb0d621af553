"""Files of networks and codes: safetensors with a JSON of the architecture, written at once or not at all.

Reading executes nothing. State dicts of other projects become our networks through the `from_*` functions.
"""

import dataclasses
import errno
import hashlib
import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from padinv.encoder import Encoder, EncoderConfig
from padinv.generator import Generator, GeneratorConfig
from padinv.ops import fir_filter

FORMAT = "padinv"


# ----------------------------------------------------------------------------------------------------------------------
# Tensors


def atomic_write(path, data: bytes) -> None:
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
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a .safetensors file, found one that is truncated, damaged or of another "
                         f"format ({path.stat().st_size} bytes: {error})") from error  # fmt: skip


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


def load_tensors(path, kind: str, device="cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of `save_tensors`: the tensors on the device, and the metadata.

    Raises:
        ValueError: the file is missing, truncated, of another format, or of another kind.
    """
    metadata = read_metadata(path)
    if metadata.get("kind") != kind:
        raise ValueError(f"{path}: its kind is {metadata.get('kind')!r}, expected {kind!r}")
    with open_file(path) as file:
        # Copies: a tensor mapped from the file would change or vanish with it.
        return {key: file.get_tensor(key).to(device, copy=True) for key in file.keys()}, metadata


# ----------------------------------------------------------------------------------------------------------------------
# Networks


def save_network(network: nn.Module, kind: str, path, half: bool, meta: dict) -> None:
    # Vectors and buffers are small, and statistics need float32; only weights are worth halving.
    weights = {name for name, p in network.named_parameters() if p.ndim > 1} if half else ()
    tensors = {}
    for name, t in network.state_dict().items():
        halved = t.half() if name in weights else t
        tensors[name] = halved if halved.isfinite().all() else t
    config = json.dumps(dataclasses.asdict(network.config))
    save_tensors(path, tensors, {"kind": kind, "config": config, "meta": json.dumps(meta)})


def load_network(network_class, config_class, kind: str, path, device) -> nn.Module:
    tensors, metadata = load_tensors(path, kind)
    try:
        network = network_class(config_class(**json.loads(metadata["config"])))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # RuntimeError: sizes that torch refuses
        raise ValueError(f"{path}: its config is not that of a {kind} of this version of padinv ({error})") from error
    return fill(network, tensors, path).to(device)


def fill(network: nn.Module, tensors: dict[str, Tensor], source) -> nn.Module:
    """Load every tensor into the network, frozen and in eval mode; ValueError, naming the source, where one differs."""
    state = network.state_dict()
    wrong = [f"{name} is missing" for name in state.keys() - tensors.keys()]
    wrong += [f"{name} is unknown" for name in tensors.keys() - state.keys()]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, expected {list(t.shape)}"
        for name, t in state.items()
        if name in tensors and tensors[name].shape != t.shape
    ]
    if wrong:
        raise ValueError(f"{source}: tensors of another architecture than its config: {'; '.join(sorted(wrong)[:4])}"
                         + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""))  # fmt: skip
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


def save_generator(G: Generator, path, half: bool = False, **meta) -> None:
    """Write a generator; meta is anything JSON (images seen, hash of the data, …), read by `read_metadata`."""
    save_network(G, "generator", path, half, meta)


def load_generator(path, device="cpu") -> Generator:
    """Read a generator of `save_generator`, in eval mode and frozen.

    Raises:
        ValueError: the file is missing, truncated, a pickle, or not of this architecture.
    """
    return load_network(Generator, GeneratorConfig, "generator", path, device)


def save_encoder(E: Encoder, path, half: bool = True, **meta) -> None:
    """Write an encoder; half stores weights as float16: codes change by under a thousandth."""
    save_network(E, "encoder", path, half, meta)


def load_encoder(path, device="cpu") -> Encoder:
    """Read an encoder of `save_encoder` in float32, in eval mode and frozen. Raises as `load_generator`."""
    return load_network(Encoder, EncoderConfig, "encoder", path, device)


# ----------------------------------------------------------------------------------------------------------------------
# State dicts of other projects


def conv(k: int | str) -> str:
    """Our name of the k-th 3×3 convolution, counted through all resolutions as other projects do."""
    return f"blocks.{(int(k) + 1) // 2}.conv{(int(k) + 1) % 2}"


def build_generator(state: dict[str, Tensor], rules: dict) -> Generator:
    """The generator of a foreign state dict, its architecture inferred from shapes.

    rules: pattern of a whole foreign name -> ours, as a template for `re.Match.expand` or a function of the match.
    """
    tensors = {}
    for key, t in state.items():
        if key.endswith(("filter", ".kernel")):
            if not torch.allclose((t / t.sum()).cpu(), fir_filter(), atol=1e-6):
                raise ValueError(f"state: {key} is not the low-pass filter [1, 3, 3, 1] of this generator")
            continue
        for pattern, name in rules.items():
            if match := re.fullmatch(pattern, key):
                key = name(match) if callable(name) else match.expand(name)
                break
        tensors[key] = t
    try:
        blocks = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
        layers = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("mapping.layers."))
        w_dim, z_dim = len(tensors[f"mapping.layers.{layers - 1}.bias"]), tensors["mapping.layers.0.weight"].shape[1]
        channels = {4 * 2**i: tensors[f"blocks.{i}.conv1.bias"].numel() for i in range(blocks)}
    except (KeyError, ValueError) as error:
        raise ValueError(f"state: not a whole StyleGAN2 generator of this format ({error})") from error
    channel_base = max(r * c for r, c in channels.items())
    G = Generator(GeneratorConfig(4 * 2 ** (blocks - 1), z_dim, w_dim, layers, channel_base, max(channels.values())))
    for name, t in G.state_dict().items():
        if name in tensors and tensors[name].numel() == t.numel():
            tensors[name] = tensors[name].reshape(t.shape)  # formats differ in singleton dimensions
    return fill(G, tensors, "state")


def from_padinv_official(state: dict[str, Tensor]) -> Generator:
    """The generator of PadInv's authors: "generator" or "generator_smooth" of their checkpoint, as plain tensors."""
    return build_generator(state, {
        r"w_avg": r"mapping.w_avg",
        r"mapping\.dense(\d+)\.(\w+)": r"mapping.layers.\1.\2",
        r"synthesis\.early_layer\.const": r"const",
        r"synthesis\.layer(\d+)\.style\.(\w+)": lambda m: f"{conv(m[1])}.affine.{m[2]}",
        r"synthesis\.layer(\d+)\.(\w+)": lambda m: f"{conv(m[1])}.{m[2]}",
        r"synthesis\.output(\d+)\.style\.(\w+)": r"blocks.\1.to_rgb.affine.\2",
        r"synthesis\.output(\d+)\.(\w+)": r"blocks.\1.to_rgb.\2",
    })  # fmt: skip


def from_nvlabs_ada(state: dict[str, Tensor]) -> Generator:
    """The unconditional `G_ema` of NVIDIA's stylegan2-ada-pytorch, as plain tensors."""
    return build_generator(state, {
        r"mapping\.fc(\d+)\.(\w+)": r"mapping.layers.\1.\2",
        r"synthesis\.b4\.const": r"const",
        r"synthesis\.b(\d+)\.(conv[01])\.noise_const": lambda m: f"blocks.{int(m[1]).bit_length() - 3}.{m[2]}.noise",
        r"synthesis\.b(\d+)\.(conv[01])\.(.*)": lambda m: f"blocks.{int(m[1]).bit_length() - 3}.{m[2]}.{m[3]}",
        r"synthesis\.b(\d+)\.torgb\.(.*)": lambda m: f"blocks.{int(m[1]).bit_length() - 3}.to_rgb.{m[2]}",
    })  # fmt: skip


def from_rosinality(state: dict[str, Tensor], w_avg: Tensor) -> Generator:
    """rosinality's stylegan2-pytorch, as plain tensors: the state dict "g_ema" and the [w_dim] "latent_avg"."""
    parts = {
        "conv.weight": "weight", "conv.modulation.weight": "affine.weight", "conv.modulation.bias": "affine.bias",
        "noise.weight": "noise_strength", "activate.bias": "bias", "bias": "bias",
    }  # fmt: skip
    part = f"({'|'.join(map(re.escape, parts))})"
    return build_generator(state | {"mapping.w_avg": w_avg}, {
        r"style\.(\d+)\.(\w+)": lambda m: f"mapping.layers.{int(m[1]) - 1}.{m[2]}",
        r"input\.input": r"const",
        rf"conv1\.{part}": lambda m: f"{conv(0)}.{parts[m[1]]}",
        rf"convs\.(\d+)\.{part}": lambda m: f"{conv(int(m[1]) + 1)}.{parts[m[2]]}",
        rf"to_rgb1\.{part}": lambda m: f"blocks.0.to_rgb.{parts[m[1]]}",
        rf"to_rgbs\.(\d+)\.{part}": lambda m: f"blocks.{int(m[1]) + 1}.to_rgb.{parts[m[2]]}",
        r"noises\.noise_(\d+)": lambda m: f"{conv(m[1])}.noise",
    })  # fmt: skip


def encoder_from_padinv_official(state: dict[str, Tensor], G: Generator) -> Encoder:
    """The "encoder" of PadInv's authors for its generator G, as plain tensors.

    Heads beyond G.num_ws, which the release computes for small generators and throws away, are dropped.
    """
    tensors, heads = {"w_avg": G.w_avg, "const": G.const.detach()}, {}
    names = {
        "input_layer.": "stem.", "backbone_stages.": "stages.", "fpn.lateral_layers.": "laterals.",
        "padding_extractor.": "padding.blocks.", "padding_modulation_heads.": "padding.rings.",
        "res_layer.": "residual.", "shortcut_layer.": "shortcut.", "fc1.": "squeeze.", "fc2.": "excite.",
    }  # fmt: skip
    for key, t in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        squeeze = key.startswith("padding.rings.") and t.ndim == 4
        (heads if key.startswith("latent_heads.") else tensors)[key] = t.flatten(2) if squeeze else t

    def count(pattern: str) -> int:
        return len({m[0] for key in [*tensors, *heads] if (m := re.match(pattern, key))})

    try:
        stages, pyramid = count(r"stages\.\d+"), len(tensors["laterals.0.bias"])
        widths = [len(tensors[f"stages.{i}.0.residual.4.bias"]) for i in range(stages)]
        E = Encoder.for_generator(
            G,
            input_resolution=2 ** (stages + count(r"latent_heads\.0\.convs\.\d+")),
            widths=widths,
            depths=[count(rf"stages\.{i}\.\d+\.") for i in range(stages)],
            strides=[2] * stages,
            se_reduction=widths[-1] // len(tensors[f"stages.{stages - 1}.0.residual.5.squeeze.weight"]),
            pyramid_channels=pyramid,
            head_channels=len(heads["latent_heads.0.convs.0.bias"]),
            padded_resolutions=count(r"padding\.rings\.\d+"),
            padding="outright",
            layout="centre",
            padding_level=1,
            padding_channels=pyramid,
            padding_depth=count(r"padding\.blocks\.\d+"),
        )
        order = iter(range(G.num_ws))  # theirs: one after another from the coarsest level; ours: side by side
        for level in (2, 1, 0):
            mine = [f"latent_heads.{next(order)}" for _ in range(E.config.level_heads[level])]
            for part in ("weight", "bias") if mine else ():
                for i in range(len(E.heads[level].convs)):
                    fused = torch.cat([heads[f"{head}.convs.{2 * i}.{part}"] for head in mine])
                    tensors[f"heads.{level}.convs.{i}.{part}"] = fused
                tensors[f"heads.{level}.{part}"] = torch.stack([heads[f"{head}.linear.{part}"] for head in mine])
    except (KeyError, IndexError) as error:
        raise ValueError(f"state: not an encoder of PadInv's authors for a generator of {G.num_ws} codes: "
                         f"{error} is missing") from error  # fmt: skip
    return fill(E, tensors, "state")
