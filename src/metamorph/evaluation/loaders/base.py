"""What a loader is: a dataclass whose fields are the options of `data:` in a spec."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from metamorph.evaluation.samples import Sample


@dataclass(frozen=True)
class Loader(ABC):
    """Reads a benchmark's files."""

    name: ClassVar[str]
    """In specs."""

    @abstractmethod
    def load(self, path: Path) -> Sequence[Sample]:
        """The samples in `path`, a file or a folder, in the order of the files.

        Raises:
            ValueError: If the layout is wrong, with the file and the columns or files that were expected.
        """
