"""Reads YAML recipes and mixtures with bounded time and memory, whatever they contain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


MAX_YAML_BYTES = 2**18
"""Largest file: a mixture of more than a thousand sources. PyYAML reads this in seconds."""
_MAX_EXPANDED = 4 * MAX_YAML_BYTES
"""Limit on values and characters once aliases are expanded: ten lines can expand to billions ("billion laughs")."""
_MAX_NUMBER = 1000
"""Longest scalar that is not text: PyYAML parses 1:1:1:1… in base 60, in quadratic time."""


def read_yaml(path: Path) -> Any:
    """Read a YAML file as plain Python objects.

    Raises:
        ValueError: If it is too long, not UTF-8 or valid YAML, nested too deeply, or expands too much. The message
            does not name the file.
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
        raise ValueError("its aliases (*name) expand to too many values; write the values out")
    return value


def _expanded_size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Values and characters of a node with its aliases expanded; infinite if it contains itself.

    `sizes` caches the result by the node's id.
    """
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")  # until it is known
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > _MAX_NUMBER and not node.tag.endswith(":str"):
                raise yaml.MarkedYAMLError(
                    problem=f"a number has more than {_MAX_NUMBER} characters", problem_mark=node.start_mark
                )
            sizes[id(node)] = 1 + len(node.value)
        else:
            pairs = node.value if isinstance(node, yaml.MappingNode) else [node.value]
            sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for pair in pairs for child in pair)
    return sizes[id(node)]
