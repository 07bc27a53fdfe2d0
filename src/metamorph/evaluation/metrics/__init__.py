"""Metrics of benchmarks.

What is a metric, and which are there?    `base.py`
"""

METRICS: dict[str, str] = {}
"""Metrics by their names in specs, as `module:Class`; a module is imported when a spec names its metric."""
