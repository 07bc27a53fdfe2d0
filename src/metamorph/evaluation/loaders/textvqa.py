"""TextVQA: `TextVQA_0.5.1_val.json` and the folder `train_images`, as at https://textvqa.org/dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from metamorph.evaluation.loaders.base import Loader
from metamorph.evaluation.loaders.choices import parse_list
from metamorph.evaluation.loaders.tables import Row, image_reference, read_rows
from metamorph.evaluation.samples import Sample


COLUMNS = ("question_id", "question", "image_id", "answers")
OCR_COLUMNS = ("image_id", "ocr_tokens")


@dataclass(frozen=True)
class TextVQALoader(Loader):
    """Reads the folder of TextVQA. Fields for prompts: `question` and, with `ocr`, `ocr_tokens`.

    The validation split, whose answers are public, is about images of `train_images`.
    """

    name: ClassVar[str] = "textvqa"
    questions: str = "TextVQA_0.5.1_val.json"
    """File in the folder."""
    images: str = "train_images"
    """Folder in the folder."""
    ocr: str = ""
    """File with the words that a program read in the images, for example `TextVQA_Rosetta_OCR_v0.2_val.json`."""

    def load(self, path: Path) -> Sequence[Sample]:
        """The samples of the folder `path`."""
        words: dict[str, list[str]] = {}
        if self.ocr:
            rows = read_rows(path / self.ocr, OCR_COLUMNS, key="data")
            words = {row.needed("image_id"): parse_list(row.values["ocr_tokens"], row, "ocr_tokens") for row in rows}
        rows = read_rows(path / self.questions, COLUMNS, key="data")
        return [self._sample(row, path, words) for row in rows]

    def _sample(self, row: Row, path: Path, words: dict[str, list[str]]) -> Sample:
        image = row.needed("image_id")
        fields = {"question": row.needed("question")}
        if self.ocr:
            if image not in words:
                raise row.error(f"{path / self.ocr} has no words of the image {image}")
            fields["ocr_tokens"] = ", ".join(words[image])
        return Sample(
            id=row.needed("question_id"),
            fields=fields,
            reference=parse_list(row.values["answers"], row, "answers"),
            images=tuple(image_reference(f"{image}.jpg", path / self.images, row.where)),
        )
