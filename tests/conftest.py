"""Fixtures shared by the tests of the networks."""

import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # which would wait for each other's threads
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))  # of torch, and of notebooks' kernels

import numpy as np
import pytest
import torch

from padinv.files.checkpoints import encoder_from_padinv_official, generator_from_state
from padinv.model.codes import Code, Padding
from padinv.model.generator import Generator, GeneratorConfig


def read(name: str) -> dict:
    """tests/fixtures/name.npz as {"generator": {…}, "encoder": {…}, "io": {…}, …} of tensors."""
    groups = defaultdict(dict)
    with np.load(Path(__file__).parent / "fixtures" / f"{name}.npz") as arrays:
        for key in arrays.files:
            group, _, rest = key.partition("/")
            groups[group][rest] = torch.from_numpy(arrays[key])
    return groups


@pytest.fixture(scope="session")
def official() -> SimpleNamespace:
    """The authors' networks: G, E; state dicts; io; the encoder's input x and the true padding p of io's maps."""
    groups = read("padinv_official_tiny")
    io = groups["io"]
    G = generator_from_state(groups["generator"], "padinv_official")
    return SimpleNamespace(
        G=G,
        E=encoder_from_padinv_official(groups["encoder"], G),
        state=groups["generator"],
        encoder_state=groups["encoder"],
        io=io,
        x=io["encoder_input_int8"].float() / 127.5,
        p=Padding.from_maps({key: io[f"padding_map_{key}"] for key in (0, 1, 3, 5, 7)}),
    )


@pytest.fixture(scope="session")
def nvlabs() -> SimpleNamespace:
    groups = read("nvlabs_ada_tiny")
    G = generator_from_state(groups["generator"], "nvlabs_ada")
    return SimpleNamespace(G=G, state=groups["generator"], io=groups["io"])


@pytest.fixture(scope="session")
def rosinality() -> SimpleNamespace:
    groups = read("rosinality_tiny")
    state = groups["generator"] | {"latent_avg": groups["latent_avg"][""]}
    return SimpleNamespace(G=generator_from_state(state, "rosinality"), state=state, io=groups["io"])


@pytest.fixture(scope="session")
def tiny() -> Generator:
    """A frozen generator of 32² with random weights, noise and biases."""
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(32, z_dim=16, w_dim=16, mapping_layers=2, channel_base=256, channel_max=12))
    for name, p in G.named_parameters():
        if name.endswith(("bias", "noise_strength")) and "mapping" not in name:
            p.data += 0.1 * torch.randn_like(p)
    G.mapping.w_avg.normal_(std=0.1)
    return G.eval().requires_grad_(False)


@pytest.fixture
def code(tiny) -> Code:
    """Four codes of `tiny`, with padding at three resolutions."""
    generator = torch.Generator().manual_seed(1)
    rings = [torch.randn(4, tiny.config.channels(r), 4 * (r + 1), generator=generator) for r in (4, 8, 16)]
    const = torch.randn(4, tiny.config.channels(4), 4, 4, generator=generator)
    w = tiny.mapping(torch.randn(4, 16, generator=generator)) + 0.3 * torch.randn(4, 8, 16, generator=generator)
    return Code(w, Padding(const, rings))


@pytest.fixture
def renderer():
    for package in ("dicebear", "dicebear_styles", "resvg_py"):
        pytest.importorskip(package, reason=f"rendering avatars needs {package}")
