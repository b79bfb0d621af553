"""Alignment and pasting as geometry, the detector, and `python -m padinv invert` with all that may go wrong."""

import json
import lzma
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from padinv import Code, Encoder, Generator, GeneratorConfig
from padinv.__main__ import main
from padinv.files.checkpoints import save_encoder, save_generator
from padinv.images.datasets import read_image, to_float
from padinv.measure.identity import ArcFace
from padinv.photos import faces, folder
from padinv.photos.faces import align, crop, detect, paste
from padinv.photos.folder import Photos, safe_name

PORTRAIT = Path(__file__).parent / "fixtures" / "photos" / "astronaut.jpg"
UPRIGHT = torch.tensor([[40.0, 50], [60, 50], [50, 62], [42, 70], [58, 70]])  # eyes 20 apart, mouth 20 below


def noise(h: int, w: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (3, h, w), np.uint8))


def smooth(h: int, w: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(h) / h, torch.arange(w) / w, indexing="ij")
    return (torch.stack((x, y, (x + y) / 2)) * 200 + 20).to(torch.uint8)


def write(path: Path, image: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return path


def whole(size: int) -> torch.Tensor:
    """The matrix of a whole square picture."""
    return torch.tensor([[size / 2, 0, size / 2], [0, size / 2, size / 2]])


# ----------------------------------------------------------------------------------------------------------------------
# Geometry


def test_the_square_of_an_upright_face():
    # Half side: max(2 · 20, 1.8 · 20) = 40; centre: a tenth of the way from eyes to mouth.
    expected = torch.tensor([[40.0, 0, 50], [0, 40, 52]])
    torch.testing.assert_close(align(UPRIGHT), expected)
    narrow = UPRIGHT.clone()
    narrow[0, 0], narrow[1, 0] = 45, 55  # seen from the side: now the height counts
    torch.testing.assert_close(align(narrow), torch.tensor([[36.0, 0, 50], [0, 36, 52]]))


def test_a_turned_and_moved_face_has_a_turned_and_moved_square():
    angle = torch.tensor(0.4)
    turn = torch.stack((torch.stack((angle.cos(), -angle.sin())), torch.stack((angle.sin(), angle.cos()))))
    moved = UPRIGHT @ turn.T * 3 + torch.tensor([7.0, -5])
    expected = 3 * turn @ align(UPRIGHT)
    expected[:, 2] += torch.tensor([7.0, -5])
    torch.testing.assert_close(align(moved), expected)


def test_the_tight_template_is_a_part_of_the_square():
    scale, down = faces.TEMPLATES["tight"]
    expected = torch.tensor([[40 * scale, 0, 50], [0, 40 * scale, 52 + 40 * down]])
    torch.testing.assert_close(align(UPRIGHT, "tight"), expected)
    with pytest.raises(ValueError, match="template.*'close'"):
        align(UPRIGHT, "close")


def test_a_crop_of_everything_is_the_picture():
    photo = noise(48, 48)
    assert crop(photo, whole(48), 48).equal(photo)


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_a_smaller_crop_is_the_mean_over_areas(factor):
    photo = noise(48, 48)
    means = photo.float().unflatten(1, (-1, factor)).unflatten(3, (-1, factor)).mean(dim=(2, 4))
    difference = crop(photo, whole(48), 48 // factor).float() - means
    assert difference.abs().mean() < (1 if factor < 4 else 6)  # from 4 on it is averaged in two steps


def test_no_aliasing():
    stripes = (torch.arange(600) % 2 * 255).to(torch.uint8).expand(3, 600, 600)
    assert (crop(stripes, whole(600), 32).float() - 127.5).abs().max() < 6


def test_beyond_the_edges_it_is_mirrored():
    photo = noise(40, 60)
    matrix = torch.tensor([[20.0, 0, 8], [0, 20, 30]])  # x from −12 to 28, y from 10 to 50
    expected = np.pad(photo.numpy(), ((0, 0), (0, 20), (20, 0)), mode="symmetric")[:, 10:50, 8:48]
    assert crop(photo, matrix, 40).equal(torch.from_numpy(expected.copy()))


def test_pasting_a_crop_back_changes_little_and_nothing_outside():
    photo = smooth(120, 150)
    before = photo.clone()
    matrix = torch.tensor([[30.0, -12, 70], [12, 30, 60]])
    back = paste(photo, to_float(crop(photo, matrix, 64)), matrix)
    assert photo.equal(before)
    assert (back.float() - photo.float()).abs().max() <= 2
    black = paste(photo, -torch.ones(3, 64, 64), matrix)
    y, x = torch.meshgrid(torch.arange(120) + 0.5, torch.arange(150) + 0.5, indexing="ij")
    inverse = torch.linalg.inv(matrix[:, :2])
    uv = torch.einsum("ij,jhw->ihw", inverse, torch.stack((x - 70, y - 60))).abs().amax(dim=0)
    assert black[:, uv >= 1].equal(photo[:, uv >= 1])
    assert (black[:, uv <= 0.79] == 0).all()
    edge = black[0, (uv > 0.85) & (uv < 0.95)]
    assert ((edge > 0) & (edge < photo[0].max())).all(), "the transition is soft"


def test_pasting_over_the_border_and_of_a_large_image():
    photo = smooth(50, 40)
    matrix = torch.tensor([[20.0, 0, 2], [0, 20, 45]])  # mostly outside
    image = to_float(crop(photo, matrix, 200))  # five times finer than the photograph
    assert (paste(photo, image, matrix).float() - photo.float()).abs().max() <= 3


# ----------------------------------------------------------------------------------------------------------------------
# The detector


@pytest.fixture(scope="module")
def portrait() -> torch.Tensor:
    return read_image(PORTRAIT)


def test_the_landmarks_of_the_portrait(portrait):
    # Where a person sees them, in pixels.
    seen = torch.tensor([[205.0, 102], [247, 102], [225, 128], [202, 140], [245, 141]])
    found = detect(portrait)
    assert found.shape == (1, 5, 2) and (found[0] - seen).norm(dim=1).max() < 5


def test_a_turned_portrait_gives_the_same_crop(portrait):
    upright = crop(portrait, align(detect(portrait)[0]), 64)
    picture = Image.fromarray(portrait.permute(1, 2, 0).numpy()).rotate(20, Image.Resampling.BICUBIC, expand=True)
    turned = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    again = crop(turned, align(detect(turned)[0]), 64)
    middle = np.s_[:, 12:60, 12:52]
    assert (again[middle].float() - upright[middle].float()).abs().mean() < 12
    # The same square cut without regard to the angle is another picture.
    matrix = align(detect(turned)[0])
    matrix[:, :2] = torch.eye(2) * matrix[:, 0].norm()
    assert (crop(turned, matrix, 64)[middle].float() - upright[middle].float()).abs().mean() > 24


def test_larger_faces_first_and_pictures_without_any(portrait):
    small = F.interpolate(portrait[None].float(), size=(400, 400), mode="area")[0].to(torch.uint8)
    both = torch.zeros(3, 512, 912, dtype=torch.uint8)
    both[:, :400, :400], both[:, :, 400:] = small, portrait
    found = detect(both)
    assert len(found) == 2 and found[0, 0, 0] > 400 > found[1, 0, 0]
    for nothing in (smooth(300, 200), torch.zeros(3, 64, 64, dtype=torch.uint8), noise(8, 900), noise(20, 20)):
        assert detect(nothing).shape == (0, 5, 2)


def test_large_photographs_are_searched_at_a_lower_resolution(portrait):
    large = portrait.repeat_interleave(5, dim=1).repeat_interleave(4, dim=2)  # 2560 × 2048
    found = detect(large)
    torch.testing.assert_close(found / torch.tensor([4.0, 5]), detect(portrait), atol=4, rtol=0)


def test_without_the_detector_the_fix_is_named(monkeypatch, networks, tmp_path):
    faces.detector.cache_clear()
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(SystemExit, match="pip install .facenet-pytorch.*--aligned"):
        main(["invert", str(PORTRAIT), *networks, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    faces.detector.cache_clear()


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> list[str]:
    """Options that name tiny networks for 32² with random weights."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(32, 16, 16, 2, 512, 16))
    small = {"widths": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "pyramid_channels": 8, "head_channels": 4,
             "padding_channels": 4, "se_reduction": 2, "input_resolution": 32}  # fmt: skip
    save_generator(G, folder / "g.safetensors")
    save_encoder(Encoder.for_generator(G, **small), folder / "e.safetensors", half=False)
    return ["--generator", str(folder / "g.safetensors"), "--encoder", str(folder / "e.safetensors"), "--device", "cpu"]


@pytest.fixture
def run(networks, tmp_path):
    """Runs the command into tmp_path/out, or another folder there, in this process: (exit status, report)."""

    def run(*arguments, out="out") -> tuple[int, dict]:
        out = tmp_path / out
        status = main(["invert", *networks, "--out", str(out), "--workers", "0", *map(str, arguments)])
        return status, json.loads((out / "report.json").read_text())

    return run


def records(out: Path) -> list[dict]:
    return [json.loads(line) for path in (out / "records").glob("*.jsonl") for line in path.read_text().splitlines()]


def results(out: Path) -> dict[str, int]:
    """Time of each file of results."""
    kinds = ("reconstructions", "codes", "compare", "pasted")
    found = [path for kind in kinds for path in (out / kind).rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in found}


def test_faces_of_photographs(run, portrait, tmp_path):
    write(tmp_path / "in" / "two.png", torch.cat((portrait, portrait.flip(2)), dim=2))
    write(tmp_path / "in" / "two-1.png", portrait[:, :300])
    write(tmp_path / "in" / "none.png", smooth(200, 200))
    status, report = run(tmp_path / "in")
    out = tmp_path / "out"
    faces = ("two-1", "two-2", "two-1-1")  # the faces of "two", and that of "two-1"
    kinds = {"reconstructions": "png", "codes": "safetensors", "compare": "png"}
    expected = {f"{kind}/{face}.{suffix}" for face in faces for kind, suffix in kinds.items()}
    assert set(results(out)) == expected | {"pasted/two.jpg", "pasted/two-1.jpg"}
    assert status == 3 and (report["pictures"], report["inverted"], report["faces"]) == (3, 2, 3)
    assert list(report["several_faces"].values()) == [2]
    assert "none.png: no face found" in report["refused"][0]["reason"]
    assert set(report["mean"]) == {"mse", "psnr", "ssim", "lpips_alex"}

    # The compared crop is the aligned face; the photograph changed there and nowhere else.
    record = next(r for r in records(out) if r["name"] == "two-1")
    points = torch.tensor(record["faces"][0]["points"])
    face = crop(portrait[:, :300], align(points), 32)
    pair = read_image(out / "compare" / "two-1-1.png")
    assert (pair[:, 1:33, 1:33].float() - face.float()).abs().mean() < 2
    assert pair[:, 1:33, 34:66].equal(read_image(out / "reconstructions" / "two-1-1.png"))
    pasted = read_image(out / "pasted" / "two-1.jpg")
    difference = (pasted.float() - portrait[:, :300].float()).abs().mean(dim=0)
    assert difference[200:].mean() < 3 and difference[80:140, 190:260].mean() > 10
    assert len(Code.load(out / "codes" / "two-1-1.safetensors")) == 1


def test_forty_faces_in_one_picture(run, portrait, tmp_path, capsys):
    face = F.interpolate(portrait[None, :, :256, 100:356].float(), (160, 160), mode="area")[0].to(torch.uint8)
    write(tmp_path / "in" / "crowd.png", face.repeat(1, 5, 8))
    status, report = run(tmp_path / "in")
    assert status == 0 and report["faces"] == 40 and list(report["several_faces"].values()) == [40]
    assert len(list((tmp_path / "out" / "codes").glob("crowd-*.safetensors"))) == 40
    said = capsys.readouterr()
    assert "1 of 1 picture inverted, 40 faces: " in said.out and "40 faces in " in said.err
    # Each is pasted back where it was: all tiles have changed, and alike.
    pasted = read_image(tmp_path / "out" / "pasted" / "crowd.jpg").float()  # [3, 800, 1280]
    change = (pasted - read_image(tmp_path / "in" / "crowd.png")).abs().mean(dim=0)
    tiles = F.avg_pool2d(change[None, None], 160).flatten()  # [40]
    assert tiles.min() > 0.5 * tiles.max() > 5


def test_the_largest_face_alone(run, portrait, tmp_path):
    write(tmp_path / "two.png", torch.cat((portrait, portrait.flip(2)), dim=2))
    status, report = run(tmp_path / "two.png", "--largest", "--no-paste", "--crop", "tight")
    assert status == 0 and report["faces"] == 1 and not report["several_faces"]
    assert not (tmp_path / "out" / "pasted").exists()


def test_compiled_steps_give_the_same(run, tmp_path, monkeypatch):
    calls, original = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda G: calls.append(G) or original(G, backend="eager"))
    for i in range(3):
        write(tmp_path / "in" / f"{i}.png", noise(32, 32, seed=i))
    arguments = tmp_path / "in", "--aligned", "--batch", "2", "--steps", "2"
    (status, plain), (compiled_status, compiled) = run(*arguments), run(*arguments, "--compile", out="compiled")
    assert status == compiled_status == 0 and len(calls) == 1
    assert compiled["mean"] == pytest.approx(plain["mean"], abs=1e-4)


@pytest.mark.skipif("PADINV_ISOLATED" not in os.environ, reason="test_isolated.py runs it, in a process of its own")
def test_compiled_networks_give_the_same(run, tmp_path):
    pytest.importorskip("openvino")
    for i in range(3):
        write(tmp_path / "in" / f"{i}.png", noise(32, 32, seed=i))
    arguments = tmp_path / "in", "--aligned"
    (status, plain), (compiled_status, compiled) = run(*arguments), run(*arguments, "--compile", out="compiled")
    assert status == compiled_status == 0 and compiled["inverted"] == 3
    assert compiled["mean"] == pytest.approx(plain["mean"], abs=1e-4)


def test_metrics_and_codes_are_those_of_the_library(run, networks, tmp_path):
    import padinv
    from padinv.measure.metrics import compare

    for i in range(5):
        write(tmp_path / "in" / f"{i}.png", noise(32, 32, seed=i))
    status, report = run(tmp_path / "in", "--aligned", "--batch", "2", "--steps", "2")
    assert status == 0
    G, E = padinv.load_generator(networks[1]), padinv.load_encoder(networks[3])
    x = to_float(torch.stack([noise(32, 32, seed=i) for i in range(5)]))
    code = padinv.invert(x, E, G, steps=2)  # in one batch
    values = compare(G(code), x, nets=("alex",))
    saved = Code.cat([Code.load(tmp_path / "out" / "codes" / f"{i}.safetensors") for i in range(5)])
    for a, b in zip(saved.tensors, code.tensors, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)
    rows = sorted(records(tmp_path / "out"), key=lambda r: r["name"])
    for key, value in values.items():
        torch.testing.assert_close(torch.tensor([r["faces"][0][key] for r in rows]), value, atol=1e-3, rtol=1e-3)
        assert report["mean"][key] == pytest.approx(value.mean().item(), rel=1e-3, abs=1e-3)


def test_likeness_with_arcface(run, tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(folder, "arcface", lambda path, device, box: ArcFace(box).eval())
    weights = tmp_path / "weights.pth"
    weights.write_text("any")
    _, report = run(write(tmp_path / "a.png", noise(32, 32)), "--aligned", "--identity", weights)
    assert -1 <= report["mean"]["identity"] < 1
    _, report = run(tmp_path / "a.png", "--aligned", "--identity", weights)
    assert "identity" in report["mean"], "from the record"


def test_bad_files_are_reported_and_the_rest_goes_on(run, tmp_path, capsys):
    folder = tmp_path / "in"
    for i in range(3):
        write(folder / f"good{i}.png", noise(40, 32, seed=i))
    good = (folder / "good0.png").read_bytes()
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    write(folder / "tiny.png", noise(4, 4))
    (folder / "notes.txt").write_text("passed over, since it claims to be no image")
    (tmp_path / "odd.bin").write_text("but this was asked for")
    status, report = run(folder, tmp_path / "odd.bin", "--aligned")
    assert status == 3 and report["inverted"] == 3
    refused = {Path(bad["file"]).name: bad["reason"] for bad in report["refused"]}
    assert set(refused) == {"cut.png", "empty.png", "text.jpg", "tiny.png", "odd.bin"}
    assert "cannot be decoded" in refused["cut.png"] and "not an image" in refused["text.jpg"]
    assert "8 or more" in refused["tiny.png"]
    assert "cut.png" in capsys.readouterr().err


def test_a_second_run_does_only_what_is_missing(run, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(4):
        write(folder / f"{i}.png", noise(32, 32, seed=i))
    (folder / "bad.png").write_bytes(b"")
    run(folder, "--aligned")
    first = results(out)
    assert run(folder, "--aligned")[0] == 3
    assert results(out) == first and len(records(out)) == 5, "nothing was done twice"

    (out / "codes" / "2.safetensors").unlink()
    write(folder / "bad.png", noise(32, 32, seed=9))  # mended
    write(folder / "new.png", noise(32, 32, seed=10))
    status, report = run(folder, "--aligned")
    now = results(out)
    changed = {Path(name).stem for name in now if now[name] != first.get(name)}
    assert status == 0 and report["inverted"] == 6 and changed == {"2", "bad", "new"}

    with pytest.raises(SystemExit, match="other settings .steps.*--out"):
        run(folder, "--aligned", "--steps", "1")


@pytest.mark.parametrize("timed", [True, False])
def test_of_two_lines_for_a_picture_the_later_counts(run, tmp_path, timed):
    folder, lines = tmp_path / "in", tmp_path / "out" / "records"
    write(folder / "good.png", noise(32, 32))
    (folder / "bad.png").write_bytes(b"")
    run(folder, "--aligned")
    first = records(tmp_path / "out")
    assert all(0 < time.time_ns() - record["time"] < 600e9 for record in first)
    for record in first if not timed else ():  # as earlier versions wrote them
        del record["time"]
    (lines / "00000.jsonl").unlink()
    (lines / "00001.jsonl").write_text("".join(json.dumps(record) + "\n" for record in first))  # of two processes
    write(folder / "bad.png", noise(32, 32, seed=1))
    for _ in range(2):
        status, report = run(folder, "--aligned")
        assert status == 0 and report["inverted"] == 2 and not report["refused"]
    assert len(records(tmp_path / "out")) == 3, "the third run had nothing to do"


def test_whatever_the_detector_raises_stops_nothing(run, tmp_path, monkeypatch):
    errors = [IndexError("list index out of range"), RuntimeError("a shape"), lzma.LZMAError(), None]

    def detect(photo):
        if error := errors.pop(0):
            raise error
        return UPRIGHT[None]

    monkeypatch.setattr(folder, "detect", detect)
    for i in range(4):
        write(tmp_path / "in" / f"{i}.png", noise(100, 100, seed=i))
    status, report = run(tmp_path / "in")
    assert status == 3 and report["inverted"] == 1
    reasons = enumerate(("list index out of range", "a shape", "LZMAError"))
    assert [bad["reason"] for bad in report["refused"]] == [f"{tmp_path}/in/{i}.png: {text}" for i, text in reasons]


def test_bf16_is_a_setting_only_where_it_rounds(run, tmp_path, monkeypatch):
    arguments = write(tmp_path / "a.png", noise(32, 32)), "--aligned"
    for flag in ([], ["--bf16"], []):
        assert run(*arguments, *flag)[0] == 0
    monkeypatch.setattr(folder, "compile", lambda network, precision: network)
    with pytest.raises(SystemExit, match="other settings .bf16."):
        run(*arguments, "--compile", "--bf16")


def test_names_never_meet(run, tmp_path):
    inputs = [write(tmp_path / name, noise(32, 32, seed=i)) for i, name in enumerate(
        ("a/x.png", "b/x.png", "c/x.bmp", "c/X~2.png", "c/sub/x.png"))]  # fmt: skip
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as z:
        z.write(inputs[0], "../../x.png")
        z.write(inputs[1], "/sub/x.png")
    status, report = run(inputs[0], inputs[1], tmp_path / "c", inputs[2], tmp_path / "pack.zip", "--aligned")
    assert status == 0 and report["inverted"] == 7, "c/x.bmp was named twice and counts once"
    names = {Path(r["source"]).relative_to(tmp_path).as_posix(): r["name"] for r in records(tmp_path / "out")}
    assert len({name.casefold() for name in names.values()}) == 7
    assert names["a/x.png"] == "x" and names["c/sub/x.png"] == "sub/x"
    for source, name in names.items():
        path = tmp_path / "out" / "reconstructions" / f"{name}.png"
        assert path.exists() and path.resolve().is_relative_to(tmp_path / "out"), source
    # Another picture that comes before them takes none of their names.
    write(tmp_path / "0" / "x.png", noise(32, 32, seed=20))
    first = results(tmp_path / "out")
    run(tmp_path / "0" / "x.png", *inputs[:2], "--aligned")
    later = results(tmp_path / "out")
    assert len(later) == len(first) + 3 and all(later[name] == first[name] for name in first)


def test_names_of_results():
    assert safe_name("../a/../b.c.png") == "a/b.c"
    assert safe_name("/a.png") == "a"
    assert len(safe_name("é" * 120 + ".png").encode()) <= 200
    assert safe_name("..") == "picture"


def test_a_crowded_folder_is_spread(tmp_path, monkeypatch):
    for i in range(6):
        write(tmp_path / "in" / f"{i}.png", noise(8, 8))
    assert Photos([tmp_path / "in"], 32, None).names == [str(i) for i in range(6)]
    monkeypatch.setattr(Photos, "MANY", 5)
    spread = Photos([tmp_path / "in"], 32, None).names
    assert len(set(spread)) == 6 and all(name[2] == "/" and name[3:] == str(i) for i, name in enumerate(spread))


@pytest.mark.parametrize(("arguments", "message"), [
    (["absent.png"], "absent.png does not exist"),
    ([PORTRAIT, "--generator", "absent"], "absent"),
    ([PORTRAIT, "--steps", "-1"], "steps"),
    ([PORTRAIT, "--identity", "absent.pth"], "absent.pth"),
])  # fmt: skip
def test_errors_end_with_a_message(run, arguments, message):
    with pytest.raises(SystemExit, match=f"^padinv: .*{message}"):
        run("--aligned", *arguments)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["invert", "--help"])
    assert stop.value.code == 0 and "padinv invert holiday.jpg" in capsys.readouterr().out


def command(*arguments, launcher: tuple = ()) -> list[str]:
    return [sys.executable, *launcher, "-m", "padinv", "invert", *map(str, arguments)]


def test_killed_and_resumed(networks, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(24):
        write(folder / f"{i:02d}.png", noise(32, 32, seed=i))
    (folder / "bad.png").write_bytes(b"nothing")
    arguments = [folder, *networks, "--out", out, "--aligned", "--steps", "25", "--batch", "2", "--workers", "1"]
    process = subprocess.Popen(command(*arguments), start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (found := sum(path.read_bytes().count(b"\n") for path in out.glob("records/*"))) >= 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before, kept = results(out), {r["name"]: r for r in records(out)}
    assert found <= len(kept) < 24, "it was killed on its way"
    for name in before:  # whole or not there
        path = out / name
        if not path.name.startswith("."):
            Code.load(path) if path.suffix == ".safetensors" else read_image(path)
    with open(out / "records" / "00000.jsonl", "ab") as file:  # a line that the machine's end cut off
        file.write(b'{"source": "half')

    again = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert again.returncode == 3, again.stderr
    after, lines = results(out), records(out)
    assert sorted(r["name"] for r in lines) == sorted(p.stem for p in folder.iterdir()), (
        "each once: none lost or redone"
    )
    assert len([name for name in after if name.startswith("codes/")]) == 24
    assert not [name for name in after if Path(name).name.startswith(".")]
    done = {name for name in before if Path(name).stem in kept and not Path(name).name.startswith(".")}
    assert done and all(after[name] == before[name] for name in done)
    report = json.loads((out / "report.json").read_text())
    assert report["inverted"] == 24 and [Path(bad["file"]).name for bad in report["refused"]] == ["bad.png"]


def test_several_processes_share_the_work(networks, run, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "shared"
    for i in range(7):
        write(folder / f"{i}.png", noise(32, 32, seed=i))
    (folder / "bad.png").write_bytes(b"nothing")
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    arguments = [folder, *networks, "--out", out, "--aligned", "--workers", "1"]
    done = subprocess.run(command(*arguments, launcher=launcher), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = {path.stem: len(path.read_text().splitlines()) for path in (out / "records").iterdir()}
    assert lines == {"00000": 4, "00001": 4}
    _, alone = run(folder, "--aligned")
    report = json.loads((out / "report.json").read_text())
    assert report["refused"] == alone["refused"] and report["inverted"] == 7
    assert report["mean"] == pytest.approx(alone["mean"], rel=1e-4)
