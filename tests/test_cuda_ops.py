"""The kernels for GPUs: each index in Triton's interpreter on the CPU; compiled for GPUs that are not here; on GPUs."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from padinv import ops
from padinv.ops import cuda, reference

pytest.importorskip("triton", reason="no Triton: it comes with torch for CUDA, on Linux")
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

NAMES = ["pad_ring_kernel", "upfirdn2d_kernel"]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
ELEMENTS = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# up, down, taps, pad: those of the networks (filter, skip, discriminator), and what else may be asked for
UPFIRDN = [
    (1, 1, (4, 4), (1, 1, 1, 1)), (2, 1, (4, 4), (2, 1, 2, 1)), (1, 2, (4, 4), (1, 1, 1, 1)),
    (1, 1, (4, 4), (2, 2, 2, 2)), (2, 1, (4, 4), (-1, 2, 3, -2)), (1, 2, (4, 4), (-2, 3, 1, 0)),
    (3, 2, (5, 3), (2, 3, 4, 1)), (1, 1, (1, 2), (0, 0, 0, 0)), (2, 2, (4, 4), (2, 1, 1, 3)),
    (4, 1, (8, 8), (5, 4, 5, 4)), (2, 3, (3, 4), (-3, -1, -2, -1)),
]  # fmt: skip


def random(*shape, seed=0, dtype=torch.float64, layout=torch.contiguous_format):
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).contiguous(memory_format=layout if len(shape) == 4 else torch.contiguous_format)


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    if request.param == "cuda":
        return "cuda" if torch.cuda.is_available() else pytest.skip("no GPU")
    for name in NAMES:
        monkeypatch.setattr(cuda, name, InterpretedFunction(getattr(cuda, name).fn))
    return "cpu"


# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic


def check(op, expected, tensors, dtype):
    """Results, layout and gradients of op in dtype against those of the reference in float64."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y, wanted = op(*tensors), expected(*exact)
    last = tensors[0].is_contiguous(memory_format=torch.channels_last) and not tensors[0].is_contiguous()
    assert y.dtype == dtype and y.is_contiguous(memory_format=LAYOUTS[last])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.device, dtype)
    pairs = [(y, wanted)]
    pairs += zip(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(wanted, exact, dy.double()), strict=True)
    for a, w in pairs:
        scale = max(1.0, w.abs().max().item()) if w.numel() else 1.0
        torch.testing.assert_close(a.double() / scale, w / scale, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 16, 4), (1, 5, 7), (3, 24, 1), (0, 8, 4), (1, 8, 16)])
@pytest.mark.parametrize("styled", [True, False])
def test_pad_ring(device, shape, styled, layout, dtype):
    n, c, r = shape
    x = random(n, c, r, r, dtype=dtype, layout=layout)
    tensors = [x, random(n, c, 4 * (r + 1), seed=1, dtype=dtype), random(n, c, seed=2, dtype=dtype)][: 2 + styled]
    check(cuda.pad_ring, reference.pad_ring, [t.to(device) for t in tensors], dtype)


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("up, down, taps, pad", UPFIRDN)
def test_upfirdn2d(device, up, down, taps, pad, layout, dtype):
    f = random(*taps, seed=1).to(device) / taps[0]
    for shape in ((2, 16, 7, 6), (1, 3, 5, 9), (0, 8, 6, 6)):
        x = random(*shape, dtype=dtype, layout=layout).to(device)
        check(lambda x: cuda.upfirdn2d(x, f, up, down, pad, 1.5),
              lambda x: reference.upfirdn2d(x, f, up, down, pad, 1.5), [x], dtype)  # fmt: skip


@pytest.mark.parametrize("up, down, taps, pad", [UPFIRDN[1], UPFIRDN[2], UPFIRDN[6]])
def test_second_gradients_of_upfirdn2d(device, up, down, taps, pad):
    x, f = random(1, 2, 4, 3).to(device).requires_grad_(), random(*taps, seed=1).to(device)
    # Squared, so that the first gradient depends on the input and the second one has something to find.
    assert gradcheck(lambda x: cuda.upfirdn2d(x, f, up, down, pad, 4.0).square(), x, fast_mode=True)
    assert gradgradcheck(lambda x: cuda.upfirdn2d(x, f, up, down, pad, 4.0).square(), x, fast_mode=True)


@pytest.mark.parametrize("styled", [True, False])
def test_second_gradients_of_pad_ring(device, styled):
    tensors = [random(1, 2, 2, 2), random(1, 2, 12, seed=1), random(1, 2, seed=2)][: 2 + styled]
    tensors = [t.to(device).requires_grad_() for t in tensors]
    assert gradcheck(lambda *t: cuda.pad_ring(*t).square(), tensors, fast_mode=True)
    assert gradgradcheck(lambda *t: cuda.pad_ring(*t).square(), tensors, fast_mode=True)


def test_a_filter_that_is_learnt_has_its_gradient(device):
    x, f = random(1, 2, 5, 5).to(device), random(4, 4, seed=1).to(device).requires_grad_()
    actual, expected = (torch.autograd.grad(m.upfirdn2d(x, f).square().sum(), f) for m in (cuda, reference))
    torch.testing.assert_close(actual, expected)


def test_strides_alignment_and_wide_indices(device, monkeypatch):
    """Slices, transposes, expanded and unaligned tensors are read as what they show; so with 64-bit indices."""
    x, whole = random(2, 8, 6, 12, dtype=torch.float32).to(device), random(1 + 2 * 8 * 6 * 6, dtype=torch.float32)
    views = [x[..., ::2], x[:, ::2, :, :6], x.transpose(2, 3)[..., :6, :], x[:1, :, :6, :6].expand(3, -1, -1, -1)]
    for small in (cuda.SMALL, 0):
        monkeypatch.setattr(cuda, "SMALL", small)
        for view in (*views, whole[1:].view(2, 8, 6, 6).to(device)):
            square, ring = view[..., :6, :6], torch.ones(28, device=device).expand(*view.shape[:2], 28)
            torch.testing.assert_close(cuda.pad_ring(square, ring), F.pad(square, (1, 1, 1, 1), value=1.0))
            style = random(1, view.shape[1], dtype=torch.float32).to(device)  # one for all images
            torch.testing.assert_close(
                cuda.pad_ring(square, ring, style), reference.pad_ring(square, ring, style.expand(len(view), -1))
            )
            f = ops.fir_filter().to(device)
            torch.testing.assert_close(cuda.upfirdn2d(view, f), reference.upfirdn2d(view, f))


def test_nan_stays_where_it_is(device):
    x = torch.full((1, 4, 2, 2), float("nan"), device=device)
    y = cuda.pad_ring(x, torch.ones(1, 4, 12, device=device), torch.ones(1, 4, device=device))
    assert y[..., 1:-1, 1:-1].isnan().all() and (ops.take_ring(y) == 1).all()


@pytest.mark.parametrize("x, ring, message", [
    ((1, 2, 4, 4), (1, 2, 19), r"ring: expected \[1, 2, 20\] for x \[1, 2, 4, 4\], got \[1, 2, 19\]"),
    ((2, 2, 4, 4), (1, 2, 20), "ring: expected"), ((1, 2, 4, 5), (1, 2, 20), "x: expected square maps"),
])  # fmt: skip
def test_shapes_that_do_not_fit(x, ring, message):
    with pytest.raises(ValueError, match=message):
        cuda.pad_ring(torch.ones(x), torch.ones(ring))


# ----------------------------------------------------------------------------------------------------------------------
# Compiling for GPUs, of which none need be here


class Compiler:
    """In place of a kernel: compiles what a launch asks for to machine code, and runs nothing."""

    def __init__(self, kernel, arch):
        self.kernel, self.arch, self.sizes = kernel, arch, []

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **constants):
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
        assert set(given) == set(self.kernel.arg_names) and len(given) == len(args) + len(constants)
        fixed = {p.name: given[p.name] for p in self.kernel.params if p.is_constexpr or given[p.name] is None}
        kinds = {name: "constexpr" if name in fixed else self.kind(given[name]) for name in self.kernel.arg_names}
        compiled = triton.compile(ASTSource(self.kernel, kinds, fixed), target=GPUTarget("cuda", self.arch, 32))
        self.sizes.append(len(compiled.asm["cubin"]))

    @staticmethod
    def kind(value):
        return (
            f"*{ELEMENTS[value.dtype]}" if isinstance(value, torch.Tensor) else {int: "i32", float: "fp32"}[type(value)]
        )


# 75, Turing, is the oldest that torch's CUDA 13 knows; 90 is Hopper.
@pytest.mark.parametrize("arch, dtype, layout", [
    (75, torch.float32, LAYOUTS[1]), (75, torch.bfloat16, LAYOUTS[1]), (90, torch.float64, LAYOUTS[0]),
    (90, torch.float16, LAYOUTS[0]), (90, torch.bfloat16, LAYOUTS[1]),
])  # fmt: skip
def test_the_kernels_compile(dtype, layout, arch, monkeypatch):
    stands = [Compiler(getattr(cuda, name), arch) for name in NAMES]
    for name, stand in zip(NAMES, stands, strict=True):
        monkeypatch.setattr(cuda, name, stand)
    x, ring, f = random(1, 2, 4, 4, dtype=dtype, layout=layout), torch.ones(1, 2, 20), ops.fir_filter()
    cuda.pad_ring(x, ring.to(dtype), torch.ones(1, 2))
    cuda.pad_ring(x, ring)
    for up, down, _, pad in UPFIRDN[:3]:
        cuda.upfirdn2d(x, f, up, down, pad)
    assert [len(stand.sizes) for stand in stands] == [2, 3] and all(min(stand.sizes) > 0 for stand in stands)


# ----------------------------------------------------------------------------------------------------------------------
# Who takes the kernels


class OnGPU(torch.Tensor):
    """A tensor that says so."""

    is_cuda = True


@pytest.fixture
def fresh():
    ops.kernels.cache_clear()
    yield
    ops.kernels.cache_clear()


def test_tensors_on_a_gpu_take_the_kernels(fresh, device):
    x, ring = torch.ones(1, 1, 2, 2, device=device), torch.ones(1, 1, 12, device=device)
    assert ops.kernels(x.device) is cuda
    assert "PadRing" in type(ops.pad_ring(x.as_subclass(OnGPU).requires_grad_(), ring).grad_fn).__name__
    if device == "cpu":
        assert "PadRing" not in type(ops.pad_ring(x.requires_grad_(), ring).grad_fn).__name__


def test_torch_compile_takes_the_reference(monkeypatch):
    monkeypatch.setattr(ops, "kernels", None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.ones(1, 1, 2, 2).as_subclass(OnGPU)
    assert ops.pad_ring(x, torch.ones(1, 1, 12)).shape == (1, 1, 4, 4)


@pytest.mark.parametrize("name, value, why", [("triton", None, "ImportError: Triton is not installed"),
                                              ("pad_ring_kernel", {}, "KeyError")])  # fmt: skip
def test_where_no_kernel_runs_a_warning_says_why_once(name, value, why, fresh, monkeypatch, recwarn):
    monkeypatch.setattr(cuda, name, value)
    for _ in range(2):
        x = torch.ones(1, 1, 2, 2).as_subclass(OnGPU)
        assert (ops.pad_ring(x, torch.ones(1, 1, 12)) == 1).all()
    said = str(recwarn[0].message)
    assert len(recwarn) == 1 and "no Triton kernels on cpu, PyTorch's own" in said and why in said
