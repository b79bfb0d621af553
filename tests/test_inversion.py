"""invert: the encoder's answer, and its refinement."""

import pytest
import torch

import padinv
from padinv import Code, Encoder, Generator, GeneratorConfig
from padinv.losses import lpips


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(32, 16, 16, 2, 512, 16)).eval().requires_grad_(False)
    small = {"widths": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "pyramid_channels": 8, "head_channels": 4,
             "padding_channels": 4, "se_reduction": 2, "input_resolution": 32}  # fmt: skip
    E = Encoder.for_generator(G, **small).eval().requires_grad_(False)
    x = G.synthesis(G.mapping(torch.randn(3, 16))).clamp(-1, 1)
    return G, E, x


def mse(x, y):
    return (x - y).square().mean(dim=(1, 2, 3))


def test_without_steps_it_is_the_encoder(networks):
    G, E, x = networks
    code, expected = padinv.invert(x, E, G, batch=2), E(x)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(code.tensors, expected.tensors, strict=True))


def test_refinement_improves_every_image_and_p_helps(networks):
    G, E, x = networks
    start = mse(G(padinv.invert(x, E, G)), x)
    w = mse(G(padinv.invert(x, E, G, steps=40, space="w+", lpips_weight=0)), x)
    both = mse(G(padinv.invert(x, E, G, steps=40, lpips_weight=0)), x)
    assert (w < start).all() and (both < w).all()


def test_refinement_never_ends_worse_even_with_an_absurd_step(networks):
    G, E, x = networks
    distance = lpips("alex")

    def objective(code):
        y = G(code)
        return mse(y, x) + 0.8 * distance(y, x)

    assert (objective(padinv.invert(x, E, G, steps=3, lr=100.0)) <= objective(E(x)) + 1e-5).all()


def test_images_do_not_influence_each_other(networks):
    G, E, x = networks
    together = padinv.invert(x, E, G, steps=5, batch=3)
    alone = Code.cat([padinv.invert(x[i : i + 1], E, G, steps=5) for i in range(3)])
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(together.tensors, alone.tensors, strict=True))


def test_w_only_keeps_p_and_nothing_of_the_caller_changes(networks):
    G, E, x = networks
    before, state = x.clone(), {k: v.clone() for k, v in (G.state_dict() | E.state_dict()).items()}
    code = padinv.invert(x, E, G, steps=2, space="w+")
    expected = E(x).p
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(code.p.tensors, expected.tensors, strict=True))
    assert torch.equal(x, before) and not any(t.requires_grad for t in code.tensors)
    assert all(torch.equal(state[k], v) for k, v in (G.state_dict() | E.state_dict()).items())


def test_refines_in_inference_mode_and_other_sizes(networks):
    G, E, x = networks
    with torch.inference_mode():
        code = padinv.invert(torch.nn.functional.interpolate(x, size=48), E, G, steps=2)
    assert len(code) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": -1}, "steps"), ({"space": "z"}, "space"), ({"lr": 0}, "lr"), ({"lr": float("nan")}, "lr"),
     ({"batch": 0}, "batch"), ({"x": torch.zeros(1, 1, 32, 32)}, r"\[N, 3, H, W\]"),
     ({"x": torch.full((1, 3, 32, 32), 255.0)}, r"\[-1, 1\]"),
     ({"x": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, "to_float")],
)  # fmt: skip
def test_errors_name_the_argument(networks, change, message):
    G, E, x = networks
    with pytest.raises((TypeError, ValueError), match=message):
        padinv.invert(**({"x": x, "E": E, "G": G} | change))


def test_encoder_of_another_generator_is_refused(networks):
    _, E, x = networks
    other = Generator(GeneratorConfig(64, 16, 16, 2, 512, 16))
    with pytest.raises(ValueError, match="another generator"):
        padinv.invert(x, E, other)
