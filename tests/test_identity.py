"""The ArcFace network, against its public layout written out by hand, and its file."""

import pickle

import pytest
import torch
import torch.nn.functional as F

from padinv.measure.identity import ArcFace, arcface, similarity

UNITS = [(i, width, 2 if j == 0 else 1) for i, (width, j) in enumerate(
    (width, j) for width, depth in ((64, 3), (128, 4), (256, 14), (512, 3)) for j in range(depth))]  # fmt: skip


def norm(name: str, n: int) -> dict:
    """A batch norm that does something."""
    return {
        f"{name}.weight": 1 + 0.1 * torch.randn(n), f"{name}.bias": 0.1 * torch.randn(n),
        f"{name}.running_mean": 0.1 * torch.randn(n), f"{name}.running_var": 1 + torch.rand(n),
        f"{name}.num_batches_tracked": torch.tensor(7),
    }  # fmt: skip


def conv(*size: int) -> torch.Tensor:
    return torch.randn(size) * (size[1] * size[2] * size[3]) ** -0.5


@pytest.fixture(scope="module")
def state() -> dict:
    """Random weights with the names and shapes of model_ir_se50.pth."""
    torch.manual_seed(0)
    state = {"input_layer.0.weight": conv(64, 3, 3, 3), **norm("input_layer.1", 64)}
    state["input_layer.2.weight"] = torch.rand(64)
    before = 64
    for i, width, _ in UNITS:
        unit = f"body.{i}"
        if before != width:
            state[f"{unit}.shortcut_layer.0.weight"] = conv(width, before, 1, 1)
            state |= norm(f"{unit}.shortcut_layer.1", width)
        state |= norm(f"{unit}.res_layer.0", before)
        state[f"{unit}.res_layer.1.weight"] = conv(width, before, 3, 3)
        state[f"{unit}.res_layer.2.weight"] = torch.rand(width)
        state[f"{unit}.res_layer.3.weight"] = conv(width, width, 3, 3)
        state |= norm(f"{unit}.res_layer.4", width)
        state[f"{unit}.res_layer.5.fc1.weight"] = conv(width // 16, width, 1, 1)
        state[f"{unit}.res_layer.5.fc2.weight"] = conv(width, width // 16, 1, 1)
        before = width
    state |= norm("output_layer.0", 512)
    state["output_layer.3.weight"] = torch.randn(512, 25088) * 25088**-0.5
    state["output_layer.3.bias"] = 0.1 * torch.randn(512)
    return state | norm("output_layer.4", 512)


@pytest.fixture(scope="module")
def path(state, tmp_path_factory):
    torch.save(state, file := tmp_path_factory.mktemp("arcface") / "model_ir_se50.pth")
    return file


@pytest.fixture(scope="module")
def network(path) -> ArcFace:
    return arcface(path)


def by_hand(s: dict, x: torch.Tensor) -> torch.Tensor:
    """IR-SE50 step by step: images of 112² in [-1, 1] -> unit features."""

    def bn(x, name):
        mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, s[f"{name}.weight"], s[f"{name}.bias"])

    x = F.prelu(bn(F.conv2d(x, s["input_layer.0.weight"], padding=1), "input_layer.1"), s["input_layer.2.weight"])
    for i, _, stride in UNITS:
        r, shortcut = f"body.{i}.res_layer", F.max_pool2d(x, 1, stride)
        if f"body.{i}.shortcut_layer.0.weight" in s:
            shortcut = F.conv2d(x, s[f"body.{i}.shortcut_layer.0.weight"], stride=stride)
            shortcut = bn(shortcut, f"body.{i}.shortcut_layer.1")
        x = F.prelu(F.conv2d(bn(x, f"{r}.0"), s[f"{r}.1.weight"], padding=1), s[f"{r}.2.weight"])
        x = bn(F.conv2d(x, s[f"{r}.3.weight"], stride=stride, padding=1), f"{r}.4")
        gate = F.conv2d(F.adaptive_avg_pool2d(x, 1), s[f"{r}.5.fc1.weight"]).relu()
        x = x * F.conv2d(gate, s[f"{r}.5.fc2.weight"]).sigmoid() + shortcut
    x = bn(x, "output_layer.0").flatten(1)
    x = bn(F.linear(x, s["output_layer.3.weight"], s["output_layer.3.bias"]), "output_layer.4")
    return x / x.norm(dim=1, keepdim=True)


def faces(n: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(n, 3, 8, 8, generator=generator) * 2 - 1
    return F.interpolate(small, size=(size, size), mode="bicubic").clamp(-1, 1)


def test_it_is_the_public_network(path, state):
    x = faces(2, 112)
    found = arcface(path, box=(0, 0, 1)).features(x)
    assert found.shape == (2, 512)
    torch.testing.assert_close(found, by_hand(state, x), atol=1e-4, rtol=0)


def test_of_an_ffhq_image_the_middle_is_seen(network, state):
    x = faces(1, 256)
    middle = F.interpolate(x[:, :, 35:223, 32:220], size=(112, 112), mode="bilinear", antialias=True)
    torch.testing.assert_close(network.features(x), by_hand(state, middle), atol=1e-4, rtol=0)
    x[:, :, :35] = 1
    x[:, :, :, 220:] = -1
    torch.testing.assert_close(network.features(x), by_hand(state, middle), atol=1e-4, rtol=0)


def test_a_loss_with_gradient_and_a_metric(network):
    x, y = faces(2, 64), faces(2, 64, seed=1).requires_grad_()
    loss = network(y, x)
    assert loss.shape == (2,) and (loss > 0.01).all() and (loss < 2).all()
    torch.testing.assert_close(network(x, x), torch.zeros(2), atol=1e-5, rtol=0)
    loss.sum().backward()
    assert y.grad.abs().sum() > 0 and all(p.grad is None for p in network.parameters())
    y = y.detach()
    torch.testing.assert_close(similarity(y, x, network, batch=1), 1 - loss.detach(), atol=1e-5, rtol=0)
    assert similarity(3 * y, x, network).isfinite().all()


def test_without_weights_the_term_is_refused():
    with pytest.raises(ValueError, match="identity.*none are shipped.*model_ir_se50.pth"):
        arcface("")


def test_a_file_of_older_torch_without_counters(state, network, tmp_path):
    older = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(older, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    x = faces(1, 64)
    assert network.features(x).equal(arcface(tmp_path / "a.pth").features(x))


class Attack:
    def __reduce__(self):
        return open, ("padinv-was-here", "w")


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("body.4.res_layer.3.weight"), r"body\.4\.res_layer\.3\.weight is missing"),
    (lambda s: s.update({"output_layer.3.weight": torch.zeros(512, 512)}),
     r"output_layer\.3\.weight is \[512, 512\], expected \[512, 25088\]"),
    (lambda s: s.update({"body.24.res_layer.0.bias": torch.zeros(1)}), r"body\.24\.res_layer\.0\.bias is unknown"),
    (lambda s: s.update({"body.3.res_layer.2.weight": "text"}), r"body\.3\.res_layer\.2\.weight is missing"),
    (lambda s: s.pop("input_layer.0.weight"), r"expected tensors input_layer\.\*, body\.\*"),
])  # fmt: skip
def test_a_file_of_another_network_is_refused(state, tmp_path, change, message):
    change(changed := {k: torch.zeros(()).expand_as(t) for k, t in state.items()})  # a small file
    torch.save(changed, file := tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"other.pth: .*{message}"):
        arcface(file)


def test_what_is_no_state_dict_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save([1, 2], "list.pth")
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "attack.pth").write_bytes(pickle.dumps({"input_layer.0.weight": Attack()}))
    for name in ("list.pth", "text.pth", "attack.pth", "absent.pth"):
        with pytest.raises(ValueError, match=name):
            arcface(name)
    assert not (tmp_path / "padinv-was-here").exists()
