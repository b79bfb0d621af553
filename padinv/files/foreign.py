"""Generators of other projects: where they are in files, their names and layouts, and ours written as theirs.

Formats:
    padinv_official  PadInv's authors: a torch file of {"models": {"generator", "generator_smooth", "encoder"}}.
    nvlabs_ada  NVIDIA's stylegan2-ada-pytorch: a pickle of {"G", "D", "G_ema"}, modules with their source.
    rosinality  stylegan2-pytorch: a torch file of {"g_ema", "latent_avg"}.
    stylegan2_tf  NVIDIA's StyleGAN2 for TensorFlow: a pickle of three networks (G, D, Gs).

Settings for half precision (conv_clamp and the like) are ignored: they matter to activations beyond 256 only.
"""

import io
import math
import pickle
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from padinv.files.pickles import NETWORK, PERSISTENT, Record, errors_of, read_file, tensor
from padinv.model.encoder import EncoderConfig
from padinv.model.generator import Generator, GeneratorConfig
from padinv.ops import fir_filter

CONST = {  # the learned input, by which a state dict shows its format
    "padinv_official": "synthesis.early_layer.const",
    "nvlabs_ada": "synthesis.b4.const",
    "rosinality": "input.input",
    "stylegan2_tf": "4x4/Const/const",
}
W_AVG = {
    "padinv_official": "w_avg",
    "nvlabs_ada": "mapping.w_avg",
    "rosinality": "latent_avg",
    "stylegan2_tf": "dlatent_avg",
}
SIGNS = {  # what names of tensors give away
    r"\.epilogue|^b4\.(fc|out)\.|final_(conv|linear)\.|/FromRGB|fromrgb|^Output/": "a discriminator",
    r"^mapping\.embed|Label(Concat|Embed)": "a conditional generator; only unconditional ones are supported",
    r"^synthesis\.(input\.|L\d+_\d+_\d+\.)": "a StyleGAN3 generator",
    r"StyleMod|progression\.": "a StyleGAN1 generator",
    r"\.skip\.|/Skip/|ToRGB_lod": 'a generator of another architecture; only "skip" is supported',
}
SETTINGS = {  # of NVIDIA's constructors, where shapes do not show them: ours
    "lr_multiplier": 0.01, "mapping_lrmul": 0.01, "normalize_latents": True, "activation": "lrelu", "act": "lrelu",
    "nonlinearity": "lrelu", "mapping_nonlinearity": "lrelu", "architecture": "skip", "resample_kernel": [1, 3, 3, 1],
    "resample_filter": [1, 3, 3, 1], "c_dim": 0, "label_size": 0,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Networks in files


def read_generator(path) -> tuple[GeneratorConfig, dict[str, Tensor]]:
    """The generator in a file of any format, as `generator_tensors`.

    Raises:
        ValueError: as `read_file`, `generator_state` and `generator_tensors`; names the file.
    """
    with errors_of(path):
        state, format = generator_state(read_file(path))
        check_sizes(state, path)
        return generator_tensors(state, format)


def read_encoder(path) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """The encoder in a file of PadInv's authors, as `encoder_tensors`, for the generator beside it.

    Raises:
        ValueError: as `read_generator`; there is no encoder, or no generator beside it.
    """
    with errors_of(path):
        contents = read_file(path)
        nets = contents.get("models") if isinstance(contents, dict) else None
        if not isinstance(nets, dict) or not isinstance(nets.get("encoder"), dict):
            raise ValueError(f"no encoder of PadInv's authors in it, found {described(contents)}")
        try:
            state, format = generator_state(contents)
        except ValueError as error:
            raise ValueError(f"its encoder needs the w_avg and constant of its generator; {error}") from error
        check_sizes(state | nets["encoder"], path)
        config, tensors = generator_tensors(state, format)
        return encoder_tensors(nets["encoder"], config, tensors["mapping.w_avg"], tensors["const"])


def generator_state(contents: object) -> tuple[dict[str, Tensor], str]:
    """The state dict of the generator in what a file holds, and its format; of several, the average over training.

    Raises:
        ValueError: there is no StyleGAN2 generator; says what was found instead.
    """
    found = contents
    if isinstance(contents, tuple) and all(x is None or is_record(x, NETWORK) for x in contents):
        found = contents[-1]  # of (G, D, Gs)
    elif isinstance(contents, dict):
        nets = contents["models"] if isinstance(contents.get("models"), dict) else contents
        wanted = [nets.get(name) for name in ("generator_smooth", "generator", "G_ema", "g_ema")]
        found = next((x for x in wanted if isinstance(x, dict | Record)), contents)

    state = found if isinstance(found, dict) else {}
    if is_record(found, PERSISTENT):
        state = nvlabs_state(found)
    elif is_record(found, NETWORK):
        state = tf_state(found)
    elif {"init_kwargs", "state_dict"} <= state.keys():  # as `exported` writes nvlabs_ada
        check_settings(state["init_kwargs"])
        state = {name: tensor(x) for name, x in state["state_dict"].items()}
    elif isinstance(contents, dict) and found is contents.get("g_ema") and "latent_avg" in contents:
        state = state | {"latent_avg": contents["latent_avg"]}

    for format, const in CONST.items():
        if const in state:
            return state, format
    raise ValueError(f"no StyleGAN2 generator in it, found {sign(state) or described(contents)}")


def is_record(x: object, name: str) -> bool:
    return isinstance(x, Record) and x.name == name


def nvlabs_state(G: Record) -> dict[str, Tensor]:
    """The state dict of a module that NVIDIA's loader would build by executing the source beside it."""
    fields = G.args[0]["state"]
    check_settings({"c_dim": fields.get("c_dim", 0)} | fields.get("_init_kwargs", {}))
    state, queue, seen = {}, [("", G)], set()
    while queue:
        prefix, module = queue.pop()
        if id(module) in seen:
            raise ValueError(f"damaged: the module {prefix[:100]} is there twice")
        seen.add(id(module))
        fields = module.args[0]["state"]
        for name, x in (fields["_parameters"] | fields["_buffers"]).items():
            if x is not None and name not in fields.get("_non_persistent_buffers_set", ()):
                state[prefix + name] = tensor(x)
        queue += [(f"{prefix}{name}.", child) for name, child in fields["_modules"].items()]
    return state


def tf_state(G: Record) -> dict[str, Tensor]:
    """The variables of a TensorFlow network and of its components, without the names of these."""
    state = {}
    for network in (G, *G.state.get("components", {}).values()):
        check_settings(network.state["static_kwargs"])
        for name, x in dict(network.state["variables"]).items():
            state[re.sub(r"^(Gs?|(G_)?(main|mapping|synthesis)\w*)/", "", name)] = tensor(x)
    if (lod := state.pop("lod", torch.zeros(()))) != 0:
        raise ValueError(f"a generator that was still growing (lod {lod:g}), expected lod 0")
    return state


def check_settings(settings: dict) -> None:
    """ValueError where a constructor's arguments ask for what our generator does not do."""
    for name, value in settings.items():
        if isinstance(value, dict):
            check_settings(value)
        elif name in SETTINGS and (list(value) if isinstance(value, tuple) else value) != SETTINGS[name]:
            kind = "a conditional generator" if SETTINGS[name] == 0 else "a generator"
            raise ValueError(f"{kind} with {name} {value!r}; only {SETTINGS[name]!r} is supported")


def check_sizes(state: dict[str, Tensor], path) -> None:
    """ValueError unless these are plain tensors, together no larger than the file: views can claim any shape."""
    for name, t in state.items():
        if not isinstance(t, Tensor) or t.layout != torch.strided or t.device.type != "cpu":
            raise ValueError(f"{name} is no plain tensor but of type {type(t).__name__}")
    claimed, size = sum(t.numel() * t.element_size() for t in state.values()), Path(path).stat().st_size
    if claimed > size:
        raise ValueError(f"damaged: its tensors claim {claimed} bytes, the file has {size}")


def sign(state: dict) -> str | None:
    """What the names in a state dict that is not ours give away."""
    return next((what for pattern, what in SIGNS.items() if any(re.search(pattern, str(k)) for k in state)), None)


def described(contents: object) -> str:
    """The parts of a file in words, for errors."""

    def kind(x) -> str:
        if is_record(x, PERSISTENT):
            return f"a module {x.args[0].get('class_name')!r}"
        if is_record(x, NETWORK):
            return sign(dict(x.state["variables"])) or f"a network {x.state.get('name')!r}"
        return isinstance(x, dict) and sign(x) or f"of type {type(x).__name__}"

    if isinstance(contents, dict):
        nets = contents["models"] if isinstance(contents.get("models"), dict) else contents
        parts = [f"{name!r} ({kind(x)})" for name, x in nets.items() if x is not None]
    else:
        parts = [kind(x) for x in (contents if isinstance(contents, tuple) else [contents]) if x is not None]
    more = f" and {len(parts) - 6} more" if len(parts) > 6 else ""
    return ", ".join(part[:80] for part in parts[:6]) + more or "nothing"


# ----------------------------------------------------------------------------------------------------------------------
# Names and layouts


def our_names(blocks: int, layers: int) -> list[str]:
    """The state dict of a `Generator` of so many resolutions and layers of the mapping."""
    names = ["mapping.w_avg", "const"]
    names += [f"mapping.layers.{i}.{part}" for i in range(layers) for part in ("weight", "bias")]
    for i in range(blocks):
        for layer in ("conv0", "conv1", "to_rgb")[i == 0 :]:
            parts = ["weight", "bias", "affine.weight", "affine.bias"]
            parts += ["noise_strength", "noise"] if layer != "to_rgb" else []
            names += [f"blocks.{i}.{layer}.{part}" for part in parts]
    return names


def their_name(name: str, format: str) -> str:
    """The name in a format of the tensor that has this name in ours."""
    if name in ("mapping.w_avg", "const"):
        return (W_AVG if name == "mapping.w_avg" else CONST)[format]
    i, layer, part = re.fullmatch(r"(?:mapping\.layers|blocks)\.(\d+)\.(conv0|conv1|to_rgb|)\.?(.+)", name).groups()
    i = int(i)
    r, k = 4 << i, 2 * i + (layer == "conv1") - 1  # resolution; number of 3×3 convolutions before this one
    match format:
        case "padinv_official":
            if not layer:
                return f"mapping.dense{i}.{part}"
            layer = f"output{i}" if layer == "to_rgb" else f"layer{k}"
            return f"synthesis.{layer}.{part.replace('affine', 'style')}"
        case "nvlabs_ada":
            if not layer:
                return f"mapping.fc{i}.{part}"
            return f"synthesis.b{r}.{layer.replace('_', '')}.{'noise_const' if part == 'noise' else part}"
        case "rosinality":
            if not layer:
                return f"style.{i + 1}.{part}"
            if part == "noise":
                return f"noises.noise_{k}"
            part = {"weight": "conv.weight", "noise_strength": "noise.weight"}.get(part, part)
            part = part.replace("affine", "conv.modulation")
            if layer == "to_rgb":
                return f"to_rgbs.{i - 1}.{part}" if i else f"to_rgb1.{part}"
            part = "activate.bias" if part == "bias" else part
            return f"convs.{k - 1}.{part}" if k else f"conv1.{part}"
        case "stylegan2_tf":
            if not layer:
                return f"Dense{i}/{part}"
            if part == "noise":
                return f"noise{k}"
            layer = {"conv0": "Conv0_up", "conv1": "Conv1" if i else "Conv", "to_rgb": "ToRGB"}[layer]
            return f"{r}x{r}/{layer}/{part.replace('affine.', 'mod_')}"


def our_layout(t: Tensor, name: str, format: str) -> Tensor:
    """Their tensor as ours, but for dimensions of size 1.

    TensorFlow keeps kernels as [k, k, C_in, C_out] and dense weights as [in, out], and adds 1 to the bias of a style
    where it is used. Its up-sampling convolution is up-sampling, then a convolution; ours is a transposed convolution,
    which does both when the kernel is turned by 180°.
    """
    if format != "stylegan2_tf" or name == "const" or name.endswith(".noise"):
        return t
    if t.ndim == 4:
        t = t.permute(3, 2, 0, 1)  # [C_out, C_in, k, k]
        return t.flip(2, 3) if ".conv0." in name else t
    return t.double() + 1 if name.endswith("affine.bias") else t.t()


def their_layout(t: Tensor, name: str, format: str) -> Tensor:
    """The inverse of `our_layout`, dimensions of size 1 included."""
    if name.endswith(".noise"):
        return t if format == "nvlabs_ada" else t[None, None]  # [1, 1, r, r]
    if name == "const":
        return t[0] if format == "nvlabs_ada" else t  # [C, 4, 4]
    if format == "rosinality":
        if t.ndim == 4 or name.endswith("noise_strength"):
            return t[None]  # [1, C_out, C_in, k, k] or [1]
        return t[None, :, None, None] if name.endswith("to_rgb.bias") else t
    if format == "stylegan2_tf":
        if t.ndim == 4:
            return (t.flip(2, 3) if ".conv0." in name else t).permute(2, 3, 1, 0)  # [k, k, C_in, C_out]
        return t.double() - 1 if name.endswith("affine.bias") else t.t()  # 1 is taken off without rounding
    return t


def filters(blocks: int, format: str) -> dict[str, Tensor]:
    """The low-pass filters that a format keeps beside the weights."""
    match format:
        case "padinv_official":
            names = ["synthesis.filter"] + [f"synthesis.layer{2 * i - 1}.filter" for i in range(1, blocks)]
        case "nvlabs_ada":
            layers = [f"b{4 << i}.{layer}" for i in range(blocks) for layer in ("", "conv0.", "conv1.")]
            names = [f"synthesis.{layer}resample_filter" for layer in layers if layer != "b4.conv0."]
        case "rosinality":
            names = [f"convs.{2 * i}.conv.blur.kernel" for i in range(blocks - 1)]
            names += [f"to_rgbs.{i}.upsample.kernel" for i in range(blocks - 1)]
        case "stylegan2_tf":
            names = []
    gain = 4 if format == "rosinality" else 1  # that of up-sampling
    return {name: gain * fir_filter() for name in names}


def generator_tensors(state: dict[str, Tensor], format: str) -> tuple[GeneratorConfig, dict[str, Tensor]]:
    """A generator's state dict of another project as the architecture, read off the shapes, and tensors in our names.

    The tensors are views of theirs. Only rosinality's may lack the mean of w, and then "mapping.w_avg" is not there.

    Raises:
        ValueError: tensors are missing, unknown or of other sizes; says what kind of network it is where names tell.
    """
    biases = [[their_name(f"blocks.{i}.{layer}.bias", format) for layer in ("conv1", "to_rgb")] for i in range(10)]
    blocks = 1 + max((i for i, names in enumerate(biases) if not state.keys().isdisjoint(names)), default=-1)
    layers = 0
    while their_name(f"mapping.layers.{layers}.bias", format) in state:
        layers += 1
    names = {their_name(name, format): name for name in our_names(max(blocks, 2), max(layers, 1))}
    optional = {W_AVG[format]} if format == "rosinality" else set()
    low_pass = {name for name in state if str(name).endswith(("filter", ".kernel"))}
    wrong = [f"{name} is missing" for name in names.keys() - state.keys() - optional]
    wrong += [f"{name} is unknown" for name in state.keys() - names.keys() - low_pass]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"expected a whole StyleGAN2 generator of format {format}, found {sign(state) or 'another'}: "
                         f"{'; '.join(sorted(wrong)[:4])}{more}")  # fmt: skip
    for name in low_pass:
        t = state[name].cpu()
        if t.shape != (4, 4) or not torch.allclose(t / t.sum(), fir_filter(), atol=1e-6):
            raise ValueError(f"{name} is not the low-pass filter [1, 3, 3, 1] of this generator")
    tensors = {ours: our_layout(state[name], ours, format) for name, ours in names.items() if name in state}
    w_dim, z_dim = tensors[f"mapping.layers.{layers - 1}.bias"].numel(), tensors["mapping.layers.0.weight"].shape[1]
    channels = {4 << i: tensors[f"blocks.{i}.conv1.bias"].numel() for i in range(blocks)}
    base = max(r * c for r, c in channels.items())
    return GeneratorConfig(4 << blocks - 1, z_dim, w_dim, layers, base, max(channels.values())), tensors


def encoder_tensors(
    state: dict[str, Tensor], G: GeneratorConfig, w_avg: Tensor, const: Tensor
) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """The "encoder" of PadInv's authors as the architecture, read off the shapes, and tensors in our names.

    Heads beyond G.num_ws, which the release computes for small generators and throws away, are dropped.

    Args:
        state: its state dict.
        G, w_avg, const: its generator.

    Raises:
        ValueError: it is no such encoder, or that of another generator.
    """
    tensors, heads = {"w_avg": w_avg, "const": const}, {}
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
        config = EncoderConfig(
            num_ws=G.num_ws,
            w_dim=G.w_dim,
            channels=tuple(map(G.channels, G.resolutions)),
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
            mine = [f"latent_heads.{next(order)}" for _ in range(config.level_heads[level])]
            for part in ("weight", "bias") if mine else ():
                for i in range(math.ceil(math.log2(config.level_sizes[level]))):
                    fused = torch.cat([heads[f"{head}.convs.{2 * i}.{part}"] for head in mine])
                    tensors[f"heads.{level}.convs.{i}.{part}"] = fused
                tensors[f"heads.{level}.{part}"] = torch.stack([heads[f"{head}.linear.{part}"] for head in mine])
    except LookupError as error:
        raise ValueError(f"not an encoder of PadInv's authors for a generator of {G.num_ws} codes: "
                         f"{error} is missing") from error  # fmt: skip
    return config, tensors


# ----------------------------------------------------------------------------------------------------------------------
# Ours as theirs


def exported(G: Generator, format: str) -> bytes | memoryview:
    """A generator as the contents of a file of `format`; see `padinv.files.checkpoints.export_generator`."""
    blocks, c = len(G.blocks), G.config
    ours = {name: t.detach().float().cpu() for name, t in G.state_dict().items()}
    state = {their_name(name, format): their_layout(t, name, format).contiguous() for name, t in ours.items()}
    state |= filters(blocks, format)
    match format:
        case "padinv_official":
            return torch_file({"models": {"generator": state, "generator_smooth": state}})
        case "rosinality":
            return torch_file({"g_ema": state, "latent_avg": state.pop("latent_avg")})
        case "nvlabs_ada":
            settings = {
                "z_dim": c.z_dim, "c_dim": 0, "w_dim": c.w_dim, "img_resolution": c.resolution, "img_channels": 3,
                "mapping_kwargs": {"num_layers": c.mapping_layers},
                "synthesis_kwargs": {"channel_base": c.channel_base, "channel_max": c.channel_max},
            }  # fmt: skip
            note = (
                "G_ema holds tensors, no module. With stylegan2-ada-pytorch on the path: "
                "G = training.networks.Generator(**G_ema['init_kwargs']); G.load_state_dict(G_ema['state_dict'])"
            )
            G_ema = {"init_kwargs": settings, "state_dict": state}
            return pickle.dumps({"G": None, "D": None, "G_ema": G_ema, "note": note}, protocol=4)
        case "stylegan2_tf":
            return tf_file(state, c)


def torch_file(contents: dict) -> memoryview:
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getbuffer()


def tf_file(state: dict[str, Tensor], config: GeneratorConfig) -> bytes:
    """The pickle of (None, None, Gs), whose opcodes are put together here: the class it names is not ours to import."""
    settings = {
        "num_channels": 3, "resolution": config.resolution, "label_size": 0, "latent_size": config.z_dim,
        "dlatent_size": config.w_dim, "mapping_fmaps": config.w_dim, "mapping_layers": config.mapping_layers,
        "fmap_base": config.channel_base // 2, "fmap_max": config.channel_max,
    }  # fmt: skip

    def plain(x) -> list[bytes]:
        data = pickle.dumps(x, protocol=3)[2:-1]  # without the opcodes of a file's start and end
        # The numpy of those days has its functions elsewhere.
        return [data.replace(b"cnumpy._core.", b"cnumpy.core.", 1) if isinstance(x, np.ndarray) else data]

    def mapping(items: dict[str, list[bytes]]) -> list[bytes]:
        return [b"}(", *(part for key, value in items.items() for part in (*plain(key), *value)), b"u"]

    def network(name: str, function: str, own: str, **components: list[bytes]) -> list[bytes]:
        fields = {
            "version": 4, "name": name, "static_kwargs": settings, "build_func_name": function,
            "build_module_src": "from training.networks_stylegan2 import *\n",
        }  # fmt: skip
        variables = [(*plain(key), *plain(t.numpy()), b"\x86") for key, t in state.items() if re.match(own, key)]
        fields = {key: plain(x) for key, x in fields.items()} | {
            "components": mapping(components),
            "variables": [b"](", *(part for pair in variables for part in pair), b"e"],
        }
        return [f"c{NETWORK[:-8]}\nNetwork\n)".encode() + b"\x81", *mapping(fields), b"b"]

    Gs = network(
        "Gs",
        "G_main",
        own="dlatent_avg",
        synthesis=network("G_synthesis", "G_synthesis_stylegan2", own=r"noise|\d"),
        mapping=network("G_mapping", "G_mapping", own="Dense"),
    )
    return b"".join([b"\x80\x03NN", *Gs, b"\x87."])
