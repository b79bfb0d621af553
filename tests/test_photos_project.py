"""pipelines/photos: its stages run on a shrunken domain, and publish.py hands over what they made."""

import csv
import json
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from padinv import load_encoder
from padinv.model.tensors import file_hash
from tests.test_paper import ROOT, dvc, encoded, execute, stages_of

PHOTOS = ROOT / "pipelines" / "photos"
GIT = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The project of photographs in a copy of the repository, without data and with small parameters."""
    top = tmp_path_factory.mktemp("repository")
    for name in ("params.yaml", "tools/readme.py", ".dvc/config"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, top / name)
    shutil.copytree(ROOT / "results/tables", top / "results/tables")
    (top / "README.md").write_text("<!-- table: results/tables/cats.md -->\n<!-- end of table -->\n")
    local = shutil.ignore_patterns("tmp", "cache", "config.local", "sources", "data", "checkpoints", "runs", "results")
    shutil.copytree(PHOTOS, top / "pipelines/photos", ignore=local)
    for package in ("padinv", "study"):
        shutil.copytree(ROOT / package, top / package, ignore=shutil.ignore_patterns("__pycache__"))
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "start"]):
        subprocess.run([*GIT, *command], cwd=top, check=True)

    folder = top / "pipelines/photos"
    text = (folder / "dvc.yaml").read_text()
    own = "--set images=112000 --set grow=[[32,80000]]"  # of cats; here they are as params.yaml says
    assert own in text
    (folder / "dvc.yaml").write_text(text.replace("test: 400", "test: 10").replace(own, ""))
    params = yaml.safe_load((folder / "params.yaml").read_text())
    tiny = {"widths": [16, 16, 24, 24], "se_reduction": 2, "pyramid_channels": 8, "head_channels": 4}
    params["train_generator"] |= {"images": 12, "batch": 4, "grow": [[32, 8]], "warm": 4}
    params["train_generator"] |= {"channel_base": 256, "channel_max": 8}
    params["train_encoder"] |= {"images": 8, "batch": 4}
    params["train_encoder"]["encoder"] |= tiny | {"padding_channels": 8}
    params["train_encoder"]["methods"]["padinv-split"]["images"] = 4
    for kind, n in (("encoded", 10), ("touched", 8), ("refined", 8)):
        params["table"][kind] |= {"n_images": n, "n_native": 2}
    params["rows"] = {name: row | ({"steps": 1} if "steps" in row else {}) for name, row in params["rows"].items()}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "sources").mkdir()
    with zipfile.ZipFile(folder / "sources/afhq-cat-128.zip", "w") as z:
        for i in range(18):
            z.writestr(f"{i:03d}.png", encoded(i, "PNG", (128, 128)))
    return folder


def test_a_dry_run_needs_no_data(folder):
    names = stages_of(folder)
    out = dvc(folder, "repro", "--dry", "--force")
    assert len(names) == 45 and all(f"Running stage '{name}'" in out for name in names)


def test_a_shrunken_domain_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    stages = stages_of(folder)
    dvc(folder, "repro", "data@cats")
    wanted = ["train-generator@cats", "train-encoder@cats-psp", "train-encoder@cats-padinv",
              "train-encoder@cats-padinv-f", "train-split@cats",
              *(name for name in stages if name.startswith("row-") and "@cats" in name), "table@cats"]  # fmt: skip
    for name in wanted:
        execute(stages[name].cmd)
        for out in stages[name].outs:
            assert Path(out.fs_path).exists(), (name, out.def_path)
    # Of 18 cats 8 are left to train on: too few for covariances of 1,088 features.
    monkeypatch.setattr("padinv.measure.metrics.frechet_distance", lambda a, b: (a.mean(0) - b.mean(0)).norm().item())
    execute(f"{stages['samples@cats'].cmd} --samples 4 --draws 2")
    assert all(Path(out.fs_path).exists() for out in stages["samples@cats"].outs)
    judged = list(csv.DictReader(Path("results/tables/cats-samples.csv").read_text().splitlines()))
    assert [(row["from"], row["images"]) for row in judged] == [("other training images", ""), ("generator", "12")]
    assert float(judged[1]["frechet_alex"]) > float(judged[0]["frechet_alex"])
    with pytest.raises(SystemExit, match="--samples: expected at most half of the 8 training images, got 2000"):
        execute(stages["samples@cats"].cmd)
    assert load_encoder("checkpoints/cats-64/padinv-split.safetensors").padding is not None
    row = json.loads(Path("results/cats-64/rows/psp+100.json").read_text())
    assert row["row"]["test"]["n_images"] == 8 and row["row"]["generator_passes"] == 2
    assert Path("results/tables/cats.md").read_text().count("| padinv+10 |") == 1
    assert not list(Path("runs").rglob("state.pt"))

    # The networks stand in for those of faces.
    shutil.copytree("checkpoints/cats-64", "checkpoints/faces-64")
    with zipfile.ZipFile("sources/ffhq-256-sample.zip", "w") as z:
        for name in runpy.run_path("elsewhere.py")["HARD"]:
            z.write(ROOT / "tests/fixtures/photos/astronaut.jpg", f"{name}.jpg")
    execute(stages["elsewhere@faces"].cmd)
    assert all(Path(out.fs_path).exists() for out in stages["elsewhere@faces"].outs)
    found = list(csv.DictReader(Path("results/tables/faces-elsewhere.csv").read_text().splitlines()))
    assert [row["n_images"] for row in found] == 5 * ["8"]
    mse = {row["way"]: float(row["mse"]) for row in found}
    assert mse["PadInv + 100 steps"] < mse["PadInv"] and mse["W+ & P by search"] < mse["PadInv"]


@pytest.fixture
def trained(folder, monkeypatch) -> Path:
    """The project after dvc repro, by stages that write a word to each file."""
    outs = ["checkpoints/cats-64/psp.safetensors", "results/cats-64/rows/psp.json", "results/cats-64/figures/psp.png",
            "results/cats-64/curves/psp/plots/metrics/mse.tsv", "results/tables/cats.csv", "results/tables/cats.md",
            "results/figures/cats.png"]  # fmt: skip
    write = "import pathlib, sys; [pathlib.Path(p).parent.mkdir(parents=True, exist_ok=True) for p in sys.argv[1:]]; "
    write += "[pathlib.Path(p).write_text(p) for p in sys.argv[1:]]"
    stage = {"foreach": ["cats", "faces"], "do": {
        "cmd": f"python -c '{write}' {' '.join(outs).replace('cats', '${item}')}",
        "deps": ["sources/afhq-cat-128.zip"], "outs": [{o.replace("cats", "${item}"): {"cache": False}} for o in outs],
    }}  # fmt: skip
    for name in ("checkpoints", "results", "dvc.lock"):
        subprocess.run(["rm", "-rf", str(folder / name)], check=True)
    network, figure = "checkpoints/${item}-64/generator.safetensors", "results/${item}-64/figures/nearest.png"
    generator = {"foreach": ["cats"], "do": {
        "cmd": f"python -c '{write}' {network} {figure}", "deps": ["README.md"],
        "outs": [network, {figure: {"cache": False}}],
    }}  # fmt: skip
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"data": stage, "train-generator": generator}}))
    dvc(folder, "repro", "data@cats", "train-generator@cats")
    return folder


def test_publish(trained):
    top = trained.parents[1]
    (top / "results/cats-64/rows").mkdir(parents=True)
    (top / "results/cats-64/rows/gone.json").touch()

    def publish(domain: str) -> subprocess.CompletedProcess:
        command = ["env", f"PATH={Path(sys.executable).parent}:/usr/bin:/bin", sys.executable, "publish.py", domain]
        return subprocess.run(command, cwd=trained, capture_output=True, text=True)

    assert publish("dogs").stderr == "publish: expected one of faces, cats\n"
    assert "publish: first dvc repro" in publish("faces").stderr
    assert not (top / "checkpoints").exists()
    (trained / "README.md").write_text("code that the generator was not trained with")
    for command in (["add", "dvc.lock"], ["commit", "-qm", "trained"]):
        subprocess.run([*GIT, *command], cwd=trained, check=True)
    network = trained / "checkpoints/cats-64/generator.safetensors"
    made = network.read_text()
    network.write_text("another")
    assert (
        "publish: first dvc repro, since these differ from what was run: train-generator@cats" in publish("cats").stderr
    )
    network.write_text(made)
    shutil.rmtree(trained / ".dvc/cache")  # of another clone, which has neither cache nor figures of photographs
    (trained / "results/cats-64/figures/nearest.png").unlink()
    done = publish("cats")
    assert done.returncode == 0, done.stderr
    new = subprocess.run(["git", "ls-files", "-o", "checkpoints", "results"], cwd=top, capture_output=True, text=True)
    assert new.stdout.split() == [
        "checkpoints/.gitignore",
        "checkpoints/cats-64.dvc",
        "checkpoints/cats-64/generator.safetensors",
        "checkpoints/cats-64/psp.safetensors",
        "results/cats-64/curves/psp/plots/metrics/mse.tsv",
        "results/cats-64/rows/psp.json",
        "results/figures/cats.png",
    ]
    assert (top / "results/tables/cats.md").read_text() == "results/tables/cats.md"
    assert "results/tables/cats.md" in (top / "README.md").read_text()
    record = yaml.safe_load((top / "checkpoints/cats-64.dvc").read_text())
    assert record["meta"]["commit"].endswith("-dirty") and record["meta"]["terms"] == "CC BY-NC 4.0"
    head = ["git", "rev-parse", "--short", "HEAD"]
    assert record["meta"]["generator_since"] == subprocess.check_output(head, cwd=top, text=True).strip()
    lock = yaml.safe_load((trained / "dvc.lock").read_text())
    assert record["meta"]["photographs_md5"] == lock["stages"]["data@cats"]["deps"][0]["md5"]
    shutil.rmtree(top / "checkpoints/cats-64")
    shutil.rmtree(top / ".dvc/cache")
    dvc(top, "pull", "checkpoints/cats-64.dvc")  # from the store
    published, made = top / "checkpoints/cats-64/psp.safetensors", trained / "checkpoints/cats-64/psp.safetensors"
    assert file_hash(published) == file_hash(made)
