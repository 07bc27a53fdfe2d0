"""ChartQA: the authors' folder (JSON files and PNG files), or parquet files from the Hugging Face Hub.

Layouts: https://github.com/vis-nlp/ChartQA, https://huggingface.co/datasets/HuggingFaceM4/ChartQA,
https://huggingface.co/datasets/lmms-lab/ChartQA.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from metamorph.evaluation.loaders.base import Loader
from metamorph.evaluation.loaders.tables import Row, find_files, image_reference, read_rows
from metamorph.evaluation.samples import Sample


JSON_COLUMNS = ("imgname", "query", "label")
HUB_COLUMNS = (("image", "query", "label", "human_or_machine"), ("image", "question", "answer", "type"))
"""Of HuggingFaceM4's and of lmms-lab's files."""


@dataclass(frozen=True)
class ChartQALoader(Loader):
    """Reads a folder with `test/test_human.json`, `test/test_augmented.json` and `test/png`, or with
    `data/test-*.parquet`. The field for prompts is `question`; categories: who wrote it (`human` or `augmented`).
    """

    name: ClassVar[str] = "chartqa"
    split: Literal["train", "val", "test"] = "test"

    def load(self, path: Path) -> Sequence[Sample]:
        """The samples in `path`."""
        folder = path / self.split if (path / self.split).is_dir() else path
        if (folder / f"{self.split}_human.json").is_file():
            return [sample for source in ("human", "augmented") for sample in self._from_json(folder, source)]
        if path.is_dir() and not list(path.glob(f"**/{self.split}-*.parquet")):
            raise ValueError(
                f"{path} is expected to have {self.split}/{self.split}_human.json (with the columns "
                f"{', '.join(JSON_COLUMNS)}) or data/{self.split}-*.parquet"
            )
        return list(_from_hub(find_files(path, f"**/{self.split}-*.parquet")))

    def _from_json(self, folder: Path, source: str) -> Iterator[Sample]:
        for number, row in enumerate(read_rows(folder / f"{self.split}_{source}.json", JSON_COLUMNS), start=1):
            image = image_reference(row.needed("imgname"), folder / "png", row.where)
            yield _sample(f"{source}-{number}", row.needed("query"), [row.needed("label")], image, source)


def _from_hub(files: Sequence[Path]) -> Iterator[Sample]:
    number = 0
    for file in files:
        for row in read_rows(file, ("image",), [name for columns in HUB_COLUMNS for name in columns]):
            number += 1
            image, question, answer, source = _columns(row)
            right = row.values[answer] if isinstance(row.values[answer], list) else [row.needed(answer)]
            images = image_reference(row.values[image], Path(), row.where)
            # HuggingFaceM4 has a class label (0: human), lmms-lab a word such as human_test
            is_human = row.text(source) == "0" or row.text(source).startswith("human")
            yield _sample(str(number), row.needed(question), right, images, "human" if is_human else "augmented")


def _columns(row: Row) -> Sequence[str]:
    for columns in HUB_COLUMNS:
        if set(columns) <= set(row.values):
            return columns
    expected = " or ".join(", ".join(columns) for columns in HUB_COLUMNS)
    raise row.error(f"expected the columns {expected}; found: {', '.join(row.values)}")


def _sample(id_: str, question: str, right: list[str], images: list[str], source: str) -> Sample:
    return Sample(id_, {"question": question}, right, tuple(images), categories={"source": source})
