"""Records of edits: an image, an instruction, and what is known about the right result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from metamorph.evaluation.loaders.base import Loader
from metamorph.evaluation.loaders.tables import Row, existing_file, find_files, read_rows
from metamorph.evaluation.samples import Sample


FILES = ("target", "mask")
TEXTS = ("caption_before", "caption_after")


@dataclass(frozen=True)
class EditsLoader(Loader):
    """JSON lines, or a folder with them as `edits.jsonl`; images are beside the file. Field: `instruction`.

    A line has `image` and `instruction`, and may have `id`, `task` (a category), `target` (the right result), `mask`
    (white where the image is to change), `caption_before` and `caption_after`.
    """

    name: ClassVar[str] = "edits"

    def load(self, path: Path) -> Sequence[Sample]:
        """See `Loader.load`."""
        (file,) = find_files(path, "edits.jsonl")
        rows = read_rows(file, ("image", "instruction"))
        return [_sample(number, row, file.parent) for number, row in enumerate(rows)]


def _sample(number: int, row: Row, folder: Path) -> Sample:
    paths = {"image": row.needed("image"), **{name: row.text(name) for name in FILES}}
    files = {name: existing_file(path, folder, row.where) for name, path in paths.items() if path}
    texts = {"instruction": row.needed("instruction"), **{name: row.text(name) for name in TEXTS}}
    return Sample(
        row.text("id") or f"{number:05}",
        {"instruction": texts["instruction"]},
        {name: text for name, text in texts.items() if text},
        images=(files["image"],),
        files=files,
        categories={"task": row.text("task")} if row.text("task") else {},
    )
