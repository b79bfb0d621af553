"""Ops against plain loops, and their gradients and second gradients in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from padinv.ops import bias_act, fir_filter, pad_ring, take_ring, upfirdn2d


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop_upfirdn2d(x, f, up, down, pad, gain):
    """The definition, pixel by pixel."""
    left, right, top, bottom = pad
    n, c, h, w = x.shape
    height, width = h * up + top + bottom, w * up + left + right
    grid = np.zeros((n, c, height, width))
    for i in range(h):
        for j in range(w):
            if 0 <= i * up + top < height and 0 <= j * up + left < width:
                grid[:, :, i * up + top, j * up + left] = x[:, :, i, j]
    kh, kw = f.shape
    y = np.zeros((n, c, (height - kh) // down + 1, (width - kw) // down + 1))
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            for a in range(kh):
                for b in range(kw):
                    pixel = grid[:, :, i * down + kh - 1 - a, j * down + kw - 1 - b]
                    y[:, :, i, j] += gain * f[a, b] * pixel
    return y


@pytest.mark.parametrize("up", [1, 2, 3])
@pytest.mark.parametrize("down", [1, 2])
@pytest.mark.parametrize("pad", [(0, 0, 0, 0), (2, 1, 2, 1), (3, 0, 1, 2), (-1, 2, 1, -1), (-1, -1, -1, -1)])
def test_upfirdn2d_is_its_definition(up, down, pad):
    x, f = random(2, 3, 6, 7), random(4, 3, seed=1)
    expected = loop_upfirdn2d(x.numpy(), f.numpy(), up, down, pad, gain=1.7)
    np.testing.assert_allclose(upfirdn2d(x, f, up, down, pad, gain=1.7), expected, atol=1e-12)


def test_fir_filter():
    f = fir_filter()
    assert f.shape == (4, 4) and f.sum() == 1
    assert torch.equal(f[0] * 64, torch.tensor([1.0, 3.0, 3.0, 1.0]))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3, 2)])
def test_bias_act(shape):
    x, bias = random(*shape), random(5, seed=1)
    y = x + bias.reshape(1, 5, *[1] * (len(shape) - 2))
    torch.testing.assert_close(bias_act(x, bias, act="linear"), y)
    torch.testing.assert_close(bias_act(x, bias), torch.where(y > 0, y, 0.2 * y) * 2**0.5)
    torch.testing.assert_close(bias_act(x, bias, gain=3.0), torch.where(y > 0, y, 0.2 * y) * 3)
    assert torch.equal(bias_act(x, act="linear"), x)
    with pytest.raises(ValueError, match="act: expected 'lrelu' or 'linear', got 'relu'"):
        bias_act(x, act="relu")


def test_bias_act_with_noise_and_clamp():
    x, bias = random(2, 5, 3, 4), random(5, seed=1)
    for noise in (random(3, 4, seed=2), random(2, 1, 3, 4, seed=2)):
        y = x + noise + bias[:, None, None]
        expected = (torch.where(y > 0, y, 0.2 * y) * 2**0.5).clamp(-1, 1)
        torch.testing.assert_close(bias_act(x, bias, noise=noise, clamp=1.0), expected)


@pytest.mark.parametrize("r", [1, 2, 4, 9])
def test_pad_ring_and_take_ring_are_inverse(r):
    x, ring = random(2, 3, r, r), random(2, 3, 4 * (r + 1), seed=1)
    y = pad_ring(x, ring)
    assert y.shape == (2, 3, r + 2, r + 2)
    assert torch.equal(y[:, :, 1:-1, 1:-1], x)
    assert torch.equal(take_ring(y), ring)
    style = random(2, 3, seed=2)
    assert torch.equal(pad_ring(x, ring, style), pad_ring(x * style[:, :, None, None], ring))


def test_the_order_of_the_ring():
    y = pad_ring(torch.zeros(1, 1, 2, 2), torch.arange(1.0, 13.0).reshape(1, 1, 12))[0, 0]
    assert y.tolist() == [[1, 2, 3, 4], [9, 0, 0, 11], [10, 0, 0, 12], [5, 6, 7, 8]]


def test_a_ring_of_zeros_is_zero_padding():
    x, weight = random(2, 3, 5, 5), random(4, 3, 3, 3, seed=1)
    padded = pad_ring(x, torch.zeros(2, 3, 24))
    assert torch.equal(padded, F.pad(x, (1, 1, 1, 1)))
    torch.testing.assert_close(F.conv2d(padded, weight), F.conv2d(x, weight, padding=1))


@pytest.mark.parametrize(
    "op, inputs",
    [
        (lambda x, f: upfirdn2d(x, f, up=2, down=1, pad=(2, 1, -1, 2), gain=4), [(1, 2, 3, 3), (4, 4)]),
        (lambda x, f: upfirdn2d(x, f, up=1, down=2, pad=(1, 1, 1, 1)), [(1, 2, 4, 4), (4, 4)]),
        (bias_act, [(2, 3, 2, 2), (3,)]),
        (lambda x, bias, noise: bias_act(x, bias, noise=noise), [(2, 3, 2, 2), (3,), (2, 2)]),
        (lambda x, ring, style: pad_ring(x, ring, style).square(), [(1, 2, 3, 3), (1, 2, 16), (1, 2)]),
        (lambda x: take_ring(x).square(), [(1, 2, 4, 4)]),
    ],
    ids=["up", "down", "bias_act", "noise", "pad_ring", "take_ring"],
)
def test_ops_are_differentiable_twice(op, inputs):
    tensors = [random(*shape, seed=i).requires_grad_() for i, shape in enumerate(inputs)]
    assert gradcheck(op, tensors)
    assert gradgradcheck(op, tensors)


def test_ops_leave_their_arguments_alone():
    x, bias, ring, f = random(1, 2, 4, 4), random(2), random(1, 2, 20), random(4, 4)
    before = [t.clone() for t in (x, bias, ring, f)]
    bias_act(x, bias), upfirdn2d(x, f, up=2, down=2, pad=(1, 1, 1, 1)), pad_ring(x, ring), take_ring(x)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, bias, ring, f), strict=True))
