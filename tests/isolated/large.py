"""A generator of 1024² at full width (StyleGAN2's config F) in NVIDIA's layout, and two pictures inverted with it.

It takes long, so it is in no suite: python -m pytest -s tests/isolated/large.py. It prints the seconds and the peak of
memory; STEPS=5 gives the same peak sooner.
"""

import os
import sys
import time

import psutil
import pytest
import torch

from padinv import load_generator
from tests.test_commands import picture
from tests.test_foreign import fake, nvlabs_module, write  # noqa: F401

STEPS = os.environ.get("STEPS", "50")


def config_f() -> dict:
    """A state dict with random weights of NVIDIA's names and shapes."""
    torch.manual_seed(0)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    filter = taps.outer(taps) / 64
    state = {"mapping.w_avg": torch.randn(512) * 0.1}
    for i in range(8):
        state |= {f"mapping.fc{i}.weight": torch.randn(512, 512) * 100, f"mapping.fc{i}.bias": torch.zeros(512)}
    last = 512
    for r in (4, 8, 16, 32, 64, 128, 256, 512, 1024):
        nf, block = min(32768 // r, 512), f"synthesis.b{r}"
        state[f"{block}.resample_filter"] = filter
        if r == 4:
            state[f"{block}.const"] = torch.randn(512, 4, 4)
        layers = {f"conv{c}": (nf, last if c == 0 else nf, 3) for c in (0, 1) if (r, c) != (4, 0)}
        for name, (out, inside, k) in (layers | {"torgb": (3, nf, 1)}).items():
            layer = f"{block}.{name}"
            state |= {f"{layer}.weight": torch.randn(out, inside, k, k), f"{layer}.bias": torch.zeros(out)}
            state |= {f"{layer}.affine.weight": torch.randn(inside, 512), f"{layer}.affine.bias": torch.ones(inside)}
            if k == 3:
                state |= {f"{layer}.noise_strength": torch.tensor(0.0), f"{layer}.noise_const": torch.randn(r, r),
                          f"{layer}.resample_filter": filter}  # fmt: skip
        last = nf
    return state


@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_two_pictures_at_1024(precision, fake, tmp_path):  # noqa: F811
    module = nvlabs_module(fake, config_f())
    path = write(tmp_path / "ffhq.pkl", {"G": None, "D": None, "G_ema": module})
    G = load_generator(path)
    assert G.resolution == 1024 and G.num_ws == 18 and sum(p.numel() for p in G.parameters()) > 30e6
    for i in range(2):
        picture(tmp_path / f"pictures/{i}.png", 1024, 1024, seed=i)
    command = [sys.executable, "-m", "padinv", "invert", f"{tmp_path}/pictures", "--generator", f"{path}", "--aligned",
               "--steps", STEPS, "--batch", "1", "--device", "cpu", "--out", f"{tmp_path}/out", *precision]  # fmt: skip
    start, peak = time.perf_counter(), 0
    run = psutil.Popen(command)
    while run.poll() is None:
        try:
            peak = max(peak, sum(p.memory_info().rss for p in (run, *run.children(recursive=True))))
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.1)
    print(f"\n{' '.join(precision) or 'fp32'}: {time.perf_counter() - start:.0f} s for 2 pictures of {STEPS} steps, "
          f"start included; peak {peak / 1e9:.2f} GB", flush=True)  # fmt: skip
    assert run.returncode == 0 and peak < 8e9
    assert len(list((tmp_path / "out/reconstructions").iterdir())) == 2
