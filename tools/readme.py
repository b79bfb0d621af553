"""Render the tables of README.md and docs/ from committed results, between the markers that ask for them.

python tools/readme.py            after the pipeline has run; a test fails when the two differ

    <!-- table: FILE.md -->                                        the file, as it is
    <!-- table: FILE ... COLUMN=A,B columns=A,B note=FILE.md -->   rows of CSV or JSON, numbers to 3 significant digits

Several files are joined by `method`, rows in the order in which they first occur; where columns meet, the later file
counts. COLUMN=A,B keeps the rows with these values, in this order, and COLUMN=* those with any; columns= chooses
columns. note= adds the last paragraph of a file, which the pipeline wrote with its table.
"""

import csv
import json
import re
from decimal import Context, Decimal
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def read(path: str) -> list[dict[str, str]]:
    """Rows of a file of results, every value as it is written there.

    CSV; or JSON with one "row"; or JSON of rows by their method.
    """
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".csv"):
        return list(csv.DictReader(text.splitlines()))
    content = json.loads(text, parse_float=str)
    rows = [content["row"]] if "row" in content else [{"method": name} | row for name, row in content.items()]
    return [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]


def rounded(text: str) -> str:
    """A decimal number to 3 significant digits, or fewer where the text has fewer; other text as it is."""
    if not re.fullmatch(r"-?\d+\.\d+(e[+-]?\d+)?", text):
        return text.replace("|", "\\|")
    return f"{Context(prec=3).create_decimal(Decimal(text)):f}"


def table(request: str) -> str:
    """What a marker asks for. Raises ValueError if a row or a column of it is not there."""
    words = request.split()
    files, options = [w for w in words if "=" not in w], dict(w.split("=", 1) for w in words if "=" in w)
    if files[0].endswith(".md"):
        return (ROOT / files[0]).read_text(encoding="utf-8").strip()
    found: dict = {}
    for file in files:
        for i, row in enumerate(read(file)):
            key = row["method"] if len(files) > 1 else i
            found[key] = found.get(key, {}) | row
    rows = list(found.values())
    columns, note = options.pop("columns", ",".join(rows[0])).split(","), options.pop("note", None)
    for name, values in options.items():
        values = values.split(",")
        if missing := set(values) - {"*"} - {row[name] for row in rows}:
            raise ValueError(f"{request}: no row whose {name} is {', '.join(sorted(missing))}")
        rows = [row for row in rows if row[name] in values or (values == ["*"] and row[name])]
        rows.sort(key=lambda row, name=name, values=values: values.index(row[name]) if "*" not in values else 0)
    if missing := set(columns) - set().union(*rows):
        raise ValueError(f"{request}: no column {', '.join(sorted(missing))}")
    cells = [columns, ["---"] * len(columns), *([rounded(row.get(c, "")) for c in columns] for row in rows)]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    if note:
        lines += ["", (ROOT / note).read_text(encoding="utf-8").strip().split("\n\n")[-1]]
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The text of a page with each marked table as the results have it now."""
    return TABLE.sub(lambda m: f"{m[1]}{table(m[2])}\n{m[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
