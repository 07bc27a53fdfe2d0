"""Registers MetaMorph with Transformers' Auto classes on `import metamorph`, without importing Transformers or torch.

An Auto class looks models up by name: `CONFIG_MAPPING_NAMES` maps a model type to the name of its configuration class,
other tables map it to its model and processor, and the classes are attributes of the module
`transformers.models.<model type>`, which is imported on first use. Our names are added to these tables as soon as
Transformers has created them, and that module is this package, which imports its own names lazily.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
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
"""Module of Transformers -> its tables -> the name of our class in each."""


def register_lazily() -> None:
    """Add our names to the tables that exist, and to the others once they are imported."""
    sys.modules.setdefault(f"transformers.models.{MODEL_TYPE}", sys.modules["metamorph"])
    for name in _TABLES:
        if name in sys.modules:
            _add_names(sys.modules[name])
    if "transformers.models.auto.modeling_auto" in sys.modules:
        # Transformers has built its mappings from the tables already: these modules register their classes themselves.
        for module in ("modeling_metamorph", "processing_metamorph"):
            import_module(f"metamorph.models.{module}")
    elif not any(isinstance(finder, _AddsNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AddsNames())


def _add_names(module: ModuleType) -> None:
    for table, name in _TABLES[module.__name__].items():
        getattr(module, table, {})[MODEL_TYPE] = name  # not every release of Transformers has every table


class _AddsNames(MetaPathFinder):
    """Finds the modules with the tables, and adds our names after they have been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_add(module: ModuleType) -> None:
                execute(module)
                _add_names(module)

            spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec
