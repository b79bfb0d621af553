"""`padinv.compile`: the plain networks' results, and what becomes of it where OpenVINO cannot help."""

import copy
import dataclasses
import sys

import pytest
import torch

import padinv
from padinv import Code, Encoder, Padding

SMALL = {"input_resolution": 32, "widths": (4, 6, 8, 8), "depths": (1, 1, 2, 1), "se_reduction": 2,
         "pyramid_channels": 8, "head_channels": 4, "padding_channels": 6, "padding_depth": 1}  # fmt: skip


@pytest.fixture(autouse=True)
def openvino():
    return pytest.importorskip("openvino", reason="padinv.compile needs OpenVINO")


def trained(G, **overrides) -> Encoder:
    torch.manual_seed(0)
    E = Encoder.for_generator(G, **SMALL | overrides)
    for p in E.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return E.eval().requires_grad_(False)


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def images(n: int, size: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Results


def test_a_generator_of_every_layout_of_codes(tiny, code):
    G, p = padinv.compile(tiny, "fp32"), code.p
    interior = torch.randn(4, tiny.config.channels(16), 16, 16)
    layouts = [
        None, p, dataclasses.replace(p, modulated=True), Padding(p.const, ()), Padding(None, p.rings[:1]),
        dataclasses.replace(p, interior=interior), Padding(None, (), interior=interior),
    ]  # fmt: skip
    for p in layouts:
        close(G(Code(code.w, p)), tiny(Code(code.w, p)))
    assert len(G.models) == len(layouts)
    again = 0.5 * code
    close(G.synthesis(again.w, again.p), tiny(again))
    assert len(G.models) == len(layouts), "compiled once, for all values"


def test_a_generator_of_every_batch_and_noise(tiny, code):
    G = padinv.compile(tiny, "fp32")
    for n in (1, 3, 4):
        close(G(code[:n], "const"), tiny(code[:n]))
    close(G(code[1:2], noise="none"), tiny(code[1:2], noise="none"))
    assert len(G.models) == 4
    torch.manual_seed(0)
    fresh = G(code, "random")
    torch.manual_seed(0)
    assert torch.equal(fresh, tiny(code, "random")) and G(code[:0]).shape == (0, 3, 32, 32) and len(G.models) == 4


@pytest.mark.parametrize("overrides", [
    {}, {"padded_resolutions": 0}, {"padded_resolutions": 0, "replace_const": False}, {"predict_w": False},
    {"modulated": True, "base_w": True}, {"interior": 16}, {"layout": "centre", "replace_const": False},
])  # fmt: skip
def test_an_encoder_of_every_kind(tiny, overrides):
    plain = trained(tiny, **overrides)
    E = padinv.compile(plain, "fp32")
    for x in (images(2), images(1), images(2, size=48), images(1).double()):  # resized before it is compiled
        actual, expected = E(x), plain(x.float())
        assert (actual.p is None) == (expected.p is None)
        assert actual.p is None or actual.p.modulated == expected.p.modulated
        for a, b in zip(actual.tensors, expected.tensors, strict=True):
            close(a, b)
    assert len(E.models) == 2


def test_in_bfloat16(tiny, code):
    y = padinv.compile(tiny, "bf16")(code)
    assert y.dtype == torch.float32 and (y - tiny(code)).abs().mean() < 0.02 * tiny(code).abs().mean()
    assert padinv.compile(tiny).precision in ("fp32", "bf16")


def test_under_autocast_and_inference_mode(tiny, code):
    G, expected = padinv.compile(tiny, "fp32"), tiny(code)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        close(G(code.clone()), expected)


def test_inversion_with_both(tiny):
    plain = trained(tiny)
    E, G, x = padinv.compile(plain, "fp32"), padinv.compile(tiny, "fp32"), images(2)
    for steps in (0, 2):
        code = padinv.invert(x, plain, tiny, steps=steps)
        for a, b in zip(padinv.invert(x, E, G, steps=steps).tensors, code.tensors, strict=True):
            close(a, b, atol=1e-3)
    close(G(code), tiny(code))


# ----------------------------------------------------------------------------------------------------------------------
# Where the plain network runs, and errors


def test_gradients_are_those_of_the_plain_network(tiny, code):
    plain = trained(tiny)
    G, E = padinv.compile(tiny, "fp32"), padinv.compile(plain, "fp32")
    w = code.w.clone().requires_grad_()
    G.synthesis(w, code.p).square().sum().backward()
    expected = w.grad.clone()
    w.grad = None
    tiny.synthesis(w, code.p).square().sum().backward()
    assert expected.abs().sum() > 0 and torch.equal(w.grad, expected)
    assert E(images(2).requires_grad_()).w.requires_grad and not G.models and not E.models
    with torch.no_grad():
        assert not G.synthesis(w, code.p).requires_grad and len(G.models) == 1


def test_training_and_residual_encoders_stay_plain(tiny, code):
    base = trained(tiny)
    E = padinv.compile(base.train())
    with torch.no_grad():
        E(images(2))
    assert not E.models
    residual = Encoder.residual_of(base.eval()).eval().requires_grad_(False)
    x, start = images(2), base(images(2))
    close(padinv.compile(residual)(x, tiny(start), start).w, residual(x, tiny(start), start).w, atol=0)
    with pytest.raises(ValueError, match="y, code: this encoder takes an image x, its inversion"):
        padinv.compile(residual)(x)


def test_weights_are_those_of_the_first_call(tiny, code):
    plain = copy.deepcopy(tiny)
    G = padinv.compile(plain, "fp32")
    first = G(code)
    with torch.no_grad():
        plain.blocks[1].conv1.bias.add_(1)
    assert torch.equal(G(code), first)
    close(padinv.compile(plain, "fp32")(code), plain(code))


def test_attributes_and_checks_are_the_network_s(tiny, code):
    G = padinv.compile(tiny)
    assert G.config is tiny.config and G.num_ws == 8 and torch.equal(G.w_avg, tiny.w_avg)
    assert G.mapping(torch.zeros(2, 16)).shape == (2, 8, 16) and copy.copy(G).network is tiny
    with pytest.raises(ValueError, match=r"w: expected \[N, 8, 16\]"):
        G(Code(code.w[:, :7]))
    with pytest.raises(ValueError, match="noise: expected one of"):
        G(code, noise="some")


def test_what_cannot_be_compiled(tiny):
    with pytest.raises(TypeError, match="expected a Generator or an Encoder, got Linear"):
        padinv.compile(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="precision: expected one of .*, got 'fp16'"):
        padinv.compile(tiny, "fp16")
    with pytest.raises(ValueError, match="network: expected one on a CPU, got meta"):
        padinv.compile(copy.deepcopy(tiny).to("meta"))


def test_without_openvino_the_fix_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"pip install padinv\[fast\]"):
        padinv.compile(tiny)
