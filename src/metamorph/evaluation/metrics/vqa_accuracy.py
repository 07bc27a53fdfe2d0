"""VQA accuracy: an answer counts as much as people gave it, fully if three did (VQAv2, TextVQA).

The rules are those of https://visualqa.org/evaluation.html; the characters that count as punctuation, and `none` as a
number, are in the challenge's script only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from metamorph.evaluation.metrics.text import TextMetric, references
from metamorph.evaluation.samples import Sample


ENOUGH = 3
"""People who must have given an answer for it to be fully right."""
NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = """
ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't shan't shouldn't
wasn't weren't won't wouldn't i'm i've you're you've you'll you'd he's she's they're they've they'll they'd we've it'll
it'd that's that'll that'd there's there'd what's what're what've where's where'd when's who's who'd who'll why's how's
how'd let's ma'am o'clock y'all could've should've would've might've must've somebody's someone's something's everyone's
"""
"""Not those that are another word without the apostrophe, such as "we're" and "she'll"."""
CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}
_PUNCTUATION = str.maketrans(dict.fromkeys(';/[]"{}()=+\\_-><@`,?!', " "))


@dataclass(frozen=True)
class VqaAccuracy(TextMetric):
    """Mean over all sets of all people but one of min(people who gave this answer / 3, 1)."""

    name: ClassVar[str] = "vqa_accuracy"
    headline: ClassVar[str] = "vqa_accuracy"

    def check(self, samples: Sequence[Sample]) -> None:
        """Refuse samples with so few answers that none could be fully right."""
        for sample in samples:
            if len(references(sample)) <= ENOUGH:
                raise ValueError(
                    f"sample {sample.id} has {len(references(sample))} right answers, but vqa_accuracy compares with "
                    "those of more than three people (ten in VQAv2 and TextVQA): exact_match suits one right answer"
                )

    def judge(self, text: str, right: Sequence[str]) -> float:
        """The accuracy of one answer."""
        given = normalise(text)
        agrees = [normalise(each) == given for each in right]
        return sum(min((sum(agrees) - each) / ENOUGH, 1) for each in agrees) / len(agrees)


def normalise(text: str) -> str:
    """The answer in lower case with digits, without articles and punctuation, and with all apostrophes."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    text = re.sub(r"\.(?!\d)", "", text.translate(_PUNCTUATION))
    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
