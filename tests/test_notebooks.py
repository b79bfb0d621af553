"""Conventions of notebooks/. That they run, and give their stored outputs, is what `pytest --nbval` checks."""

import re
from pathlib import Path

import pytest

from tools import notebook

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Home and temporary folders of any system, and this checkout's own.
MACHINE_PATH = re.compile(r"/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\Users|site-packages|" + re.escape(str(ROOT) + "/"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def nb(request):
    return notebook.read(request.param)


def code(nb) -> list:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_names(path):
    assert re.fullmatch(r"\d\d(_[a-z0-9]+)+", path.stem)


def test_shape(nb):
    assert len(nb.cells) <= 25
    assert nb.cells[0].cell_type == "markdown"
    assert all(cell.source.strip() for cell in nb.cells), "an empty cell"
    ids = [cell.id for cell in nb.cells]
    assert len(set(ids)) == len(ids)


def test_one_cell_of_parameters(nb):
    (cell,) = [cell for cell in code(nb) if "parameters" in tags(cell)]
    assert cell is code(nb)[0]
    assert notebook.defaults(nb), "no parameter"  # raises unless all are literals
    uncommented = [line for line in cell.source.splitlines() if line.strip() and "#" not in line]
    assert not uncommented, "every parameter has a comment"


def test_no_classes_and_no_long_functions(nb):
    for cell in code(nb):
        assert not re.search(r"^class ", cell.source, re.M), "classes belong to padinv/"
        assert len(cell.source.splitlines()) <= 20, f"a long cell: {cell.source[:80]}"


def test_outputs_are_stored(nb):
    for cell in code(nb):
        assert cell.execution_count is not None, f"nbval compares nothing here: {cell.source[:80]}"
        assert not [o for o in cell.outputs if o.output_type == "error"], cell.source[:80]
        if "volatile" in tags(cell):
            assert "nbval-ignore-output" in tags(cell), "outputs that are not stored cannot be compared"
    counts = [cell.execution_count for cell in code(nb)]
    assert counts == list(range(1, len(counts) + 1)), "not run from top to bottom"


def test_outputs_are_the_same_everywhere(nb):
    assert nb == notebook.normalise(nb), "not normalised: make notebooks"
    for cell in nb.cells:
        for text in (cell.source, *(str(o.get("text", o.get("data", ""))) for o in cell.get("outputs", ()))):
            found = MACHINE_PATH.search(text) or re.search(r" at 0x[0-9a-f]{6,}", text)
            assert not found, f"{found[0]!r} in {cell.source[:80]!r}"


def test_figures_are_small(nb):
    for cell in code(nb):
        for output in cell.outputs:
            for kind, data in output.get("data", {}).items():
                if kind.startswith("image/"):
                    assert len(data) * 3 / 4 < 150_000, f"{kind} of {len(data) * 3 // 4:,} bytes: {cell.source[:80]}"
