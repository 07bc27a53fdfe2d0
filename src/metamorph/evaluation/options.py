"""Mappings of a YAML file as dataclasses: every key and type is checked, loaders and metrics are found by name."""

from __future__ import annotations

import importlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from metamorph.flags.parser import nearest, unknown_choice


Options = TypeVar("Options")

_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", types.NoneType: "null"}


def build(registry: Mapping[str, str], mapping: Any, where: str) -> Any:
    """Create the object that `mapping` describes: the class that `registry` has for its `name`, the rest its fields.

    Raises:
        ValueError: If a name, an option or a type is wrong; it begins with `where` and says what is expected.
        ModuleNotFoundError: If the class needs a package that is not installed.
    """
    if not isinstance(mapping, Mapping) or not isinstance(mapping.get("name"), str):
        raise ValueError(
            f"{where} must be a mapping with a name, which is one of {', '.join(registry)}, not {mapping!r:.80}"
        )
    name, options = mapping["name"], {key: value for key, value in mapping.items() if key != "name"}
    if name not in registry:
        raise ValueError(f"{where}: {unknown_choice(name, registry)}")
    module, _, attribute = registry[name].partition(":")
    return read_options(getattr(importlib.import_module(module), attribute), options, f"{where} {name}")


def read_options(kind: type[Options], values: Any, where: str) -> Options:
    """Create the dataclass `kind` from the mapping `values`; lists become tuples where it wants them.

    Raises:
        ValueError: If a key is unknown or missing, or a value has another type or is refused by the class.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping, not {values!r:.80}")
    known = {field.name: field for field in fields(kind) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = nearest(str(key), known)
            hint = f" (did you mean {near!r}?)" if near else ""
            allowed = f"its keys are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{where} has no key {key!r}{hint}; {allowed}")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where} needs the key {name!r}")
    hints = get_type_hints(kind)
    try:
        return kind(**{name: _converted(name, value, hints[name]) for name, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _converted(name: str, value: Any, hint: Any) -> Any:
    """The value as the type of a field; a `ValueError` if it has another one."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for each in args:
            try:
                return _converted(name, value, each)
            except ValueError:
                continue
    elif origin is Literal and value in args:
        return value
    elif origin in (tuple, Sequence, list) and isinstance(value, list):
        return (list if origin is list else tuple)(_converted(f"an item of {name}", item, args[0]) for item in value)
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        return {
            _converted(f"a key of {name}", key, args[0]): _converted(f"{name}.{key}", item, args[1])
            for key, item in value.items()
        }
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{name} must be {_in_words(hint)}, not {value!r:.80}")


def _in_words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_in_words, args))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (tuple, Sequence, list):
        return f"a list, each item {_in_words(args[0])}"
    if origin in (dict, Mapping):
        return f"a mapping, each value {_in_words(args[1])}"
    return _WORDS.get(hint, str(getattr(hint, "__name__", hint)))
