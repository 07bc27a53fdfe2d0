"""Records of edits: an image, an instruction, and what is known about the right result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from metamorph.evaluation.loaders.base import Loader
from metamorph.evaluation.loaders.generation import existing, file_in, need, read_lines
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
        file = file_in(path, "edits.jsonl")
        samples: list[Sample] = []
        for where, record in read_lines(file):
            need(record, {"image": str, "instruction": str}, where)
            need(record, {name: str for name in (*FILES, *TEXTS, "task") if name in record}, where)
            files = {name: existing(file.parent / record[name], file) for name in ("image", *FILES) if name in record}
            texts = {name: record[name] for name in ("instruction", *TEXTS) if name in record}
            samples.append(
                Sample(
                    str(record.get("id", f"{len(samples):05}")),
                    {"instruction": record["instruction"]},
                    texts,
                    images=(files["image"],),
                    files=files,
                    categories={"task": record["task"]} if "task" in record else {},
                )
            )
        return samples
