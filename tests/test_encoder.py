"""The encoder: equal to the authors', starts at the generator's own padding, sound under every use."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F

from benchmarks import reference
from padinv.files.checkpoints import encoder_from_padinv_official, load_encoder, save_encoder
from padinv.model.codes import Code, Padding
from padinv.model.encoder import Encoder, EncoderConfig, ResidualBlock
from padinv.model.generator import Generator
from padinv.ops import take_ring

SMALL = {
    "widths": (4, 6, 8, 8), "depths": (1, 1, 2, 1), "se_reduction": 2, "pyramid_channels": 8, "head_channels": 4,
    "padding_channels": 6, "padding_depth": 1,
}  # fmt: skip


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def trained(G, **overrides) -> Encoder:
    """A small encoder with random last layers and running statistics, as after training."""
    torch.manual_seed(0)
    E = Encoder.for_generator(G, **SMALL | overrides)
    for name, t in E.state_dict().items():
        if t.is_floating_point():
            t += 0.1 * (torch.rand_like(t) if name.endswith("running_var") else torch.randn_like(t))
    return E.eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Agreement with the authors' release


def test_official_codes(official):
    with torch.no_grad():
        code = official.E(official.x)
    close(code.w, official.io["style_latents"], atol=1e-4)
    close(code.p.const, official.p.const, atol=1e-4)
    assert len(code.p.rings) == 4
    for ring, expected in zip(code.p.rings, official.p.rings, strict=True):
        close(ring, expected, atol=1e-4)
    close(official.G(code), official.io["image_padded"], atol=1e-4)
    close(official.G(code, noise="none"), official.io["image_padded_no_noise"], atol=1e-4)


def test_official_configuration(official):
    assert official.E.config == EncoderConfig(
        num_ws=10, w_dim=32, channels=(16, 16, 16, 16, 8), input_resolution=256, widths=(8, 8, 16, 16),
        depths=(3, 4, 14, 3), se_reduction=4, pyramid_channels=16, head_channels=32, padding="outright",
        layout="centre", padding_level=1, padding_channels=16, padding_depth=2,
    )  # fmt: skip
    assert official.E.config.level_sizes == [64, 32, 16] and official.E.config.level_heads == [3, 4, 3]


def test_dead_heads_of_the_release_are_dropped(official):
    state = dict(official.encoder_state)
    extra = {key.replace(".9.", ".10.", 1): t for key, t in state.items() if key.startswith("latent_heads.9.")}
    E = encoder_from_padinv_official(state | extra, official.G)
    assert E.config == official.E.config


def test_an_encoder_of_another_generator(official, tiny):
    with pytest.raises(ValueError, match="padding_channels: .* expected 12, the constant's, got 16"):
        encoder_from_padinv_official(official.encoder_state, tiny)
    narrow = Generator(dataclasses.replace(official.G.config, w_dim=16))
    with pytest.raises(ValueError, match=r"heads\.0\.bias is \[3, 32\], expected \[3, 16\]"):
        encoder_from_padinv_official(official.encoder_state, narrow)
    state = {key: t for key, t in official.encoder_state.items() if not key.startswith("latent_heads.9.")}
    with pytest.raises(ValueError, match=r"not an encoder of PadInv's authors .*latent_heads\.9\.convs\.0\.weight"):
        encoder_from_padinv_official(state, official.G)


# ----------------------------------------------------------------------------------------------------------------------
# Layout of the answer


@pytest.mark.parametrize("replace_const", [True, False])
@pytest.mark.parametrize("padding, layout", [("offset", "aligned"), ("offset", "centre"), ("outright", "centre")])
@pytest.mark.parametrize("rings", [0, 1, 4])
def test_every_number_of_padded_resolutions(tiny, x, rings, replace_const, padding, layout):
    options = {"replace_const": replace_const, "padding": padding, "layout": layout, "padded_resolutions": rings}
    E = trained(tiny, **options, **{"padding_channels": 12} if padding == "outright" else {})
    code = E(x)
    assert code.w.shape == (3, 8, 16)
    if not rings and not replace_const:
        assert code.p is None
    else:
        assert (code.p.const is not None) == replace_const and len(code.p.rings) == rings
    assert tiny(code).shape == (3, 3, 32, 32)


@pytest.mark.parametrize("layout", ["aligned", "centre"])
def test_offset_training_starts_exactly_from_psp(tiny, x, layout):
    torch.manual_seed(0)
    E = Encoder.for_generator(tiny, **SMALL, layout=layout).eval()
    code = E(x)
    assert torch.equal(code.p.const, tiny.const.expand(3, -1, -1, -1))
    assert all(ring.abs().max() == 0 for ring in code.p.rings)
    torch.manual_seed(0)
    psp = Encoder.for_generator(tiny, **SMALL, padded_resolutions=0, replace_const=False).eval()
    assert psp.padding is None and psp(x).p is None
    assert set(psp.state_dict()) == {key for key in E.state_dict() if not key.startswith("padding.")}
    psp.load_state_dict({key: t for key, t in E.state_dict().items() if not key.startswith("padding.")})
    assert torch.equal(psp(x).w, code.w)
    assert torch.allclose(tiny(code), tiny(psp(x)), atol=1e-5)


def test_w_starts_near_w_avg(tiny, x):
    spread = tiny.mapping(torch.randn(500, 16))[:, 0].std()
    E = Encoder.for_generator(tiny, **SMALL)
    assert torch.equal(E.w_avg, tiny.w_avg)
    assert (E(x).w - tiny.w_avg).std() < 0.3 * spread


def test_the_outermost_ring_comes_from_the_border_of_the_image(tiny, x):
    """Aligned rings see what lies beside them: a change in one corner moves the rings there most."""
    E = trained(tiny, input_resolution=64, padded_resolutions=4)
    changed = x.clone()
    changed[:, :, :8, :8] *= -1
    moved = (E(changed).p.rings[3] - E(x).p.rings[3]).abs().mean(dim=(0, 1))  # [132]: top, bottom, left, right
    assert moved[:6].mean() > 2 * moved[34 + 28 : 34 + 34].mean()


def test_aligned_rings_are_those_of_resized_maps(tiny, x):
    """Only edges are resized; that must equal resizing the whole map and taking its ring."""
    branch = trained(tiny).padding
    level = torch.randn(2, 8, 16, 16)
    p = branch(level, tiny.const)
    features = branch.blocks(level)
    for r, head, ring in zip((4, 8, 16, 32), branch.rings, p.rings, strict=True):
        whole = F.interpolate(features, size=(r + 2, r + 2), mode="bicubic", align_corners=True)
        close(ring, head(take_ring(whole)), atol=1e-5)


@pytest.mark.parametrize("num_ws, heads", [(4, [0, 1, 3]), (6, [0, 3, 3]), (10, [3, 4, 3]), (18, [11, 4, 3])])
def test_heads_per_level(num_ws, heads):
    assert EncoderConfig(num_ws=num_ws).level_heads == heads


@pytest.mark.parametrize("overrides", [
    {"strides": (1, 2, 2, 2)}, {"widths": (4, 6, 8), "depths": (1, 1, 1), "strides": (2, 2, 2)},
    {"input_resolution": 48}, {"padding_level": 1}, {"padding_level": 2}, {"head_channels": None},
    {"padding_depth": 2, "padded_resolutions": 2}, {"pyramid_channels": 5},
])  # fmt: skip
def test_other_shapes(tiny, x, overrides):
    assert tiny(trained(tiny, **overrides)(x)).shape == (3, 3, 32, 32)


def test_default_configuration_is_cheap(tiny):
    E = Encoder.for_generator(tiny)
    assert sum(p.numel() for p in E.parameters()) < 6e6


# ----------------------------------------------------------------------------------------------------------------------
# Behaviour


def test_images_of_other_sizes(tiny, x):
    E = trained(tiny)
    large = x.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    close(E(large).w, E(x).w, atol=1e-5)
    assert E(x[..., :17, :17]).w.isfinite().all()
    assert E(x[..., :1, :1]).w.isfinite().all()


def test_a_batch_is_its_images_one_by_one(tiny, x):
    E = trained(tiny)
    for together, apart in zip(
        E(x).tensors, zip(*(E(x[i : i + 1]).tensors for i in range(3)), strict=True), strict=True
    ):
        close(together, torch.cat(apart), atol=1e-5)


def test_the_image_is_not_written_to(tiny, x):
    before = x.clone()
    trained(tiny)(x)
    assert torch.equal(x, before)


def test_gradients_reach_every_parameter(tiny, x):
    E = trained(tiny).train().requires_grad_(True)
    tiny(E(x)).square().mean().backward()
    missing = [name for name, p in E.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_offset_heads_learn_from_their_zeros(tiny, x):
    E = Encoder.for_generator(tiny, **SMALL)
    tiny(E(x)).square().mean().backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in (*E.padding.rings, E.padding.const))


def test_bfloat16_under_autocast(tiny, x):
    E = trained(tiny)
    expected = E(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        code = E(x)
    for a, b in zip(code.tensors, expected.tensors, strict=True):
        assert a.dtype == torch.float32 and a.isfinite().all()
        assert (a - b).abs().mean() < 0.05 * b.abs().mean()


def test_channels_last(tiny, x):
    expected = trained(tiny)(x)
    code = trained(tiny).to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    for a, b in zip(code.tensors, expected.tensors, strict=True):
        close(a, b, atol=1e-5)


def test_compiles_without_a_graph_break(tiny, x):
    torch.compiler.reset()
    E = trained(tiny)
    code = torch.compile(E, fullgraph=True, backend="eager")(x)
    for a, b in zip(code.tensors, E(x).tensors, strict=True):
        close(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "layout, overrides", [("aligned", {}), ("centre", {"padding": "outright", "padding_channels": 12})]
)
def test_it_is_the_plain_reference(tiny, x, layout, overrides):
    """Heads side by side and P on rings alone change nothing in the result."""
    E = trained(tiny, layout=layout, **overrides)
    for a, b in zip(E(x).tensors, reference.encode(E, x).tensors, strict=True):
        close(a, b, atol=2e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Variants: ablations, e4e, ReStyle


def test_a_shared_head_gives_every_ring_and_none_the_branch_itself(tiny, x):
    shared, headless = (
        trained(tiny, padding_heads=heads, padded_resolutions=3, padding_channels=12) for heads in ("shared", "none")
    )
    assert len(shared.padding.rings) == 1 and not headless.padding.rings and headless.padding.const is None
    for E in (shared, headless):
        p = E(x).p
        assert [ring.shape[1] for ring in p.rings] == [tiny.config.channels(r) for r in (4, 8, 16)]
        assert tiny(E(x)).shape == (3, 3, 32, 32)
    # With every weight of the only head at zero but a bias of one, all rings are one.
    torch.nn.init.zeros_(shared.padding.rings[0].weight)
    torch.nn.init.ones_(shared.padding.rings[0].bias)
    assert all(torch.equal(ring, torch.ones_like(ring)) for ring in shared(x).p.rings)


def test_p_alone_keeps_w_at_its_mean(tiny, x):
    E = trained(tiny, predict_w=False)
    code = E(x)
    assert torch.equal(code.w, E.w_avg.expand(3, tiny.num_ws, -1))
    assert not any(name.startswith("heads") for name, _ in E.named_parameters())
    assert (code.p.rings[0][0] - code.p.rings[0][1]).abs().max() > 0


def test_offsets_from_the_first_w(tiny, x):
    E, plain = trained(tiny, base_w=True), trained(tiny)
    heads = plain(x).w - plain.w_avg  # the same weights, each head by itself
    close(E(x).w, E.w_avg + torch.cat((heads[:, :1], heads[:, :1] + heads[:, 1:]), dim=1), atol=1e-5)


def test_modulated_rings_are_multiplied_by_the_style(tiny, x):
    code = trained(tiny, modulated=True)(x)
    assert code.p.modulated and (2 * code)[:1].p.modulated and Code.cat([code, code]).p.modulated
    rings = []
    for i, ring in enumerate(code.p.rings):
        style = tiny.blocks[i].conv1.affine(code.w[:, max(2 * i - 1, 0) + (i > 0)])
        rings.append(ring * style[:, :, None])
    expected = tiny.synthesis(code.w, Padding(code.p.const, tuple(rings)))
    close(tiny(code), expected, atol=1e-4)
    assert (tiny(code) - tiny.synthesis(code.w, dataclasses.replace(code.p, modulated=False))).abs().max() > 1e-2
    with pytest.raises(ValueError, match="different layout"):
        code + Code(code.w, dataclasses.replace(code.p, modulated=False))


def test_modulation_is_kept_in_files(tiny, x, tmp_path):
    code = trained(tiny, modulated=True)(x)
    code.save(tmp_path / "code.safetensors", name="x")
    assert Code.load(tmp_path / "code.safetensors").p.modulated


def test_an_interior_starts_at_nothing_and_belongs_to_the_layout(tiny, x):
    E = Encoder.for_generator(tiny, input_resolution=32, interior=8).eval()
    code, plain = E(x), Encoder.for_generator(tiny, input_resolution=32)
    assert list(code.p.interior.shape[1:]) == [tiny.config.channels(8), 8, 8] and not code.p.interior.any()
    torch.nn.init.normal_(E.padding.interior.weight)
    moved = E(x)
    assert (tiny(moved) - tiny(code)).abs().max() > 0.01
    assert torch.equal(Code.cat([moved[:1], moved[1:]]).p.interior, moved.p.interior)
    assert torch.equal((moved - code).p.interior, moved.p.interior)
    with pytest.raises(ValueError, match="different layout"):
        code + plain.eval()(x)


OF_W = {"padded_resolutions": 0, "replace_const": False}
OUTRIGHT = {"padding": "outright", "padding_channels": 12}


@pytest.mark.parametrize("overrides", [{}, OF_W, {"base_w": True}, {"interior": 8}, OUTRIGHT])
def test_a_residual_encoder_starts_by_changing_nothing(tiny, x, overrides, tmp_path):
    base = trained(tiny, **overrides)
    E = Encoder.residual_of(base).eval()
    code = base(x)
    again = E(x, tiny(code), code)
    assert all(torch.equal(a, b) for a, b in zip(code.tensors, again.tensors, strict=True))
    for head in E.heads:
        torch.nn.init.normal_(head.weight)
    moved, other = E(x, tiny(code), code), E(x, x[:, :, :32, :32], code)
    assert not torch.equal(moved.w, code.w)
    assert torch.equal(moved.w, other.w)  # the inversion's part of the stem is untrained
    torch.nn.init.normal_(E.stem[0].weight)
    assert not torch.equal(E(x, tiny(code), code).w, E(x, x[:, :, :32, :32], code).w)
    save_encoder(E, tmp_path / "e.safetensors", half=False)
    loaded = load_encoder(tmp_path / "e.safetensors")
    E.requires_grad_(False)
    assert torch.equal(loaded(x, tiny(code), code).w, E(x, tiny(code), code).w)


def test_without_heads_no_residual_encoder_can_start(tiny):
    with pytest.raises(ValueError, match='base: padding_heads "none" leaves nothing to start from zero'):
        Encoder.residual_of(trained(tiny, padding_heads="none", padding_channels=12))


def test_a_residual_encoder_wants_the_inversion_and_others_do_not(tiny, x):
    base = trained(tiny)
    E, code = Encoder.residual_of(base), base(x)
    with pytest.raises(ValueError, match="y, code: this encoder takes an image x, its inversion y and that code"):
        E(x)
    with pytest.raises(ValueError, match="y, code: this encoder takes images x alone"):
        base(x, tiny(code), code)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 1, 64, 64), (2, 4, 64, 64), (2, 3, 64, 32), (2, 64, 64, 3)])
def test_images_of_a_wrong_shape(tiny, shape):
    with pytest.raises(
        ValueError, match=r"x: expected square float images \[N, 3, S, S\] in \[−1, 1\], got torch.float32"
    ):
        trained(tiny)(torch.zeros(shape))


def test_images_of_bytes(tiny):
    with pytest.raises(ValueError, match="x: expected square float images .* got torch.uint8"):
        trained(tiny)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize("overrides, message", [
    ({"padding": "reflect"}, "padding: expected one of ('offset', 'outright'), got 'reflect'"),
    ({"layout": "tiled"}, "layout: expected one of ('aligned', 'centre'), got 'tiled'"),
    ({"padding_level": 3}, "padding_level: expected one of (0, 1, 2), got 3"),
    ({"padded_resolutions": 6}, "padded_resolutions: expected 0 to 5, the generator's resolutions, got 6"),
    ({"padded_resolutions": -1}, "padded_resolutions: expected 0 to 5, the generator's resolutions, got -1"),
    ({"widths": (8, 8)}, "widths, depths, strides: expected one number for each of at least 3 stages"),
    ({"padding": "outright"}, "padding_channels: outright padding or padding_heads none take the P branch as it is"),
    ({"padding_heads": "none"}, "padding_channels: outright padding or padding_heads none take"),
    ({"padding_heads": "all"}, "padding_heads: expected one of ('layer', 'shared', 'none'), got 'all'"),
    ({"interior": 12}, "interior: expected one of (0, 4, 8, 16, 32, 64), got 12"),
    ({"predict_w": False, "padded_resolutions": 0, "replace_const": False}, "predict_w: an encoder without w"),
    ({"input_resolution": 16}, "strides: (2, 2, 2, 2) leave nothing of 16² images"),
])  # fmt: skip
def test_configurations_that_make_no_sense(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EncoderConfig(**overrides)


def test_gradients_of_few_channels(x):
    """Those of a strided 1×1 convolution oneDNN 3.11 gets wrong in channels_last, below a block of 8 or 16 channels."""
    torch.manual_seed(0)
    block, gradients = ResidualBlock(3, 6, 2, 2).to(memory_format=torch.channels_last), []
    for enabled in (True, False):
        block.zero_grad()
        with torch.backends.mkldnn.flags(enabled=enabled):
            block(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        gradients.append([t.grad.clone() for t in block.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
