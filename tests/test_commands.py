"""The command `padinv`: every example of every --help runs, searches without an encoder, bad input ends in one line."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from padinv import Code, Encoder, Generator, GeneratorConfig, load_generator, project
from padinv.__main__ import COMMANDS, main
from padinv.commands import directions as directions_command
from padinv.files.checkpoints import save_encoder, save_generator
from padinv.images import datasets
from padinv.images.datasets import read_image, to_float
from padinv.photos import networks as networks_module
from padinv.photos.faces import cut, middle
from padinv.photos.networks import Networks, fingerprint, room

ROOT = Path(__file__).resolve().parent.parent
PORTRAIT = ROOT / "tests/fixtures/photos/astronaut.jpg"
SMALL = {"widths": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "pyramid_channels": 8, "head_channels": 4,
         "padding_channels": 4, "se_reduction": 2, "input_resolution": 32}  # fmt: skip


def tiny(seed: int = 0, **config) -> Generator:
    torch.manual_seed(seed)
    sizes = {"z_dim": 16, "w_dim": 16, "mapping_layers": 2, "channel_base": 512, "channel_max": 16}
    G = Generator(GeneratorConfig(32, **sizes | config)).eval().requires_grad_(False)
    G.mapping.w_avg.normal_()
    return G


def picture(path: Path, h: int = 32, w: int = 32, seed: int = 0) -> Path:
    coarse = np.random.RandomState(seed).randint(0, 256, (4, 4, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """What the examples name: networks, pictures, directions, labelled images; and networks that do not fit."""
    folder = tmp_path_factory.mktemp("files")
    G, shipped = tiny(), folder / "checkpoints/faces-64"
    save_generator(G, shipped / "generator.safetensors")
    E = Encoder.for_generator(G, **SMALL)
    for head in (*E.padding.rings, E.padding.const):  # as of a trained one: P differs from picture to picture
        torch.nn.init.normal_(head.weight)
    for name in ("padinv", "padinv-split"):
        save_encoder(E, shipped / f"{name}.safetensors", half=False)
    Code(torch.randn(2, G.num_ws, 16)).save(shipped / "directions-w.safetensors", names=["hat", "glasses"])
    torch.save(torch.randn(1, 16), folder / "age.pt")
    for name in ("ffhq.pkl", "cars.pkl"):
        shutil.copy(shipped / "generator.safetensors", folder / name)  # content decides, not the name
    save_generator(tiny(1), folder / "other.safetensors")
    save_generator(tiny(1, w_dim=24), folder / "wide.safetensors")
    for name in ("holiday.jpg", "portraits/a.jpg", "me.png", "you.png", "face.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.open(PORTRAIT).save(folder / name)
    hat = Image.open(PORTRAIT)
    hat.paste((200, 20, 20), (160, 60, 290, 94))
    hat.save(folder / "face-with-hat.png")
    picture(folder / "car.jpg", 40, 60)
    with zipfile.ZipFile(folder / "more.zip", "w") as z:
        z.write(PORTRAIT, "b.jpg")
    with zipfile.ZipFile(folder / "faces.zip", "w") as z:
        rows = ["file,smiling,hair,all"]
        for i in range(20):
            z.write(picture(folder / "labelled" / f"{i}.png", seed=i), f"{i}.png")
            rows.append(f"{i}.png,{i % 2},{('long', 'short')[i % 2]},yes")
        z.writestr("labels.csv", "\n".join(rows))
    shutil.copy(ROOT / "params.yaml", folder)
    return folder


@pytest.fixture
def place(files, tmp_path, monkeypatch) -> Path:
    """An empty working directory with links to the files."""
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(networks_module, "STEPS", 2)
    return tmp_path


GENERATOR = ["--generator", "checkpoints/faces-64/generator.safetensors", "--device", "cpu"]
ENCODER = [*GENERATOR, "--encoder", "checkpoints/faces-64/padinv.safetensors"]
SVM = [*ENCODER, "--method", "svm", "--labelled"]


def records(out: Path) -> list[dict]:
    return [json.loads(line) for path in (out / "records").glob("*.jsonl") for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# Examples


def examples(command) -> list[list[str]]:
    """The command lines in what --help shows: indented by two, and perhaps continued."""
    lines = command.EXAMPLE.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("  padinv ")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_examples_run(command, place, monkeypatch):
    import padinv.app.page
    import padinv.training.__main__  # only here: see the test of --help

    started = []
    monkeypatch.setattr(padinv.training.__main__, "train_generator", lambda *given: started.append(given))
    monkeypatch.setattr(padinv.app.page, "serve", lambda *given: started.append(given))
    assert examples(command)
    for _, *words in examples(command):
        assert main(words) == 0
        if words[0] in ("app", "train"):
            assert len(started) == 1
        elif words[0] != "inspect":
            out = Path(words[words.index("--out") + 1])
            assert {".png", ".safetensors"} & {path.suffix for path in ([out], out.rglob("*"))[out.is_dir()]}
            assert out.exists()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_help_shows_the_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command.__name__.rpartition(".")[2], "--help"])
    assert stop.value.code == 0 and command.EXAMPLE.splitlines()[1].strip(" \\") in capsys.readouterr().out


def test_help_imports_nothing_that_takes_long():
    heavy = "{'accelerate', 'gradio', 'sklearn', 'facenet_pytorch', 'padinv.training', 'padinv.photos.folder'}"
    code = f"import sys, padinv.__main__; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_console_script():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"padinv": f"{main.__module__}:{main.__name__}"}


# ----------------------------------------------------------------------------------------------------------------------
# Without an encoder


def test_a_search_is_that_of_the_library(place):
    paths = [picture(place / "in" / f"{i}.png", seed=i) for i in range(3)]
    assert main(["invert", "in", *GENERATOR, "--crop", "center", "--steps", "4", "--out", "out"]) == 0
    G = load_generator(GENERATOR[1])
    x = to_float(torch.stack(list(map(read_image, paths))))
    expected = project(x, G, "w+p", steps=4, batch=3)
    found = Code.cat([Code.load(place / f"out/codes/{i}.safetensors") for i in range(3)])
    for a, b in zip(found.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)
    start = (G(Code(G.w_avg.expand(1, G.num_ws, -1))) - x).clamp(-1, 1).square().mean()
    report = json.loads(Path("out/report.json").read_text())
    assert report["inverted"] == 3 and report["mean"]["mse"] < start


def test_the_middle_is_inverted_and_pasted_back(place):
    picture(place / "wide.png", 32, 60)
    assert main(["invert", "wide.png", *GENERATOR, "--crop", "center", "--steps", "1", "--out", "out"]) == 0
    photo, pasted = read_image("wide.png").float(), read_image("out/pasted/wide.jpg").float()
    difference = (pasted - photo).abs().mean(dim=0)
    assert difference[:, :8].mean() < 4 and difference[:, -8:].mean() < 4 and difference[8:24, 22:38].mean() > 15
    drawn = read_image("out/reconstructions/wide.png").float()
    assert (pasted[:, 8:24, 22:38] - drawn[:, 8:24, 8:24]).abs().mean() < 8
    crop = read_image("out/compare/wide.png")[:, 1:33, 1:33]
    assert crop.equal(read_image("wide.png")[:, :, 14:46])
    main(["invert", "wide.png", *GENERATOR, "--crop", "center", "--aligned", "--steps", "1", "--out", "crops"])
    assert not Path("crops/pasted").exists()


def test_the_middle_of_odd_sizes_is_that_of_read_image(tmp_path):
    for h, w in ((33, 64), (64, 33), (32, 32)):
        photo = read_image(picture(tmp_path / "a.png", h, w))
        side = min(h, w)
        assert cut(photo, "center", side)[0].equal(read_image(tmp_path / "a.png", side))
        assert middle(photo)[0, 0] == side / 2


def test_spaces(place):
    picture(place / "a.png")
    for space in ("w", "w+", "w+p"):
        main(["invert", "a.png", *GENERATOR, "--aligned", "--space", space, "--steps", "3", "--out", space])
        code = Code.load(f"{space}/codes/a.safetensors")
        assert (code.p is None) == (space != "w+p")
        assert (code.w == code.w[:, :1]).all() == (space == "w")


def test_half_the_memory_gives_nearly_the_same(place):
    picture(place / "a.png")
    means = []
    for options in ([], ["--bf16"]):
        main(["invert", "a.png", *GENERATOR, "--aligned", "--steps", "20", "--out", f"out{len(options)}", *options])
        means.append(json.loads(Path(f"out{len(options)}/report.json").read_text())["mean"]["mse"])
    assert means[0] != means[1] and means[1] == pytest.approx(means[0], rel=0.2)
    assert [json.loads(Path(f"out{n}/settings.json").read_text())["bf16"] for n in (0, 1)] == [None, True]


@pytest.mark.parametrize("can", [False, True])
def test_where_bfloat16_is_slow_a_warning_says_so(place, can, monkeypatch, capsys):
    picture(place / "a.png")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": can}, raising=False)
    main(["invert", "a.png", *GENERATOR, "--aligned", "--steps", "1", "--out", "out", "--bf16"])
    assert capsys.readouterr().err.count("padinv: --bf16: this processor does not multiply bfloat16") == (not can)


def test_progress_hears_of_every_step(files):
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    for encoder, settings, count in ((None, {"steps": 2, "batch": 2}, 6), ("padinv", {"steps": 2, "batch": 4}, 3),
                                     ("padinv", {}, 1)):  # fmt: skip
        shipped, heard = files / "checkpoints/faces-64", []
        encoder = encoder and shipped / f"{encoder}.safetensors"
        nets = Networks.load(shipped / "generator.safetensors", encoder, "cpu", **settings)
        nets.invert(x, heard.append)
        assert heard == pytest.approx([(i + 1) / count for i in range(count)])
        nets.invert(x)
        assert len(heard) == count, "the hook is gone"


def test_the_batch_follows_the_memory(monkeypatch):
    G = tiny()
    need = networks_module.BYTES * sum(G.config.channels(r) * r * r for r in G.config.resolutions)
    for free, batch in ((100 * need, 4), (3 * need, 2), (need, 1)):
        memory = type("Memory", (), {"available": free})
        monkeypatch.setattr(networks_module.psutil, "virtual_memory", lambda memory=memory: memory)
        assert room(G) == batch
    memory.available = 0.6 * need
    assert room(G, bf16=True) == 1
    with pytest.raises(ValueError, match="--generator: a step at 32² takes .* --bf16 halves it, --batch 1 tries"):
        room(G)


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted


def test_ctrl_c_loses_no_picture_that_was_done(place, monkeypatch):
    for i in range(4):
        picture(place / "in" / f"{i}.png", seed=i)
    arguments = ["invert", "in", *GENERATOR, "--aligned", "--batch", "1", "--workers", "0", "--out", "out"]
    calls, original = [], Networks.invert

    def interrupted(self, *given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *given)

    monkeypatch.setattr(Networks, "invert", interrupted)
    with pytest.raises(SystemExit, match="^padinv: interrupted; the same command goes on from here$"):
        main(arguments)
    assert [r["name"] for r in records(place / "out")] == ["0", "1"]
    assert main(arguments) == 0 and len(calls) == 5
    assert [r["name"] for r in records(place / "out")] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(("command", "says"), [("train", "; the same command goes on from here"), ("move", "")])
def test_ctrl_c_promises_nothing_that_is_not_so(command, says, place, monkeypatch):
    import padinv.training.__main__

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Networks, "load", interrupted)
    monkeypatch.setattr(padinv.training.__main__, "train_generator", interrupted)
    with pytest.raises(SystemExit, match=f"^padinv: interrupted{says}$"):
        main(next(words for c in COMMANDS for _, *words in examples(c) if words[0] == command))


def test_a_killed_search_goes_on(place):
    for i in range(4):
        picture(place / "in" / f"{i}.png", seed=i)
    command = [sys.executable, "-m", "padinv", "invert", "in", *GENERATOR, "--aligned", "--batch", "1", "--steps", "60"]
    command += ["--workers", "0", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    end = time.monotonic() + 120
    while not records(place / "out"):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = [place / f"out/codes/{record['name']}.safetensors" for record in records(place / "out")]
    times = [path.stat().st_mtime_ns for path in kept]
    assert 1 <= len(kept) < 4, "killed on its way"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(r["name"] for r in records(place / "out")) == ["0", "1", "2", "3"], "each once"
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert "4 of 4 [" in done.stderr, "a bar with what is left"


# ----------------------------------------------------------------------------------------------------------------------
# Codes, edits, directions


def test_codes_serve_as_pictures_do(place):
    main(["invert", "me.png", *ENCODER, "--crop", "tight", "--out", "out"])
    code = Path("out/codes/me-1.safetensors")
    for first, out in ((code, "a"), ("me.png", "b")):
        assert main(["blend", str(first), "you.png", *ENCODER, "--crop", "tight", "--layers", "0-3", "--out", out]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    one, both = Code.load(code), Code.load("a.safetensors")
    assert both.p.const.equal(one.p.const) and both.w[:, 4:].equal(one.w[:, 4:])


def test_edits_go_on_past_a_bad_target(place, capsys):
    picture(place / "nobody.png", 64, 64)
    (place / "sub").mkdir()
    shutil.copy(PORTRAIT, place / "sub/me.jpg")
    arguments = ["nobody.png", "me.png", "sub/me.jpg", "--before", "face.png", "--after", "face-with-hat.png"]
    assert main(["edit", *arguments, *ENCODER, "--crop", "ffhq", "--draw", "--out", "out"]) == 3
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "me.png", "me.safetensors", "me~2.png", "me~2.safetensors"]  # fmt: skip
    assert "refused: nobody.png: no face found; " in capsys.readouterr().err


def test_the_pair_is_not_refined(place, monkeypatch):
    seen, original = [], Networks.invert
    monkeypatch.setattr(Networks, "invert", lambda self, *given: seen.append(self.steps) or original(self, *given))
    pair = ["--before", "face.png", "--after", "face-with-hat.png"]
    main(["edit", "me.png", *pair, *ENCODER, "--steps", "2", "--out", "out"])
    assert seen == [0, 0, 2]


def test_moves(place):
    code = Code(torch.randn(1, 8, 16))
    code.save("code.safetensors")
    directions = ["--direction", "checkpoints/faces-64/directions-w.safetensors"]
    main(["move", "code.safetensors", *directions, "--name", "glasses", "--strength", "-2", "0", *GENERATOR, "--layers",
          "2-3", "--out", "m"])  # fmt: skip
    moved, glasses = Code.load("m.safetensors"), Code.load(directions[1])[1]
    assert moved[1].w.equal(code.w)
    torch.testing.assert_close(moved[0].w[:, 2:4], code.w[:, 2:4] - 2 * glasses.w[:, 2:4])
    assert moved[0].w[:, 4:].equal(code.w[:, 4:]) and read_image("m.png").shape == (3, 34, 67)


@pytest.mark.parametrize("method", ["pca", "sefa"])
def test_directions_are_those_of_the_library(place, method):
    main(["directions", *GENERATOR, "--method", method, "--count", "3", "--out", "d.safetensors"])
    found = Code.load("d.safetensors")
    assert found.w.shape == (3, 8, 16) and found.w.flatten(1).norm(dim=1).min() > 0
    main(["move", "checkpoints/faces-64/directions-w.safetensors", "--direction", "d.safetensors", "--name",
          f"{method} 2", "--strength", "1", *GENERATOR, "--out", "m"])  # fmt: skip
    torch.testing.assert_close(
        Code.load("m.safetensors").w - Code.load("checkpoints/faces-64/directions-w.safetensors").w,
        found.w[1:2].expand(2, -1, -1), atol=1e-5, rtol=0)  # fmt: skip


def test_labels_of_yes_and_no():
    rows = [{"file": "a", "x": "Yes", "y": "-1"}, {"file": "b", "x": "false", "y": "1"}]
    truths = directions_command.truths
    assert truths(rows, "x") == [True, False] == truths(rows, "y=-1") and truths(rows, "y") == [False, True]
    with pytest.raises(ValueError, match="no column 'z'; it has file, x, y$"):
        truths([rows[0] | {None: ["beyond the header"]}], "z")


@pytest.mark.parametrize("layers", ["5-2", "a-b", "-3"])
def test_layers_from_first_to_last(layers, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["move", "me.png", "--direction", "d.npy", *GENERATOR, "--out", "m", f"--layers={layers}"])
    assert stop.value.code == 2 and f"--layers: expected FIRST-LAST, the smaller first, as in 0-5, got '{layers}'" in (
        capsys.readouterr().err
    )


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line that names the argument and the fix


@pytest.mark.parametrize(("arguments", "message"), [
    (["blend", "car.jpg", "me.png", *ENCODER], "car.jpg: no face found; .*--crop center"),
    (["blend", "absent.png", "me.png", *ENCODER], "No such file.*absent.png"),
    (["blend", "params.yaml", "me.png", *ENCODER], "params.yaml: not an image; expected"),
    (["blend", "code.safetensors", "me.png", *ENCODER, "--generator", "wide.safetensors"], "--encoder: .*another gen"),
    (["blend", *["code.safetensors"] * 2, "--generator", "wide.safetensors"], "code.safetensors: .*another generator"),
    (["blend", *["marked.safetensors"] * 2, "--generator", "other.safetensors"], "marked.safetensors: .*another gen"),
    (["blend", *["code.safetensors"] * 2, *GENERATOR], "w: of codes without P"),
    (["blend", "cars.pkl", "me.png", *ENCODER], "cars.pkl: its kind is 'generator', expected 'code'"),
    (["invert", "car.jpg", *ENCODER, "--generator", "other.safetensors"],
     "--encoder: was trained for another generator .* leave --encoder out"),
    (["invert", "car.jpg", *ENCODER, "--space", "w"], "--space: .*without an encoder"),
    (["invert", "car.jpg", *GENERATOR, "--steps", "0"], "--steps: expected 1 or more, got 0"),
    (["invert", "car.jpg", "--generator", "params.yaml"], "params.yaml"),
    (["move", "code.safetensors", "--direction", "d24.safetensors", *GENERATOR], "d24.safetensors: .*another gen"),
    (["move", "code.safetensors", "--direction", "checkpoints/faces-64/directions-w.safetensors", "--name", "beard",
      *GENERATOR], "--name: expected one of hat, glasses, or 0 to 1, got 'beard'"),
    (["move", "code.safetensors", "--direction", "checkpoints/faces-64/directions-w.safetensors", "--layers", "3-9",
      *GENERATOR], "layers: expected indices of w from 0 to 7"),
    (["blend", *["code.safetensors"] * 2, *GENERATOR, "--layers", "8-11"],
     "--layers: expected indices of w from 0 to 7, got 8 on"),
    (["directions", *GENERATOR, "--labelled", "faces.zip"], "--method svm, --labelled, --label"),
    (["directions", *SVM, "faces.zip", "--label", "beard"], "--label beard: .*hair"),
    (["directions", *SVM, "faces.zip", "--label", "hair"], "give one, as hair=short"),
    (["directions", *SVM, "faces.zip", "--label", "all"], "20 of 20 .*both kinds"),
    (["directions", *SVM, "more.zip", "--label", "all"], "no labels.csv"),
    (["directions", *GENERATOR, "--count", "99"], "count: expected 1 to 16"),
    (["edit", "me.png", "--before", "face.png", "--after", "face.png", *ENCODER, "--draw"], None),
])  # fmt: skip
def test_bad_input(place, arguments, message, capsys):
    Code(torch.randn(1, 8, 16)).save("code.safetensors")
    Code(torch.randn(1, 8, 16)).save("marked.safetensors", generator=fingerprint(load_generator(GENERATOR[1])))
    Code(torch.randn(1, 8, 24)).save("d24.safetensors")
    if message is None:  # the same picture twice: found out at the first target
        assert main([*arguments, "--out", "out"]) == 3
        assert "refused: before, after: the same image twice" in capsys.readouterr().err
        return
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", "out"])
    lines = str(stop.value).splitlines()
    assert len(lines) == 1
    assert re.search(f"^padinv: .*{message}", lines[0]), lines[0]


def test_bombs_and_giants_are_refused_by_name_and_the_rest_goes_on(place, monkeypatch):
    picture(place / "in" / "good.png")
    Image.new("L", (20_000, 40)).save(place / "in" / "panorama.png")  # odd, but a picture
    Image.new("1", (20_000, 20_000)).save(place / "in" / "giant.png")
    monkeypatch.setattr(datasets, "MAX_BYTES", 10_000)
    with zipfile.ZipFile(place / "in.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("bomb.png", bytes(1_000_000))
    assert main(["invert", "in", "in.zip", *GENERATOR, "--crop", "center", "--out", "out"]) == 3
    report = json.loads(Path("out/report.json").read_text())
    refused = {Path(bad["file"]).name: bad["reason"] for bad in report["refused"]}
    assert report["inverted"] == 2 and set(refused) == {"giant.png", "bomb.png"}
    assert "too large" in refused["giant.png"] and "unpacks to 1000000 bytes" in refused["bomb.png"]


def test_too_little_memory_is_said_with_the_fix(place, monkeypatch):
    def full(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GB\nand more lines")

    monkeypatch.setattr(Networks, "invert", full)
    with pytest.raises(SystemExit, match="^padinv: out of memory; a smaller --batch, or --bf16, takes less"):
        main(["blend", "me.png", "you.png", *GENERATOR, "--out", "out"])
