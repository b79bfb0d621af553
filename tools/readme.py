"""Render the tables of README.md and docs/ from committed results, between the markers that ask for them.

python tools/readme.py            after the pipeline has run; a test fails when the two differ

    <!-- table: FILE.md -->                                        the file, as it is
    <!-- table: FILE ... COLUMN=A,B columns=A,B note=FILE.md -->   rows of CSV, numbers to 3 significant digits

COLUMN=A,B keeps the rows with these values, in this order, of each file that has the column; of several, the last one
named orders first. columns= chooses columns; behind one called NAME stands ± NAME_error where there is one. Several
files are joined by `method`, rows in the order in which they first occur; where columns meet, the later file counts.
note= adds the last paragraph of a file, which the pipeline wrote with its table.
"""

import csv
import re
from decimal import ROUND_UP, Context, Decimal
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def read(path: str) -> list[dict[str, str]]:
    """Rows of a CSV of results, every value as it is written there."""
    return list(csv.DictReader((ROOT / path).read_text(encoding="utf-8").splitlines()))


def rounded(text: str, error: str = "") -> str:
    """A decimal number to 3 significant digits, or fewer where the text has fewer, with its error to as many decimals,
    rounded up; other text as it is."""
    if not re.fullmatch(r"-?\d+\.\d+(e[+-]?\d+)?", text):
        return text.replace("|", "\\|")
    number = Context(prec=3).create_decimal(Decimal(text))
    return f"{number:f}" + (f" ± {Decimal(error).quantize(number, ROUND_UP):f}" if error else "")


def table(request: str) -> str:
    """What a marker asks for. Raises ValueError if a row or a column of it is not there."""
    words = request.split()
    files, options = [w for w in words if "=" not in w], dict(w.split("=", 1) for w in words if "=" in w)
    if files[0].endswith(".md"):
        return (ROOT / files[0]).read_text(encoding="utf-8").strip()
    columns, note = options.pop("columns", None), options.pop("note", None)
    asked = {name: values.split(",") for name, values in options.items()}
    found: dict = {}
    for i, file in enumerate(files):
        for j, row in enumerate(read(file)):
            if all(row[name] in values for name, values in asked.items() if name in row):
                key = row["method"] if len(files) > 1 else (i, j)
                found[key] = found.get(key, {}) | row
    rows = list(found.values())
    for name, values in asked.items():
        if missing := set(values) - {row.get(name) for row in rows}:
            raise ValueError(f"{request}: no row whose {name} is {', '.join(sorted(missing))}")
        rows = [row for row in rows if name in row]  # of files joined: those with a row in the file that has it
        rows.sort(key=lambda row, name=name, values=values: values.index(row[name]))
    columns = columns.split(",") if columns else [c for c in rows[0] if not c.endswith("_error")]
    if missing := set(columns) - set().union(*rows):
        raise ValueError(f"{request}: no column {', '.join(sorted(missing))}")
    cells = [[rounded(row.get(c, ""), row.get(f"{c}_error", "")) for c in columns] for row in rows]
    lines = [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]
    if note:
        lines += ["", (ROOT / note).read_text(encoding="utf-8").strip().split("\n\n")[-1]]
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The text of a page with each marked table as the results have it now."""
    return TABLE.sub(lambda m: f"{m[1]}{table(m[2])}\n{m[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
