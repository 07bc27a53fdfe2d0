"""Specs: YAML files that say what a benchmark asks, how the model answers, and how answers are judged."""

from metamorph.evaluation.options import build


__all__ = ["build"]
