"""dvc.yaml names what is there, and tools/notebook.py gives the same bytes or a clear error."""

import ast
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from padinv.model.tensors import file_hash, read_metadata
from tools import compare_metrics, imports, notebook

ROOT = Path(__file__).resolve().parent.parent
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


# ----------------------------------------------------------------------------------------------------------------------
# dvc.yaml


PHOTOS, PAPER = ROOT / "pipelines" / "photos", ROOT / "pipelines" / "paper"
NOTEBOOKS = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def stages_of(project: Path) -> list:
    from dvc.repo import Repo

    return [stage for stage in Repo(str(project)).index.stages if not stage.is_data_source]  # parsed and resolved


@pytest.fixture(scope="module")
def stages():
    return stages_of(ROOT)


@pytest.fixture(scope="module")
def photos():
    return stages_of(PHOTOS)


def executed(stages) -> list[tuple]:
    """(name of a notebook, stage that executes it)."""
    found = []
    for stage in stages:
        words = shlex.split(stage.cmd) if isinstance(stage.cmd, str) else []
        if words[1:3] in (["tools/notebook.py", "run"], ["../../tools/notebook.py", "run"]):
            found.append((words[3], stage))
    return found


def inside(path: str) -> str:
    """A path as it is called in the root."""
    return Path(path).relative_to(ROOT).as_posix()


def deps(stage) -> set[str]:
    return {inside(dep.fs_path) for dep in stage.deps}


@pytest.fixture(scope="module")
def paper():
    return stages_of(PAPER)


def test_stages_depend_on_files_that_exist(stages, photos, paper):
    missing = [
        f"{s.addressing}: {p}"
        for s in [*stages, *photos, *paper]
        for p in deps(s)
        if p.startswith(("padinv/", "study/")) and not (ROOT / p).exists()
    ]
    assert not missing


@pytest.mark.parametrize("project", [ROOT, PHOTOS, PAPER], ids=["stages", "photos", "paper"])
def test_params_and_stages_match(project, request):
    stages = request.getfixturevalue({ROOT: "stages", PHOTOS: "photos", PAPER: "paper"}[project])
    watched = {(dep.fs_path, key) for s in stages for dep in s.deps for key in getattr(dep, "params", ())}
    for path, key in watched:
        value = yaml.safe_load(Path(path).read_text())
        for part in key.split("."):
            assert part in value, f"a stage reads {key}, which {path} lacks"
            value = value[part]
    # A parameter that no stage watches could change without anything being run again.
    params = yaml.safe_load((project / "params.yaml").read_text())
    watched = {key for path, key in watched if path == str(project / "params.yaml")}
    params.pop("notebooks", None)  # a list of stages
    keys = {f"{section}.{key}" for section, values in params.items() if section not in watched for key in values}
    assert not {key for key in keys if not any(w == key or w.startswith(f"{key}.") for w in watched)}


def test_no_stage_depends_on_an_executed_notebook(stages):
    assert not [s.addressing for s in stages if any(p.startswith("results/") and p.endswith(".ipynb") for p in deps(s))]


def test_every_notebook_is_cleaned_and_executed(stages):
    names = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {s.name.removeprefix("clean@") for s in stages if s.name.startswith("clean@")} == names
    assert {name for name, _ in executed(stages)} == names


def test_stages_pass_parameters_that_the_notebook_has(stages, photos):
    assert {name[:2] for name, _ in executed(photos)} == {"03", "04", "05", "06", "11"}
    for name, stage in executed([*stages, *photos]):
        words = shlex.split(stage.cmd.partition(" && ")[0])
        words = words[4:] if "--out" not in words else words[words.index("--out") + 2 :]
        notebook.parse(notebook.pair(words), notebook.defaults(notebook.read(ROOT / "notebooks" / f"{name}.ipynb")))


def runs(stage) -> set[str]:
    """The modules of padinv/ and study/ that a stage's commands run."""
    found = set()
    for line in [stage.cmd] if isinstance(stage.cmd, str) else stage.cmd:
        for words in (shlex.split(command) for command in line.split("&&")):
            notebooks = [Path(word).stem for word in words if Path(word).stem in NOTEBOOKS]
            if "-m" in words:
                module, what = words[words.index("-m") + 1 :][:2]
                found.add(f"{module}.{what}" if module == "padinv.training" else module)
            elif "-c" in words:
                found |= imports.found(ast.parse(words[words.index("-c") + 1]))
            elif words[0] == "papermill" or words[2:3] == ["run"]:
                cells = notebook.read(ROOT / "notebooks" / f"{notebooks[0]}.ipynb").cells
                source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
                found |= imports.found(ast.parse(source))
            elif words[1].endswith(".py") and "tools" not in Path(words[1]).parts:
                found |= imports.found(ast.parse((Path(stage.wdir) / words[1]).read_text()))
    return imports.reached(found)


@pytest.mark.parametrize("project", ["", "pipelines/photos", "pipelines/paper"], ids=["root", "photos", "paper"])
def test_stages_depend_on_the_code_that_they_run(project):
    stages = stages_of(ROOT / project)
    assert len([stage for stage in stages if runs(stage)]) > 20
    for stage in stages:
        files = [imports.modules()[module] for module in runs(stage)]
        missing = [str(f) for f in files if not {f, *f.parents} & set(map(Path, deps(stage))) and f.stem != "__init__"]
        assert not missing, f"{stage.addressing} runs {sorted(missing)}"


def test_what_a_command_runs_is_followed_through_imports(stages):
    (training,) = (stage for stage in stages if stage.name == "train-encoder@psp")
    assert {"padinv.training.loop", "padinv.images.datasets"} <= runs(training)
    assert not [name for name in runs(training) if name.startswith("padinv.inversion")]
    rendering = {"study", "study.avatars", "study.sets", "study.stickers"}  # of the images, its first command
    assert {name for name in runs(training) if name.startswith("study")} <= rendering
    assert "padinv.inversion.optimise" in imports.found(ast.parse("import padinv\npadinv.invert(x, E, G)"))


def option(words: list[str], name: str, default: str | None = None) -> str | None:
    return words[words.index(name) + 1] if name in words else default


def test_training_is_frozen_and_its_checkpoints_are_of_the_settings_and_the_data(stages):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    trained = [stage for stage in stages if stage.name.startswith("train-")]
    assert len(trained) > 5 and all(stage.frozen for stage in trained)
    assert not [stage.addressing for stage in stages if stage.frozen and stage not in trained]
    hashes = functools.cache(lambda path: file_hash(ROOT / path))
    for stage in trained:
        words = next(words for words in map(shlex.split, stage.cmd) if "--out" in words and "study.sets" not in words)
        name = stage.name.partition("@")[2]
        if stage.name.startswith("train-baseline"):
            continue  # of whose network nothing is kept but the row: see below
        if stage.name.startswith("train-variant"):
            meta = json.loads((ROOT / f"results/ablation/{name}.json").read_text())["trained"]
        else:
            meta = json.loads(read_metadata(ROOT / option(words, "--out"))["meta"])
        if rendered := option(shlex.split(stage.cmd[0]), "--sha256"):
            assert meta["data"] == rendered == params["data"]["train_sha256"]
        if "padinv.training" not in words:  # the classifier, without settings
            continue
        settings = dict(params[option(words, "--section", f"train_{words[3]}")])
        if "methods" in settings:
            method = settings.pop("methods")[option(words, "--method")]
            settings |= method | {"encoder": settings.get("encoder", {}) | method.get("encoder", {})}
        got = {key: meta["training"].get(key) for key in settings}
        assert got == json.loads(json.dumps(settings)), stage.addressing
        for name in ("generator", "base", "init", *([] if rendered else ["data"])):
            path = option(words, f"--{name}")
            assert meta.get(name) == (path and hashes(path)), f"{stage.addressing}: trained with another {name}"


def test_baselines_ran_with_the_settings_and_on_the_generator_that_are_here(stages):
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    now = yaml.safe_load((ROOT / "params.yaml").read_text())
    names = [stage.name.partition("@")[2] for stage in stages if stage.name.startswith("train-baseline")]
    assert "e4e" in names
    for name in names:
        ran = lock[f"train-baseline@{name}"]["params"]["params.yaml"]
        sections = [params["train_encoder"] for params in (ran, now)]
        before, after = (section | {"methods": section["methods"][name]} for section in sections)
        assert before == after and ran["data.train_sha256"] == now["data"]["train_sha256"]
        assert ran["table"] == now["table"] and ran[f"rows.{name}"] == now["rows"][name]
        protocol = json.loads((ROOT / f"results/rows/{name}.json").read_text())["protocol"]
        assert protocol["checkpoints"]["generator"] == file_hash(ROOT / "checkpoints/avatars-128/generator.safetensors")


# ----------------------------------------------------------------------------------------------------------------------
# What a fresh clone has


def parents(path) -> tuple[Path, ...]:
    return Path(path), *Path(path).parents


def out_of_reach(project: Path) -> list[str]:
    """As "stage: file", what dvc repro would lack in a fresh clone: all that is neither in git, nor an artefact in the
    bundled store, nor made by a stage that can run. A frozen stage does not run: its outputs have to be in the store.
    """
    from dvc.repo import Repo

    stages = list(Repo(str(project)).index.stages)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=project, capture_output=True, check=True, text=True).stdout
    in_git = {str(p) for name in listed.split("\0") for p in parents(project / name)}
    makers = {out.fs_path: (stage, out) for stage in stages for out in stage.outs}

    def stored(md5: str, part: str = ".") -> bool:
        """Whether the store has a file, or of a folder the file or folder `part`, in full."""
        file = project / "store/files/md5" / md5[:2] / md5[2:]
        if not file.is_file() or not md5.endswith(".dir"):
            return file.is_file()
        entries = [e for e in json.loads(file.read_text()) if part in (".", *map(str, parents(e["relpath"])))]
        return bool(entries) and all(stored(entry["md5"]) for entry in entries)

    def reached(path: str) -> bool:
        found = next((makers[str(p)] for p in parents(path) if str(p) in makers), None)
        if path in in_git or not found:
            below = [p for p in makers if Path(path) in Path(p).parents]
            return (path in in_git or bool(below)) and all(map(reached, below))
        stage, out = found
        if stage.is_data_source or stage.frozen:
            return bool(out.hash_info) and stored(out.hash_info.value, os.path.relpath(path, out.fs_path))
        return all(reached(dep.fs_path) for dep in stage.deps)

    needed = ((stage.name, dep.fs_path) for stage in stages if not stage.frozen for dep in stage.deps)
    return [f"{name}: {os.path.relpath(path, project)}" for name, path in needed if not reached(path)]


def test_a_fresh_clone_can_get_all_that_the_stages_need():
    assert not out_of_reach(ROOT)


def test_what_a_fresh_clone_cannot_get_is_named(tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").touch()
    whole, missing, folder = "a" * 32, "b" * 32, "c" * 32 + ".dir"
    entries = [{"md5": whole, "relpath": "one/a"}, {"md5": missing, "relpath": "two/a"}]
    stored = {whole: "", folder: json.dumps(entries)}
    for md5, text in stored.items():
        path = tmp_path / "store/files/md5" / md5[:2] / md5[2:]
        path.parent.mkdir(parents=True)
        path.write_text(text)
    for name, md5 in (("whole", whole), ("missing", missing), ("folder", folder)):
        (tmp_path / f"{name}.dvc").write_text(f"outs:\n- {{md5: {md5}, hash: md5, path: {name}}}\n")
    needs = {"a": ["in_git", "whole", "folder/one"], "b": ["a"], "c": ["folder/two/a"], "d": ["missing", "brought"],
             "e": ["b", "d"], "f": ["code"]}  # fmt: skip
    stages = {name: {"cmd": "true", "deps": deps, "outs": [name]} for name, deps in needs.items()}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / "in_git").touch()
    (tmp_path / "code").mkdir()
    (tmp_path / "code/x.py").touch()
    for command in (["init", "-q"], ["add", "in_git", "code"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert out_of_reach(tmp_path) == ["c: folder/two/a", "d: missing", "d: brought", "e: d"]


def test_the_root_never_meets_projects_of_their_own():
    from dvc.repo import Repo

    repo = Repo(str(ROOT))
    assert {path.parent.name for path in (ROOT / "pipelines").glob("*/.dvc")} == {"paper", "photos"}
    assert not [s.addressing for s in repo.index.stages if s.path_in_repo.startswith("pipelines")]


@pytest.mark.parametrize("domain", ["cats", "faces"])
def test_results_of_photographs_are_of_the_networks_that_are_shipped(domain):
    meta = yaml.safe_load((ROOT / f"checkpoints/{domain}-64.dvc").read_text())["meta"]
    assert {"trained_by", "commit", "photographs", "terms", "photographs_md5"} <= set(meta)
    rows = list((ROOT / f"results/{domain}-64/rows").glob("*.json"))
    assert len(rows) == 8
    for row in rows:
        for name, digest in json.loads(row.read_text())["protocol"]["checkpoints"].items():
            assert digest == file_hash(ROOT / f"checkpoints/{domain}-64/{name}.safetensors"), (row, name)


# ----------------------------------------------------------------------------------------------------------------------
# tools/notebook.py


@pytest.fixture
def repo(tmp_path):
    """A repository with one small notebook that has run in an editor, with all that this leaves behind."""
    (tmp_path / "notebooks").mkdir()
    cells = [
        new_markdown_cell("Counts stars."),
        new_code_cell("n = 3  # stars\nname = 'one'", metadata={"tags": ["parameters"]}),
        new_code_cell(
            "import base64, sys, time\nfrom IPython.display import Image, display\n"
            f"print('*' * n); sys.stdout.flush(); time.sleep(0.3); print(name)\nprint('50 %', file=sys.stderr)\n"
            f"display(Image(base64.b64decode('{PNG}')))\nassert n < 9, 'too many'",
            execution_count=17,
            outputs=[new_output("stream", name="stdout", text="stale\n")],
            metadata={"collapsed": False, "execution": {"iopub.status.idle": "2026-01-01T00:00:00Z"}},
        ),
        new_code_cell("time.time()", metadata={"tags": ["volatile"]}),
    ]
    metadata = {
        "kernelspec": {"name": "mine", "display_name": "Mine"},
        "language_info": {"name": "python", "version": "3.99"},
    }
    save(new_notebook(cells=cells, metadata=metadata), tmp_path)
    return tmp_path


def save(nb, root):
    nbformat.write(nb, root / "notebooks" / "00_stars.ipynb")


def load(root):
    return nbformat.read(root / "notebooks" / "00_stars.ipynb", as_version=4)


def call(root, *arguments) -> None:
    notebook.main([arguments[0], "00_stars", *arguments[1:]], root=root)


def test_clean_keeps_sources_and_tags_only(repo):
    call(repo, "clean")
    cleaned = repo / "build/notebooks/00_stars.ipynb"
    first = cleaned.read_bytes()
    nb = nbformat.read(cleaned, as_version=4)
    assert [cell.source for cell in nb.cells] == [cell.source for cell in load(repo).cells]
    assert all(not cell.outputs and cell.execution_count is None for cell in nb.cells if cell.cell_type == "code")
    assert [dict(cell.metadata) for cell in nb.cells] == [{}, {"tags": ["parameters"]}, {}, {"tags": ["volatile"]}]
    assert nb.metadata.kernelspec.name == "python3"

    # Another editor, another run, other ids: the same notebook.
    nb = load(repo)
    nb.metadata.language_info.version = "3.100"
    nb.cells[2].update(id="other", execution_count=4, outputs=[])
    save(nb, repo)
    call(repo, "clean")
    assert cleaned.read_bytes() == first
    save(nbformat.read(cleaned, as_version=4), repo)
    call(repo, "clean")
    assert cleaned.read_bytes() == first

    nb.cells[0].source += " And so on."
    save(nb, repo)
    call(repo, "clean")
    assert cleaned.read_bytes() != first


def test_run_twice_gives_the_same_bytes(repo):
    call(repo, "clean")
    executed, contents = repo / "results/notebooks/00_stars.ipynb", []
    for _ in range(2):
        call(repo, "run", "--n", "5", "--name", "7")
        contents.append(executed.read_bytes())
    assert contents[0] == contents[1]
    nb = nbformat.read(executed, as_version=4)
    nbformat.validate(nb)
    stars, png = nb.cells[3].outputs  # standard error is left out
    assert stars.text == "*****\n7\n"
    assert png.data["image/png"].strip() == PNG
    assert nb.cells[4].outputs == []
    assert not {"papermill", "version"} & set(str(nb.metadata).split("'"))
    assert sorted(p.name for p in executed.parent.iterdir()) == [executed.name]  # nothing else is left behind


def test_run_in_place_stores_the_outputs_of_the_defaults(repo):
    ids = [cell.id for cell in load(repo).cells]
    call(repo, "clean")
    cleaned = (repo / "build/notebooks/00_stars.ipynb").read_bytes()
    call(repo, "run", "--in-place")
    nb = load(repo)
    assert nb.cells[2].outputs[0].text == "***\none\n"
    assert [cell.get("execution_count") for cell in nb.cells] == [None, 1, 2, 3]
    assert [cell.id for cell in nb.cells] == ids
    call(repo, "clean")
    assert (repo / "build/notebooks/00_stars.ipynb").read_bytes() == cleaned
    with pytest.raises(SystemExit, match="leave out parameters and --out"):
        call(repo, "run", "--in-place", "--n", "5")


def test_run_writes_to_another_place(repo):
    call(repo, "clean")
    call(repo, "run", "--n", "2", "--out", "elsewhere/two.ipynb")
    nb = nbformat.read(repo / "elsewhere/two.ipynb", as_version=4)
    assert nb.cells[3].outputs[0].text == "**\none\n" and not (repo / "results").exists()
    with pytest.raises(SystemExit, match="00_stars.failed"):
        call(repo, "run", "--n", "9", "--out", "elsewhere/two.ipynb")
    assert sorted(p.name for p in (repo / "elsewhere").iterdir()) == ["00_stars.failed.ipynb", "two.ipynb"]


def test_failing_cell_keeps_the_earlier_result(repo):
    call(repo, "clean")
    executed = repo / "results/notebooks/00_stars.ipynb"
    executed.parent.mkdir(parents=True)
    executed.write_text("earlier")
    with pytest.raises(SystemExit, match=r"(?s)In \[3\].*00_stars failed: AssertionError: too many.*00_stars.failed"):
        call(repo, "run", "--n", "9")
    assert executed.read_text() == "earlier"
    assert nbformat.read(executed.with_suffix(".failed.ipynb"), as_version=4).cells


def test_bad_requests_are_refused_before_anything_runs(repo):
    with pytest.raises(SystemExit, match="(?s)00_stars.ipynb: no such notebook.*there are: none"):
        call(repo, "run")  # not cleaned yet
    call(repo, "clean")
    with pytest.raises(SystemExit, match="no parameter 'm'; it has: n, name"):
        call(repo, "run", "--m", "5")
    with pytest.raises(SystemExit, match="parameter n: expected int, as its default 3, got 'many'"):
        call(repo, "run", "--n", "many")
    with pytest.raises(SystemExit, match="no such notebook; there are: 00_stars"):
        notebook.main(["clean", "01_moons"], root=repo)
    nb = load(repo)
    nb.cells[2].source = "1"
    save(nb, repo)
    with pytest.raises(SystemExit, match="first: python tools/notebook.py clean 00_stars"):
        call(repo, "run")
    nb.cells[1].source = "n = 1 + one()"
    save(nb, repo)
    call(repo, "clean")
    with pytest.raises(SystemExit, match="expected lines `name = literal`, got `n = 1 \\+ one\\(\\)`"):
        call(repo, "run")
    (repo / "notebooks/00_stars.ipynb").write_text("{")
    with pytest.raises(SystemExit, match="not a notebook"):
        call(repo, "clean")
    assert not (repo / "results").exists()


# ----------------------------------------------------------------------------------------------------------------------
# tools/compare_metrics.py


def measured(part: str, level: float) -> dict:
    """Numbers of a set as `study.tables.summary` gives them."""
    keys = (
        ["native_lpips", "edit_lpips", "edit_nothing"]
        if part == "native"
        else ["mse", "ssim", "lpips_alex", "lpips_vgg"]
    )
    found = {key: round(level * (i + 1), 6) for i, key in enumerate([*keys, "style_distance"])}
    found |= {} if part == "native" else {"psnr": 20.0}
    return {"n_images": 48} | found | {f"{key}_error": round(0.04 * value, 6) for key, value in found.items()}


@pytest.fixture(scope="module")
def committed() -> str:
    """As results/metrics/inversion.json, of some rows."""
    methods = {
        "psp": 0.03,
        "e4e": 0.032,
        "padinv": 0.02,
        "padinv-f": 0.012,
        "padinv+10": 0.015,
        "w": 0.01,
        "pti": 0.005,
    }
    rows = {method: {"method": method, "generator_passes": 1}
            | {part: measured(part, level) for part in ("inside", "outside", "native")}
            for method, level in methods.items()}  # fmt: skip
    protocol = {"device": "cpu", "packages": {"torch": "2.12.1"}, "checkpoints": {"psp": "aa"}, "resolution": 128}
    return json.dumps({"protocol": protocol, "rows": rows}, indent=2)


@pytest.fixture
def compare(tmp_path, committed):
    """Compares the committed metrics with these, as make repro does."""
    (tmp_path / "expected.json").write_text(committed)

    def run(fresh: dict) -> None:
        (tmp_path / "fresh.json").write_text(json.dumps(fresh))
        arguments = [str(tmp_path / "expected.json"), str(tmp_path / "fresh.json"), "--measured", "psp", "padinv+10"]
        compare_metrics.main(arguments)

    return run


def test_metrics_that_agree(committed, compare, capsys):
    fresh = json.loads(committed)
    compare(fresh)
    said = capsys.readouterr().out
    assert "Measured anew: psp, padinv+10. " in said and "numbers agree" in said and "furthest" not in said

    # Another machine, where rows of encoders agree to 1e-6.
    fresh["rows"]["padinv+10"]["inside"] |= {"psnr": 20.011, "mse": 0.015042, "mse_error": 0.000606}
    fresh["rows"]["padinv+10"]["native"]["edit_lpips"] = 0.03013
    fresh["rows"]["psp"]["outside"]["mse"] += 1e-6
    fresh["protocol"]["device"], fresh["protocol"]["packages"]["torch"] = "cuda", "2.13.0"
    compare(fresh)
    said = capsys.readouterr().out
    assert "Note: protocol.device: expected 'cpu', got 'cuda'" in said
    assert "Note: protocol.packages.torch: expected '2.12.1', got '2.13.0'" in said
    assert "The furthest off, of 5: rows.padinv+10.inside.mse: 0.015, now 0.015042" in said


def test_a_row_falsified_by_5_percent_is_named(committed, compare):
    for method, row in json.loads(committed)["rows"].items():
        numbers = {(part, metric): row[part][metric] for part in ("inside", "native") for metric in row[part]
                   if metric in compare_metrics.TOLERANCES}  # fmt: skip
        for (part, metric), value in numbers.items():
            for factor in (0.95, 1.05):
                fresh = json.loads(committed)
                fresh["rows"][method][part][metric] = value * factor
                with pytest.raises(SystemExit, match=re.escape(f"\n  rows.{method}.{part}.{metric}: expected {value}")):
                    compare(fresh)
        fresh = json.loads(committed)
        fresh["rows"][method]["inside"]["mse_error"] *= 1.2
        with pytest.raises(SystemExit, match=re.escape(f"rows.{method}.inside.mse_error")):
            compare(fresh)


def test_rows_of_encoders_are_held_closer_than_rows_with_steps(committed, compare):
    fresh = json.loads(committed)
    for method in ("padinv", "padinv+10", "w", "pti"):
        fresh["rows"][method]["inside"]["mse"] *= 1.004
    with pytest.raises(SystemExit) as error:
        compare(fresh)
    assert "rows.padinv.inside.mse" in str(error.value) and str(error.value).count("expected 0") == 1


def test_another_measurement_is_refused(committed, compare, capsys):
    fresh = json.loads(committed)
    fresh["protocol"]["checkpoints"]["psp"] = "bb"
    fresh["rows"]["psp"]["inside"]["n_images"] = 999
    fresh["rows"]["e4e"]["inside"]["mse"] = float("nan")
    fresh["rows"]["padinv"]["new"] = 1.0
    del fresh["rows"]["padinv"]["inside"]["ssim"]
    del fresh["rows"]["pti"]
    with pytest.raises(SystemExit) as error:
        compare(fresh)
    for part in (
        "protocol.checkpoints.psp: expected 'aa', got 'bb'",
        "rows.psp.inside.n_images: expected 48, got 999",
        "rows.e4e.inside.mse: expected 0.032, got nan",
        "rows.padinv.new: 1.0 is new",
        "rows.padinv.inside.ssim: expected 0.04, missing",
        "rows.pti.outside.mse: expected 0.005, missing",
    ):
        assert part in str(error.value)


def test_make_repro_fails_where_the_committed_row_is_false(tmp_path, committed):
    """The recipe of make repro in a repository of its own, with a dvc that does nothing."""
    for name in ("Makefile", "params.yaml", "tools/compare_metrics.py", "results/tables/inversion.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, script in (("dvc", 'echo "dvc $@"'), ("python", f'exec "{sys.executable}" "$@"')):
        (tmp_path / "env/bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "env/bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "env/bin" / name).chmod(0o755)
    for name in ("requirements.lock", "pyproject.toml", "env/.padinv-installed"):
        (tmp_path / name).touch()
    metrics = tmp_path / "results/metrics/inversion.json"
    metrics.parent.mkdir()
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)

    def repro(text: str) -> subprocess.CompletedProcess:
        """With this text committed, and the true one measured."""
        metrics.write_text(text)
        for command in (["add", "results"], ["commit", "-q", "--allow-empty", "-m", "row"]):
            subprocess.run([*git, *command], cwd=tmp_path, check=True)
        metrics.write_text(committed)
        command = ["make", "repro", "VENV=env", f"PYTHON={sys.executable}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = repro(committed)
    assert done.returncode == 0, done.stderr
    assert "dvc pull" in done.stdout and "dvc repro --force --single-item row@psp" in done.stdout
    assert "| padinv+100 |" in done.stdout
    assert "Measured anew: psp, padinv, padinv-f, padinv+10. " in done.stdout
    assert "numbers agree" in done.stdout and "Discard them" not in done.stdout
    done = repro(json.dumps(json.loads(committed)))  # the same numbers, other bytes
    assert done.returncode == 0 and "results/metrics/inversion.json\n" in done.stdout
    assert "Discard them:  git restore" in done.stdout

    false = json.loads(committed)
    false["rows"]["padinv"]["inside"]["mse"] *= 1.05
    done = repro(json.dumps(false))
    assert done.returncode == 2 and "rows.padinv.inside.mse: expected" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# What runs elsewhere


def test_ci_and_devcontainer_run_what_there_is():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads the word "on" as true
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    lines = [line.strip() for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert [line for line in lines if line.startswith("make ")] == ["make env", "make lint", "make repro", "make test"]
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)

    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    command, *targets = container["postCreateCommand"].split()
    assert command == "make" and targets == ["env", "data"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


# ----------------------------------------------------------------------------------------------------------------------
# Experiments


def test_an_experiment_as_in_the_readme(tmp_path):
    """dvc exp run -S, dvc metrics diff and dvc plots diff in a copy of the repository, on a row with few images."""
    files = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in files.stdout.decode().split("\0"):
        if name and not name.startswith("store/") and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    env = os.environ | {"PATH": os.pathsep.join(paths), "GIT_CONFIG_GLOBAL": os.devnull, "DVC_NO_ANALYTICS": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def dvc(*arguments: str) -> str:
        return run(sys.executable, "-m", "dvc", *arguments)

    run("git", "init", "-q")
    run("git", "config", "user.name", "test")
    run("git", "config", "user.email", "test@example.org")
    run("git", "add", "--all")
    run("git", "commit", "-qm", "start")
    dvc("config", "--local", "cache.dir", str(ROOT / ".dvc/cache"))
    dvc("checkout", "data.dvc", "train-generator", "train-encoder@psp", "row@psp")
    few = ["-S", "table.touched={sets: [outside], n_images: 4, n_native: 2}"]  # for speed
    dvc("exp", "run", "--name", "two-steps", "-S", "+rows.psp.steps=2", *few, "--single-item", "row@psp")

    changed = json.loads(dvc("metrics", "diff", "HEAD", "--json"))["results/rows/psp.json"]
    assert changed["row.generator_passes"] == {"old": 1, "new": 3, "diff": 2}
    assert changed["row.outside.lpips_alex"]["old"] != changed["row.outside.lpips_alex"]["new"]
    assert "two-steps" in dvc("exp", "list", "--name-only")
    page = dvc("plots", "diff", "HEAD", "two-steps", "--out", "page").strip()
    assert "two-steps_results_figures_teaser.png" in Path(page.removeprefix("file://")).read_text()
