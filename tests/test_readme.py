"""README says what the repository has."""

import re

from tools.readme import ROOT, TABLE, with_tables

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_pipeline():
    assert TABLE.search(TEXT)
    assert with_tables(TEXT) == TEXT, "run: python tools/readme.py"


def test_links_and_pictures_exist():
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in t]
    assert len(targets) > 5
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_python_examples_name_real_things():
    import padinv

    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
    compile(code, "README.md", "exec")
    names = re.findall(r"\bpadinv\.(\w+)\(", code) + ["Code"]
    assert names and all(hasattr(padinv, name) for name in names)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z]+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
