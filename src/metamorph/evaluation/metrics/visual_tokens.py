"""Visual tokens of answers against those of the true images: cosine, and which image they are nearest to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metamorph.evaluation.drawings import encode_images
from metamorph.evaluation.metrics.base import Metric, Tools
from metamorph.evaluation.samples import Answer, Sample
from metamorph.evaluation.tokens import constant_cosine, cosines, num_nearer
from metamorph.inference.answer_files import load_tokens
from metamorph.inference.session import Session
from metamorph.models.image_inputs import to_pil_image


_BATCH_SIZE = 64


@dataclass(frozen=True)
class VisualTokens(Metric):
    """Cosine of generated and true visual tokens, and retrieval among the true images of all samples.

    Samples have the file of the true `image`, as those of the loader `captions`.
    """

    name: ClassVar[str] = "visual_tokens"
    headline: ClassVar[str] = "retrieval_at_1"
    needs_visual_tokens: ClassVar[bool] = True
    retrieval_at: Sequence[int] = (1, 5)
    """An answer is found at k if fewer than k other images are nearer to it than its own."""

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        """`cosine` to its own image, `cosine_to_others`, the mean, and `retrieval_at_K`; of the answer's first image.

        An answer without an image has no cosine and is not found.
        """
        true = self._true(samples, tools)
        found = []
        for index, answer in enumerate(answers):
            scores: dict[str, float] = dict.fromkeys((f"retrieval_at_{count}" for count in self.retrieval_at), 0.0)
            if answer.visual_tokens:
                similar = cosines(load_tokens(answer.visual_tokens[0])[:1].float(), true)
                own = similar[0, index].item()
                nearer = num_nearer(similar, similar[:, index]).item()
                scores = {f"retrieval_at_{count}": float(nearer < count) for count in self.retrieval_at}
                scores["cosine"] = own
                if len(true) > 1:
                    scores["cosine_to_others"] = (similar.sum().item() - own) / (len(true) - 1)
            found.append(scores)
            tools.progress.update()
        return found

    def of_set(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> dict[str, float]:
        """`cosine_baseline`: the cosine of the best answer that is the same for every prompt."""
        return {"cosine_baseline": constant_cosine(self._true(samples, tools))}

    def _true(self, samples: Sequence[Sample], tools: Tools) -> Tensor:
        files = [sample.files["image"] for sample in samples]
        return tools.once("true tokens", lambda: encode_files(tools.open_session(), files))


def encode_files(session: Session, files: Sequence[str]) -> Tensor:
    """The true visual tokens of images, files or data URLs, `[images, N, D]`; few are in memory at once."""
    batches = [files[start : start + _BATCH_SIZE] for start in range(0, len(files), _BATCH_SIZE)]
    return torch.cat(
        [encode_images(session.model, session.processor, [*map(to_pil_image, batch)]) for batch in batches]
    )
