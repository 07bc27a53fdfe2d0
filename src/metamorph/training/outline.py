"""The model of a run without its weights: every parameter has its shape and takes no memory."""

from __future__ import annotations
