"""README and docs/ say what the repository has: tables, links, examples, commands. Sentences: test_claims.py."""

import contextlib
import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from padinv.__main__ import COMMANDS as PADINV
from tools.readme import PAGES, ROOT, TABLE, with_tables

OTHERS = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "pipelines").glob("*/README.md"))]


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(page), re.DOTALL)


def pages(of: list[Path]):
    return pytest.mark.parametrize("page", of, ids=lambda page: page.relative_to(ROOT).as_posix())


# ----------------------------------------------------------------------------------------------------------------------
# Tables


@pages(PAGES)
def test_tables_are_those_of_the_pipeline(page):
    assert with_tables(text(page)) == text(page), "run: python tools/readme.py"


@pages(PAGES)
def test_numbers_are_not_typed_into_tables(page):
    assert not re.findall(r"^\|.*\d\.\d.*\|$", TABLE.sub("", text(page)), re.MULTILINE)


def test_a_marker_chooses_joins_and_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.readme.ROOT", tmp_path)
    (tmp_path / "a.csv").write_text('method,s,n\nx,11.4826,9\n"y",0.00042,1234\nz,,7\n')
    (tmp_path / "b.csv").write_text(
        "set,method,n,mse,mse_error\nin,y,64,7.4e-05,1e-06\nout,y,16,0.05,0.01\nin,x,8,1373.3,0.5\nout,x,8,0.0291,0.00041\n"
    )
    (tmp_path / "c.md").write_text("| t |\n| --- |\n| 0.12345 |\n\nA note.\n")

    def rendered(request: str) -> str:
        return with_tables(f"A\n<!-- table: {request} -->\nstale\n<!-- end of table -->\nB\n")[2:-3].split("-->")[1]

    both = (
        "| method | s | mse | n |\n| --- | --- | --- | --- |\n"
        "| y | 0.00042 | 0.000074 ± 0.000001 | 64 |\n| x | 11.5 | 1370 ± 10 | 8 |"
    )
    assert both in rendered("a.csv b.csv set=in method=y,x\n  columns=method,s,mse,n")
    ordered = rendered("b.csv method=x,y set=out,in note=c.md")
    assert ordered.startswith("\n| set | method | n | mse |\n") and ordered.endswith("\n\nA note.\n<!-- end of table ")
    assert [line.split(" | ")[:2] for line in ordered.splitlines()[3:7]] == [
        ["| out", "x"], ["| out", "y"], ["| in", "x"], ["| in", "y"]]  # fmt: skip
    assert "| 0.0291 ± 0.0005 |" in ordered
    assert "0.12345" in rendered("c.md")
    for wrong, message in (("a.csv method=x,q", "no row whose method is q"), ("a.csv columns=s,t", "no column t")):
        with pytest.raises(ValueError, match=message):
            rendered(wrong)


# ----------------------------------------------------------------------------------------------------------------------
# Length, links


def test_readme_is_short():
    assert len(text(ROOT / "README.md").splitlines()) <= 200
    assert len(text(ROOT / "CONTRIBUTING.md").splitlines()) <= 60


@pages(PAGES + OTHERS)
def test_links_and_pictures_exist(page):
    found = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text(page))
    targets = [a or b for a, b in found if "://" not in a + b]
    assert [t for t in targets if not (page.parent / (t.split("#")[0] or page.name)).exists()] == []
    titles = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", text(page), re.M)
    }
    assert [t for t in targets if t.startswith("#") and t[1:] not in titles] == []


def test_readme_lists_every_notebook():
    listed = re.findall(r"\]\((notebooks/\w+\.ipynb)\)", text(ROOT / "README.md"))
    assert listed == sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks").glob("*.ipynb"))


# ----------------------------------------------------------------------------------------------------------------------
# Examples


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with what a reader would bring: networks and pictures."""
    from padinv.files.checkpoints import save_generator
    from padinv.images.datasets import ImageDataset
    from padinv.model.generator import Generator, GeneratorConfig
    from study.sets import editing_set

    pictures = dict(
        zip(("me", "you"), ImageDataset(ROOT / "data/avatars-128/outside.zip").tensor(range(2)), strict=True)
    )
    pair = editing_set(ROOT / "data/avatars-128/editing.zip")["hat"]
    for name, image in (pictures | {role: pair[role][0] for role in ("before", "after")}).items():
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.png")
    for name in ("checkpoints", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    save_generator(Generator(GeneratorConfig(32)), tmp_path / "ffhq.pkl")  # as wide as NVIDIA's; content decides
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pages([page for page in PAGES if blocks(page, "python")])
def test_python_examples_run(page, place):
    """In the order of the page, in one namespace, with two steps where it takes many."""
    namespace = {}
    for code in blocks(page, "python"):
        exec(compile(re.sub(r"\bsteps=\d+", "steps=2", code), page.name, "exec"), namespace)
    for name in re.findall(r"\.save\(\"([\w.]+)\"", "".join(blocks(page, "python"))):
        assert (place / name).exists()


def commands(page: Path) -> list[list[str]]:
    """Words of each command in its shell blocks."""
    found = []
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        groups = itertools.groupby(words, lambda word: set(word) <= set("();&|<>"))
        found += [list(group) for operator, group in groups if not operator]
    return found


COMMANDS = sorted({tuple(words) for page in PAGES + OTHERS for words in commands(page)})
STARTED = {  # by these command lines
    "padinv": [f"{command.__name__}.run" for command in PADINV],
    "padinv.training": [f"padinv.training.__main__.train_{what}" for what in ("generator", "encoder")],
}


@pytest.mark.parametrize("words", [words for words in COMMANDS if "-m" in words or words[0] == "padinv"], ids=" ".join)
def test_python_commands_parse(words, monkeypatch, capsys):
    """Of the packages that people use: to the very function that they start; of others: each option is in --help."""
    module, *arguments = words[words.index("-m") + 1 :] if "-m" in words else words
    package = importlib.util.find_spec(module).submodule_search_locations is not None
    main = importlib.import_module(f"{module}.__main__" if package else module)
    monkeypatch.chdir(ROOT)
    called = []
    for name in STARTED.get(module, ()):
        monkeypatch.setattr(name, lambda *given: called.append(given))
    if called_for := module in STARTED and "…" not in arguments:
        with contextlib.suppress(SystemExit):
            main.main(arguments)
    else:
        with pytest.raises(SystemExit):
            main.main(["--help"])
    shown = capsys.readouterr()
    assert len(called) == called_for, shown.err
    assert called_for or all(word.split("=")[0] in shown.out for word in arguments if word.startswith("--"))


@pages([page for page in PAGES + OTHERS if "make " in text(page)])
def test_make_targets_exist(page):
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)", text(page), re.MULTILINE))
    assert targets - set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)) == set()


def test_stages_exist():
    from dvc.repo import Repo

    stages = {stage.name for stage in Repo(str(ROOT)).index.stages if not stage.is_data_source}
    asked = {word for page in PAGES for words in commands(page) for word in words if words[0] == "dvc" and "@" in word}
    assert asked and not asked - stages
