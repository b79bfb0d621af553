"""Directions of W+ & P: found again where they were planted, and moved along without touching anything else."""

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from padinv import Code
from padinv.inversion.directions import (
    balanced_accuracy,
    linear_svm,
    move,
    pca_directions,
    sefa_directions,
    svm_directions,
)


def cosine(a, b) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.fixture(scope="module")
def planted():
    """400 codes in which two attributes move w [4, 6] along two directions, under noise: codes, labels, directions."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(2, 4, 6, generator=generator)
    labels = torch.rand(400, 2, generator=generator) < torch.tensor([0.5, 0.15])
    noise = 0.3 * torch.randn(400, 4, 6, generator=generator)
    return Code(noise + torch.einsum("nk,kij->nij", labels.float(), true)), labels, true


# move


def test_move_adds_the_direction_in_the_given_layers_and_keeps_p(code):
    d = Code(torch.randn(1, 8, 16))
    moved = move(code, d, 1.5, layers=(2, 5))
    expected = code.w.clone()
    expected[:, [2, 5]] += 1.5 * d.w[:, [2, 5]]
    assert torch.allclose(moved.w, expected)
    assert all(torch.equal(a, b) for a, b in zip(moved.p.tensors, code.p.tensors, strict=True))
    assert torch.allclose(move(code, d).w, code.w + d.w)
    assert torch.equal(move(code, d, layers=()).w, code.w)


def test_one_code_takes_many_strengths_and_many_codes_their_own(code, tiny):
    d = Code(torch.randn(1, 8, 16))
    strengths = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    sweep, each = move(code[0], d, strengths), move(code, d, strengths)
    for i, strength in enumerate(strengths.tolist()):
        assert torch.allclose(sweep.w[i : i + 1], move(code[0], d, strength).w)
        assert torch.allclose(each.w[i : i + 1], move(code[i], d, strength).w)
    assert tiny(sweep).shape == (4, 3, 32, 32)
    assert torch.allclose(tiny(sweep)[1:2], tiny(code[0]), atol=1e-5)


def test_a_direction_with_p_moves_it(code):
    d = code[1] - code[0]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(move(code[0], d).tensors, code[1].tensors, strict=True))
    sweep = move(code[0], d, torch.tensor([0.0, 1.0]))
    expected = Code.cat([code[0], code[1]])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(sweep.tensors, expected.tensors, strict=True))


def test_moving_back_and_nothing_of_the_caller_changes(code):
    d, before = Code(torch.randn(1, 8, 16)), code.clone()
    assert torch.allclose(move(move(code, d, 2.0), d, -2.0).w, code.w, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(code.tensors, before.tensors, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"strength": float("nan")}, "strength: expected finite"), ({"strength": float("inf")}, "strength"),
     ({"strength": torch.ones(3)}, "one for each of 4 codes, got 3"),
     ({"layers": (8,)}, "layers: .* 0 to 7, got"), ({"layers": (-1,)}, "layers"),
     ({"direction": Code(torch.zeros(2, 8, 16))}, r"direction: .*directions\[0\]"),
     ({"direction": Code(torch.zeros(1, 10, 16))}, r"\[1, 8, 16\].*\[1, 10, 16\]")],
)  # fmt: skip
def test_move_refuses(code, change, message):
    with pytest.raises(ValueError, match=message):
        move(**({"code": code, "direction": Code(torch.zeros(1, 8, 16))} | change))


def test_move_refuses_p_for_codes_without(code):
    with pytest.raises(ValueError, match=r"direction: it moves p.*Code\(direction.w\)"):
        move(Code(code.w), code[0])


# Labels


def test_linear_svm_is_scikit_learns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 5)) + 3
    labels = x[:, 0] + 0.5 * rng.normal(size=80) > 3.4
    normals, biases = linear_svm(torch.from_numpy(x).float(), torch.from_numpy(labels)[:, None], C=2.0)
    centred = x - x.mean(axis=0)
    centred /= np.sqrt((centred**2).sum(axis=1).mean())
    expected = SVC(kernel="linear", C=2.0, class_weight="balanced").fit(centred, labels)
    scores = torch.from_numpy(x).float() @ normals + biases
    assert np.allclose(scores[:, 0], expected.decision_function(centred), atol=1e-3)


def test_balanced_accuracy():
    scores = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, 1.0], [-1.0, 1.0]])
    labels = torch.tensor([[True, True], [False, False], [False, False], [True, False]])
    assert balanced_accuracy(scores, labels).tolist() == [0.75, 0.5]


def test_svm_directions_find_what_was_planted(planted):
    codes, labels, true = planted
    found, accuracy = svm_directions(codes, labels)
    assert len(found) == 2 and found.p is None and (accuracy > 0.97).all()
    for k in range(2):
        assert cosine(found.w[k], true[k]) > 0.95
        assert abs(cosine(found.w[k], true[1 - k])) < abs(cosine(true[0], true[1])) + 0.1


def test_strength_one_is_a_standard_deviation_of_the_score(planted):
    """Moving all codes by one shifts the mean of the score as far as the score spreads, up to what the SVM ignores."""
    codes, labels, _ = planted
    direction = svm_directions(codes, labels, held_out=0.25)[0]
    x = codes.w[:300].flatten(1)
    normals, biases = linear_svm(x, labels[:300])
    score = x @ normals + biases
    for k in range(2):
        shift = ((x + direction.w[k].flatten()) @ normals + biases - score).mean(dim=0)
        assert shift[k].item() == pytest.approx(score[:, k].std().item(), rel=0.02)


def test_labels_of_pure_noise_are_not_told(planted):
    codes, _, _ = planted
    labels = torch.rand(400, 1, generator=torch.Generator().manual_seed(1)) < 0.5
    assert abs(svm_directions(codes, labels, held_out=0.5)[1].item() - 0.5) < 0.12


def test_directions_of_w_and_p(code):
    """What is planted in one ring alone is found there, whatever the scale of w."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.rand(200, 1, generator=generator) < 0.5
    codes = code[:1].map(lambda t: torch.randn(200, *t.shape[1:], generator=generator))
    codes = Code(100 * codes.w, codes.p)
    true = torch.randn(*codes.p.rings[1].shape[1:], generator=generator)
    codes.p.rings[1][labels[:, 0]] += true
    found, accuracy = svm_directions(codes, labels)
    assert accuracy > 0.9 and cosine(found.p.rings[1][0], true) > 0.9
    assert move(codes[:3], found, 2.0).p.const.shape == (3, 12, 4, 4)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(torch.ones(400, 2), r"bool \[400, K\], got torch.float32"),
     (torch.ones(400, dtype=torch.bool), r"got .*\[400\]$"),
     (torch.ones(399, 2, dtype=torch.bool), r"labels: expected bool"),
     (torch.zeros(400, 1, dtype=torch.bool), r"labels\[:, 0\]: all 320 are False"),
     (torch.arange(400)[:, None] < 200, "held_out: the last 80 of 400 codes lack")],
)  # fmt: skip
def test_labels_are_checked(planted, labels, message):
    with pytest.raises(ValueError, match=message):
        svm_directions(planted[0], labels)


# Without labels


def test_pca_finds_the_axes_and_their_spread(tiny):
    found = pca_directions(tiny, 16)
    assert torch.equal(found.w, found.w[:, :1].expand_as(found.w)), "the same in every layer"
    lengths = found.w[:, 0].norm(dim=1)
    axes = found.w[:, 0] / lengths[:, None]
    assert (lengths.diff() < 0).all() and torch.allclose(axes @ axes.T, torch.eye(16), atol=1e-4)
    w = tiny.mapping(torch.randn(10_000, 16, generator=torch.Generator().manual_seed(1)))[:, 0]
    covariance = torch.cov((w @ axes.T).T)  # of other codes, along the axes
    torch.testing.assert_close(covariance.diag().sqrt(), lengths, rtol=0.05, atol=0)
    assert (covariance - covariance.diag().diag()).abs().max() < 0.05 * covariance.max()
    assert torch.equal(found.w[:3], pca_directions(tiny, 3).w)


def test_sefa_directions_change_the_styles_most(tiny):
    """The first direction moves the styles of the layers further than any other of its length."""
    codes = Code(torch.randn(50, 8, 16, generator=torch.Generator().manual_seed(0)))
    found = sefa_directions(tiny, codes, 16, layers=(1, 2))
    assert found.w[:, [0, *range(3, 8)]].abs().max() == 0
    block = tiny.blocks[1]
    weight = torch.cat([conv.affine.weight * conv.affine.weight_gain for conv in (block.conv0, block.conv1)])
    units = found.w[:, 1] / found.w[:, 1].norm(dim=1, keepdim=True)
    gains = (units @ weight.T).norm(dim=1)
    assert (gains.diff() < 1e-5).all() and torch.allclose(units @ units.T, torch.eye(16), atol=1e-4)
    assert gains[0].item() == pytest.approx(torch.linalg.matrix_norm(weight, 2).item(), rel=1e-4)
    spread = (codes.w[:, 1:3] @ units.T).std(dim=0).mean(dim=0)
    assert torch.allclose(found.w[:, 1].norm(dim=1), spread, atol=1e-4)


def test_counts_layers_and_generators_are_checked(tiny):
    codes = Code(torch.randn(5, 8, 16))
    for count in (0, 17):
        with pytest.raises(ValueError, match="count: expected 1 to 16"):
            pca_directions(tiny, count)
    with pytest.raises(ValueError, match="count from 1 to 16, got 5 and 17"):
        sefa_directions(tiny, codes, 17)
    for layers in ((), (7,), (2, 9)):  # none, a toRGB alone, one that is not there
        with pytest.raises(ValueError, match="layers: expected indices from 0 to 7"):
            sefa_directions(tiny, codes, 1, layers)
    with pytest.raises(ValueError, match=r"w: expected \[N, 8, 16\]"):
        sefa_directions(tiny, Code(torch.randn(5, 10, 16)), 1)
