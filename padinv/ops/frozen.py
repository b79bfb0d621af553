"""What weights allow where no gradient is wanted: to compute once what follows from them, and on a CPU to lay them out
once for oneDNN.

Nothing here is part of a network's state. What was kept is dropped when its weight changes in place, is replaced, or
its layer is gone (a change through `.data` goes unseen), and nothing is kept while torch compiles.
"""

import ctypes
import functools
import sys
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_kept: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # layer -> {key: (weights, their versions, value)}


def once(layer: nn.Module, key, weights: tuple[Tensor, ...], compute: Callable):
    """`compute()`, which depends on nothing but these weights of the layer; kept where it needs no gradient."""
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in weights)
    if torch.compiler.is_compiling() or graph or any(t.is_inference() for t in weights):
        return compute()
    kept = _kept.setdefault(layer, {})
    versions = [t._version for t in weights]
    if key in kept:
        sources, known, value = kept[key]
        if known == versions and all(a is b for a, b in zip(sources, weights, strict=True)):
            return value
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
        value = compute()
    kept[key] = weights, versions, value
    return value


@functools.cache
def keep_memory() -> None:
    """On Linux, let the allocator keep freed blocks: to map 32 MB anew for each large activation costs as much time as
    several passes over it. It holds for the whole process: for commands of ours to call, not for the library."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # glibc; musl has none
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def dtype_of(x: Tensor) -> torch.dtype:
    """In which a convolution of x computes."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def inferring(x: Tensor, *others: Tensor) -> bool:
    """Whether a result on a CPU needs no gradient, so that it may be computed in place and by oneDNN's own calls."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others)):
        return False
    known = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    dtype = dtype_of(x)
    return known and (
        dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def convolve(conv: nn.Conv2d, x: Tensor, norm: nn.BatchNorm2d | None = None, slope: float = 1.0) -> Tensor:
    """A convolution, a batch norm and a leaky ReLU with this slope below zero; in one pass on a CPU without gradients.

    conv must pad zeros by a number of pixels.
    """
    weights = [conv.weight, *([] if conv.bias is None else [conv.bias])]
    if norm is not None:
        weights += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    if norm is not None and norm.training or not inferring(x, *weights):
        x = conv(x)
        x = x if norm is None else norm(x)
        return x if slope == 1 else F.leaky_relu(x, slope)
    dtype = dtype_of(x)

    def packed() -> tuple[Tensor, Tensor | None]:
        weight, bias = conv.weight, conv.bias
        if norm is not None:
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)  # [C_out]
            weight = weight * scale[:, None, None, None]
            bias = norm.bias + ((0 if bias is None else bias) - norm.running_mean) * scale
        layout = conv.padding, conv.stride, conv.dilation, conv.groups
        weight = torch.ops.mkldnn._reorder_convolution_weight(weight.to(dtype), *layout, x.shape)
        return weight, None if bias is None else bias.to(dtype)

    weight, bias = once(conv, ("packed", dtype), tuple(weights), packed)
    act = ("none", [], "") if slope == 1 else ("leaky_relu", [slope], "")
    return torch.ops.mkldnn._convolution_pointwise(
        x.to(dtype), weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups, *act
    )
