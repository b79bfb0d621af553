"""invert: the encoder's answer, and its refinement."""

import pytest
import torch

import padinv
from padinv import Code, Encoder, Generator, GeneratorConfig
from padinv.inversion.optimise import project, ramp, tune
from padinv.measure.lpips import lpips


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


def test_a_compiled_generator_serves(networks):
    G, E, x = networks
    compiled = torch.compile(G, backend="aot_eager")  # all of it but the writing of C++, which takes a minute
    for run in (lambda g: padinv.invert(x, E, g, steps=3), lambda g: project(x, g, "w+p", steps=3)):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(run(compiled).tensors, run(G).tensors, strict=True))


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
     ({"batch": 0}, "batch"), ({"passes": 0}, "passes"), ({"x": torch.zeros(1, 1, 32, 32)}, r"\[N, 3, H, W\]"),
     ({"x": torch.full((1, 3, 32, 32), 255.0)}, r"\[-1, 1\]"),
     ({"x": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, "to_float")],
)  # fmt: skip
def test_errors_name_the_argument(networks, change, message):
    G, E, x = networks
    with pytest.raises((TypeError, ValueError), match=message):
        padinv.invert(**({"x": x, "E": E, "G": G} | change))


def test_a_residual_encoder_goes_on_from_the_first(networks):
    G, E, x = networks
    R = Encoder.residual_of(E).eval()
    torch.manual_seed(1)
    for head in R.heads:
        torch.nn.init.normal_(head.weight, std=0.1)
    code = E(x)
    for _ in range(2):
        code = R(x, G(code), code)
    found = padinv.invert(x, E, G, residual=R, passes=3, batch=2)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found.tensors, code.tensors, strict=True))
    assert (found.w - padinv.invert(x, E, G, residual=R, passes=1).w).abs().max() > 0.01


def test_the_domain_term_keeps_codes_where_the_encoder_maps_back_to(networks):
    G, E, x = networks
    free, kept = (padinv.invert(x, E, G, steps=30, domain_weight=weight) for weight in (0.0, 30.0))

    def away(code):
        return (E(G(code)).w - code.w).square().mean().item()

    assert away(kept) < 0.7 * away(free)


def test_projection_needs_no_encoder_and_larger_spaces_come_closer(networks):
    G, _, x = networks
    codes = {space: project(x, G, space, steps=60, lpips_weight=0) for space in ("w", "w+", "w+p")}
    assert (codes["w"].w == codes["w"].w[:, :1]).all() and codes["w"].w.shape == (3, G.num_ws, 16)
    assert codes["w+"].p is None and len(codes["w+p"].p.rings) == 4
    start = mse(G.synthesis(G.w_avg.expand(3, G.num_ws, -1)), x)
    errors = {space: mse(G(code), x) for space, code in codes.items()}
    assert (errors["w"] < start).all() and errors["w+p"].mean() < errors["w"].mean()
    assert torch.equal(project(x, G, "w", steps=60, lpips_weight=0, seed=1).w, codes["w"].w)


def test_noise_of_a_projection_is_its_seed_s(networks):
    G, _, x = networks
    one, again, other, none = (
        project(x, G, "w", steps=8, noise=noise, seed=seed).w for noise, seed in ((0.5, 0), (0.5, 0), (0.5, 1), (0, 0))
    )
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, none)


def test_inversions_take_other_floats_and_no_other_shapes(networks):
    G, E, x = networks
    for run in (lambda x: padinv.invert(x, E, G, steps=1), lambda x: project(x, G, "w+p", steps=2)):
        code = run(x)
        assert torch.allclose(run(x.double()).w, code.w, atol=1e-4) and code.w.dtype == torch.float32
        for shape in ((1, 3, 32, 64), (1, 3, 1, 32)):
            with pytest.raises(ValueError, match=r"x: .*square|x: expected \[N, 3"):
                run(torch.zeros(shape))


def test_the_projector_warms_up_and_cools_down():
    factors = [ramp(t / 100) for t in range(101)]
    assert factors[0] == 0 and max(factors[5:76]) == min(factors[5:76]) == 1 and factors[100] == 0
    assert factors[:6] == sorted(factors[:6]) and factors[75:] == sorted(factors[75:], reverse=True)


def test_tuning_draws_the_image_at_the_pivot_and_spares_the_generator(networks):
    G, E, x = networks
    state = {k: v.clone() for k, v in G.state_dict().items()}
    pivot = E(x[:1])
    mine = tune(x[:1], pivot, G, steps=25, lr=3e-3)
    assert mse(mine(pivot), x[:1]) < 0.5 * mse(G(pivot), x[:1])
    assert all(torch.equal(state[k], v) for k, v in G.state_dict().items())
    assert not any(t.requires_grad for t in mine.parameters())
    assert all(torch.equal(a, b) for a, b in zip(mine.mapping.parameters(), G.mapping.parameters(), strict=True))


@pytest.mark.parametrize("change", [{"space": "z"}, {"steps": 0}, {"lr": 0}, {"batch": 0}, {"noise": -1}])
def test_errors_of_project_name_the_argument(networks, change):
    G, _, x = networks
    with pytest.raises(ValueError, match=next(iter(change))):
        project(x, G, **change)


def test_tuning_takes_one_image_of_the_right_size(networks):
    G, E, x = networks
    with pytest.raises(ValueError, match="x, pivot: expected one image at the generator's 32²"):
        tune(x, E(x), G)


def test_encoder_of_another_generator_is_refused(networks):
    _, E, x = networks
    other = Generator(GeneratorConfig(64, 16, 16, 2, 512, 16))
    with pytest.raises(ValueError, match="another generator"):
        padinv.invert(x, E, other)
