"""`--data_path` as one data set of training examples."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from metamorph.data.bad_records import BadRecordLimit
from metamorph.data.examples import ConversationDataset
from metamorph.data.features import FeatureCache
from metamorph.data.mixture import read_specs
from metamorph.models.processing_metamorph import MetaMorphProcessor


logger = logging.getLogger(__name__)


def load_data(
    data_path: str | os.PathLike[str],
    processor: MetaMorphProcessor | None,
    image_folder: str | os.PathLike[str] | None = None,
    model_max_length: int | None = None,
    *,
    seed: int = 0,
    on_bad_record: str = "raise",
    max_bad_fraction: float = 0.01,
    check: bool = True,
    weighted: bool = True,
    features: FeatureCache | None = None,
    folder_flag: str = "--image_folder",
) -> MixtureDataset:
    """Open the data that `--data_path` names, for training, for the data check and for caching features.

    Arguments and errors are those of [`ConversationDataset`] for all sources. `image_folder` is for those that do not
    name one. `seed` also picks records by `weight` and `max_samples`; with `weighted=False` each record counts once.

    Raises:
        DataError: If a source or the mixture is unusable.
        FileNotFoundError: If there is no file of that name.
    """
    datasets, indices = [], []
    for spec in read_specs(data_path):
        dataset = ConversationDataset(
            spec.path,
            processor,
            spec.image_folder or image_folder,
            model_max_length,
            task=spec.task,
            options=spec.options,
            name=spec.name,
            seed=seed,
            check=False,
            features=features,
            fields=spec.fields,
            folder_flag=folder_flag if spec.image_folder is None else f"{data_path}, source {spec.name}: image_folder",
        )
        datasets.append(dataset)
        indices.append(spec.choose(len(dataset), seed) if weighted else None)
    limit = BadRecordLimit(on_bad_record, max_bad_fraction)
    return MixtureDataset(datasets, indices, limit=limit, check=check)


class MixtureDataset(Dataset[dict[str, Any]]):
    """Several sources as one data set: all samples of the first source, then those of the second, and so on.

    `indices` are the int64 `[samples]` record numbers of each source; None takes each record once.
    """

    def __init__(
        self,
        datasets: Sequence[ConversationDataset],
        indices: Sequence[np.ndarray | None],
        *,
        limit: BadRecordLimit,
        check: bool,
    ) -> None:
        self.datasets = list(datasets)
        self.indices = list(indices)
        self.limit = limit
        self.processor = self.datasets[0].processor
        self.model_max_length = self.datasets[0].model_max_length
        counts = []
        for dataset, chosen in zip(datasets, indices, strict=True):
            counts.append(len(dataset) if chosen is None else len(chosen))
            dataset.set_limit(self.limit, min(counts[-1], len(dataset)))
            text = "source %s: %d samples of %d records, task %s"
            logger.info(text, dataset.name, counts[-1], len(dataset), dataset.task.name)
        self._ends = np.cumsum(counts)
        if check:
            for dataset, chosen in zip(datasets, indices, strict=True):
                dataset.check(chosen)

    @property
    def sources(self) -> dict[str, int]:
        """Number of samples of each source, by its name."""
        counts = np.diff(self._ends, prepend=0).tolist()
        return {dataset.name: count for dataset, count in zip(self.datasets, counts, strict=True)}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        dataset, number = self.locate(index)
        return dataset[number]

    def locate(self, index: int) -> tuple[ConversationDataset, int]:
        """The source of sample `index`, and the number of its record there, for the methods of the source."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no sample {index}: the sources have {len(self)}")
        source = int(np.searchsorted(self._ends, index, side="right"))
        number = int(index) - (int(self._ends[source - 1]) if source else 0)
        chosen = self.indices[source]
        return self.datasets[source], number if chosen is None else int(chosen[number])

    def fingerprint(self) -> str:
        """Changes whenever the conversations may have changed, or the choice of them."""
        digest = hashlib.sha256()
        for dataset, chosen in zip(self.datasets, self.indices, strict=True):
            digest.update(dataset.fingerprint().encode())
            digest.update(b"all" if chosen is None else chosen.tobytes())
        return digest.hexdigest()[:16]

    def statistics(self) -> dict[str, Any]:
        """The sum of the statistics of all sources, and those of each under `"sources"`, by its name."""
        sources = {dataset.name: dataset.statistics() for dataset in self.datasets}
        total = {
            name: sum(source[name] for source in sources.values())
            for name in ("records", "truncated", "dropped_images")
        }
        return {**total, "bad": self.limit.bad_by_kind(), "sources": sources}
