"""Copy the tables of results/tables into README.md, between the markers that name them.

python tools/readme.py            after the pipeline has run; a test fails when the two differ
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """README's text with each marked table as the file has it now."""
    return TABLE.sub(lambda m: m[1] + (ROOT / m[2]).read_text(encoding="utf-8").strip() + "\n" + m[3], text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
