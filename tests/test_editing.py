"""Blends and edits: shares, offsets, files, drawings; and what is refused."""

import pytest
import torch

import padinv
from padinv import Code, Edit, Padding, analogy, blend, customize


def equal(a: Code, b: Code) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a.tensors, b.tensors, strict=True))


def allclose(a: Code, b: Code) -> bool:
    return all(torch.allclose(s, t, atol=1e-5) for s, t in zip(a.tensors, b.tensors, strict=True))


@pytest.fixture
def other(code) -> Code:
    torch.manual_seed(2)
    return code.map(lambda t: t + torch.randn_like(t))


# ----------------------------------------------------------------------------------------------------------------------
# Blending


def test_strength_goes_from_the_contour_to_p_of_one_and_w_of_the_other(code, other):
    full = blend(code, other)
    assert allclose(full, Code(other.w, code.p))
    assert equal(blend(code, other, 0), code)
    assert allclose(blend(code, other, 0.25), code + 0.25 * (full - code))
    assert allclose(blend(code, other, 1, 1, 1, 1), other) and equal(blend(code, other, 1, 0, 0, 0), code)


@pytest.mark.parametrize("part", range(12))
def test_one_layer_at_a_time(code, other, part):
    eye = torch.eye(12)[part].tolist()  # 8 w, the constant, 3 rings
    mixed = blend(code, other, 1, eye[:8], eye[8], eye[9:])
    pieces = [[*c.w.unbind(dim=1), *c.p.tensors] for c in (mixed, code, other)]
    for i, (new, contour, details) in enumerate(zip(*pieces, strict=True)):
        assert torch.allclose(new, details if i == part else contour, atol=1e-6)


def test_codes_without_some_parts(code, other):
    mixed = blend(Code(code.w), Code(other.w), w=[0] + 7 * [1])
    assert torch.equal(mixed.w[:, 0], code.w[:, 0]) and torch.allclose(mixed.w[:, 1:], other.w[:, 1:], atol=1e-6)
    a, b = (Code(c.w, Padding(None, c.p.rings)) for c in (code, other))
    assert blend(a, b).p.const is None and len(blend(a, b)) == 4
    a, b = (Code(c.w, Padding(c.p.const, ())) for c in (code, other))
    assert torch.equal(blend(a, b).p.const, code.p.const)
    a, b = (Code(c.w, Padding(c.p.const, c.p.rings, modulated=True)) for c in (code, other))
    assert blend(a, b).p.modulated and Edit.between(a, b).offset.p.modulated


def test_the_interior_stays_with_the_contour_and_belongs_to_an_edit(code, other):
    a, b = (Code(c.w, Padding(c.p.const, c.p.rings, interior=torch.randn(4, 12, 8, 8))) for c in (code, other))
    assert torch.equal(blend(a, b).p.interior, a.p.interior)
    assert torch.allclose(blend(a, b, interior=1).p.interior, b.p.interior, atol=1e-6)
    change = b.p.interior - a.p.interior
    assert torch.allclose(Edit.between(a, b).offset.p.interior[0], change.mean(dim=0), atol=1e-6)  # of all pairs
    assert not Edit.between(a, b, interior=0).offset.p.interior.any()


def test_one_image_with_many_and_chains(tiny, code, other):
    many, one = blend(code, other[1]), blend(code[1], other)
    assert len(many) == len(one) == 4
    assert allclose(many[2], blend(code[2], other[1])) and allclose(one[2], blend(code[1], other[2]))
    before = code.clone(), other.clone()
    chain = blend(blend(code, other, 0.5), other[:1], 0.3)
    assert tiny(chain).shape == (4, 3, 32, 32) and equal(code, before[0]) and equal(other, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": -0.1}, "strength: expected 0 to 1, got -0.1"),
        ({"strength": 1.01}, "strength"),
        ({"strength": float("nan")}, "strength: expected 0 to 1, got nan"),
        ({"strength": float("inf")}, "strength"),
        ({"strength": "half"}, "strength: expected a number, got str"),
        ({"strength": True}, "strength: expected a number, got bool"),
        ({"contour": torch.zeros(1, 8, 16)}, "contour: expected a Code, .* got Tensor"),
        ({"details": None}, "details: expected a Code"),
        ({"w": [1, 0]}, r"w: expected a finite number for each of 8 layers, got \[1, 0\]"),
        ({"w": float("nan")}, "w: expected a finite"),
        ({"const": float("inf")}, "const"),
        ({"rings": [1.0] * 4}, "rings: expected a finite number for each of 3 layers"),
        ({"details": slice(3)}, "contour, details: expected equally many codes, or one of them, got 4 and 3"),
        ({"details": slice(0)}, "details: expected the code of at least one image"),
        ({"details": lambda c: Code(c.w)}, "contour and details do not fit together. p: one code has padding"),
        ({"details": lambda c: Code(c.w[:, :6], c.p)}, "contour and details .* codes of different generators"),
    ],
)
def test_blends_that_are_refused(code, other, change, message):
    for key, value in change.items():
        if isinstance(value, slice):
            change = {key: other[value]}
        elif callable(value):
            change = {key: value(other)}
    with pytest.raises((TypeError, ValueError), match=message):
        blend(**({"contour": code, "details": other} | change))


def test_codes_without_p_need_to_know_which_w(code, other):
    with pytest.raises(ValueError, match="w: of codes without P, w = 1 would leave nothing of contour"):
        blend(Code(code.w), Code(other.w))
    shares = torch.arange(code.w.shape[1]).numpy() % 2
    assert torch.equal(blend(Code(code.w), Code(other.w), w=shares).w[:, 1], other.w[:, 1].expand_as(code.w[:, 1]))


# ----------------------------------------------------------------------------------------------------------------------
# Customised edits


def test_the_offset_of_the_pair(code, other):
    edited = customize(code, before=code[0], after=other[0])
    for new, target, b, a in zip(edited.tensors, code.tensors, code[0].tensors, other[0].tensors, strict=True):
        assert torch.allclose(new, target + (a - b), atol=1e-6)
    assert allclose(edited[0], other[0]), "before becomes after"
    assert allclose(customize(code, code[0], other[0], -0.5), code - 0.5 * (edited - code))
    assert equal(customize(code, code[0], other[0], 0), code)
    plain = customize(Code(code.w), Code(code.w[:1]), Code(other.w[:1]))
    assert torch.allclose(plain.w, code.w + other.w[:1] - code.w[:1], atol=1e-5), "without P the offset is one of W+"


def test_shares_and_several_pairs(code, other):
    alone = Edit.between(code[0], other[0], w=0)
    assert torch.equal(alone(code).w, code.w), "the target keeps its w"
    ring = Edit.between(code[0], other[0], w=0, const=0, rings=[0, 1, 0])
    assert [bool(t.any()) for t in ring.offset.tensors] == [False, False, False, True, False]
    mean = Edit.between(code, other).offset
    assert torch.allclose(mean.p.const, (other.p.const - code.p.const).mean(dim=0, keepdim=True), atol=1e-6)


def test_edits_add_scale_and_undo(code, other):
    a, b = Edit.between(code[0], other[0], "hat"), Edit.between(code[1], other[1], "glasses")
    assert (a + b).name == "hat + glasses" and (-a).name == "not hat"
    assert allclose((a + b)(code), b(a(code))) and allclose((-a)(a(code)), code) and allclose(a(code, -1), (-a)(code))
    assert allclose((0.5 * a)(code), a(code, 0.5)) and allclose((a * 2)(code), a(code, 2))
    for wrong in (lambda: a + code, lambda: a * b, lambda: a + 1):
        with pytest.raises(TypeError):
            wrong()


def test_edits_are_files(code, other, tmp_path):
    edit = Edit.between(code[0], other[0], "Sonnenbrille · 1")
    edit.save(tmp_path / "edits" / "e.safetensors")
    loaded = Edit.load(tmp_path / "edits" / "e.safetensors")
    assert loaded.name == edit.name and equal(loaded.offset, edit.offset)
    code[:1].save(tmp_path / "code.safetensors")
    with pytest.raises(ValueError, match=r"code\.safetensors: a code, expected an edit"):
        Edit.load(tmp_path / "code.safetensors")
    code.save(tmp_path / "many.safetensors", edit="many")
    with pytest.raises(ValueError, match=r"many\.safetensors: not a whole edit \(offset: expected one Code, got 4"):
        Edit.load(tmp_path / "many.safetensors")
    (tmp_path / "text.safetensors").write_text("no edit")
    for name in ("text.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match=name):
            Edit.load(tmp_path / name)
    small = Code(code.w[:, :6, :], code.p)
    with pytest.raises(ValueError, match="targets and edit 'Sonnenbrille · 1' do not fit together. w: codes of diff"):
        loaded(small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"after": lambda code: code[0].clone()}, "before, after: the same code twice"),
        ({"after": lambda code: Code(code.w[:1])}, "before and after do not fit together. p: one code has padding"),
        ({"after": lambda code: code[0].map(lambda t: t * torch.nan)}, "its offset is not finite"),
        ({"after": lambda code: torch.zeros(1, 3, 32, 32)}, "after: expected a Code, as padinv.invert.* got Tensor"),
        ({"before": lambda code: code[:3], "after": lambda code: code[1:3]}, "got 3 and 2"),
        ({"target": lambda code: code[:0]}, "targets: expected the code of at least one"),
        ({"target": lambda code: Code(code.w)}, "targets and edit 'edit' do not fit"),
        ({"target": lambda code: Code(code.w, Padding(None, code.p.rings))}, "paddings of different layout"),
        ({"strength": lambda code: 3.5}, "strength: expected -3 to 3, got 3.5"),
        ({"strength": lambda code: float("nan")}, "strength"),
        ({"strength": lambda code: torch.ones(2)}, "strength: expected a number, got Tensor"),
    ],
)
def test_edits_that_are_refused(code, other, change, message):
    arguments = {"target": code, "before": code[0], "after": other[0]}
    with pytest.raises((TypeError, ValueError), match=message):
        customize(**(arguments | {key: make(code) for key, make in change.items()}))


def test_a_target_of_another_generator_is_refused(code, other, official):
    with pytest.raises(ValueError, match="do not fit together. w: codes of different generators"):
        customize(official.E(official.x), code[0], other[0])


# ----------------------------------------------------------------------------------------------------------------------
# Drawings

GREY, RED, BLUE, BLACK = ([0.3, 0.3, 0.3], [0.9, -0.8, -0.8], [-0.7, -0.6, 0.9], [-1.0, -1.0, -1.0])


def picture(size: int, *patches: tuple[list[float], slice, slice]) -> torch.Tensor:
    """Colours on grey, in eighths of the side: [1, 3, size, size]."""
    x = torch.tensor(GREY).view(1, 3, 1, 1).repeat(1, 1, size, size)
    for colour, rows, columns in patches:
        rows, columns = (slice(s.start * size // 8, s.stop * size // 8) for s in (rows, columns))
        x[:, :, rows, columns] = torch.tensor(colour).view(1, 3, 1, 1)
    return x


HAIR, BEARD, HAT = (slice(1, 3), slice(1, 7)), (slice(5, 7), slice(2, 6)), (slice(0, 1), slice(2, 4))


@pytest.mark.parametrize("size", [32, 64, 96])
def test_a_beard_takes_the_colour_of_the_hair(size):
    before = picture(size, (RED, *HAIR))
    after = picture(size, (RED, *HAIR), (RED, *BEARD), (BLACK, *HAT))
    x = torch.cat((picture(size, (BLUE, *HAIR)), before))
    copies = [t.clone() for t in (x, before, after)]
    truth = torch.cat((picture(size, (BLUE, *HAIR), (BLUE, *BEARD), (BLACK, *HAT)), after))
    drawn = analogy(x, before, after)
    assert (drawn - truth).abs().max() < 0.06
    assert torch.equal(drawn[:, :, :, : size // 8], x[:, :, :, : size // 8]), "where the pair agrees nothing changes"
    assert torch.allclose(analogy(x, before, after, 0.5), 0.5 * (x + drawn), atol=1e-5)
    assert torch.equal(analogy(x, before, after, 0), x)
    assert all(torch.equal(s, t) for s, t in zip(copies, (x, before, after), strict=True))


def test_a_pair_the_other_way_round_takes_the_beard_off():
    shaved, bearded = picture(64, (RED, *HAIR)), picture(64, (RED, *HAIR), (RED, *BEARD))
    x = picture(64, (BLUE, *HAIR), (BLUE, *BEARD))
    assert (analogy(x, bearded, shaved) - picture(64, (BLUE, *HAIR))).abs().max() < 0.06


def test_two_subjects_are_warned_of():
    one, two = picture(64, (RED, *HAIR)), -picture(64, (BLUE, *HAIR))
    with pytest.warns(UserWarning, match="two subjects"):
        analogy(one, one, two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"after": picture(64)}, "before, after: the same image twice"),
        ({"after": picture(32, (RED, *HAIR))}, r"after: expected \[1, 3, 64, 64\], one image of the size of x, got"),
        ({"x": picture(32)}, r"before: expected \[1, 3, 32, 32\]"),
        ({"before": picture(64).repeat(2, 1, 1, 1)}, "before: expected"),
        ({"x": torch.zeros(1, 3, 64, 64, dtype=torch.uint8)}, "x: .*to_float"),
        ({"after": 100 * picture(64)}, r"after: expected values in \[-1, 1\]"),
        ({"x": picture(64) * torch.nan}, "x: expected values"),
        ({"x": torch.zeros(3, 64, 64)}, r"x: expected \[N, 3, H, W\]"),
        ({"before": "before.png"}, "before: expected a float tensor"),
        ({"strength": 1.5}, "strength: expected 0 to 1, got 1.5"),
        ({"strength": -1}, "strength"),
        ({"strength": float("nan")}, "strength"),
    ],
)
def test_drawings_that_are_refused(change, message):
    arguments = {"x": picture(64), "before": picture(64), "after": picture(64, (RED, *HAIR))}
    with pytest.raises((TypeError, ValueError), match=message):
        analogy(**(arguments | change))


def test_a_drawing_can_be_inverted(tiny):
    torch.manual_seed(0)
    small = {"widths": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "pyramid_channels": 8, "head_channels": 4,
             "padding_channels": 4, "se_reduction": 2, "input_resolution": 32}  # fmt: skip
    E = padinv.Encoder.for_generator(tiny, **small).eval()
    x = picture(32, (BLUE, *HAIR)).repeat(3, 1, 1, 1)
    drawn = analogy(x, picture(32, (RED, *HAIR)), picture(32, (RED, *HAIR), (RED, *BEARD)))
    start, code = padinv.invert(drawn, E, tiny), padinv.invert(drawn, E, tiny, steps=20, lpips_weight=0)
    assert (tiny(code) - drawn).square().mean() < (tiny(start) - drawn).square().mean()
