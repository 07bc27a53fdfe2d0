"""MkDocs hooks: tables of flags and lists of tests, generated from the code.

`{{ flags module:Class }}` becomes a table of the fields of a dataclass, `{{ options module:Class }}` the same without
dashes before the names, `{{ tests r07 }}` a list of the regression tests of that fault, `{{ files }}` a table of all
source files. A placeholder without a match is a warning, which fails `mkdocs build --strict`. Names in docstrings,
[`Name`] and :func:`name`, become plain code.
"""

import ast
import dataclasses
import importlib
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

from metamorph.flags.checks import attribute_docs


logger = logging.getLogger("mkdocs.hooks.metamorph")
FLAGS = re.compile(r"^\{\{ (flags|options) ([\w.]+):(\w+) \}\}$", re.MULTILINE)
TESTS = re.compile(r"^\{\{ tests (r\d\d) \}\}$", re.MULTILINE)
MARKED_NAME = re.compile(r"\[(<code>[\w.]+</code>)\]|:(?:attr|class|data|func|meth|mod):(<code>[^<]*</code>)")
TEST_FOLDER = Path(__file__).parent.parent / "tests"
PACKAGE = Path(__file__).parent.parent / "src" / "metamorph"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the placeholders of a page; MkDocs calls this function by name."""
    markdown = FLAGS.sub(lambda match: flag_table(match[2], match[3], "--" * (match[1] == "flags")), markdown)
    if "{{ files }}" in markdown:
        markdown = markdown.replace("{{ files }}", file_table())
    return TESTS.sub(lambda match: guarding_tests(match[1]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Strip brackets and Sphinx roles from names in docstrings; MkDocs calls this function by name."""
    return MARKED_NAME.sub(lambda match: match[1] or match[2], html)


def flag_table(module: str, name: str, dashes: str = "--") -> str:
    """Return a Markdown table of the documented fields of a dataclass, inherited ones included."""
    cls = getattr(importlib.import_module(module), name)
    documented = attribute_docs(cls)
    rows = [f"| {'Flag' if dashes else 'Option'} | Default | Meaning |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        if (field.name in documented or field.name in cls.__annotations__) and field.init:
            meaning = documented.get(field.name, "")
            if not meaning:
                logger.warning("%s.%s.%s has no attribute docstring", module, name, field.name)
            rows.append(f"| `{dashes}{field.name}` | {_default(field)} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def guarding_tests(number: str) -> str:
    """Return a Markdown list of the tests named `test_<number>_…`."""
    found = [f"- `{file}::{name}`" for file, name in _tests() if name.startswith(f"test_{number}_")]
    if not found:
        logger.warning("no test is named test_%s_…: write it, or leave the fault out of the page", number)
    return "\n" + "\n".join(found)


def file_table() -> str:
    """Return a Markdown table of the files of each package, with the first paragraph of each docstring."""
    lines = []
    for folder in sorted({file.parent for file in PACKAGE.rglob("*.py")}):
        lines += ["", f"**`{folder.relative_to(PACKAGE.parent).as_posix()}/`** {_summary(folder / '__init__.py')}"]
        files = sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")
        lines += ["", "| File | |", "|---|---|"] if files else []
        lines += [f"| `{file.name}` | {_summary(file).replace('|', chr(92) + '|')} |" for file in files]
    return "\n".join(lines)


def _summary(file: Path) -> str:
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(doc.split("\n\n")[0].split())


@cache
def _tests() -> list[tuple[str, str]]:
    """Return file and name of every test function, sorted by file."""
    return [
        (path.relative_to(TEST_FOLDER.parent).as_posix(), name)
        for path in sorted(TEST_FOLDER.rglob("test_*.py"))
        for name in re.findall(r"^ *def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    if field.default is dataclasses.MISSING:
        return "required"
    return "–" if field.default is None else f"`{field.default}`"
