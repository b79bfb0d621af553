"""Semantic directions of W+ (& P): by linear SVM on labelled codes, by PCA of w, by factorising the style weights.

A direction is a `Code` of one, scaled so that strength 1 is one standard deviation; K directions are a `Code` of K.
Without p it leaves the padding of what it moves alone: the native editing of W+ with P kept.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from padinv.model.codes import Code
from padinv.model.generator import Generator


def move(code: Code, direction: Code, strength: float | Tensor = 1.0, layers: Iterable[int] | None = None) -> Code:
    """Codes moved along a direction: w + strength · direction in the given layers, P kept unless the direction has one.

    Args:
        code: N codes, or one that takes every strength.
        direction: one direction.
        strength: in standard deviations; a number, or one for each result [N].
        layers: indices of w that move, all if None. P, where it moves, does so whole.

    Raises:
        ValueError: shapes of another generator, more than one direction, a direction in P for codes without, a layer
            out of range, or a strength that is not finite or fits no batch.
    """
    strength = torch.as_tensor(strength, dtype=code.w.dtype, device=code.w.device).reshape(-1)  # [1] or [N]
    if not strength.isfinite().all():
        raise ValueError(f"strength: expected finite numbers of standard deviations, got {strength.tolist()}")
    if len(code) != len(strength) and 1 not in (len(code), len(strength)):
        raise ValueError(f"strength: expected one, or one for each of {len(code)} codes, got {len(strength)}")
    if len(direction) != 1 or direction.w.shape[1:] != code.w.shape[1:]:
        raise ValueError(f"direction: expected one, with w {[1, *code.w.shape[1:]]} as the codes have it, got "
                         f"{list(direction.w.shape)}; of several pick one, as in directions[0]")  # fmt: skip
    num_ws = code.w.shape[1]
    chosen = range(num_ws) if layers is None else list(layers)
    if not all(0 <= i < num_ws for i in chosen):
        raise ValueError(f"layers: expected indices of w from 0 to {num_ws - 1}, got {chosen}")
    if direction.p is not None and code.p is None:
        raise ValueError("direction: it moves p, but the codes have none; drop it with Code(direction.w)")

    def scaled(t: Tensor, d: Tensor) -> Tensor:
        return t + strength.view(-1, *[1] * (t.ndim - 1)) * d

    mask = torch.zeros(num_ws, 1, device=code.w.device)
    mask[list(chosen)] = 1
    w = scaled(code.w, mask * direction.w)  # [N, num_ws, w_dim]
    p = code.p
    if direction.p is not None:
        p = p.zip(direction.p, scaled)
    elif p is not None and len(p) != len(w):
        p = p.map(lambda t: t.expand(len(w), *t.shape[1:]))
    return Code(w, p)


# ----------------------------------------------------------------------------------------------------------------------
# From labels


def check_labels(labels: Tensor, n: int) -> None:
    if labels.ndim != 2 or len(labels) != n or labels.dtype != torch.bool:
        raise ValueError(f"labels: expected bool [{n}, K], got {labels.dtype} {list(labels.shape)}")


def linear_svm(x: Tensor, labels: Tensor, C: float = 1.0) -> tuple[Tensor, Tensor]:
    """Linear support vector machines (scikit-learn's), one for each label, both classes weighing the same.

    They are solved on the inner products of x, which all labels share: time grows with N² and hardly with D.

    Args:
        x: [N, D].
        labels: boolean [N, K], each column of both kinds.
        C: weight of the errors against the width of the margin, for x whose mean square norm is 1.

    Returns:
        Normals [D, K] and biases [K]: x @ normals + biases is above 0 where the labels are said to be true.

    Raises:
        ValueError: labels of another shape or type, or a column that is all the same.
    """
    from sklearn.svm import SVC

    check_labels(labels, len(x))
    for k, column in enumerate(labels.T):
        if column.all() or not column.any():
            raise ValueError(f"labels[:, {k}]: all {len(x)} are {bool(column[0])}; both kinds are needed to tell apart")
    mean = x.mean(dim=0)
    x = x - mean
    size = x.square().sum(dim=1).mean()
    gram = (x @ x.T / size).cpu().double().numpy()  # [N, N]
    duals, biases = x.new_zeros(len(x), labels.shape[1]), []
    for k, column in enumerate(labels.T.cpu().numpy()):
        svm = SVC(kernel="precomputed", C=C, class_weight="balanced").fit(gram, column)
        duals[torch.from_numpy(svm.support_).long(), k] = torch.from_numpy(svm.dual_coef_[0]).to(x)
        biases.append(svm.intercept_.item())
    normals = x.T @ duals / size  # [D, K]
    return normals, torch.tensor(biases).to(x) - mean @ normals


def balanced_accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean over true and false of the share whose score has the right sign: [N, K], [N, K] -> [K]; 0.5 is guessing."""
    right = ((scores > 0) == labels).float()
    return sum((right * kind).sum(dim=0) / kind.sum(dim=0) for kind in (labels, ~labels)) / 2


def svm_directions(codes: Code, labels: Tensor, C: float = 1.0, held_out: float = 0.2) -> tuple[Code, Tensor]:
    """The directions of labels, and how well codes tell them (InterFaceGAN, Shen et al. 2020, section 3).

    InterFaceGAN moves codes along the normal of the SVM. A normal is made to separate and may point where codes never
    go; the direction here is how codes change with the SVM's score, their covariance with it (Haufe et al. 2014).

    Args:
        codes: N codes. Code(codes.w) gives directions of W+; codes with p those of W+ & P, for which w, the constant
            and each ring count the same.
        labels: boolean [N, K], each column of both kinds.
        C: as in `linear_svm`.
        held_out: share of the codes, the last ones, kept from the SVM.

    Returns:
        K directions towards true, of one standard deviation of the score, and the balanced accuracies [K] on the codes
        held out.

    Raises:
        ValueError: as `linear_svm`, also if the codes held out lack one kind of a label.
    """
    check_labels(labels, len(codes))
    n = len(codes) - round(held_out * len(codes))
    centred = codes.map(lambda t: t - t[:n].mean(dim=0))
    x = torch.cat([t.flatten(1) / t[:n].square().sum().sqrt() for t in centred.tensors], dim=1)  # [N, D]
    normals, biases = linear_svm(x[:n], labels[:n], C)
    scores = x @ normals + biases  # [N, K]
    accuracy = balanced_accuracy(scores[n:], labels[n:])
    if accuracy.isnan().any():
        raise ValueError(f"held_out: the last {len(codes) - n} of {len(codes)} codes lack one kind of a label; shuffle "
                         "them, or hold out more")  # fmt: skip
    weights = (scores[:n] - scores[:n].mean(dim=0)) / (scores[:n].std(dim=0) * n)  # [n, K]
    return centred.map(lambda t: torch.tensordot(weights.T, t[:n], dims=1)), accuracy


# ----------------------------------------------------------------------------------------------------------------------
# Without labels


@torch.no_grad()
def pca_directions(G: Generator, count: int, n: int = 10_000, seed: int = 0) -> Code:
    """The main axes of W, the same in every layer: the first principal components of the mapping's codes, the largest
    first (GANSpace, Härkönen et al. 2020, section 2.1).

    Args:
        G: generator.
        count: axes, up to w_dim.
        n, seed: of the codes.

    Raises:
        ValueError: count out of range.
    """
    if not 1 <= count <= G.config.w_dim:
        raise ValueError(f"count: expected 1 to {G.config.w_dim}, got {count}")
    z = torch.randn(n, G.config.z_dim, generator=torch.Generator().manual_seed(seed)).to(G.w_avg.device)
    values, vectors = torch.linalg.eigh(torch.cov(G.mapping(z)[:, 0].T).cpu())  # ascending; not for GPUs of Apple
    d = settled((vectors * values.clamp_min(0).sqrt()).T.flip(0)[:count])  # [count, w_dim]
    return Code(d[:, None].repeat(1, G.num_ws, 1).to(G.w_avg))


def settled(d: Tensor) -> Tensor:
    """Eigenvectors [K, D] have no sign: the largest coefficient of each becomes positive."""
    return d * d.gather(1, d.abs().argmax(dim=1, keepdim=True)).sign()


def sefa_directions(G: Generator, codes: Code, count: int, layers: Iterable[int] | None = None) -> Code:
    """The directions of w that change the styles most: eigenvectors of AᵀA (SeFa, Shen & Zhou 2021, section 3).

    Args:
        G: generator; A holds the style weights of its convolutions, those of toRGB aside.
        codes: N ≥ 2 codes, whose spread along a direction, averaged over the layers, is strength 1.
        count: directions, up to w_dim.
        layers: indices of w whose convolutions count, and which the directions move; all if None.

    Raises:
        ValueError: codes of another generator or fewer than two, a count out of range, or no convolution in `layers`.
    """
    G.check(codes.w, None)
    if len(codes) < 2 or not 1 <= count <= G.config.w_dim:
        raise ValueError(f"expected 2 codes or more and a count from 1 to {G.config.w_dim}, got {len(codes)} and "
                         f"{count}")  # fmt: skip
    chosen = set(range(G.num_ws) if layers is None else layers)
    convs = {2 * i: block.conv1 for i, block in enumerate(G.blocks)}
    convs |= {2 * i - 1: block.conv0 for i, block in enumerate(G.blocks) if i}
    weights = [conv.affine.weight * conv.affine.weight_gain for i, conv in convs.items() if i in chosen]
    if not weights or not chosen <= set(range(G.num_ws)):
        raise ValueError(f"layers: expected indices from 0 to {G.num_ws - 1}, one at least of a convolution "
                         f"{sorted(convs)}, got {sorted(chosen)}")  # fmt: skip
    A = torch.cat(weights).detach().cpu().double()  # [styles, w_dim]; GPUs of Apple have no float64
    d = settled(torch.linalg.eigh(A.T @ A).eigenvectors.T.flip(0)[:count])  # [count, w_dim], the largest first
    used = sorted(chosen)
    spread = (codes.w[:, used].cpu().double() @ d.T).std(dim=0).mean(dim=0)  # [count]
    w = codes.w.new_zeros(count, *codes.w.shape[1:])
    w[:, used] = (spread[:, None] * d).to(w)[:, None]  # [count, num_ws, w_dim]
    return Code(w)
