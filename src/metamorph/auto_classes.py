"""Makes Transformers' Auto classes know MetaMorph on `import metamorph`, without importing Transformers or torch.

An Auto class finds a model by names: `CONFIG_MAPPING_NAMES` maps a model type to the name of a configuration, other
tables map it to the names of a model and a processor, and the classes are attributes of the module
`transformers.models.<model type>`, which is imported when one of them is asked for. Here the names are added to these
tables as soon as Transformers has made them, and that module is this package, which imports its own names on first use.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


MODEL_TYPE = "metamorph"
_TABLES: Mapping[str, Mapping[str, str]] = {
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING_NAMES": "MetaMorphConfig"},
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING_NAMES": "MetaMorphModel",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "MetaMorphForConditionalGeneration",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "MetaMorphForConditionalGeneration",
    },
    "transformers.models.auto.processing_auto": {"PROCESSOR_MAPPING_NAMES": "MetaMorphProcessor"},
}
"""Modules of Transformers -> their tables -> what they call ours."""


def register_lazily() -> None:
    """Add the names to the tables that there are, and to the others when they are made."""
    sys.modules.setdefault(f"transformers.models.{MODEL_TYPE}", sys.modules["metamorph"])
    for name in _TABLES:
        if name in sys.modules:
            _add_names(sys.modules[name])
    if "transformers.models.auto.modeling_auto" in sys.modules:
        # It has built mappings from the tables, and torch is loaded: these modules register their classes themselves.
        for module in ("modeling_metamorph", "processing_metamorph"):
            import_module(f"metamorph.models.{module}")
    elif not any(isinstance(finder, _AddsNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AddsNames())


def _add_names(module: ModuleType) -> None:
    for table, name in _TABLES[module.__name__].items():
        getattr(module, table, {})[MODEL_TYPE] = name  # not every release of Transformers has every table


class _AddsNames(MetaPathFinder):
    """Finds the modules with the tables where they are, and has the names added when they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenAddNames(spec.loader)
        return spec


class _ThenAddNames(Loader):
    """The loader of a module with tables, which adds the names after it has run the module."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # what `inspect` and `importlib.resources` ask a loader for

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add_names(module)
