"""The operations that StyleGAN2 and the padding space need beyond plain convolutions, each where it is fastest.

`dispatch` is the one place where a CUDA kernel (`padinv.ops.cuda`) takes over from the function of the same name in
`padinv.ops.reference`, which specifies it. Importing this needs no compiler.
"""

import functools

from torch import Tensor

from padinv.ops import cuda, reference
from padinv.ops.reference import fir_filter, take_ring

__all__ = ["bias_act", "fir_filter", "pad_ring", "take_ring", "upfirdn2d"]


def dispatch(function):
    """On a GPU run the operation of the function's name in `padinv.ops.cuda`, elsewhere the function."""

    @functools.wraps(function)
    def op(x: Tensor, *args, **kwargs) -> Tensor:
        if x.is_cuda and x.dtype in cuda.DTYPES:
            return getattr(cuda, function.__name__)(x, *args, **kwargs)
        return function(x, *args, **kwargs)

    op.reference = function
    return op


bias_act = dispatch(reference.bias_act)
upfirdn2d = dispatch(reference.upfirdn2d)
pad_ring = dispatch(reference.pad_ring)
