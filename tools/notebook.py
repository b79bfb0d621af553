"""Clean and execute the notebooks so that the same code, data and parameters give the same bytes.

python tools/notebook.py clean 03_inversion                   notebooks/ -> build/notebooks/, what DVC's stages watch
python tools/notebook.py run 03_inversion --n_images 1000     build/notebooks/ -> results/notebooks/
python tools/notebook.py run 03_inversion --out here.ipynb    likewise, to another place
python tools/notebook.py run 03_inversion --in-place          notebooks/ -> itself, for the outputs that tests compare

Notebooks run in the repository's root. Everything that changes from run to run is left out of the result: times,
ids, versions, progress (standard error and widgets), and the outputs of cells tagged `volatile`.
"""

import argparse
import ast
import copy
import json
import os
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
          "language_info": {"name": "python"}}  # fmt: skip
WIDGET = "application/vnd.jupyter.widget-view+json"


class NotebookError(Exception):
    """Something that the caller can mend: the message says how."""


def read(path: Path) -> NotebookNode:
    """A notebook in the current format. NotebookError if there is none or it is broken."""
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.ipynb"))) or "none"
        raise NotebookError(f"{path}: no such notebook; there are: {there}")
    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, nbformat.ValidationError) as error:
        raise NotebookError(f"{path}: not a notebook: {error}") from error


def write(nb: NotebookNode, path: Path) -> None:
    """Write at once or not at all: a kill leaves the file that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(nbformat.writes(nb) + "\n", encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def normalise(nb: NotebookNode) -> NotebookNode:
    """A copy without what changes from run to run and from machine to machine; tags, counts and results stay."""
    nb = copy.deepcopy(nb)
    nb.nbformat, nb.nbformat_minor = 4, 5
    nb.metadata = nbformat.from_dict(KERNEL)
    for cell in nb.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if "injected-parameters" in tags:
            cell.id = "injected-parameters"  # papermill draws a new one each time
        if cell.cell_type == "code":
            kept = []
            for output in cell.outputs if "volatile" not in tags else ():
                if output.get("name") == "stderr" or WIDGET in output.get("data", ()):
                    continue
                if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
                    kept[-1].text += output.text  # where a stream was cut is a matter of timing
                else:
                    kept.append(output)
            cell.outputs = kept
    return nb


def clean(nb: NotebookNode, keep_ids: bool = False) -> NotebookNode:
    """A copy with the sources and tags only. Ids are numbered, unless kept."""
    from nbstripout import strip_output

    nb = strip_output(normalise(nb), keep_output=False, keep_count=False, keep_id=True)
    if not keep_ids:
        for i, cell in enumerate(nb.cells):
            cell.id = f"{i:02d}"
    return nb


def defaults(nb: NotebookNode) -> dict[str, object]:
    """The names and default values in the cell tagged `parameters`. NotebookError if one is not a literal."""
    found = {}
    for cell in nb.cells:
        if "parameters" not in cell.metadata.get("tags", []):
            continue
        for node in ast.parse(cell.source).body:
            try:
                (target,) = node.targets
                found[target.id] = ast.literal_eval(node.value)
            except (AttributeError, ValueError) as error:
                line = ast.unparse(node)
                raise NotebookError(f"parameters: expected lines `name = literal`, got `{line}`") from error
    return found


def pair(words: list[str]) -> list[tuple[str, str]]:
    """[("n_images", "1000"), …] of ["--n_images", "1000", …]. NotebookError for anything else."""
    names, values = words[::2], words[1::2]
    if len(words) % 2 or not all(name.startswith("--") for name in names):
        raise NotebookError(f"expected pairs of --NAME VALUE, got {' '.join(words)}")
    return [(name.removeprefix("--"), value) for name, value in zip(names, values, strict=True)]


def parse(pairs: list[tuple[str, str]], known: dict[str, object]) -> dict[str, object]:
    """Values of the command line, as JSON where they are JSON, of the type of the defaults."""
    values = {}
    for key, text in pairs:
        if key not in known:
            raise NotebookError(f"the notebook has no parameter {key!r}; it has: {', '.join(known) or 'none'}")
        if isinstance(known[key], str):
            values[key] = text
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if type(known[key]) is float and type(value) is int:
            value = float(value)
        if known[key] is not None and type(value) is not type(known[key]):
            kind = type(known[key]).__name__
            raise NotebookError(f"parameter {key}: expected {kind}, as its default {known[key]!r}, got {text!r}")
        values[key] = value
    return values


def run(name: str, pairs: list[tuple[str, str]], in_place: bool = False, out: str = "", root: Path = ROOT) -> Path:
    """Execute a notebook and write it, byte-stable, once it has run through.

    Where to: the given file, in the root unless absolute, or results/notebooks/NAME.ipynb.

    Raises:
        NotebookError: unknown or mistyped parameter, stale cleaned copy, or a cell that failed; then the partly
            executed notebook lies beside the target, as NAME.failed.ipynb.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    source = root / "notebooks" / f"{name}.ipynb"
    nb = clean(read(source), keep_ids=in_place)
    if in_place:
        if pairs or out:
            raise NotebookError("--in-place stores outputs of the default parameters: leave out parameters and --out")
    elif read(root / "build" / "notebooks" / source.name) != nb:
        # DVC watches the cleaned copy: executing anything else would record a result under the wrong hash.
        raise NotebookError(f"build/notebooks/{source.name} is not the cleaned {source.name}; "
                            f"first: python tools/notebook.py clean {name} (dvc repro does so)")  # fmt: skip
    values = parse(pairs, defaults(nb))
    result = root / (out or f"results/notebooks/{name}.ipynb")
    partial = result.with_name(f"{name}.failed.ipynb")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        nb = papermill.execute_notebook(nb, partial, values, kernel_name="python3", cwd=root, coalesce_streams=True)
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        where = f"cell {error.cell_index}" if hasattr(error, "cell_index") else "a cell"
        what = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else "the kernel died; out of memory?"
        raise NotebookError(f"{error}\n{where} of {name} failed: {what}\nexecuted up to there: {partial}") from None
    target = source if in_place else result
    write(normalise(nb), target)
    partial.unlink()
    return target


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("clean", "run"))
    parser.add_argument("name", help="of a notebook in notebooks/, like 03_inversion")
    parser.add_argument("--out", default="", metavar="PATH", help="run: where to (results/notebooks/NAME.ipynb)")
    parser.add_argument("--in-place", action="store_true", help="run: store the outputs in notebooks/ itself")
    parser.epilog = "run: each further --NAME VALUE is a parameter of the notebook, as dvc writes ${section}"
    args, words = parser.parse_known_args(arguments)
    try:
        pairs = pair(words)
        if args.action == "run":
            run(args.name, pairs, args.in_place, args.out, root)
        elif pairs or args.in_place or args.out:
            raise NotebookError("clean takes no options")
        else:
            nb = clean(read(root / "notebooks" / f"{args.name}.ipynb"))
            write(nb, root / "build" / "notebooks" / f"{args.name}.ipynb")
    except NotebookError as error:
        sys.exit(f"tools/notebook.py: {error}")


if __name__ == "__main__":
    main()
