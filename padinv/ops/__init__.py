"""The operations that StyleGAN2 and the padding space need beyond plain convolutions, each where it is fastest.

`dispatch` is the one place where a kernel for GPUs (`padinv.ops.cuda`) takes over from the function of the same name
in `padinv.ops.reference`, which specifies it. `torch.compile` is given the reference, and fuses it by itself.
"""

import functools
import warnings

import torch
from torch import Tensor

from padinv.ops import cuda, reference
from padinv.ops.reference import bias_act, fir_filter, take_ring

__all__ = ["bias_act", "fir_filter", "pad_ring", "take_ring", "upfirdn2d"]


@functools.cache
def kernels(device: torch.device):
    """`padinv.ops.cuda`, or, after one warning, the reference where its kernels do not run."""
    try:
        cuda.try_out(device)
        return cuda
    except Exception as error:  # no Triton, no C compiler for it, a GPU that it does not know
        warnings.warn(f"padinv: no Triton kernels on {device}, PyTorch's own operations are used, which is slower "
                      f"({type(error).__name__}: {str(error).strip()[:300]})", stacklevel=3)  # fmt: skip
        return reference


def dispatch(function):
    """On a GPU run the operation of the function's name in `padinv.ops.cuda`, elsewhere the function."""

    @functools.wraps(function)
    def op(x: Tensor, *args, **kwargs) -> Tensor:
        if x.is_cuda and x.is_floating_point() and not torch.compiler.is_compiling():
            return getattr(kernels(x.device), function.__name__)(x, *args, **kwargs)
        return function(x, *args, **kwargs)

    return op


upfirdn2d = dispatch(reference.upfirdn2d)
pad_ring = dispatch(reference.pad_ring)
