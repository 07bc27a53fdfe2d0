"""YAML of recipes and mixtures, read so that a small file costs little time and memory, whatever is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


MAX_YAML_BYTES = 2**18
"""Largest file: a mixture of more than a thousand sources. PyYAML reads this in seconds."""
_MAX_EXPANDED = 4 * MAX_YAML_BYTES
"""Most values and characters of a file whose aliases are written out. Nested ones multiply: ten lines may stand for
billions of values (the "billion laughs")."""
_MAX_NUMBER = 1000
"""Most characters of what is not text; PyYAML computes 1:1:1:1… in base 60, which takes the square of its length."""


def read_yaml(path: Path) -> Any:
    """The value of a YAML file, made of plain Python objects.

    Args:
        path: A file that exists.

    Raises:
        ValueError: If it is too long, not UTF-8, not valid YAML, nested too deeply, or grows by its aliases. The
            message does not name the file.
    """
    with path.open("rb") as file:
        text = file.read(MAX_YAML_BYTES + 1)
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it has more than {MAX_YAML_BYTES} bytes")
    try:
        loader = yaml.SafeLoader(text.decode("utf-8-sig"))
        node = loader.get_single_node()
        is_too_large = node is not None and _expanded_size(node, {}) > _MAX_EXPANDED
        value = None if node is None or is_too_large else loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        # The last four are what PyYAML raises where a value does not fit its tag, as in `!!bool x`.
        raise ValueError(f"it is not valid YAML: {error}") from error
    if is_too_large:
        raise ValueError("its aliases (*name) multiply each other; write the values out")
    return value


def _expanded_size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Values and characters of a node whose aliases are written out; infinite if it holds itself.

    Args:
        node: The node.
        sizes: Sizes of the nodes that are known, by their identity.
    """
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")  # until it is known
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > _MAX_NUMBER and not node.tag.endswith(":str"):
                raise yaml.MarkedYAMLError(
                    problem=f"a number has more than {_MAX_NUMBER} characters", problem_mark=node.start_mark
                )
            sizes[id(node)] = 1 + len(node.value)
        elif isinstance(node, yaml.MappingNode):
            sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for pair in node.value for child in pair)
        else:
            sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in node.value)
    return sizes[id(node)]
