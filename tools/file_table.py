"""Writes the table of all source files into `docs/design.md`: `python -m tools.file_table`."""

from __future__ import annotations

import ast
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- file table: python -m tools.file_table -->\n", "<!-- end of file table -->\n"


def summary(file: Path) -> str:
    """The first paragraph of a file's docstring, on one line."""
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(doc.split("\n\n")[0].split())


def table() -> str:
    """Every package with its files, as Markdown."""
    package = ROOT / "src" / "metamorph"
    lines = []
    for folder in sorted({file.parent for file in package.rglob("*.py")}):
        name = folder.relative_to(package.parent).as_posix()
        lines += [f"\n**`{name}/`** {summary(folder / '__init__.py')}\n", "| file | |", "|---|---|"]
        files = sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")
        lines += [f"| `{file.name}` | {summary(file).replace('|', chr(92) + '|')} |" for file in files]
        if not files:
            del lines[-2:]
    return "\n".join(lines).strip() + "\n"


def page_with_table(page: str) -> str:
    """The page with the table as it should be between its two markers."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
