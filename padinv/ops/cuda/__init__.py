"""CUDA kernels of `padinv.ops`, compiled by nvcc on first use and kept in torch's folder of extensions.

Importing this compiles nothing. Each operation is registered with torch, so that autograd and `torch.compile` know it.
On the CPU, and on a GPU without a compiler (after one warning), it runs the PyTorch reference.
"""

import ctypes
import functools
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.library import custom_op

from padinv.ops import reference

SOURCE = Path(__file__).parent / "csrc" / "ops.cu"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


# ----------------------------------------------------------------------------------------------------------------------
# The library


def folder() -> Path:
    """Where compiled kernels are kept: a folder for each state of the source."""
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root) / f"padinv-ops-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"


def nvcc() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    return shutil.which("nvcc", path=f"{CUDA_HOME}/bin") if CUDA_HOME else None


def compiler() -> str:
    """What a failure to compile depends on."""
    command = nvcc()
    if command is None:
        return f"torch {torch.__version__}, no nvcc"
    release = subprocess.run([command, "--version"], capture_output=True, text=True).stdout.split("release ")[-1]
    return f"torch {torch.__version__}, {command} {release.split(',')[0]}"


def build(arch: str) -> Path:
    """Compile for one architecture, such as "9.0": the library's path. A failure is written down beside it.

    Raises:
        RuntimeError: there is no nvcc, or it failed; its message is in the error.
    """
    from torch.utils.cpp_extension import load

    path = folder() / f"sm_{arch.replace('.', '')}.so"
    failure = path.with_suffix(".failed.json")
    failure.unlink(missing_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")  # of this process alone: several may start at once
    temporary.mkdir(parents=True, exist_ok=True)
    sm = path.stem.removeprefix("sm_")
    flags = [f"-gencode=arch=compute_{sm},code=sm_{sm}", "-std=c++17", "-O3"]
    try:
        if nvcc() is None:
            raise RuntimeError("no nvcc found; install the CUDA toolkit of torch's version, or set CUDA_HOME")
        # Where nvcc on the path is a wrapper, torch looks for libcudart in the wrong place; nvcc itself knows it.
        plan = subprocess.run([nvcc(), "--dryrun", str(SOURCE)], capture_output=True, text=True).stderr
        top = re.search(r"TOP=(.*)", plan)
        libraries = [f"-L{top[1]}/{name}" for name in ("lib64", "lib")] if top else []
        load("padinv_ops", [str(SOURCE)], extra_cuda_cflags=flags, extra_ldflags=libraries, with_cuda=True,
             build_directory=str(temporary), is_python_module=False)  # fmt: skip
        os.replace(next(temporary.glob("*.so")), path)
    except Exception as error:  # whatever a compiler, a linker or a full disk may raise
        message = str(error).strip()[-2000:]
        failure.write_text(json.dumps({"compiler": compiler(), "error": message}))
        raise RuntimeError(message) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


@functools.cache
def library(arch: str) -> ctypes.CDLL | None:
    """The kernels of an architecture, compiled now if they never were; None, after one warning, where they cannot be.

    A failure is remembered: it is tried again with another torch or compiler, or by `python -m padinv.ops build`.
    """
    path = folder() / f"sm_{arch.replace('.', '')}.so"
    failure = path.with_suffix(".failed.json")
    try:
        if not path.exists():
            if failure.exists() and (known := json.loads(failure.read_text()))["compiler"] == compiler():
                raise RuntimeError(known["error"])
            build(arch)
        lib = ctypes.CDLL(str(path))
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        reason = [line for line in lines if "error" in line.lower()][-1:] or lines[-1:]
        warnings.warn(f"padinv: no CUDA kernels for sm_{arch}, PyTorch's own operations are used, which is slower "
                      f"({reason[0]}). To try again: python -m padinv.ops build", stacklevel=2)  # fmt: skip
        return None
    lib.padinv_error.restype = ctypes.c_char_p
    return lib


def kernels(x: Tensor) -> ctypes.CDLL | None:
    """The library that works on x, or None for the reference."""
    if not x.is_cuda or x.dtype not in DTYPES:
        return None
    return library("{}.{}".format(*torch.cuda.get_device_capability(x.device)))


def call(lib: ctypes.CDLL, name: str, *args) -> None:
    """Run a kernel on the current stream of its tensors' device: integers go as int64, floats as double."""
    device = args[0].device
    values = [ctypes.c_int64(not args[0].is_cuda), ctypes.c_void_p(), ctypes.c_int64(DTYPES[args[0].dtype])]
    for a in args:
        if a is None or isinstance(a, Tensor):
            values.append(ctypes.c_void_p(a.data_ptr() if a is not None else None))
        else:
            values.append((ctypes.c_double if isinstance(a, float) else ctypes.c_int64)(a))
    function = getattr(lib, f"padinv_{name}")
    if device.type == "cpu":
        code = function(*values)
    else:
        with torch.cuda.device(device):
            values[1] = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            code = function(*values)
    if code:
        raise RuntimeError(f"padinv_{name}: {lib.padinv_error(code).decode()}")


# ----------------------------------------------------------------------------------------------------------------------
# Memory layout: kernels know contiguous and channels-last tensors, and answer in the layout of their input


def layout(x: Tensor) -> torch.memory_format:
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def like(x: Tensor, shape=None) -> Tensor:
    """A new tensor in the layout of x."""
    return torch.empty(x.shape if shape is None else shape, dtype=x.dtype, device=x.device, memory_format=layout(x))


def settle(y: Tensor, out: Tensor, x: Tensor) -> Tensor:
    """The reference's answer y with the strides of `out`, and never x itself."""
    return out.copy_(y) if y is x or y.stride() != out.stride() else y


def floats(x: Tensor | None) -> Tensor | None:
    """As the kernels read small tensors."""
    return None if x is None else x.float().contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# bias_act


@custom_op("padinv::bias_act", mutates_args=())
def bias_act_op(
    x: Tensor, bias: Tensor | None, noise: Tensor | None, slope: float, gain: float, clamp: float | None
) -> Tensor:
    y, lib = like(x), kernels(x)
    if lib is None:
        act = "linear" if slope == 1 else "lrelu"
        return settle(reference.bias_act(x, bias, act, gain, noise, clamp), y, x)
    x, bias, noise = x.contiguous(memory_format=layout(x)), floats(bias), floats(noise)
    n, c, pixels = len(x), x.shape[1], math.prod(x.shape[2:])
    step = pixels if noise is not None and noise.numel() > pixels else 0
    last = x.ndim == 2 or layout(x) == torch.channels_last
    call(lib, "bias_act", x, bias, noise, y, n, c, pixels, step, last, slope, gain, clamp or math.inf)
    return y


@custom_op("padinv::bias_act_backward", mutates_args=())
def bias_act_backward(dy: Tensor, y: Tensor, slope: float, gain: float, clamp: float | None) -> Tensor:
    """The derivative by x follows from y: linear in dy, and flat in y wherever it has a derivative."""
    dx, lib = like(y), kernels(y)
    if lib is None:
        factor = torch.where(y > 0, gain, gain * slope) * (y.abs() < (clamp or math.inf))
        return settle(dy * factor.to(y.dtype), dx, dy)
    y = y.contiguous(memory_format=layout(y))
    dy = dy.to(y.dtype).contiguous(memory_format=layout(y))
    call(lib, "bias_act_backward", dy, y, dx, y.numel(), slope, gain, clamp or math.inf)
    return dx


def bias_act_context(ctx, inputs, output):
    _, bias, noise, *ctx.settings = inputs
    ctx.save_for_backward(output, bias, noise)


def bias_act_gradient(ctx, dy):
    y, bias, noise = ctx.saved_tensors
    dx = bias_act_backward(dy, y, *ctx.settings)
    d_bias = d_noise = None
    wide = torch.promote_types(dx.dtype, torch.float32)  # of sums
    if ctx.needs_input_grad[1]:
        d_bias = dx.sum(dim=[0, *range(2, dx.ndim)], dtype=wide).to(bias.dtype)  # [C]
    if ctx.needs_input_grad[2]:
        d_noise = dx.sum(dim=1, keepdim=True, dtype=wide).sum_to_size(noise.shape).to(noise.dtype)
    return dx, d_bias, d_noise, None, None, None


def bias_act_backward_context(ctx, inputs, output):
    _, y, *ctx.settings = inputs
    ctx.save_for_backward(y)


bias_act_op.register_fake(lambda x, bias, noise, slope, gain, clamp: like(x))
bias_act_op.register_autograd(bias_act_gradient, setup_context=bias_act_context)
bias_act_backward.register_fake(lambda dy, y, slope, gain, clamp: like(y))
bias_act_backward.register_autograd(
    lambda ctx, g: (bias_act_backward(g, ctx.saved_tensors[0], *ctx.settings), None, None, None, None),
    setup_context=bias_act_backward_context,
)


def bias_act(x, bias=None, act="lrelu", gain=None, noise=None, clamp=None):
    slope, default = reference.ACTS[act]
    return bias_act_op(x, bias, noise, slope, float(default if gain is None else gain), clamp)


# ----------------------------------------------------------------------------------------------------------------------
# upfirdn2d


def out_size(shape, f: Tensor, up: int, down: int, pad) -> tuple[int, ...]:
    height = (shape[2] * up + pad[2] + pad[3] - f.shape[0]) // down + 1
    width = (shape[3] * up + pad[0] + pad[1] - f.shape[1]) // down + 1
    return *shape[:2], height, width


@custom_op("padinv::upfirdn2d", mutates_args=())
def upfirdn2d_op(
    x: Tensor, f: Tensor, up: int, down: int, pad: list[int], gain: float, flip: bool
) -> Tensor:  # flip: a true convolution
    y, lib = like(x, out_size(x.shape, f, up, down, pad)), kernels(x)
    if lib is None:
        return settle(reference.upfirdn2d(x, f if flip else f.flip(0, 1), up, down, pad, gain), y, x)
    x, f = x.contiguous(memory_format=layout(x)), floats(f)
    call(lib, "upfirdn2d", x, f, y, *x.shape, *y.shape[2:], up, down, *f.shape, pad[0], pad[2],
         layout(x) == torch.channels_last, flip, gain)  # fmt: skip
    return y


def upfirdn2d_context(ctx, inputs, output):
    x, f, *ctx.settings = inputs
    ctx.save_for_backward(f)
    ctx.sizes = x.shape[2:], output.shape[2:]


def upfirdn2d_gradient(ctx, dy):
    """The transpose of upfirdn2d is upfirdn2d, with up and down exchanged and the filter turned round."""
    (f,) = ctx.saved_tensors
    up, down, pad, gain, flip = ctx.settings
    back = []
    for k, before, size, out in zip(f.shape[::-1], pad[::2], ctx.sizes[0][::-1], ctx.sizes[1][::-1], strict=True):
        back += [k - 1 - before, size * up - up + 1 - out * down + before]
    return upfirdn2d_op(dy, f, down, up, back, gain, not flip), None, None, None, None, None, None


upfirdn2d_op.register_fake(lambda x, f, up, down, pad, gain, flip: like(x, out_size(x.shape, f, up, down, pad)))
upfirdn2d_op.register_autograd(upfirdn2d_gradient, setup_context=upfirdn2d_context)


def upfirdn2d(x, f, up=1, down=1, pad=(0, 0, 0, 0), gain=1.0):
    return upfirdn2d_op(x, f, up, down, list(pad), float(gain), True)


# ----------------------------------------------------------------------------------------------------------------------
# pad_ring


def ring_shapes(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the padded map and of the ring."""
    n, c, r = x.shape[:3]
    return (n, c, r + 2, r + 2), (n, c, 4 * (r + 1))


@custom_op("padinv::pad_ring", mutates_args=())
def pad_ring_op(x: Tensor, ring: Tensor, style: Tensor | None) -> Tensor:
    y, lib = like(x, ring_shapes(x)[0]), kernels(x)
    if lib is None:
        return settle(reference.pad_ring(x, ring, style), y, x)
    x, ring, style = x.contiguous(memory_format=layout(x)), ring.to(x.dtype).contiguous(), floats(style)
    call(lib, "pad_ring", x, ring, style, y, *x.shape[:3], layout(x) == torch.channels_last)
    return y


@custom_op("padinv::pad_ring_backward", mutates_args=())
def pad_ring_backward(dy: Tensor, x: Tensor, style: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """By x, by the ring, by the style (empty without one)."""
    dx, d_ring, d_style = pad_ring_backward_fake(dy, x, style)
    lib = kernels(x)
    if lib is None:
        inner = dy[..., 1:-1, 1:-1]
        dx.copy_(inner if style is None else inner * style.to(dy.dtype)[:, :, None, None])
        if style is not None:
            d_style.copy_((inner * x).sum(dim=(2, 3)))
        d_ring.copy_(reference.take_ring(dy))
        return dx, d_ring, d_style
    x, dy = x.contiguous(memory_format=layout(x)), dy.to(x.dtype).contiguous(memory_format=layout(x))
    style = floats(style)
    call(lib, "pad_ring_backward", dy, x, style, dx, d_ring, None if style is None else d_style, *x.shape[:3],
         layout(x) == torch.channels_last)  # fmt: skip
    return dx, d_ring, d_style


@pad_ring_backward.register_fake
def pad_ring_backward_fake(dy, x, style):
    wide = torch.promote_types(x.dtype, torch.float32)  # of sums
    d_style = x.new_empty(x.shape[:2] if style is not None else (0,), dtype=wide)
    return like(x), x.new_empty(ring_shapes(x)[1]), d_style


def pad_ring_context(ctx, inputs, output):
    x, ring, style = inputs
    ctx.save_for_backward(x, style)
    ctx.dtype = ring.dtype


def pad_ring_gradient(ctx, dy):
    x, style = ctx.saved_tensors
    dx, d_ring, d_style = pad_ring_backward(dy, x, style)
    return dx, d_ring.to(ctx.dtype), None if style is None else d_style.to(style.dtype)


def pad_ring_backward_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def pad_ring_second_gradient(ctx, g_x, g_ring, g_style):
    dy, x, style = ctx.saved_tensors
    if style is None:
        return pad_ring_op(g_x, g_ring, None), None, None
    inner, g_style = dy[..., 1:-1, 1:-1], g_style.to(x.dtype)[:, :, None, None]
    by_dy = pad_ring_op(g_x * style.to(x.dtype)[:, :, None, None] + g_style * x, g_ring, None)
    return by_dy, g_style * inner, (g_x * inner).sum(dim=(2, 3), dtype=style.dtype)


pad_ring_op.register_fake(lambda x, ring, style: like(x, ring_shapes(x)[0]))
pad_ring_op.register_autograd(pad_ring_gradient, setup_context=pad_ring_context)
pad_ring_backward.register_autograd(pad_ring_second_gradient, setup_context=pad_ring_backward_context)


def pad_ring(x, ring, style=None):
    return pad_ring_op(x, ring, style)
