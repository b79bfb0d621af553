"""The paper's scale: LSUN's LMDB is read, and each stage of pipelines/paper runs on a shrunken copy of its domain."""

import importlib
import importlib.util
import io
import json
import os
import pickle
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from padinv import Encoder, EncoderConfig, Generator, GeneratorConfig, export_generator, load_encoder, load_generator
from padinv.images.datasets import ImageDataset, read_image
from padinv.measure import metrics
from tests.test_field import OPTS, psp_file
from tools import notebook

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "pipelines" / "paper"
DOMAINS = ("ffhq", "church", "bedroom")
RUN = {  # of each domain the encoders that are trained here, and the row that is measured of each
    "ffhq": {"psp": "psp", "padinv": "padinv", "padinv-paper": "padinv-paper-w-alone"},
    "church": {"psp": "psp", "padinv": "padinv+10", "padinv-f": "padinv-f-w-alone"},
    "bedroom": {"psp": "psp", "padinv": "padinv+10"},
}


def encoded(seed: int, kind: str, size=(40, 32)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(pixels).resize(size).save(out, kind, **options)
    return out.getvalue()


def write_lmdb(folder: Path, values: dict[bytes, bytes]) -> Path:
    import lmdb

    with lmdb.open(str(folder), map_size=1 << 24) as env, env.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# LMDB


@pytest.fixture
def lsun(tmp_path) -> tuple[Path, dict[bytes, bytes]]:
    """As LSUN is distributed: keys of 40 hexadecimal digits, WebP; and some other keys and kinds."""
    values = {f"{i * 7919 % 13:040x}".encode(): encoded(i, "WEBP") for i in range(10)}
    values |= {b"\x00\xff": encoded(20, "JPEG"), b"0x41": encoded(21, "PNG"), b"with space/1.jpg": encoded(22, "JPEG")}
    folder = write_lmdb(tmp_path / "train_lmdb", values)
    (folder / "lock.mdb").unlink()
    return folder, values


def test_lmdb_is_read_in_the_order_of_its_keys_and_written_to_by_nobody(lsun):
    folder, values = lsun
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}
    ds = ImageDataset(folder, 32)
    names = {b"\x00\xff": "0x00ff", b"0x41": "0x30783431"}
    assert ds.names == [names.get(key, key.decode("latin-1")) for key in sorted(values)] and ds.labels is None
    for image, key in zip(ds, sorted(values), strict=True):
        assert torch.equal(image, read_image(values[key], 32))
    assert torch.equal(ds.tensor([3, 0], progress=False), torch.stack([ds[3], ds[0]]))
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()} == before


def test_lmdb_is_shared_by_forks_threads_pickles_and_other_readers(lsun):
    folder, _ = lsun
    ds, other = ImageDataset(folder, 32), ImageDataset(folder / ".." / folder.name, 16)
    want = ds.tensor(progress=False)
    loader = torch.utils.data.DataLoader(ds, batch_size=len(ds), num_workers=2)
    assert all(torch.equal(x, want) for _ in range(2) for x in loader)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ds.__getitem__, [i % len(ds) for i in range(200)]))
    assert all(torch.equal(x, want[i % len(ds)]) for i, x in enumerate(found))
    assert torch.equal(pickle.loads(pickle.dumps(ds))[1], want[1]) and other[1].shape == (3, 16, 16)
    code = f"import pickle, sys; print(pickle.load(sys.stdin.buffer)[1].sum().item(), {str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(ds), capture_output=True, cwd=ROOT)
    assert done.stdout.split()[0].decode() == str(want[1].sum().item()), done.stderr


def test_a_bad_lmdb_is_refused_by_name(lsun, tmp_path, monkeypatch):
    whole = (lsun[0] / "data.mdb").read_bytes()
    bad = tmp_path / "bad"
    bad.mkdir()
    cut = len(whole) // 2
    for content, reason in ((b"", ""), (b"not this " * 2000, "not an LMDB"), (whole[:100], "not an LMDB"),
                            (whole[:cut], f"truncated: {cut} bytes, expected {len(whole)}"),
                            (whole[:-1], "truncated")):  # fmt: skip
        (bad / "data.mdb").write_bytes(content)
        with pytest.raises(ValueError, match=f"bad/data.mdb is no readable LMDB .*{reason}"):
            ImageDataset(bad)
    with pytest.raises(ValueError, match="no images in .*empty"):
        ImageDataset(write_lmdb(tmp_path / "empty", {}))
    mixed = ImageDataset(write_lmdb(tmp_path / "mixed", {b"a": encoded(0, "PNG"), b"b": b"junk"}), 32)
    with pytest.raises(ValueError, match="1 of 2 images .*b: not an image"):
        mixed.tensor(progress=False)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match="train_lmdb is an LMDB.*pip install lmdb"):
        ImageDataset(lsun[0])


# ----------------------------------------------------------------------------------------------------------------------
# pipelines/paper


def copied(top: Path) -> Path:
    """pipelines/paper in a repository of its own, beside the code that it depends on."""
    for package in ("padinv", "study"):
        shutil.copytree(ROOT / package, top / package, ignore=shutil.ignore_patterns("__pycache__"))
    local = shutil.ignore_patterns("tmp", "cache", "config.local", "sources", "data", "checkpoints", "runs", "results")
    shutil.copytree(PAPER, top / "pipelines" / "paper", ignore=local)
    git = ["git", "-C", str(top), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "start"]):
        subprocess.run([*git, *command], check=True)
    return top / "pipelines" / "paper"


def stages_of(folder: Path) -> dict:
    from dvc.repo import Repo

    return {stage.name: stage for stage in Repo(str(folder)).index.stages}


def dvc(folder: Path, *arguments: str) -> str:
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    env = os.environ | {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def stages() -> dict:
    return stages_of(PAPER)


def test_a_dry_run_needs_no_data(tmp_path, stages):
    out = dvc(copied(tmp_path), "repro", "--dry", "--force")
    assert len(stages) == 67 and out.count("Running stage") == len(stages)
    for name in stages:
        assert f"Running stage '{name}'" in out


def test_stages_pass_parameters_that_the_notebook_has(stages):
    words = shlex.split(stages["inversion@ffhq"].cmd)
    pairs = [words[i + 1 : i + 3] for i, word in enumerate(words) if word in ("-p", "-r")]
    notebook.parse(pairs, notebook.defaults(notebook.read(ROOT / "notebooks/03_inversion.ipynb")))


def test_parameters_are_the_papers():
    params = yaml.safe_load((PAPER / "params.yaml").read_text())
    keys = ("mse", "lpips", "identity", "w_norm", "adversarial", "mirror", "r1_gamma", "lr", "batch", "images")
    want = {
        "ffhq": (1.0, 0.8, 0.1, 0.003, 0, True, 10, 1e-4, 64, 6_400_000),
        "church": (1.0, 0.8, 0, 0.003, 0.03, False, 10, 1e-4, 64, 6_400_000),
        "bedroom": (1.0, 0.8, 0, 0.003, 0.05, False, 10, 1e-4, 64, 6_400_000),
    }
    for domain, values in want.items():
        section = params[f"train_{domain}"]
        assert tuple(section[key] for key in keys) == values and section["resolution"] == 256
        assert set(section["methods"]) == {"psp", "padinv-paper", "padinv", "padinv-f"}
        assert set(section["methods"]["padinv-paper"]) == {"encoder"}  # no loss that is not above
        for method, p in (("padinv", True), ("padinv-paper", True), ("padinv-f", True), ("psp", False)):
            fields = section["encoder"] | section["methods"][method]["encoder"]
            for w, channels in ((18, (512,) * 5 + (256, 128, 64, 32)), (14, (512,) * 5 + (256, 128))):
                config = EncoderConfig(num_ws=w, channels=channels, **fields)
                with torch.device("meta"):
                    encoder = Encoder(config)
                assert (encoder.padding is not None) == p and config.level_sizes == [64, 32, 16]


@pytest.fixture(scope="module")
def shrunken(tmp_path_factory) -> Path:
    """A copy with small parameters and sources of the three domains: each kind of dataset, and of generator."""
    torch.manual_seed(0)
    folder = copied(tmp_path_factory.mktemp("shrunken"))
    sources = folder / "sources"
    for domain, resolution in {"ffhq": 1024, "church": 256, "bedroom": 256}.items():
        G = Generator(GeneratorConfig(resolution, 8, 8, 2, 4096, 8)).eval().requires_grad_(False)
        for block in G.blocks:
            block.to_rgb.weight *= 0.1  # images about as bright as trained ones
        export_generator(G, sources / domain / "generator", "padinv_official")
    (sources / "ffhq/train").mkdir()
    for i in range(6):
        (sources / f"ffhq/train/{i:05d}.png").write_bytes(encoded(i, "PNG", (256, 256)))
    for path, kind in ((sources / "ffhq/test", "JPEG"), (sources / "church/train", "WEBP")):
        with zipfile.ZipFile(path, "w") as z:
            for i in range(6):
                z.writestr(f"{i}.{kind.lower()}", encoded(i, kind, (256, 320)))
    for name in ("church/test", "bedroom/train", "bedroom/test"):
        write_lmdb(sources / name, {f"{i:040x}".encode(): encoded(i, "WEBP", (320, 256)) for i in range(6)})

    params = yaml.safe_load((PAPER / "params.yaml").read_text())
    tiny = {"input_resolution": 32, "widths": [16, 16, 24, 24], "depths": [1, 1, 1, 1], "se_reduction": 2,
            "pyramid_channels": 8, "head_channels": 4, "padding_channels": 8}  # fmt: skip
    for domain in DOMAINS:
        section = params[f"train_{domain}"]
        section |= {"images": 8, "batch": 4, "resolution": 64, "log_every": 1, "grid_every": 8, "workers": 2}
        section["encoder"] = section["encoder"] | tiny
    params["table"]["n_show"] = 1
    for kind, n in (("encoded", 2), ("touched", 1), ("refined", 1)):
        params["table"][kind] |= {"n_images": n, "n_native": 1}
    for row in params["rows"].values():
        row["steps"] = min(row.get("steps", 0), 1)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def execute(command: str | list[str]) -> None:
    """The commands of a stage, within this process, which has loaded torch already."""
    for line in [command] if isinstance(command, str) else command:
        words = shlex.split(line)
        if words[0] == "rm":
            Path(words[-1]).unlink(missing_ok=True)
            continue
        words = words[words.index("launch") + 1 if words[0] == "accelerate" else 1 :]
        if words[0] == "-m":
            package = importlib.util.find_spec(words[1]).submodule_search_locations is not None
            importlib.import_module(words[1] + ".__main__" * package).main(words[2:])
            continue
        kept, sys.argv = sys.argv, words
        try:
            runpy.run_path(words[0], run_name="__main__")
        finally:
            sys.argv = kept


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_shrunken_domain_runs(shrunken, domain, monkeypatch):
    monkeypatch.chdir(shrunken)
    stages = stages_of(shrunken)
    if domain == "ffhq":  # minutes for VGG at 1024² on a CPU
        compare = metrics.compare
        monkeypatch.setattr(metrics, "compare", lambda x, y, nets=("alex",): compare(x, y, nets))
    execute(stages[f"generator@{domain}"].cmd)
    G = load_generator(f"checkpoints/{domain}/generator.safetensors")
    assert G.resolution == (1024 if domain == "ffhq" else 256)
    execute(stages[f"test-set@{domain}"].cmd)
    test = ImageDataset(f"data/{domain}/test.zip")
    assert test[0].shape == (3, G.resolution, G.resolution) and len(test) == 2
    assert torch.equal(test[1], ImageDataset(f"sources/{domain}/test", G.resolution)[3])

    if domain == "ffhq":  # without the user's weights the paper's term is refused, and can be left out
        with pytest.raises(SystemExit, match="model_ir_se50.pth"):
            execute(stages["train-encoder@ffhq-psp"].cmd)
        params = yaml.safe_load(Path("params.yaml").read_text())
        params["train_ffhq"]["identity"] = 0.0
        Path("params.yaml").write_text(yaml.safe_dump(params))
    for method, row in RUN[domain].items():
        execute(stages[f"train-encoder@{domain}-{method}"].cmd)
        E = load_encoder(f"checkpoints/{domain}/{method}.safetensors")
        assert E.config.num_ws == G.num_ws and (E.padding is not None) == (method != "psp")
        curves = {path.stem for path in Path(f"results/{domain}/curves/{method}").rglob("*.tsv")}
        assert {"mse", "lpips", "w_norm"} <= curves and ("w_mse" in curves) == (method in ("padinv", "padinv-f"))
        assert ("loss_D" in curves) == (domain != "ffhq")
        assert not Path(f"runs/{domain}/{method}/state.pt").exists()
        execute(stages[f"row-{method}@{domain}-{row}"].cmd)
        file = json.loads(Path(f"results/{domain}/rows/{row}.json").read_text())
        assert file["row"]["method"] == row and file["row"]["test"]["mse"] > 0
        assert file["protocol"]["resolution"] == G.resolution


def test_released_encoders_are_rows(shrunken, official, rosinality, monkeypatch):
    monkeypatch.chdir(shrunken)
    stages = stages_of(shrunken)
    torch.save(psp_file(official, rosinality), "sources/ffhq/psp")
    torch.save(psp_file(official, rosinality, opts=OPTS | {"encoder_type": "Encoder4Editing"}), "sources/ffhq/e4e")
    Path("data/ffhq").mkdir(parents=True, exist_ok=True)
    if not Path("data/ffhq/test.zip").exists():  # of the test before, if that ran
        with zipfile.ZipFile("data/ffhq/test.zip", "w") as z:
            for i in range(2):
                z.writestr(f"{i}.png", encoded(i, "PNG", (64, 64)))
    rows = {}
    for method in ("psp", "e4e"):
        execute(stages[f"released-encoder@{method}"].cmd)
        execute(stages[f"row-released@{method}"].cmd)
        rows[method] = json.loads(Path(f"results/released/rows/{method}.json").read_text())["row"]["test"]
        E = load_encoder(f"checkpoints/released-{method}/{method}.safetensors")
        assert E.padding is None and E.config.base_w == (method == "e4e")
    assert rows["psp"]["mse"] > 0 and rows["psp"]["mse"] != rows["e4e"]["mse"]


def test_dvc_runs_it(shrunken):
    """One target, with what it needs, by DVC and accelerate themselves."""
    dvc(shrunken, "repro", "train-encoder@bedroom-padinv")
    lock = yaml.safe_load((shrunken / "dvc.lock").read_text())["stages"]
    assert set(lock) == {"generator@bedroom", "train-encoder@bedroom-padinv"}
    assert load_encoder(shrunken / "checkpoints/bedroom/padinv.safetensors").padding is not None
    assert "up to date" in dvc(shrunken, "status", "train-encoder@bedroom-padinv")
