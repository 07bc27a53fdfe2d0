"""Old place of `metamorph.evaluation.samples`, until the branches of issue 18 are merged."""

from metamorph.evaluation.samples import Answer, Sample


__all__ = ["Answer", "Sample"]
