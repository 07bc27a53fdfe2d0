"""Loaders of benchmark files, as their owners publish them.

What is a loader, and which are there?    `base.py`
"""

LOADERS: dict[str, str] = {}
"""Loaders by their names in specs, as `module:Class`; a module is imported when a spec names its loader."""
