"""The generator: equal to three other projects', and sound under batches, gradients, precisions, compilation."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import reference
from padinv.model.codes import Code, Padding
from padinv.model.generator import Generator, GeneratorConfig
from padinv.ops import bias_act, pad_ring

ATOL = 1e-4  # float32 on a CPU, by the acceptance criterion of every fixture


def close(actual, expected, atol=ATOL):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# ----------------------------------------------------------------------------------------------------------------------
# Agreement with other projects


def test_official_mapping_and_image(official):
    w = official.G.mapping(official.io["z"])
    assert w.shape == (2, 10, 32)
    close(w[:, 3], official.io["w"])
    close(official.G.synthesis(w), official.io["image_from_z"])


def test_official_images_with_and_without_padding(official):
    G, io, code = official.G, official.io, Code(official.io["style_latents"], official.p)
    close(G.synthesis(code.w), io["image_wp_only"])
    close(G(code), io["image_padded"])
    close(G(code, noise="none"), io["image_padded_no_noise"])


def test_nvlabs(nvlabs):
    G, io = nvlabs.G, nvlabs.io
    w = G.mapping(io["z"])
    close(w, io["ws"])
    close(G.mapping(io["z"], truncation=0.7), io["ws_psi0.7"])
    close(G.synthesis(w), io["image"])
    close(G.synthesis(w, noise="none"), io["image_no_noise"])


def test_rosinality(rosinality):
    G, io = rosinality.G, rosinality.io
    w = G.mapping(io["z"])
    close(w[:, 0], io["w"])
    close(G.synthesis(w), io["image_w"])
    close(G.synthesis(io["wp"]), io["image_wp"])


@pytest.mark.parametrize("source", ["official", "nvlabs", "rosinality"])
def test_the_architecture_is_read_off_the_shapes(source, request):
    config = request.getfixturevalue(source).G.config
    assert config == GeneratorConfig(64, z_dim=32, w_dim=32, mapping_layers=4, channel_base=512, channel_max=16)


# ----------------------------------------------------------------------------------------------------------------------
# Behaviour


@pytest.mark.parametrize("resolution, num_ws", [(8, 4), (16, 6), (64, 10), (256, 14), (1024, 18)])
def test_config(resolution, num_ws):
    config = GeneratorConfig(resolution)
    assert config.num_ws == num_ws
    assert config.resolutions == [4 * 2**i for i in range(num_ws // 2)]
    assert [config.channels(r) for r in (4, 64, 128, 1024)] == [512, 512, 256, 32]


@pytest.mark.parametrize("resolution", [0, 4, 63, 96])
def test_resolutions_that_do_not_exist(resolution):
    with pytest.raises(ValueError, match=f"resolution: expected a power of two from 8, got {resolution}"):
        GeneratorConfig(resolution)


@pytest.mark.parametrize("resolution", [8, 16])
def test_small_generators(resolution):
    G = Generator(GeneratorConfig(resolution, 8, 8, 1, 64, 8))
    assert G.synthesis(G.mapping(torch.randn(3, 8))).shape == (3, 3, resolution, resolution)


def test_truncation(tiny):
    z = torch.randn(2, 16)
    w = tiny.mapping(z)
    close(tiny.mapping(z, truncation=0.0), tiny.w_avg.expand(2, 8, -1))
    close(tiny.mapping(z, truncation=0.3), tiny.w_avg + 0.3 * (w - tiny.w_avg), atol=1e-6)
    close(tiny.mapping(3 * z), w, atol=1e-5)  # z is normalised


def test_the_generators_own_padding_changes_nothing(tiny, code):
    zeros = [torch.zeros_like(ring) for ring in code.p.rings]
    own = Padding(tiny.const.expand(4, -1, -1, -1), zeros)
    close(tiny.synthesis(code.w, own), tiny.synthesis(code.w), atol=1e-5)
    assert (tiny(code) - tiny.synthesis(code.w)).abs().max() > 0.1
    close(tiny.synthesis(code.w, Padding(None, zeros)), tiny.synthesis(code.w), atol=1e-5)


def test_rings_bypass_the_style_but_not_the_demodulation(tiny, code):
    """As StyleGAN2's paper writes it: modulate the weights, image by image; a ring is then divided by the style."""
    layer = tiny.blocks[1].conv1
    x, w, ring = torch.randn(4, 12, 8, 8), code.w[:, 2], code.p.rings[1]
    actual = layer(x, w, ring, "none", tiny.fir)
    for i in range(4):
        style = layer.affine(w[i : i + 1])[0]  # [C_in]
        weight = layer.weight / (12 * 9) ** 0.5 * style[:, None, None]  # [C_out, C_in, 3, 3]
        weight = weight / (weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        y = F.conv2d(pad_ring(x[i : i + 1], ring[i : i + 1] / style[:, None]), weight)
        close(actual[i : i + 1], bias_act(y, layer.bias), atol=1e-4)


@pytest.mark.parametrize("rings", [3, 1, 0])
def test_the_interior_is_added_within_the_ring_after_the_style(tiny, code, rings):
    inside, layer = torch.randn(4, 12, 8, 8), tiny.blocks[1].conv1
    p = Padding(code.p.const, code.p.rings[:rings], interior=inside)
    changed, style = tiny.synthesis(code.w, p), layer.affine(code.w[:, 2])  # [N, 12]
    into = layer.register_forward_pre_hook(lambda _, given: (given[0] + inside / style[:, :, None, None], *given[1:]))
    expected = tiny.synthesis(code.w, Padding(code.p.const, code.p.rings[:rings]))
    into.remove()
    close(changed, expected, atol=1e-3)
    assert (changed - tiny.synthesis(code.w, Padding(code.p.const, code.p.rings[:rings]))).abs().max() > 0.1
    with pytest.raises(ValueError, match="p.interior: 12 channels at 64² fit no layer"):
        tiny.synthesis(code.w, Padding(None, (), interior=torch.zeros(4, 12, 64, 64)))


def test_noise_modes(tiny, code):
    images = {mode: tiny(code, noise=mode) for mode in ("const", "none", "random")}
    assert torch.equal(images["const"], tiny(code))
    assert torch.equal(images["none"], tiny(code, noise="none"))
    assert not torch.equal(images["random"], tiny(code, noise="random"))
    torch.manual_seed(3)
    first = tiny(code, noise="random")
    torch.manual_seed(3)
    assert torch.equal(first, tiny(code, noise="random"))
    same = Code(code.w[:1].expand(2, -1, -1))
    x = tiny(same, noise="random")
    assert not torch.equal(x[0], x[1])
    with pytest.raises(ValueError, match="noise: expected one of .* got 'zero'"):
        tiny(code, noise="zero")


def test_gradients_reach_w_and_every_part_of_p(tiny, code):
    tensors = [t.clone().requires_grad_() for t in code.tensors]
    w, const, *rings = tensors
    tiny.synthesis(w, Padding(const, rings)).square().sum().backward()
    for t in tensors:
        assert t.grad.isfinite().all() and t.grad.abs().sum(dim=1).gt(0).all()


def test_nothing_is_written_into_an_argument(tiny, code):
    before = [t.clone() for t in (*code.tensors, *tiny.state_dict().values())]
    tiny(code), tiny(code, noise="random"), tiny.mapping(code.w[:, 0], truncation=0.5)
    after = (*code.tensors, *tiny.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_batch_is_its_images_one_by_one(tiny, code):
    close(tiny(code), torch.cat([tiny(one) for one in code]), atol=1e-5)
    assert tiny(code[:0]).shape == (0, 3, 32, 32)


def test_it_is_the_plain_reference(tiny, code):
    for one in (code, Code(code.w), code[:1]):
        close(tiny(one), reference.synthesis(tiny, one), atol=2e-5)


def test_channels_last(tiny, code):
    expected = tiny(code)
    state = {key: t.clone() for key, t in tiny.state_dict().items()}
    G = Generator(tiny.config).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    G.load_state_dict(state)
    p = Padding(code.p.const.contiguous(memory_format=torch.channels_last), code.p.rings)
    close(G.synthesis(code.w, p), expected, atol=1e-5)


def test_bfloat16_under_autocast(tiny, code):
    expected = tiny(code)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = tiny(code)
        assert tiny.mapping(torch.randn(2, 16)).dtype == torch.float32
    assert x.dtype == torch.float32 and x.isfinite().all()
    assert (x - expected).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.parametrize("padded", [True, False])
def test_synthesis_compiles_without_a_graph_break(tiny, code, padded):
    torch.compiler.reset()
    compiled = torch.compile(tiny.synthesis, fullgraph=True, backend="eager")
    p = code.p if padded else None
    close(compiled(code.w, p), tiny.synthesis(code.w, p), atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# What does not belong to the generator


@pytest.mark.parametrize(
    "shape, got",
    [((2, 8), "2, 8"), ((2, 7, 16), "2, 7, 16"), ((2, 8, 15), "2, 8, 15"), ((8, 16), "8, 16")],
)
def test_w_of_a_wrong_shape(tiny, shape, got):
    with pytest.raises(ValueError, match=rf"w: expected \[N, 8, 16\] for this generator of 32², got \[{got}\]"):
        tiny.synthesis(torch.zeros(shape))


def test_z_of_a_wrong_shape(tiny):
    with pytest.raises(ValueError, match=r"z: expected \[N, 16\], got \[2, 17\]"):
        tiny.mapping(torch.zeros(2, 17))


def test_padding_of_another_generator(tiny, code):
    w, p = code.w, code.p
    with pytest.raises(ValueError, match="p: expected a batch of 4 as in w, got 2"):
        tiny.synthesis(w, p[:2])
    with pytest.raises(ValueError, match="p.const: expected 12 channels, got 5"):
        tiny.synthesis(w, Padding(p.const[:, :5], p.rings))
    with pytest.raises(ValueError, match="p.rings: expected 12 channels at resolution 8, got 7"):
        tiny.synthesis(w, Padding(p.const, (p.rings[0], p.rings[1][:, :7])))
    rings = [torch.zeros(4, tiny.config.channels(r), 4 * (r + 1)) for r in (4, 8, 16, 32, 64)]
    with pytest.raises(ValueError, match="p: 5 rings, but this generator of 32² has only 4 resolutions"):
        tiny.synthesis(w, Padding(None, rings))
