"""The CUDA operations: every index of every kernel on the CPU, formulas of gradients, compilation, and GPUs."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from padinv import ops
from padinv.ops import cuda

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def random(*shape, seed=0, dtype=torch.float64, layout=torch.contiguous_format):
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).contiguous(memory_format=layout if len(shape) == 4 else torch.contiguous_format)


# ----------------------------------------------------------------------------------------------------------------------
# Formulas, in float64 through the registered operations


CASES = {
    "bias_act": (cuda.bias_act_op, [random(2, 3, 4, 2), random(3, seed=1), random(4, 2, seed=2)], [0.2, 1.5, 2.0]),
    "linear": (cuda.bias_act_op, [random(4, 3), random(3, seed=1), None], [1.0, 1.0, None]),
    "noise of each": (cuda.bias_act_op, [random(2, 3, 4, 2), None, random(2, 1, 4, 2, seed=2)], [0.2, 1.5, None]),
    "up": (cuda.upfirdn2d_op, [random(1, 2, 3, 4)], [random(4, 3, seed=1), 2, 1, [2, 1, -1, 2], 4.0, True]),
    "down": (cuda.upfirdn2d_op, [random(1, 2, 5, 4)], [random(4, 4, seed=1), 1, 2, [1, 1, 1, 2], 1.0, False]),
    "both": (cuda.upfirdn2d_op, [random(1, 1, 5, 3)], [random(3, 4, seed=1), 3, 2, [3, 2, 2, 4], 1.0, True]),
    "pad_ring": (cuda.pad_ring_op, [random(2, 3, 3, 3), random(2, 3, 16, seed=1), random(2, 3, seed=2)], []),
    "unstyled": (cuda.pad_ring_op, [random(2, 3, 3, 3), random(2, 3, 16, seed=1), None], []),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_their_gradients(name):
    op, tensors, settings = CASES[name]
    tensors = [None if t is None else t.clone().requires_grad_() for t in tensors]
    # Squared, so that the first gradient depends on the input and the second one has something to find.
    assert gradcheck(lambda *t: op(*t, *settings).square(), tensors)
    assert gradgradcheck(lambda *t: op(*t, *settings).square(), tensors)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(name, layout):
    op, tensors, settings = CASES[name]
    shaped = [t if t is None or t.ndim != 4 else t.contiguous(memory_format=layout) for t in tensors]
    torch.library.opcheck(op, (*[None if t is None else t.detach().requires_grad_() for t in shaped], *settings))
    if name == "pad_ring":
        dy = random(2, 3, 5, 5, seed=3, layout=layout)
        torch.library.opcheck(cuda.pad_ring_backward, (dy, shaped[0], shaped[2]))
    if op is cuda.bias_act_op:
        torch.library.opcheck(cuda.bias_act_backward, (shaped[0], 0.5 * shaped[0], *settings))


def test_compiled_without_a_graph_break():
    def f(x, bias, noise, ring, style):
        x = cuda.pad_ring(cuda.bias_act(x, bias, noise=noise), ring, style)
        return cuda.upfirdn2d(x, ops.fir_filter(), up=2, pad=(2, 1, 2, 1), gain=4).square().sum()

    torch.compiler.reset()
    shapes = (2, 3, 4, 4), (3,), (4, 4), (2, 3, 20), (2, 3)
    tensors = [random(*s, seed=i, dtype=torch.float32).requires_grad_() for i, s in enumerate(shapes)]
    expected = torch.autograd.grad(f(*tensors), tensors)
    actual = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    torch.testing.assert_close(actual, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels: the compiled library runs the same functors on the CPU, one item after another


@pytest.fixture(scope="session")
def lib():
    if not cuda.nvcc():
        pytest.skip("no nvcc: the CUDA kernels are not compiled")
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    lib = cuda.library("{}.{}".format(*capability))
    assert lib is not None, "the kernels do not compile"
    return lib


@pytest.fixture(params=["cpu", "cuda"])
def device(request, lib, monkeypatch):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setattr(cuda, "kernels", lambda x: lib if x.dtype in cuda.DTYPES else None)
    return request.param


def check(op, reference, tensors, layout, dtype):
    """Results and gradients of op in dtype against those of the reference in float64."""
    half = dtype != torch.float32
    tolerance = {"rtol": 0.02, "atol": 0.02} if half else {"rtol": 1e-5, "atol": 1e-5}
    exact = [None if t is None else t.double().requires_grad_() for t in tensors]
    tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y, expected = op(*tensors), reference(*exact)
    assert y.dtype == dtype and y.shape == expected.shape and cuda.layout(y) == cuda.layout(tensors[0])
    torch.testing.assert_close(y.double(), expected, **tolerance)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.device, dtype)
    given = [(t, e) for t, e in zip(tensors, exact, strict=True) if t is not None]
    actual = torch.autograd.grad(y, [t for t, _ in given], dy)
    wanted = torch.autograd.grad(expected, [e for _, e in given], dy.double())
    for a, w in zip(actual, wanted, strict=True):
        scale = max(1.0, w.abs().max().item()) if w.numel() else 1.0
        torch.testing.assert_close(a.double() / scale, w / scale, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(2, 16, 4, 8), (3, 5, 3, 7), (2, 8, 5, 5), (1, 3, 8, 16), (0, 8, 4, 4), (2, 8, 0, 3)]
)
@pytest.mark.parametrize("noise", ["none", "shared", "each"])
def test_bias_act(device, shape, layout, dtype, noise):
    n, c, h, w = shape
    x = random(*shape, dtype=dtype, layout=layout).to(device)
    bias = random(c, seed=1, dtype=torch.float32).to(device)
    maps = {"none": None, "shared": random(h, w, seed=2), "each": random(n, 1, h, w, seed=2)}[noise]
    maps = None if maps is None else maps.to(device, dtype)
    clamp = 1.5 if dtype == torch.float32 else None  # rounded to the bound, a number loses its gradient
    check(lambda x, b, m: cuda.bias_act(x, b, noise=m, clamp=clamp),
          lambda x, b, m: ops.bias_act.reference(x, b, noise=m, clamp=clamp),
          [x, bias, maps], layout, dtype)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act, gain", [("linear", None), ("linear", 0.5), ("lrelu", None)])
def test_bias_act_of_vectors(device, act, gain, dtype):
    for shape in ((4, 8), (3, 5), (2, 5, 6)):
        x, bias = random(*shape, dtype=dtype).to(device), random(shape[1], seed=1, dtype=dtype).to(device)
        check(lambda x, b: cuda.bias_act(x, b, act, gain), lambda x, b: ops.bias_act.reference(x, b, act, gain),
              [x, bias], torch.contiguous_format, dtype)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("up, down, taps, pad", [
    (1, 1, (4, 4), (1, 1, 1, 1)), (2, 1, (4, 4), (2, 1, 2, 1)), (1, 2, (4, 4), (1, 1, 1, 1)),
    (2, 1, (4, 4), (-1, 2, 3, -2)), (1, 2, (4, 4), (-2, 3, 1, 0)), (3, 2, (5, 3), (2, 3, 4, 1)),
    (1, 1, (1, 2), (0, 0, 0, 0)), (2, 2, (4, 4), (2, 1, 1, 3)), (4, 1, (8, 8), (5, 4, 5, 4)),
])  # fmt: skip
def test_upfirdn2d(device, up, down, taps, pad, layout, dtype):
    f = random(*taps, seed=1, dtype=torch.float32).to(device) / taps[0]
    for shape in ((2, 16, 7, 6), (1, 3, 5, 9), (0, 8, 6, 6)):
        x = random(*shape, dtype=dtype, layout=layout).to(device)
        check(lambda x: cuda.upfirdn2d(x, f, up, down, pad, 1.5),
              lambda x: ops.upfirdn2d.reference(x, f.double(), up, down, pad, 1.5), [x], layout, dtype)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("styled", [True, False])
@pytest.mark.parametrize("shape", [(2, 16, 4), (1, 5, 7), (3, 24, 1), (0, 8, 4), (1, 8, 32)])
def test_pad_ring(device, shape, styled, layout, dtype):
    n, c, r = shape
    x = random(n, c, r, r, dtype=dtype, layout=layout).to(device)
    ring = random(n, c, 4 * (r + 1), seed=1, dtype=dtype).to(device)
    style = random(n, c, seed=2, dtype=torch.float32).to(device) if styled else None
    check(cuda.pad_ring, ops.pad_ring.reference, [x, ring, style], layout, dtype)


def test_strides_of_every_kind(device):
    """Slices, transposes and expanded tensors are read as what they show."""
    x = random(2, 8, 6, 12, dtype=torch.float32).to(device)
    for view in (x[..., ::2], x[:, ::2, :, :6], x.transpose(2, 3)[..., :6, :], x[:1, :, :6, :6].expand(3, -1, -1, -1)):
        torch.testing.assert_close(cuda.bias_act(view), ops.bias_act.reference(view))
        square, ring = view[..., :6, :6], torch.ones(len(view), view.shape[1], 28).to(device)
        torch.testing.assert_close(cuda.pad_ring(square, ring), F.pad(square, (1, 1, 1, 1), value=1.0))
        f = ops.fir_filter().to(device)
        torch.testing.assert_close(cuda.upfirdn2d(view, f), ops.upfirdn2d.reference(view, f))


def test_tensors_that_are_not_aligned(device):
    whole = random(1 + 2 * 8 * 4 * 4, dtype=torch.bfloat16).to(device)
    x = whole[1:].view(2, 8, 4, 4)
    torch.testing.assert_close(cuda.bias_act(x), ops.bias_act.reference(x), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamp(device, dtype):
    x = random(2, 8, 4, 4, dtype=dtype).to(device)
    expected = ops.bias_act.reference(x.float(), clamp=0.5).to(dtype)
    torch.testing.assert_close(cuda.bias_act(x, clamp=0.5), expected)


def test_nan_stays_nan(device):
    assert cuda.bias_act(torch.full((1, 4, 2, 2), float("nan"), device=device), clamp=1.0).isnan().all()


# ----------------------------------------------------------------------------------------------------------------------
# GPUs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_public_operations_take_the_kernels(lib):
    x = random(2, 8, 8, 8, dtype=torch.float32).cuda().requires_grad_()
    y = ops.bias_act(x, torch.zeros(8).cuda())
    assert "bias_act" in type(y.grad_fn).__name__.lower() and "leaky" not in type(y.grad_fn).__name__.lower()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_the_device_of_the_tensors_counts(lib):
    x = torch.randn(2, 8, 8, 8, device="cuda:1")
    torch.testing.assert_close(ops.bias_act(x), ops.bias_act.reference(x))


# ----------------------------------------------------------------------------------------------------------------------
# Compiling


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A source that does not compile, and a folder of its own; the warnings are fresh."""
    source = tmp_path / "ops.cu"
    source.write_text("this is no C++")
    monkeypatch.setattr(cuda, "SOURCE", source)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    cuda.library.cache_clear()
    yield tmp_path
    cuda.library.cache_clear()


def test_a_failure_is_remembered_and_said_once(broken, monkeypatch, recwarn):
    attempts = []
    build = cuda.build
    monkeypatch.setattr(cuda, "build", lambda arch: attempts.append(arch) or build(arch))
    with pytest.warns(UserWarning, match=r"no CUDA kernels for sm_9.0, .* python -m padinv.ops build"):
        assert cuda.library("9.0") is None
    assert cuda.library("9.0") is None and attempts == ["9.0"]
    cuda.library.cache_clear()  # as in the next process
    with pytest.warns(UserWarning, match="no CUDA kernels"):
        assert cuda.library("9.0") is None
    assert attempts == ["9.0"]
    (marker,) = broken.rglob("*.failed.json")
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"compiler": "another"}))
    cuda.library.cache_clear()
    with pytest.warns(UserWarning, match="no CUDA kernels"):
        assert cuda.library("9.0") is None
    assert attempts == ["9.0", "9.0"]


def test_the_build_command_without_a_compiler(tmp_path):
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CUDA_HOME": "/nowhere", "PATH": "/nowhere"}
    command = [sys.executable, "-m", "padinv.ops", "build", "--arch", "9.0"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "padinv.ops: sm_9.0: no nvcc found" in run.stderr


def test_nothing_is_compiled_at_import():
    code = "import sys, padinv.ops; sys.exit('torch.utils.cpp_extension' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
