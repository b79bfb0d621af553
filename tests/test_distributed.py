"""Several processes train as one does with the same global batch."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

from padinv import load_encoder
from padinv.files.checkpoints import save_generator
from padinv.model.generator import Generator, GeneratorConfig

SETTINGS = {
    "images": 48, "batch": 8, "lr": 1e-3, "log_every": 1, "adversarial": 0.1, "r1_every": 2, "lpips": 0.0,
    "encoder": {"widths": [16, 16, 24, 24], "depths": [1, 1, 1, 1], "pyramid_channels": 8, "head_channels": 4,
                "padding_channels": 4, "se_reduction": 2, "input_resolution": 32},
    "methods": {"padinv": {}},
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("inputs")
    (folder / "images").mkdir()
    pixels = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(folder / "images" / f"{i}.png")
    torch.manual_seed(0)
    save_generator(Generator(GeneratorConfig(32, 8, 8, 2, 256, 8)), folder / "g.safetensors")
    (folder / "params.yaml").write_text(yaml.safe_dump({"train_encoder": SETTINGS}))
    return folder


def start(inputs, name, processes, **settings):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    files = {"data": "images", "generator": "g.safetensors", "out": f"{name}.safetensors", "workdir": name,
             "params": "params.yaml"}  # fmt: skip
    training = ["-m", "padinv.training", "encoder"]
    for key, value in files.items():
        training += [f"--{key}", str(inputs / value)]
    for key, value in settings.items():
        training += ["--set", f"{key}={value}"]
    command = [sys.executable, *(launcher if processes > 1 else []), *training]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(run, inputs, name):
    """The curve of a run and its encoder's weights."""
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output[-2000:]
    history = torch.load(inputs / name / "state.pt", weights_only=True)["history"]
    return json.loads(history), load_encoder(inputs / f"{name}.safetensors").state_dict()


def test_two_processes_and_one_have_the_same_curve_and_weights(inputs):
    runs = {"one": start(inputs, "one", 1), "two": start(inputs, "two", 2)}
    (curve, weights), (others, other_weights) = (finish(run, inputs, name) for name, run in runs.items())
    assert len(curve) == 6 and curve[0]["mse"] != curve[-1]["mse"]
    for row, other in zip(curve, others, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)
    for name, t in weights.items():  # of 6 steps of Adam at 1e-3; where a gradient is noise, its sign is too
        close = torch.isclose(other_weights[name], t, rtol=0.01, atol=2e-3).float().mean()
        apart = (other_weights[name] - t).float().abs().mean()
        assert close > 0.999 and apart < 3e-4, f"{name}: {close:%} of the weights close, {apart} apart on average"


def test_two_processes_go_on_as_if_nothing_had_happened(inputs):
    settings = {"log_every": 2, "images": 32}
    runs = {"whole": start(inputs, "whole", 2, **settings), "parts": start(inputs, "parts", 2, log_every=2, images=24)}
    (curve, weights), _ = (finish(run, inputs, name) for name, run in runs.items())
    other, other_weights = finish(start(inputs, "parts", 2, **settings), inputs, "parts")
    assert len(curve) == len(other) == 2 and all(a == pytest.approx(b) for a, b in zip(curve, other, strict=True))
    assert all(torch.equal(t, other_weights[name]) for name, t in weights.items())


def test_a_batch_that_processes_cannot_share(inputs):
    run = start(inputs, "odd", 2, batch=7)
    output, _ = run.communicate(timeout=300)
    assert run.returncode != 0 and "batch: expected a multiple of the 2 processes, got 7" in output
