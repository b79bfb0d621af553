"""Codes and paddings: a vector space, the authors' maps, files."""

import numpy as np
import pytest
import torch

from padinv.model.codes import Code, Padding, ring_resolution


def equal(a: Code, b: Code) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a.tensors, b.tensors, strict=True))


def allclose(a: Code, b: Code) -> bool:
    return all(torch.allclose(s, t, atol=1e-6) for s, t in zip(a.tensors, b.tensors, strict=True))


def test_arithmetic(code):
    other = code.map(torch.randn_like)
    for t, a, b in zip((0.5 * (code + other)).tensors, code.tensors, other.tensors, strict=True):
        assert torch.allclose(t, 0.5 * (a + b))
    assert allclose(code + (other - code), other)
    assert equal(-code, -1 * code) and equal(code * 2, code + code) and equal((code * 2) / 2, code)
    assert equal(0.25 * code, code * 0.25)
    for scalar in (np.float64(0.25), np.float32(0.25)):
        assert isinstance(scalar * code, Code) and equal(scalar * code, 0.25 * code)
    one = code[0] + code  # a batch of one broadcasts
    assert len(one) == 4 and torch.equal(one.p.const[2], code.p.const[0] + code.p.const[2])


def test_arithmetic_leaves_its_arguments_alone(code):
    before = code.clone()
    _ = 2 * code - code / 3, Code.cat([code, code]), code.p.to_maps(), code.to(torch.float64)
    assert equal(code, before)


def test_only_numbers_scale_codes(code):
    for wrong in ("a", None, [1]):
        with pytest.raises(TypeError):
            code * wrong
        with pytest.raises(TypeError):
            code + wrong


def test_indexing(code):
    assert len(code) == 4
    assert [len(code[i]) for i in (0, -1, np.int64(2), slice(1, 3), torch.tensor([3, 0, 0]))] == [1, 1, 1, 2, 3]
    assert torch.equal(code[-1].w, code.w[3:]) and torch.equal(code[2].p.rings[1], code.p.rings[1][2:3])
    assert torch.equal(code[torch.tensor([True, False, True, False])].w, code.w[[0, 2]])
    assert [torch.equal(one.w[0], w) for one, w in zip(code, code.w, strict=True)] == [True] * 4
    for i in (4, -5):
        with pytest.raises(IndexError, match=f"code {i} of a batch of 4"):
            code[i]


def test_cat(code):
    assert equal(Code.cat([code[:1], code[1:3], code[3]]), code)
    assert equal(Code.cat([Code(code.w[:2]), Code(code.w[2:])]), Code(code.w))
    rings = [Code(c.w, Padding(None, c.p.rings)) for c in (code[:2], code[2:])]
    assert equal(Code.cat(rings), Code(code.w, Padding(None, code.p.rings)))
    with pytest.raises(ValueError, match="p: one code has padding and the other has none"):
        Code.cat([code, Code(code.w)])


def test_to_and_detach(code):
    half = code.to(torch.float16)
    assert {t.dtype for t in half.tensors} == {torch.float16}
    leaf = code.map(lambda t: t.clone().requires_grad_())
    assert all(t.requires_grad for t in (leaf * 2).tensors)
    assert not any(t.requires_grad for t in leaf.detach().tensors)


def test_codes_of_different_layouts(code, tiny):
    with pytest.raises(ValueError, match=r"w: codes of different generators: \[4, 8, 16\] and \[4, 8, 8\]"):
        code + Code(code.w[..., :8], code.p)
    with pytest.raises(ValueError, match="p: one code has padding and the other has none"):
        code - Code(code.w)
    p = code.p
    for other in (Padding(None, p.rings), Padding(p.const, p.rings[:2]), p.map(lambda t: t[:, :1])):
        with pytest.raises(ValueError, match="p: paddings of different layout"):
            code + Code(code.w, other)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Code(torch.zeros(2, 16)), r"w: expected \[N, num_ws, w_dim\], got \[2, 16\]"),
        (
            lambda: Code(torch.zeros(2, 8, 16), Padding(torch.zeros(3, 4, 4, 4), ())),
            "p: expected a batch of 2 .* got 3",
        ),
        (lambda: Padding(None, ()), "neither const nor rings"),
        (lambda: Padding(torch.zeros(1, 4, 5, 4), ()), r"const: expected \[N, C, 4, 4\], got \[1, 4, 5, 4\]"),
        (
            lambda: Padding(None, (torch.zeros(1, 4, 20), torch.zeros(1, 4, 20))),
            r"rings\[1\]: expected \[N, C, 36\] for resolution 8, got \[1, 4, 20\]",
        ),
        (lambda: Padding(torch.zeros(2, 4, 4, 4), (torch.zeros(1, 4, 20),)), r"batch sizes differ: \[2, 1\]"),
        (lambda: Padding(None, (), interior=torch.zeros(1, 4, 8, 4)), r"interior: expected \[N, C, r, r\]"),
        (lambda: Padding(None, (), interior=torch.zeros(1, 4, 8, 8)).to_maps(), "interior: the authors' maps have no"),
        (lambda: Padding.from_maps({0: torch.zeros(1, 2, 18, 18), 3: torch.zeros(1, 2, 18, 18)}), "expected the keys"),
    ],
)
def test_wrong_shapes(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ----------------------------------------------------------------------------------------------------------------------
# The authors' maps


def test_maps_round_trip(code):
    maps = code.p.to_maps()
    assert sorted(maps) == [0, 1, 3, 5] and {t.shape[2:] for t in maps.values()} == {(18, 18)}
    assert equal(Code(code.w, Padding.from_maps(maps)), code)
    for p in (Padding(code.p.const, ()), Padding(None, code.p.rings[:1])):
        assert equal(Code(code.w, Padding.from_maps(p.to_maps())), Code(code.w, p))


def test_official_maps_round_trip(official):
    maps = official.p.to_maps()
    for key, t in maps.items():  # the fixture's maps are zero where nothing is read
        assert torch.equal(t, official.io[f"padding_map_{key}"])


def test_what_a_map_is_read_for():
    """The ring of a layer at r is the border of the centre (r + 2)²; anything else in its map is ignored."""
    size, r = 34, ring_resolution(1)
    full = torch.arange(float(size * size)).reshape(1, 1, size, size)
    maps = {key: full for key in (1, 3, 5, 7)}
    ring = Padding.from_maps(maps).rings[1][0, 0]
    start = (size - r - 2) // 2
    assert ring[0] == full[0, 0, start, start]
    assert ring[r + 1] == full[0, 0, start, start + r + 1]
    assert ring[2 * r + 3] == full[0, 0, start + r + 1, start + r + 1]
    assert ring[2 * r + 4] == full[0, 0, start + 1, start]


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_save_and_load(code, tmp_path):
    layouts = [code, Code(code.w), Code(code.w, Padding(None, code.p.rings)), Code(code.w, Padding(code.p.const, ()))]
    inside = torch.randn(4, 12, 8, 8)
    layouts += [Code(code.w, Padding(*parts, False, inside)) for parts in ((code.p.const, code.p.rings), (None, ()))]
    for i, saved in enumerate(layouts):
        saved.save(tmp_path / "new" / f"{i}.safetensors", images=["a.png", "b.png"])
        loaded = Code.load(tmp_path / "new" / f"{i}.safetensors")
        assert equal(loaded, saved) and (loaded.p is None) == (saved.p is None)


def test_codes_with_gradients_and_shared_memory_are_saved(tiny, tmp_path):
    w = tiny.mapping(torch.randn(2, 16)).requires_grad_()  # eight views of one w
    Code(w).save(tmp_path / "c.safetensors")
    assert torch.equal(Code.load(tmp_path / "c.safetensors").w, w)


def test_a_code_of_another_generator_is_refused(tiny, official, code, tmp_path):
    code.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"w: expected \[N, 10, 32\] for this generator of 64², got \[4, 8, 16\]"):
        official.G(Code.load(tmp_path / "c.safetensors"))


def test_files_that_are_no_codes(tiny, tmp_path):
    from padinv.files.checkpoints import save_generator
    from padinv.model.tensors import save_tensors

    save_generator(tiny, tmp_path / "G.safetensors")
    with pytest.raises(ValueError, match=r"G\.safetensors: its kind is 'generator', expected 'code'"):
        Code.load(tmp_path / "G.safetensors")
    save_tensors(tmp_path / "bad.safetensors", {"ring0": torch.zeros(1, 2, 20)}, {"kind": "code"})
    with pytest.raises(ValueError, match=r"bad\.safetensors: not a whole code \('w'\)"):
        Code.load(tmp_path / "bad.safetensors")
