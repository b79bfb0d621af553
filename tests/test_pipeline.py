"""dvc.yaml names what is there, and tools/notebook.py gives the same bytes or a clear error."""

import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import compare_metrics, imports, notebook

ROOT = Path(__file__).resolve().parent.parent
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


# ----------------------------------------------------------------------------------------------------------------------
# dvc.yaml


@pytest.fixture(scope="module")
def stages():
    from dvc.repo import Repo

    return [stage for stage in Repo(str(ROOT)).index.stages if stage.is_data_source is False]  # parsed and resolved


def executed(stages) -> list[tuple]:
    """(name of a notebook, stage that executes it), those of pipelines/ too."""
    found = []
    for stage in stages:
        words = shlex.split(stage.cmd) if isinstance(stage.cmd, str) else []
        if words[1:3] == ["tools/notebook.py", "run"]:
            found.append((words[3], stage))
    return found


def deps(stage) -> set[str]:
    return {dep.def_path for dep in stage.deps}


def test_stages_depend_on_files_that_exist(stages):
    ours = ("padinv/", "study/")
    missing = [
        f"{s.addressing}: {p}" for s in stages for p in deps(s) if p.startswith(ours) and not (ROOT / p).exists()
    ]
    assert not missing


def test_params_and_stages_match(stages):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    watched = {key for s in stages for dep in s.deps for key in getattr(dep, "params", ())}
    for key in watched:
        value = params
        for part in key.split("."):
            assert part in value, f"a stage reads {key}, which params.yaml lacks"
            value = value[part]
    # A parameter that no stage watches could change without anything being run again.
    keys = {f"{section}.{key}" for section, values in params.items() if section not in watched for key in values}
    assert not {key for key in keys if not any(w == key or w.startswith(f"{key}.") for w in watched)}


def test_no_stage_depends_on_an_executed_notebook(stages):
    assert not [s.addressing for s in stages if any(p.startswith("results/") and p.endswith(".ipynb") for p in deps(s))]


def test_every_notebook_is_cleaned_and_executed(stages):
    names = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {s.name.removeprefix("clean@") for s in stages if s.name.startswith("clean@")} == names
    assert {name for name, _ in executed(stages)} == names


def test_stages_pass_parameters_that_the_notebook_has(stages):
    for name, stage in executed(stages):
        words = shlex.split(stage.cmd)
        pairs = [words[i + 1 : i + 3] for i, word in enumerate(words) if word == "-p"]
        notebook.parse(pairs, notebook.defaults(notebook.read(ROOT / "notebooks" / f"{name}.ipynb")))


def runs(stage) -> set[str]:
    """The modules of padinv/ and study/ that a stage's commands run."""
    found = set()
    for line in [stage.cmd] if isinstance(stage.cmd, str) else stage.cmd:
        for words in (shlex.split(command) for command in line.split("&&")):
            if words[1:3] == ["tools/notebook.py", "run"]:
                cells = notebook.read(ROOT / "notebooks" / f"{words[3]}.ipynb").cells
                source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
                found |= imports.found(ast.parse(source))
            elif words[1:3] == ["-m", "padinv.training"]:
                found.add(f"padinv.training.{words[3]}")
            elif words[1] == "-m":
                found.add(words[2])
    return imports.reached(found)


def test_stages_depend_on_the_code_that_they_run(stages):
    assert len([stage for stage in stages if runs(stage)]) > 40
    for stage in stages:
        files = [imports.modules()[module] for module in runs(stage)]
        missing = [str(f) for f in files if not {f, *f.parents} & set(map(Path, deps(stage))) and f.stem != "__init__"]
        assert not missing, f"{stage.addressing} runs {sorted(missing)}"


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
        call(repo, "run", "-p", "n", "5", "-p", "name", "7")
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
    with pytest.raises(SystemExit, match="leave -p and --out out"):
        call(repo, "run", "--in-place", "-p", "n", "5")


def test_run_writes_to_another_place(repo):
    call(repo, "clean")
    call(repo, "run", "-p", "n", "2", "--out", "elsewhere/two.ipynb")
    nb = nbformat.read(repo / "elsewhere/two.ipynb", as_version=4)
    assert nb.cells[3].outputs[0].text == "**\none\n" and not (repo / "results").exists()
    with pytest.raises(SystemExit, match="00_stars.failed"):
        call(repo, "run", "-p", "n", "9", "--out", "elsewhere/two.ipynb")
    assert sorted(p.name for p in (repo / "elsewhere").iterdir()) == ["00_stars.failed.ipynb", "two.ipynb"]


def test_failing_cell_keeps_the_earlier_result(repo):
    call(repo, "clean")
    executed = repo / "results/notebooks/00_stars.ipynb"
    executed.parent.mkdir(parents=True)
    executed.write_text("earlier")
    with pytest.raises(SystemExit, match=r"(?s)In \[3\].*00_stars failed: AssertionError: too many.*00_stars.failed"):
        call(repo, "run", "-p", "n", "9")
    assert executed.read_text() == "earlier"
    assert nbformat.read(executed.with_suffix(".failed.ipynb"), as_version=4).cells


def test_bad_requests_are_refused_before_anything_runs(repo):
    with pytest.raises(SystemExit, match="(?s)00_stars.ipynb: no such notebook.*there are: none"):
        call(repo, "run")  # not cleaned yet
    call(repo, "clean")
    with pytest.raises(SystemExit, match="no parameter 'm'; it has: n, name"):
        call(repo, "run", "-p", "m", "5")
    with pytest.raises(SystemExit, match="parameter n: expected int, as its default 3, got 'many'"):
        call(repo, "run", "-p", "n", "many")
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


def test_compare_metrics(tmp_path, capsys):
    a = {
        "protocol": {"packages": {"torch": "2.1"}, "checkpoints": {"psp": "aa"}},
        "rows": [{"method": "padinv", "mse": 0.1, "n": 9}, {"method": "psp", "mse": 0.2}],
    }
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]

    def compare(b) -> None:
        for path, value in zip(paths, (a, b), strict=True):
            Path(path).write_text(json.dumps(value))
        compare_metrics.main([*paths, "--tolerance", "5e-4"])

    b = {
        "protocol": json.loads(json.dumps(a["protocol"])),
        "rows": [a["rows"][1], {"method": "padinv", "mse": 0.1004, "n": 9}],
    }
    compare(b)  # rows in another order
    assert "2 numbers within 0.0005" in capsys.readouterr().out
    b["rows"][1] = {"method": "padinv", "mse": 0.1006, "n": 8, "psnr": 1.0}
    b["protocol"] = {"packages": {"torch": "2.0"}, "checkpoints": {"psp": "bb"}}
    with pytest.raises(SystemExit) as error:
        compare(b)
    assert "Note: protocol.packages.torch: expected '2.1', got '2.0'" in capsys.readouterr().out
    for part in (
        "protocol.checkpoints.psp: expected 'aa'",
        "mse: expected 0.1, got 0.1006",
        "].n: expected 9",
        "psnr: 1.0 is new",
    ):
        assert part in str(error.value)
    with pytest.raises(SystemExit, match="rows\\[psp\\].mse: expected 0.2, missing"):
        compare({"protocol": a["protocol"], "rows": a["rows"][:1]})
    nan = {"protocol": a["protocol"], "rows": [{"method": "psp", "mse": float("nan")}, a["rows"][0]]}
    with pytest.raises(SystemExit, match="got nan"):
        compare(nan)


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
    few = ["-S", "table.n_common=4", "-S", "table.n_native=1"]  # for speed
    dvc("exp", "run", "--name", "two-steps", "-S", "+rows.psp.steps=2", *few, "--single-item", "row@psp")

    changed = json.loads(dvc("metrics", "diff", "HEAD", "--json"))["results/rows/psp.json"]
    assert changed["row.generator_passes"] == {"old": 1, "new": 3, "diff": 2}
    assert changed["row.common.lpips_alex"]["old"] != changed["row.common.lpips_alex"]["new"]
    assert "two-steps" in dvc("exp", "list", "--name-only")
    page = dvc("plots", "diff", "HEAD", "two-steps", "--out", "page").strip()
    assert "two-steps_results_figures_teaser.png" in Path(page.removeprefix("file://")).read_text()
