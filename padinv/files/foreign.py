"""Networks of other projects: where they are in files, their names and layouts, and ours written as theirs.

Formats of generators:
    padinv_official  PadInv's authors: a torch file of {"models": {"generator", "generator_smooth", "encoder"}} with the
        arguments of their constructors as "model_kwargs_init".
    nvlabs_ada  NVIDIA's stylegan2-ada-pytorch: a pickle of {"G", "D", "G_ema"}, modules with their source.
    rosinality  stylegan2-pytorch: a torch file of {"g_ema", "latent_avg"}. In files of pSp and e4e it is the decoder.
    stylegan2_tf  NVIDIA's StyleGAN2 for TensorFlow: a pickle of three networks (G, D, Gs).
"""

import io
import math
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from padinv.files.pickles import NAMESPACE, NETWORK, PERSISTENT, Record, printable, read_file, tensor
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
EXPORTS = ("padinv_official", "rosinality")
MAX_TENSORS = 10_000  # of a network; that of 1024² has some 250, its encoder 800
SIGNS = {  # what names of tensors give away
    r"\.epilogue|^b4\.(fc|out)\.|final_(conv|linear)\.|/FromRGB|fromrgb|^Output/": "a discriminator",
    r"^mapping\.embed|Label(Concat|Embed)": "a conditional generator; only unconditional ones are supported",
    r"^synthesis\.(input\.|L\d+_\d+_\d+\.)": "a StyleGAN3 generator",
    r"StyleMod|progression\.": "a StyleGAN1 generator",
    r"^truncation\.w_avg$": "a generator of genforce, which is another format",
    r"(^|\.)(iwt|dwt)\.": "a SWAGAN generator",
    r"\.to_style1\.|(^|\.)initial_block$": "networks of lucidrains' stylegan2-pytorch, which is another network",
    r"^backbone_stages\.": "an encoder of PadInv's authors",
    r"^decoder\.input\.": "an encoder and a decoder of pSp's kind",
    r"\.skip\.|/Skip/|ToRGB_lod": 'a generator of another architecture; only "skip" is supported',
}
FILTER = [1, 3, 3, 1]
CONDITIONS = ("c_dim", "label_size", "label_dim")
SETTINGS = {  # of other projects' constructors, where shapes do not show them: ours
    "lr_multiplier": 0.01, "mapping_lrmul": 0.01, "mapping_lr_mul": 0.01, "normalize_latents": True,
    "normalize_z": True, "activation": "lrelu", "act": "lrelu", "nonlinearity": "lrelu", "const_input": True,
    "mapping_nonlinearity": "lrelu", "architecture": "skip", "resample_kernel": FILTER, "resample_filter": FILTER,
    "filter_kernel": FILTER, "kernel": FILTER, **dict.fromkeys(CONDITIONS, 0), "final_tanh": False,
    "use_wscale": True, "mapping_use_wscale": True, "wscale_gain": 1, "mapping_wscale_gain": 1, "lr_mul": 1,
    "demodulate": True, "image_channels": 3, "init_res": 4, "noise_type": "spatial", "final_res": 4, "use_se": True,
}  # fmt: skip
IGNORED = {  # said when a file asks for anything but the first
    "conv_clamp": (None, "images differ where activations are larger"),
    "noise_mode": ("const", "the argument noise of synthesis decides"),
}
MODELS = {"generator": ("StyleGAN2GeneratorPadInv", "StyleGAN2Generator"), "encoder": ("PadInvEncoder",)}
NORMS = ("torch.nn.modules.batchnorm.BatchNorm2d", "torch.nn.modules.batchnorm.SyncBatchNorm")  # one, in eval mode
KNOWN = {  # further arguments in files of PadInv's authors: shown by shapes, or seen to in `encoder_tensors`
    "generator": {"resolution", "z_dim", "w_dim", "mapping_layers", "mapping_fmaps", "fmaps_base", "fmaps_max"},
    "encoder": {
        "resolution", "latent_dim", "num_latents_per_level", "network_depth", "inplanes", "se_reduction",
        "fpn_channels", "depth_padding_extractor", "use_padding_space", "encode_const_input", "only_pad_even",
        "pad_layer_num", "use_padding_modulation_head", "start_from_latent_avg",
    },
}  # fmt: skip
PSP_ENCODERS = {"GradualStyleEncoder": False, "Encoder4Editing": True}  # of pSp and e4e: whether the first w is for all


# ----------------------------------------------------------------------------------------------------------------------
# Networks in files


def read_generator(path) -> tuple[GeneratorConfig, dict[str, Tensor]]:
    """The generator in a file of any format, as `generator_tensors`; over the mapped file.

    Raises:
        ValueError: as `read_file`, `generator_state` and `generator_tensors`. Broken structure raises what `errors_of`
            catches.
    """
    return generator_tensors(*generator_state(read_file(path)), Path(path).stat().st_size)


def read_encoder(path) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """The encoder in a file of PadInv's authors, of pSp or of e4e, as `encoder_tensors`, for the generator beside it.

    Raises:
        ValueError: as `read_generator`; there is no encoder, or no generator beside it.
    """
    contents, size = read_file(path), Path(path).stat().st_size
    psp = psp_parts(contents)
    nets = contents.get("models") if isinstance(contents, dict) else None
    if psp:
        state, settings, base_w = psp_encoder(contents, psp["encoder"])
    elif isinstance(nets, dict) and isinstance(nets.get("encoder"), dict):
        state, settings, base_w = nets["encoder"], settings_of(contents, "encoder"), False
    else:
        raise ValueError(f"no encoder of PadInv's authors in it, found {described(contents)}; nor one of pSp or e4e")
    try:
        config, tensors = generator_tensors(*generator_state(contents), size)
        w_avg = tensors["mapping.w_avg"]
    except KeyError:
        raise ValueError("its encoder starts from latent_avg, which is missing") from None
    except ValueError as error:
        raise ValueError(f"its encoder needs the w_avg and constant of its generator; {error}") from error
    return encoder_tensors(plain(state, size), config, w_avg, tensors["const"], settings, base_w)


def generator_state(contents: object) -> tuple[dict, str]:
    """The state dict of the generator in what a file holds, and its format; of several, the average over training.

    Values are tensors, or what `tensor` makes one of.

    Raises:
        ValueError: there is no StyleGAN2 generator, or one with settings that ours lacks; says what was found.
    """
    found = contents
    if isinstance(contents, tuple) and contents and all(x is None or is_record(x, NETWORK) for x in contents):
        found = contents[-1]  # of (G, D, Gs)
    elif psp := psp_parts(contents):
        return psp["decoder"], "rosinality"
    elif isinstance(contents, dict):
        nets = contents["models"] if isinstance(contents.get("models"), dict) else contents
        wanted = [nets.get(name) for name in ("generator_smooth", "generator", "G_ema", "g_ema")]
        found = next((x for x in wanted if isinstance(x, dict | Record)), contents)
        if nets is not contents:
            settings_of(contents, "generator")

    state = found if isinstance(found, dict) else {}
    if is_record(found, PERSISTENT):
        state = nvlabs_state(found)
    elif is_record(found, NETWORK):
        state = tf_state(found)
    elif {"init_kwargs", "state_dict"} <= state.keys():  # as padinv 0.1 exported "nvlabs_ada"
        check_settings(state["init_kwargs"])
        state = dict(state["state_dict"])
    elif isinstance(contents, dict) and found is contents.get("g_ema") and "latent_avg" in contents:
        state = state | {"latent_avg": contents["latent_avg"]}

    for format, const in CONST.items():
        if const in state:
            return state, format
    parts = [state, *(contents.values() if isinstance(contents, dict) else ())]
    if what := next(filter(None, (sign(x) for x in parts[:7] if isinstance(x, dict))), None):
        raise ValueError(f"expected a StyleGAN2 generator of a format that is read, found {what}")
    raise ValueError(f"no StyleGAN2 generator in it, found {described(contents)}")


def is_record(x: object, name: str) -> bool:
    return isinstance(x, Record) and x.name == name


def nvlabs_state(G: Record) -> dict:
    """The state dict of a module that NVIDIA's loader would build by executing the source beside it."""
    fields = G.args[0]["state"]
    check_settings({"c_dim": fields.get("c_dim", 0)} | fields.get("_init_kwargs", {}))
    state, queue, seen = {}, [("", G)], set()
    while queue:
        prefix, module = queue.pop()
        if id(module) in seen:
            raise ValueError(f"damaged: the module {prefix} is there twice")
        seen.add(id(module))
        fields = module.args[0]["state"]
        if len(state) + len(fields["_parameters"]) + len(fields["_buffers"]) > MAX_TENSORS:
            raise ValueError(f"refused: over {MAX_TENSORS} tensors, which no network needs")  # shared ones multiply
        hidden = {name for name in fields.get("_non_persistent_buffers_set", ()) if isinstance(name, str)}
        for name, x in (fields["_parameters"] | fields["_buffers"]).items():
            if x is not None and name not in hidden:
                state[prefix + name[:200]] = x
        queue += [(f"{prefix[-200:]}{name[:200]}.", child) for name, child in fields["_modules"].items()]
    return state


def tf_state(G: Record) -> dict:
    """The variables of a TensorFlow network and of its components, without the names of these."""
    state, parts = {}, G.state.get("components", {})
    for network in (G, *(parts[name] for name in ("mapping", "synthesis") if name in parts)):
        check_settings(network.state["static_kwargs"])
        for name, x in dict(network.state["variables"]).items():
            state[re.sub(r"^(Gs?|(G_)?(main|mapping|synthesis)\w*)/", "", name)] = x
    if (lod := tensor(state.pop("lod", 0))).numel() != 1 or lod != 0:
        raise ValueError(f"a generator that was still growing (lod {lod.flatten()[0]:g}), expected lod 0")
    return state


def psp_parts(contents: object) -> dict[str, dict] | None:
    """The states of "encoder" and "decoder", this with the mean of w, in a file of pSp or e4e; None for another file.

    Raises:
        ValueError: it is of a project that descends from these.
    """
    state = contents.get("state_dict") if isinstance(contents, dict) else None
    if not isinstance(state, dict):
        return None
    parts = {"encoder": {}, "decoder": {}}
    for name, x in state.items():
        part, _, rest = str(name).partition(".")
        parts.setdefault(part, {})[rest] = x
    if not parts["encoder"] and not parts["decoder"]:
        return None
    stem = [
        tensor(x).shape[1] for name, x in parts["encoder"].items() if name in ("input_layer.0.weight", "conv1.weight")
    ]
    if "hypernet" in parts:
        raise ValueError("networks of HyperStyle, which is another method; not supported")
    if "n_iters_per_batch" in options(contents) or 6 in stem:
        raise ValueError("networks of ReStyle, which is another method; not supported")
    if len(parts) > 2:
        raise ValueError(f"networks of a project that adds to pSp's encoder and decoder; not supported: {list(parts)}")
    if contents.get("latent_avg") is not None:
        rows = tensor(contents["latent_avg"])
        if rows.ndim > 3 or rows.numel() > 1 << 20:  # of strides 0 it may have any size, which reshape would allocate
            raise ValueError(f"latent_avg is {list(rows.shape)}, expected [num_ws, w_dim], or [w_dim] for all layers")
        rows = rows.reshape(-1, rows.shape[-1])  # [num_ws or 1, w_dim]
        if len(rows) > 1 and not torch.equal(rows, rows[:1].expand_as(rows)):
            raise ValueError("latent_avg differs between the layers; only one mean for all is supported")
        parts["decoder"]["latent_avg"] = rows[0]
    return parts


def options(contents: dict) -> dict:
    """Of a file of pSp or e4e: a dict or an argparse.Namespace."""
    opts = contents.get("opts")
    opts = opts.state if is_record(opts, NAMESPACE) else opts
    return opts if isinstance(opts, dict) else {}


def psp_encoder(contents: dict, state: dict) -> tuple[dict, dict, bool]:
    """The encoder in a file of pSp or e4e with the names of PadInv's authors, its settings, and whether it is e4e's.

    Raises:
        ValueError: there is none, or one of another type.
    """
    opts = options(contents)
    kind = opts.get("encoder_type")
    if kind is None and ("stylegan_size" in opts or "global_step" in contents):
        kind = "Encoder4Editing"
    elif kind is None and "output_size" in opts:
        kind = "GradualStyleEncoder"
    if not state or kind not in PSP_ENCODERS or opts.get("learn_in_w"):
        raise ValueError(f"expected an encoder of opts.encoder_type {' or '.join(PSP_ENCODERS)}, not to learn_in_w, "
                         f"found {printable(kind, 80) if state else 'none'}")  # fmt: skip
    places = {"latlayer1": "fpn.lateral_layers.1", "latlayer2": "fpn.lateral_layers.0"}
    stages = [(stage, block) for stage, depth in enumerate((3, 4, 14, 3)) for block in range(depth)]  # of IR-SE50
    places |= {f"body.{i}": f"backbone_stages.{stage}.{block}" for i, (stage, block) in enumerate(stages)}
    renamed = {}
    for name, x in state.items():
        start = re.match(r"body\.\d+|\w*", name)[0]
        renamed[places.get(start, start.replace("styles", "latent_heads")) + name[len(start) :]] = x
    return renamed, {"start_from_latent_avg": opts.get("start_from_latent_avg", True)}, PSP_ENCODERS[kind]


def settings_of(contents: dict, name: str) -> dict:
    """The arguments of the constructor of a network in a file of PadInv's authors; {} where they are not stated.

    Raises:
        ValueError: they ask for what ours does not do, or are not known.
    """
    stated = contents.get("model_kwargs_init", {})
    settings = dict(stated.get(name, {})) if isinstance(stated, dict) else stated
    if not isinstance(settings, dict):
        raise ValueError(f"its model_kwargs_init cannot be read, found {described(settings)}")
    kind, norm = settings.pop("model_type", MODELS[name][0]), settings.pop("norm_layer", None)
    if kind not in MODELS[name]:
        raise ValueError(f"a network of model_type {printable(kind, 80)}, expected {' or '.join(MODELS[name])}")
    if norm is not None and getattr(norm, "name", norm) not in NORMS:
        raise ValueError(f"an encoder with norm_layer {printable(norm, 80)}; only BatchNorm2d is supported")
    if unknown := [printable(key, 80) for key in settings.keys() - SETTINGS.keys() - IGNORED.keys() - KNOWN[name]]:
        raise ValueError(f"settings of its {name} that are not known here: {', '.join(sorted(unknown)[:4])}")
    check_settings(settings, "an encoder" if name == "encoder" else "a generator")
    return settings


def check_settings(settings: dict, kind: str = "a generator") -> None:
    """ValueError where a constructor's arguments ask for what our networks do not do; a warning of what is ignored."""
    queue, seen = [settings], set()
    while queue:
        if id(settings := queue.pop()) in seen:
            continue
        seen.add(id(settings))
        for name, value in settings.items():
            value = list(value) if isinstance(value, tuple) else value
            if isinstance(value, dict):
                queue.append(value)
            elif name in SETTINGS and value != SETTINGS[name]:
                what = "a conditional generator" if name in CONDITIONS else kind
                raise ValueError(
                    f"{what} with {name} {printable(repr(value), 80)}; only {SETTINGS[name]!r} is supported"
                )
            elif name in IGNORED and value != IGNORED[name][0]:
                warnings.warn(f"the file asks for {name} {printable(value, 80)}, which is ignored: {IGNORED[name][1]}",
                              stacklevel=2)  # fmt: skip


def plain(state: dict, size: float = math.inf) -> dict[str, Tensor]:
    """The tensors of a state dict.

    Raises:
        ValueError: one is none, or together they are larger than the file of this size: views can claim any shape.
    """
    if len(state) > MAX_TENSORS:
        raise ValueError(f"refused: {len(state)} tensors, which no network needs")
    tensors, claimed = {}, 0
    for name, x in state.items():
        try:
            t = tensors[name] = tensor(x)
        except ValueError as error:
            raise ValueError(f"{error} ({printable(name, 80)})") from error
        claimed += t.numel() * t.element_size()
    if claimed > size:
        raise ValueError(f"damaged: its tensors claim {claimed} bytes, the file has {size}")
    return tensors


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
        if isinstance(x, dict) and (what := sign(x) or next((f for f, const in CONST.items() if const in x), None)):
            return f"a generator of format {what}" if what in CONST else what
        name = x.name if isinstance(x, Record) else type(x).__name__
        return f"of type {'Tensor' if '._rebuild' in name else name}"

    if isinstance(contents, dict):
        nets = contents["models"] if isinstance(contents.get("models"), dict) else contents
        parts = [(f"{name!r} ", x) for name, x in nets.items() if x is not None]
    else:
        parts = [("", x) for x in (contents if isinstance(contents, tuple) else [contents]) if x is not None]
    shown = [f"{name[:40]}({kind(x)[:80]})" if name else kind(x)[:80] for name, x in parts[:6]]
    return ", ".join(shown) + (f" and {len(parts) - 6} more" if len(parts) > 6 else "") or "nothing"


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
    """The inverse of `our_layout` for a format of `EXPORTS`, dimensions of size 1 included."""
    if name.endswith(".noise"):
        return t[None, None]  # [1, 1, r, r]
    if format == "rosinality":
        if t.ndim == 4 and name != "const" or name.endswith("noise_strength"):
            return t[None]  # [1, C_out, C_in, k, k] or [1]
        return t[None, :, None, None] if name.endswith("to_rgb.bias") else t
    return t


def filters(blocks: int, format: str) -> dict[str, Tensor]:
    """The low-pass filters that a format of `EXPORTS` keeps beside the weights."""
    if format == "padinv_official":
        names = ["synthesis.filter"] + [f"synthesis.layer{2 * i - 1}.filter" for i in range(1, blocks)]
        return {name: fir_filter() for name in names}
    names = [f"convs.{2 * i}.conv.blur.kernel" for i in range(blocks - 1)]
    names += [f"to_rgbs.{i}.upsample.kernel" for i in range(blocks - 1)]
    return {name: 4 * fir_filter() for name in names}  # 4: the gain of up-sampling


def generator_tensors(state: dict, format: str, size: float = math.inf) -> tuple[GeneratorConfig, dict[str, Tensor]]:
    """A generator's state dict of another project as the architecture, read off the shapes, and tensors in our names.

    The tensors are views of theirs. Only rosinality's may lack the mean of w, and then "mapping.w_avg" is not there.

    Args:
        state: tensors, or what `tensor` makes one of.
        format: of `CONST`.
        size: as `plain`.

    Raises:
        ValueError: tensors are missing, unknown or of other sizes; says what kind of network it is where names tell.
    """
    state = plain(state, size)
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
    if wrong and format == "rosinality" and all(text.startswith("noises.") for text in wrong):
        raise ValueError("a generator of rosinality's project as of 2019, which drew new noise for each image: it has "
                         "no noises.*; loaded and saved by a later version of that project it has")  # fmt: skip
    if wrong:
        raise ValueError(f"expected a whole StyleGAN2 generator of format {format}, found {sign(state) or 'another'}: "
                         f"{some(wrong)}")  # fmt: skip
    for name in low_pass:
        t = state[name].float().cpu()
        if t.shape != (4, 4) or not torch.allclose(t / t.sum(), fir_filter(), atol=1e-6):
            raise ValueError(f"{name} is not the low-pass filter [1, 3, 3, 1] of this generator")
    tensors = {ours: our_layout(state[name], ours, format) for name, ours in names.items() if name in state}
    w_dim, z_dim = tensors[f"mapping.layers.{layers - 1}.bias"].numel(), tensors["mapping.layers.0.weight"].shape[1]
    widths = {tensors[f"mapping.layers.{i}.bias"].numel() for i in range(layers)}
    if widths != {w_dim}:
        raise ValueError(f"a mapping with layers of {sorted(widths)} numbers; only the {w_dim} of w are supported")
    if (colours := tensors["blocks.0.to_rgb.bias"].numel()) != 3:
        raise ValueError(f"a generator of images of {colours} channels; only RGB is supported")
    channels = {4 << i: tensors[f"blocks.{i}.conv1.bias"].numel() for i in range(blocks)}
    base = max(r * c for r, c in channels.items())
    return GeneratorConfig(4 << blocks - 1, z_dim, w_dim, layers, base, max(channels.values())), tensors


def some(wrong: list[str]) -> str:
    """The first four."""
    first = "; ".join(printable(text, 120) for text in sorted(wrong)[:4])
    return first + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")


def encoder_tensors(
    state: dict[str, Tensor], G: GeneratorConfig, w_avg: Tensor, const: Tensor, settings: dict, base_w: bool = False
) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """The "encoder" of PadInv's authors as the architecture, read off the shapes, and tensors in our names.

    Heads beyond G.num_ws, which the release computes for small generators and throws away, are dropped. Without a
    "padding_extractor" it is their pSp; without "padding_modulation_heads" the maps of the P branch are the padding.

    Args:
        state: its state dict.
        G, w_avg, const: its generator.
        settings: as `settings_of`; what is not stated is as in the release.
        base_w: of `EncoderConfig`.

    Raises:
        ValueError: it is no such encoder, or that of another generator, or has settings that ours lacks.
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

    def expect(name: str, value: object, found: object) -> None:
        if value != found:
            raise ValueError(f"an encoder with {name} {printable(value, 80)}; expected {found}")

    branch, rings = count(r"padding\.blocks\.\d+"), count(r"padding\.rings\.\d+")
    expect("use_padding_space", settings.get("use_padding_space", branch > 0), branch > 0)
    L = settings.get("pad_layer_num", rings or None) if branch else 0
    if branch:
        expect("only_pad_even", settings.get("only_pad_even", True), True)
        expect("use_padding_modulation_head", settings.get("use_padding_modulation_head", rings > 0), rings > 0)
        expect("pad_layer_num", L, rings or L or "a number, as there are no padding_modulation_heads")
    if not settings.get("start_from_latent_avg", True):
        tensors["w_avg"] = torch.zeros_like(w_avg)
    try:
        if (colours := tensors["stem.0.weight"].shape[1]) != 3:
            raise ValueError(f"an encoder of images of {colours} channels; only RGB is supported")
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
            padded_resolutions=L,
            replace_const=branch > 0 and bool(settings.get("encode_const_input", True)),
            padding="outright",
            layout="centre",
            padding_level=1,
            padding_channels=pyramid,
            padding_depth=branch,
            padding_heads="layer" if rings or not branch else "none",
            base_w=base_w,
        )
        order = iter(range(G.num_ws))  # theirs: one after another from the coarsest level; ours: side by side
        for level in (2, 1, 0):
            mine = [f"latent_heads.{next(order)}" for _ in range(config.level_heads[level])]
            for part in ("weight", "bias") if mine else ():
                for i in range(math.ceil(math.log2(config.level_sizes[level]))):
                    fused = torch.cat([heads.pop(f"{head}.convs.{2 * i}.{part}") for head in mine])
                    tensors[f"heads.{level}.convs.{i}.{part}"] = fused
                tensors[f"heads.{level}.{part}"] = torch.stack([heads.pop(f"{head}.linear.{part}") for head in mine])
    except LookupError as error:
        raise ValueError(f"not an encoder of PadInv's authors (or of pSp or e4e) for a generator of {G.num_ws} codes: "
                         f"{error} is missing") from error  # fmt: skip
    expect("resolution", settings.get("resolution", config.input_resolution), config.input_resolution)
    if config.padding_heads == "none" and any(nf != pyramid for nf in config.channels[:L]):
        raise ValueError(f"an encoder without padding_modulation_heads, whose maps of {pyramid} channels are not those "
                         f"of its generator, {list(config.channels[:L])}")  # fmt: skip
    tensors |= {key: t for key, t in heads.items() if int(key.split(".")[1]) < G.num_ws}  # unknown
    return config, tensors


# ----------------------------------------------------------------------------------------------------------------------
# Ours as theirs


def check_export(config: GeneratorConfig, format: str) -> None:
    """ValueError where the code of the other project cannot build such a generator."""
    if config.resolution > 1024:
        raise ValueError(f"G: {config.resolution}², but the code of {format} has no resolution beyond 1024²")
    if format != "rosinality":
        return
    if config.z_dim != config.w_dim:
        raise ValueError(
            f"G: z of {config.z_dim} and w of {config.w_dim} numbers, but rosinality's code has one number"
        )
    channels = [config.channels(r) for r in config.resolutions]
    tables = [[512 if r < 64 else 16384 * m // r for r in config.resolutions] for m in (1, 2)]
    if channels not in tables:
        raise ValueError(f"G: channels {channels} from 4² on, but rosinality's code has {tables[1]} or, with "
                         f"channel_multiplier 1, {tables[0]}")  # fmt: skip


def exported(G: Generator, format: str) -> memoryview:
    """A generator as the contents of a file of `format`; see `padinv.files.checkpoints.export_generator`."""
    ours = {name: t.detach().float().cpu() for name, t in G.state_dict().items()}
    state = {their_name(name, format): their_layout(t, name, format).contiguous() for name, t in ours.items()}
    state |= filters(len(G.blocks), format)
    if format == "rosinality":
        contents = {"g_ema": state, "latent_avg": state.pop("latent_avg")}
    else:
        contents = {"models": {"generator": state, "generator_smooth": state}}
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getbuffer()
