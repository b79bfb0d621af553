"""Training: it learns, resumes to the bit, survives being killed, and says what is wrong."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import distributed, nn

import padinv
import padinv.training.encoder as encoder_training
from padinv import load_encoder, load_generator
from padinv.files.checkpoints import save_generator
from padinv.images.datasets import ImageDataset, to_float
from padinv.model.generator import Generator, GeneratorConfig
from padinv.model.tensors import read_metadata
from padinv.ops import upfirdn2d
from padinv.training.__main__ import configure, main
from padinv.training.autoencoder import ToLatent, jitter, uniformity
from padinv.training.discriminators import FeatureDiscriminator, augment
from padinv.training.encoder import EncoderTraining, train_encoder
from padinv.training.generator import GeneratorTrainer, GeneratorTraining, train_generator
from padinv.training.loop import Batches, GlobalBatchNorm, Loop, Run, Stop, frozen, step_seed
from padinv.training.views import views

TINY = {"z_dim": 8, "w_dim": 8, "mapping_layers": 2, "channel_base": 128, "channel_max": 8, "resolution": 16,
        "batch": 4, "log_every": 1, "r1_every": 3, "ema_images": 16.0}  # fmt: skip
SMALL_ENCODER = {"widths": (16, 16, 24, 24), "depths": (1, 1, 1, 1), "pyramid_channels": 8, "head_channels": 4,
                 "padding_channels": 4, "se_reduction": 2, "input_resolution": 32}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("g") / "generator.safetensors"
    G = Generator(GeneratorConfig(32, 8, 8, 2, 256, 8))
    G.blocks[0].conv1.noise.normal_()
    save_generator(G, path)
    return str(path)


def weights(path):
    return {k: v.clone() for k, v in load_generator(path).state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def train(data, folder, images, name="g", **settings):
    config = GeneratorTraining(**(TINY | settings), images=images)
    return train_generator(data, str(folder / f"{name}.safetensors"), config, str(folder / name))


def test_unbroken_and_resumed_runs_end_in_the_same_weights(data, tmp_path):
    grow = {"grow": [[8, 12]], "path_length": 2.0}
    train(data, tmp_path, 32, "whole", **grow)
    for images in (8, 16, 32):  # stops before and after the generator grows
        train(data, tmp_path, images, "parts", **grow)
    assert same(weights(tmp_path / "whole.safetensors"), weights(tmp_path / "parts.safetensors"))
    assert read_metadata(tmp_path / "whole.safetensors")


def test_one_process_trains_in_both_precisions_and_says_where(data, tmp_path):
    for precision in ("bf16", "fp32"):
        train(data, tmp_path, 4, precision, precision=precision)
        meta = json.loads(read_metadata(tmp_path / f"{precision}.safetensors")["meta"])
        assert meta["training"]["precision"] == precision and meta["images"] == 4
        assert len((meta["commit"] or 40 * "0").removesuffix("-dirty")) == 40 and meta["machine"] and meta["date"]
    assert not same(*(weights(tmp_path / f"{precision}.safetensors") for precision in ("bf16", "fp32")))
    with pytest.raises(ValueError, match="precision: expected fp32 or bf16, got 'fp16'"):
        train(data, tmp_path, 4, "other", precision="fp16")


def test_a_discriminator_of_frozen_features_grows_and_resumes(data, tmp_path):
    settings = {"resolution": 64, "grow": [[32, 8]], "discriminator": "features", "r1_gamma": 0.0}
    train(data, tmp_path, 16, "whole", **settings, grid_every=8)
    for images in (4, 16):
        train(data, tmp_path, images, "parts", **settings)
    for path, resolution in zip(sorted((tmp_path / "whole" / "kept").iterdir()), (32, 64), strict=True):
        assert load_generator(path).resolution == resolution
        assert json.loads(read_metadata(path)["meta"]) == {"images": int(path.stem)}
    assert same(weights(tmp_path / "whole.safetensors"), weights(tmp_path / "parts.safetensors"))
    with pytest.raises(ValueError, match="discriminator: expected one of .*'both'"):
        train(data, tmp_path, 4, "other", discriminator="vgg")


WARM = {"resolution": 64, "grow": [[32, 8]], "discriminator": "both", "reconstruct": 1.0, "warm": 12,
        "reconstruct_final": 0.5}  # fmt: skip


def test_a_warm_start_is_followed_by_both_discriminators_and_resumes(data, tmp_path):
    train(data, tmp_path, 20, "whole", **WARM)
    for images in (4, 16, 20):
        train(data, tmp_path, images, "parts", **WARM)
    assert same(weights(tmp_path / "whole.safetensors"), weights(tmp_path / "parts.safetensors"))
    history = json.loads(torch.load(tmp_path / "whole" / "state.pt", weights_only=True)["history"])
    assert [("loss_D" in row, "l1" in row) for row in history] == [(False, True)] * 3 + [(True, True)] * 2


def test_an_autoencoder_gives_each_image_a_place_in_z(data, tmp_path):
    settings = {"resolution": 32, "reconstruct": 1.0, "warm": 10**6, "lr": 0.01, "z_noise": 0.1, "channel_max": 16,
                "uniformity": 1.0}  # fmt: skip
    train(data, tmp_path, 400, **settings)
    state = torch.load(tmp_path / "g" / "state.pt", weights_only=True)
    history = json.loads(state["history"])
    assert history[-1]["l1"] < 0.9 * history[0]["l1"]
    E = ToLatent(GeneratorConfig(32, 8, 8, 2, 128, 16))
    E.load_state_dict(state["networks"][3])
    z = E(to_float(ImageDataset(data).tensor(progress=False)))  # [6, 8]
    assert torch.allclose(z.norm(dim=1), torch.tensor(8.0).sqrt()), "on the sphere"
    assert torch.pdist(z).min() > 1 and torch.allclose(jitter(z, 0.3).norm(dim=1), z.norm(dim=1))


def test_one_image_is_spread_evenly():
    z = torch.randn(1, 8, requires_grad=True)
    loss = uniformity(z)
    loss.backward()
    assert loss == 0 and not z.grad.any()


def test_the_mean_path_length_is_of_all_processes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "reduce", lambda self, t, how: torch.zeros_like(t))
    train(data, tmp_path, 4, path_length=2.0)
    assert torch.load(tmp_path / "g" / "state.pt", weights_only=True)["pl_mean"] == 0


def test_augmented_images_are_shifted_and_recoloured_differentiably():
    x = torch.zeros(64, 3, 16, 16)
    x[:, 0, 4:12, 4:12] = 1
    x.requires_grad_(True)
    y = augment(x)
    assert y.shape == x.shape and y.std(dim=0).mean() > 0.1
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0
    marks = torch.zeros(256, 3, 16, 16)
    marks[:, :, 8, 8] = 100.0  # still the brightest in another light
    where = augment(marks).mean(dim=1).flatten(1).argmax(dim=1)
    assert {*(where // 16).tolist()} == {*(where % 16).tolist()} == set(range(6, 11)), "by up to an eighth, each way"


def test_the_feature_discriminator_learns_its_heads_only():
    D = FeatureDiscriminator(32, width=4)
    state, x = copy.deepcopy(D.state_dict()), torch.rand(2, 3, 32, 32).requires_grad_()
    assert not any("vgg" in name for name in state)
    logits = D(x)
    assert logits.shape == (2, 3 * 4 * 4 + 2 * 2)  # maps of 16², 8² and 4² end at 4², that of 2² stays
    logits.sum().backward()
    assert x.grad.abs().sum() > 0
    with frozen(D):
        assert not any(p.requires_grad for p in D.parameters())
    trained = {name for name, p in D.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("heads.") for name in trained)
    assert {name for name, p in D.named_parameters() if p.grad is not None} == trained
    with pytest.raises(ValueError, match=r"x: expected \[N, 3, 32, 32\]"):
        D(torch.zeros(1, 3, 64, 64))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(data, tmp_path):
    train(data, tmp_path, 8, "a")
    train(data, tmp_path, 8, "b")
    train(data, tmp_path, 8, "c", seed=1)
    a, b, c = (weights(tmp_path / f"{name}.safetensors") for name in "abc")
    assert same(a, b) and not same(a, c)


def test_growing_starts_from_the_upsampled_picture(data, tmp_path):
    still = {"lr": 1e-9}  # so that the step after growing hides nothing
    low = train(data, tmp_path, 12, "low", grow=[[8, 100]], **still)
    high = train(data, tmp_path, 16, "high", grow=[[8, 12]], **still)
    assert (low.resolution, high.resolution) == (8, 16)
    z = torch.randn(2, 8)
    x, y = (G.synthesis(G.mapping(z), noise="none") for G in (low, high))
    assert torch.allclose(y, upfirdn2d(x, low.fir, up=2, pad=(2, 1, 2, 1), gain=4), atol=1e-5)


def test_not_a_number_stops_with_the_last_good_state(data, tmp_path):
    train(data, tmp_path, 8)
    state = (tmp_path / "g" / "state.pt").read_bytes()
    broken = torch.load(tmp_path / "g" / "state.pt", weights_only=True)
    broken["networks"][0]["blocks.0.to_rgb.weight"].fill_(float("nan"))
    torch.save(broken, tmp_path / "g" / "state.pt")
    with pytest.raises(Stop, match="not finite by step 2"):
        train(data, tmp_path, 16)
    (tmp_path / "g" / "state.pt").write_bytes(state)
    train(data, tmp_path, 16)


class Given:
    """A trainer whose losses and weights are given, one of each a step; it may end its own process gently."""

    def __init__(self, loop, losses, weights=None, asked_at=None):
        self.loop, self.losses, self.weights, self.asked_at = loop, losses, weights, asked_at

    def step(self):
        if self.loop.step == self.asked_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": torch.tensor(self.losses[self.loop.step])}

    def state(self):
        return {"networks": [{"w": torch.tensor(self.weights[self.loop.step - 1])}] if self.weights else []}


def run_given(folder, losses, *given, steps=None, **settings):
    loop = Loop(Run(batch=1, images=steps or len(losses), **settings), str(folder), None, "data")
    loop.load()
    loop.run(Given(loop, losses, *given))
    return loop.history


NAN = float("nan")


@pytest.mark.parametrize(
    "given, settings, kept",
    [
        (([1.0, NAN],), {}, None),  # at the end
        (([1.0, NAN, 1.0], None, 1), {}, None),  # asked to end
        (([1.0, NAN, 1.0],), {"save_every": -1}, 1),  # when it is time to save
        (([1.0, 1.0, 1.0], [1.0, NAN, 1.0]), {"save_every": -1}, 1),  # the loss does not show it yet
    ],
)
def test_what_is_not_finite_is_never_saved(tmp_path, given, settings, kept):
    with pytest.raises(Stop, match="not finite by step"):
        run_given(tmp_path, *given, **settings)
    state = tmp_path / "state.pt"
    assert (torch.load(state, weights_only=True)["step"] if state.exists() else None) == kept


def test_the_curve_of_a_resumed_run_has_no_seam(tmp_path):
    losses = [1.0, 2.0, 4.0, 8.0]
    whole = run_given(tmp_path / "whole", losses, log_every=2)
    assert [row["loss"] for row in whole] == [1.5, 6.0]
    run_given(tmp_path / "parts", losses, steps=3, log_every=2)
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert run_given(tmp_path / "parts", losses, log_every=2) == whole
    del state["sums"]  # as states once were
    torch.save(state, tmp_path / "parts" / "state.pt")
    assert run_given(tmp_path / "parts", losses, log_every=2) == [whole[0], {"images": 4, "loss": 8.0}]


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (30.0, 0.01), (100.0, 0.05)])
def test_batch_norm_over_processes_is_torchs(mean, std):
    x = mean + std * torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = []
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for norm, images in ((nn.BatchNorm2d(4).double(), x.double()), (GlobalBatchNorm(4), x)):
            y = norm(images.requires_grad_())
            (y * direction).sum().backward()
            found.append((y, std * images.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()))
    finally:
        distributed.destroy_process_group()
    for of_torch, mine in zip(*found, strict=True):
        assert torch.allclose(mine.double(), of_torch.double(), rtol=0.01, atol=0.01)


def test_a_run_goes_on_where_a_setting_is_newer_than_it(data, tmp_path):
    train(data, tmp_path, 8)
    state = torch.load(tmp_path / "g" / "state.pt", weights_only=True)
    state["config"] = json.dumps(
        {k: v for k, v in json.loads(state["config"]).items() if k not in ("path_length", "grow")}
    )
    torch.save(state, tmp_path / "g" / "state.pt")
    with pytest.raises(ValueError, match="other settings .path_length."):
        train(data, tmp_path, 12, path_length=2.0)
    train(data, tmp_path, 12)
    train(data, tmp_path, 12, "whole")
    assert same(weights(tmp_path / "g.safetensors"), weights(tmp_path / "whole.safetensors"))


def test_a_run_folder_of_other_settings_is_refused_and_kept(data, tmp_path):
    train(data, tmp_path, 8)
    before = (tmp_path / "g" / "state.pt").read_bytes()
    with pytest.raises(ValueError, match="other settings .lr."):
        train(data, tmp_path, 16, lr=1e-4)
    assert (tmp_path / "g" / "state.pt").read_bytes() == before


def command(data, folder, *overrides):
    folder.mkdir(exist_ok=True)
    params = folder / "params.yaml"
    settings = "\n".join(f"  {key}: {value}" for key, value in TINY.items())
    params.write_text(f"train_generator:\n{settings}\n  images: 4000\n  save_every: 0.1\n")
    return [sys.executable, "-m", "padinv.training", "generator", "--data", data, "--params", str(params),
            "--out", str(folder / "cli.safetensors"), "--workdir", str(folder / "cli"),
            *(word for o in overrides for word in ("--set", o))]  # fmt: skip


def start(data, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(data, folder), stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (folder / "cli" / "state.pt").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.fixture
def one_thread():
    """As in the process that is killed: with another number of them sums may round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(data, tmp_path, how, one_thread, monkeypatch):
    process = start(data, tmp_path)
    process.send_signal(how)
    said = process.communicate(timeout=60)[1]
    if how != signal.SIGKILL:
        assert process.returncode == 1 and "state saved" in said
    step = torch.load(tmp_path / "cli" / "state.pt", weights_only=True)["step"]
    images = 4 * (step + 2)
    assert step > 0
    assert how == signal.SIGKILL or not list((tmp_path / "cli").glob(".*.tmp"))
    config = GeneratorTraining(**TINY, images=images, save_every=0.1)
    steps, make = [], GeneratorTrainer.step
    monkeypatch.setattr(GeneratorTrainer, "step", lambda self: steps.append(self.loop.step) or make(self))
    train_generator(data, str(tmp_path / "resumed.safetensors"), config, str(tmp_path / "cli"))
    assert steps == [step, step + 1]
    train_generator(data, str(tmp_path / "whole.safetensors"), config, str(tmp_path / "whole"))
    assert same(weights(tmp_path / "resumed.safetensors"), weights(tmp_path / "whole.safetensors"))
    histories = [torch.load(tmp_path / run / "state.pt", weights_only=True)["history"] for run in ("cli", "whole")]
    assert histories[0] == histories[1]


def test_command_line_errors_name_the_setting(data, tmp_path):
    for overrides, message in ((["speed=3"], "unknown training settings \\['speed'\\]"), (["lr"], "key=value")):
        with pytest.raises(SystemExit, match=message):
            main(command(data, tmp_path, *overrides)[3:])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SystemExit, match="no images"):
        main(command(str(empty), tmp_path)[3:])


def test_settings_have_the_type_of_their_default(data, tmp_path):
    given = {"lr": "1e-4", "images": "1e2", "batch": 8.0, "swap": 1, "resolution": None, "unlock": [8, 4]}
    config = configure(EncoderTraining, given, ["adversarial_lr=2e-5"])
    assert [config.lr, config.images, config.batch, config.swap] == [1e-4, 100, 8, 1.0]
    assert (config.adversarial_lr, config.resolution, config.unlock) == (2e-5, None, (8, 4))
    assert {type(config.lr), type(config.swap)} == {float} and {type(config.images), type(config.batch)} == {int}
    for override in ("lr=fast", "lr=true", "lr=", "images=1.5", "images=.inf", "images=true", "mirror=1", "precision=1",
                     "unlock=8", "encoder=8"):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{override.partition('=')[0]}: expected .*, got "):
            configure(EncoderTraining, {}, [override])
    with pytest.raises(SystemExit, match="images: expected int, got 'many'"):
        main(command(data, tmp_path, "images=many")[3:])


@pytest.mark.parametrize("what, section", [("generator", "nope"), ("encoder", "nope"), ("encoder", "train_encoder")])
def test_a_missing_section_is_named(data, tmp_path, what, section):
    arguments = [what, *command(data, tmp_path)[4:], *(["--section", section] if section == "nope" else [])]
    with pytest.raises(SystemExit, match=rf"--section: expected one of \['train_generator'\], got '{section}'"):
        main(arguments)


def test_every_image_is_shown_once_an_epoch(tmp_path):
    for i in range(6):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i}.png")
    shown = {}
    for workers in (0, 2):  # held in memory, or decoded as they are needed
        config = GeneratorTraining(batch=4, workers=workers, mirror=False)
        batches = Batches(str(tmp_path), 8, config, Accelerator(cpu=True))
        shown[workers] = torch.cat([batches[i] for i in range(6)])[:, 0, 0, 0]  # 4 epochs
        again = Batches(str(tmp_path), 8, config, Accelerator(cpu=True))
        assert torch.equal(again[4][:, 0, 0, 0], shown[workers][16:20])  # as after a resume
    assert torch.equal(shown[0], shown[2])
    values = ((shown[0] + 1) * 127.5).round().int().view(4, 6)
    assert all(sorted(epoch.tolist()) == list(range(6)) for epoch in values)
    assert len({tuple(epoch.tolist()) for epoch in values}) > 1


def test_a_broken_image_stops_training_by_name(data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    (broken / "3.png").write_bytes(b"no image")
    for workers in (0, 2):
        with pytest.raises(ValueError, match=r"3\.png"):
            train(str(broken), tmp_path, 16, f"g{workers}", workers=workers)


def test_step_seeds_differ():
    seeds = {step_seed(seed, step, process) for seed in range(5) for step in range(200) for process in range(4)}
    assert len(seeds) == 4000


# ----------------------------------------------------------------------------------------------------------------------
# Encoders


def train_e(data, generator, folder, images, name="e", encoder=None, **settings):
    settings = {"batch": 4, "log_every": 1, "lr": 2e-3, "lpips": 0.0} | settings
    config = EncoderTraining(**settings, images=images, encoder=SMALL_ENCODER | (encoder or {}))
    out = folder / f"{name}.safetensors"
    train_encoder(data, generator, str(out), config, str(folder / name))
    history = folder / name / "history.json"  # written with each sample grid
    return load_encoder(out), json.loads(history.read_text()) if history.exists() else None


def test_losses_at_a_lower_resolution(data, generator, tmp_path):
    encoder, history = train_e(data, generator, tmp_path, 8, resolution=16, grid_every=8, adversarial=0.1)
    with Image.open(next((tmp_path / "e").glob("samples-*.png"))) as grid:
        assert (grid.width - 1) % (16 + 1) == 0 and (grid.width - 1) % (32 + 1) != 0
    with pytest.raises(ValueError, match="resolution: expected a divisor of the generator's 32, got 64"):
        train_e(data, generator, tmp_path, 8, "other", resolution=64)


def test_encoder_learns_and_resumes_exactly(data, generator, tmp_path):
    whole, history = train_e(data, generator, tmp_path, 120, "whole", grid_every=120)
    mse = [row["mse"] for row in history]
    assert np.mean(mse[-5:]) < np.mean(mse[:5])
    train_e(data, generator, tmp_path, 40, "parts")
    parts, _ = train_e(data, generator, tmp_path, 120, "parts")
    assert same(whole.state_dict(), parts.state_dict())
    assert (tmp_path / "whole" / "samples-00000120.png").exists()


def test_each_loss_can_be_switched(data, generator, tmp_path):
    settings = {"mse": 0.0, "w_norm": 0.0, "lpips": 0.0, "adversarial": 0.05, "r1_every": 2}
    E, history = train_e(data, generator, tmp_path, 16, **settings, grid_every=16)
    assert set(history[0]) == {"images", "adversarial", "loss_D"}
    _, history = train_e(data, generator, tmp_path, 8, "l", lpips=0.8, grid_every=8)
    assert set(history[0]) == {"images", "mse", "lpips", "w_norm"}


def test_identity_needs_weights_and_then_is_a_loss(data, generator, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="identity: .*model_ir_se50.pth"):
        train_e(data, generator, tmp_path, 8, "none", identity=0.1)
    likeness = torch.nn.CosineSimilarity()  # of pixels, in the place of a slow network
    monkeypatch.setattr(
        encoder_training, "arcface", lambda path, device, box: lambda y, x: 1 - likeness(y.flatten(1), x.flatten(1))
    )
    (tmp_path / "weights.pth").write_text("any")
    settings = {"mse": 0.0, "w_norm": 0.0, "identity": 1.0, "identity_weights": str(tmp_path / "weights.pth")}
    _, history = train_e(data, generator, tmp_path, 40, **settings, grid_every=40)
    loss = [row["identity"] for row in history]
    assert set(history[0]) == {"images", "identity"} and np.mean(loss[-3:]) < np.mean(loss[:3])


def test_views_are_of_the_same_image():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 32, 32) * 2 - 1
    x[:, :, :, 16:] = x[:, :, :, 16:] * 0.2  # busy on the left, calm on the right
    before = x.clone()
    colours, warped = views(x)
    assert torch.equal(x, before) and colours.shape == warped.shape == x.shape
    assert max(colours.abs().max(), warped.abs().max()) <= 1
    assert (colours.mean(dim=(2, 3)) - x.mean(dim=(2, 3))).abs().mean() > 0.05, "colours change"
    busy = colours[..., :16].std(dim=(1, 2, 3)) > colours[..., 16:].std(dim=(1, 2, 3))
    assert busy.all(), "shapes do not"
    mirrored = warped[..., :16].std(dim=(1, 2, 3)) < warped[..., 16:].std(dim=(1, 2, 3))
    assert 0.3 < mirrored.float().mean() < 0.7, "of the warped ones, half are mirrored"


def test_swapping_goes_on_from_an_encoder_and_resumes(data, generator, tmp_path):
    def go_on(name, images, init=tmp_path / "e.safetensors", **settings):
        encoder = SMALL_ENCODER | settings.pop("encoder", {})
        config = EncoderTraining(batch=4, lr=3e-3, log_every=1, images=images, swap=1.0, encoder=encoder, **settings)
        arguments = (str(tmp_path / f"{name}.safetensors"), config, str(tmp_path / name))
        return train_encoder(data, generator, *arguments, init=init and str(init))

    train_e(data, generator, tmp_path, 16)
    start = load_encoder(tmp_path / "e.safetensors").state_dict()
    none = go_on("none", 4, lr_final=0.0, grid_every=100)
    key = "padding.rings.0.weight"
    assert not torch.equal(none.state_dict()[key], start[key]), "it learns"
    assert (none.state_dict()[key] - start[key]).abs().max() < 0.01, "from where the other had ended"
    whole = go_on("whole", 32)
    for images in (16, 32):
        part = go_on("part", images)
    assert same(whole.state_dict(), part.state_dict())
    with pytest.raises(ValueError, match="init: .*another architecture"):
        go_on("wide", 4, encoder={"head_channels": 6})
    with pytest.raises(ValueError, match="swap: one at a time, for an encoder that predicts P"):
        go_on("psp", 4, init=None, encoder={"padded_resolutions": 0, "replace_const": False})
    with pytest.raises(ValueError, match="swap_from: expected 0 to "):
        go_on("far", 4, swap_from=load_generator(generator).num_ws)
    apart = go_on("apart", 4, swap_from=2).state_dict()
    assert not torch.equal(apart[key], go_on("once", 4).state_dict()[key]), "coarse w of the image itself"
    go_on("psp", 4, init=None, encoder={"padded_resolutions": 0, "replace_const": False}, swap_from=2)


def test_w_draws_alone_what_it_can_where_that_is_asked_for(data, generator, tmp_path):
    G, x = load_generator(generator), to_float(ImageDataset(data).tensor(progress=False))
    alone = {}
    for name, settings in (("free", {}), ("asked", {"w_only": 1.0}), ("part", {"w_only": 1.0, "w_only_part": 0.5})):
        E, history = train_e(data, generator, tmp_path, 240, name, grid_every=240, **settings)
        assert ("w_mse" in history[0]) == (name != "free")
        with torch.no_grad():
            alone[name] = (G.synthesis(E(x).w) - x).square().mean().item()
    assert max(alone["asked"], alone["part"]) < alone["free"]
    psp = {"padded_resolutions": 0, "replace_const": False}
    runs = [train_e(data, generator, tmp_path, 8, f"psp{w}", psp, w_only=w)[0].state_dict() for w in (0.0, 1.0)]
    assert same(*runs), "without P there is nothing to share"


def test_p_can_be_dropped_for_a_part_or_for_a_time(data, generator, tmp_path):
    cases = {
        "still": {"lr": 0.0},
        "plain": {},
        "part": {"p_drop": 0.5},
        "later": {"p_from": 8},
        "whole": {"p_drop": 1.0},
    }
    state = {}
    for name, settings in cases.items():
        state[name] = train_e(data, generator, tmp_path, 8, name, **settings)[0].state_dict()
    learnt = [key for key in state["still"] if key.startswith("padding.") and key.endswith("weight")]
    moved = {name: any(not torch.equal(state[name][key], state["still"][key]) for key in learnt) for name in cases}
    assert moved == {"still": False, "plain": True, "part": True, "later": False, "whole": False}


def test_w_is_held_at_the_distance_of_the_mapping(data, generator, tmp_path):
    _, history = train_e(data, generator, tmp_path, 8, w_norm=0.0, w_hinge=1.0, grid_every=8)
    assert all(row["w_hinge"] >= 0 for row in history)
    assert history[0]["w_hinge"] > 0, "new encoders answer w_avg"


def test_edits_are_learnt_from_the_generators_own_images(data, generator, tmp_path):
    inside = {"interior": 8}
    E, history = train_e(data, generator, tmp_path, 16, "e", inside, edited=1.0, interior_norm=0.01, grid_every=16)
    assert all(row["edited_mse"] > 0 and row["interior_norm"] >= 0 for row in history)
    assert E(torch.zeros(1, 3, 32, 32)).p.interior.any()
    train_e(data, generator, tmp_path, 8, "parts", inside, edited=1.0, interior_norm=0.01)
    parts, _ = train_e(data, generator, tmp_path, 16, "parts", inside, edited=1.0, interior_norm=0.01)
    assert same(E.state_dict(), parts.state_dict())
    for settings, message in (({"edited": 1.0, "swap": 1.0}, "swap, edited: one at a time"),
                              ({"interior_norm": 0.01}, "interior_norm: needs")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            train_e(data, generator, tmp_path, 4, "none", **settings)


def test_psp_is_the_same_encoder_without_p(data, generator, tmp_path):
    E, _ = train_e(data, generator, tmp_path, 4, encoder={"padded_resolutions": 0, "replace_const": False})
    assert E(torch.zeros(1, 3, 32, 32)).p is None


E4E = {"padded_resolutions": 0, "replace_const": False, "base_w": True}


def test_e4e_unlocks_one_offset_after_another(data, generator, tmp_path):
    settings = {"encoder": E4E, "unlock": [8, 4], "delta_norm": 1e-3, "w_adversarial": 0.1, "r1_every": 2}
    _, history = train_e(data, generator, tmp_path, 24, **settings, grid_every=24)
    assert set(history[0]) >= {"delta_norm", "w_adversarial", "loss_D_w"}
    norms = [row["delta_norm"] for row in history]  # 4 images a step
    assert norms[0] == norms[1] == 0 < norms[2] < norms[3] < norms[5]


def test_e4e_resumes_exactly(data, generator, tmp_path):
    settings = {"encoder": E4E, "unlock": [8, 4], "w_adversarial": 0.1}
    whole, _ = train_e(data, generator, tmp_path, 16, "whole", **settings)
    train_e(data, generator, tmp_path, 8, "parts", **settings)
    parts, _ = train_e(data, generator, tmp_path, 16, "parts", **settings)
    assert same(whole.state_dict(), parts.state_dict())


def test_a_residual_encoder_learns_what_its_base_left_and_resumes(data, generator, tmp_path):
    train_e(data, generator, tmp_path, 16, "base")
    base = str(tmp_path / "base.safetensors")

    def train(images, name):
        config = EncoderTraining(batch=4, log_every=1, lr=2e-3, lpips=0.0, w_norm=0.0, images=images, passes=2)
        return train_encoder(data, generator, str(tmp_path / f"{name}.safetensors"), config, str(tmp_path / name),
                               base=base)  # fmt: skip

    E = train(120, "whole")
    train(40, "parts")
    assert same(E.state_dict(), train(120, "parts").state_dict())
    x, G = to_float(ImageDataset(data).tensor(progress=False)), load_generator(generator)
    first = load_encoder(base)
    before = padinv.invert(x, first, G)
    after = padinv.invert(x, first, G, residual=E.eval(), passes=3)
    assert (G(after) - x).square().mean() < (G(before) - x).square().mean()
    with pytest.raises(ValueError, match="other settings \\(base\\)"):
        train_e(data, generator, tmp_path, 8, "other")
        base = str(tmp_path / "other.safetensors")
        train(120, "parts")
