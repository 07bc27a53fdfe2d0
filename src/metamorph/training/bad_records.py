"""Bad records are counted over all ranks, and too many of them stop all ranks at the same step."""

from __future__ import annotations
