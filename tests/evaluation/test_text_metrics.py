"""Metrics of short answers, on hand-computed values and the examples of their papers."""

from pathlib import Path

import pytest
import torch

from metamorph.evaluation.metrics.anls import Anls, edit_distance
from metamorph.evaluation.metrics.base import Metric, Tools
from metamorph.evaluation.metrics.exact_match import ExactMatch
from metamorph.evaluation.metrics.multiple_choice import CircularChoice, MultipleChoice, PairedChoice, parse_choice
from metamorph.evaluation.metrics.relaxed_accuracy import RelaxedAccuracy
from metamorph.evaluation.metrics.vqa_accuracy import VqaAccuracy, normalise
from metamorph.evaluation.metrics.yes_no import YesNo, parse
from metamorph.evaluation.samples import Answer, Sample
from metamorph.runs.progress import Progress


OPTIONS = {"A": "red", "B": "dark red", "C": "two cats", "D": "a dog"}


def no_session():
    raise AssertionError("text is judged without a model")


def scored(metric: Metric, references, texts, groups=None):
    """Scores and summary of answers; an answer of None is an error."""
    if groups:
        references = [each | {"group": group} for each, group in zip(references, groups, strict=True)]
    samples = [Sample(str(index), {}, reference) for index, reference in enumerate(references)]
    answers = [Answer(error="no image") if text is None else Answer(text) for text in texts]
    metric.check(samples)
    with Progress(total=len(samples)) as progress:
        scores = metric.score(samples, answers, Tools(torch.device("cpu"), no_session, progress, Path()))
        assert progress.n == len(samples)
    return scores, metric.summarise(samples, scores)


@pytest.mark.parametrize(
    ("metric", "references", "texts", "expected"),
    [
        # case, spaces and a final full stop do not count; an error is wrong; any right answer will do
        (ExactMatch(), ["Red", "red", ["two", "2"], "red"], [" red. ", "dark red", "2", None], [1, 0, 1, 0]),
        # within 5 % of 50: 47.5 to 52.5; `%` is a hundredth; only texts must match exactly
        (RelaxedAccuracy(), ["50"] * 4, ["47.5", "52.6", "50.0.", "50 apples"], [1, 0, 1, 0]),
        (RelaxedAccuracy(), ["12%", "0.12", "12", "0"], ["12.5%", "12%", "12%", "0.01"], [1, 1, 0, 0]),
        (RelaxedAccuracy(), ["Germany", "-10", ["3", "Three"]], ["germany", "-10.4", "three"], [1, 1, 1]),
        # one of six letters: 5/6; three of six: 1/2, which counts; four of six: 1/3, which does not
        (Anls(), ["kitten", "abcdef", "abcdef"], ["kittin", "abcxyz", "abxyzw"], [5 / 6, 0.5, 0]),
        (Anls(), [["ITC Limited", "itc"], "a  b", "x"], ["itc limited", "A B", None], [1, 1, 0]),
    ],
)
def test_figures_of_each_answer(metric, references, texts, expected):
    scores, summary = scored(metric, references, texts)
    assert [each[metric.headline] for each in scores] == pytest.approx(expected)
    assert summary == pytest.approx({metric.headline: sum(expected) / len(expected)})


@pytest.mark.parametrize(("agree", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_averages_over_nine_of_ten_people(agree, accuracy):
    people = ["no"] * agree + ["yes"] * (10 - agree)
    scores, _ = scored(VqaAccuracy(), [people], ["No."])
    assert scores == [{"vqa_accuracy": pytest.approx(accuracy)}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Two dogs.", "2 dogs"),
        ("100,978", "100978"),
        ("3.50", "3.50"),
        ("red, green/blue", "red green blue"),
        ("dont know", "don't know"),
        ("were", "were"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("None", "0"),
    ],
)
def test_vqa_answers_are_normalised(text, expected):
    assert normalise(text) == expected


def test_an_error_does_not_agree_with_people_whose_answer_has_only_an_article():
    assert scored(VqaAccuracy(), [["a"] * 10], [None])[0] == [{"vqa_accuracy": 0.0}]


@pytest.mark.parametrize(
    ("first", "second", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("a", "a", 0)]
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("no, there is not", "no"),
        ("Yes, there is no doubt.", "yes"),
        ("There is no dog. Yes it is empty.", "no"),
        ("There isn't a dog in the image", "no"),
        ("I would say yes", "yes"),
        ("either yes or no", None),
        ("A dog", None),
        ("", None),
    ],
)
def test_yes_and_no_are_found(text, expected):
    assert parse(text) == expected


def test_yes_no_counts_by_hand():
    right = ["yes", "yes", "yes", "No", "no", "no"]
    scores, summary = scored(YesNo(), right, ["yes", "No.", "a dog", "yes", "no", None])
    # true positives 1, false positives 1, missed 2 of 3; right: 2 of 6; neither: 2 of 6
    assert summary == pytest.approx(
        {"accuracy": 2 / 6, "yes_ratio": 2 / 6, "unparseable": 2 / 6, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5}
    )
    assert YesNo().summarise([Sample("0", {}, "no")], scores[4:5])["precision"] == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("(b) dark red", "B"),
        ("B. dark red", "B"),
        ("**B**", "B"),
        ("The answer is B", "B"),
        ("the answer is: (b).", "B"),
        ("The answer is A because it is red.", "A"),
        ("I think that the correct option is D.", "D"),
        ("It must be (C), I believe", "C"),
        ("dark red", "B"),
        ("Dark red.", "B"),
        ("red", "A"),
        ("It is dark red, I think", "B"),
        ("A photo of two cats", "C"),
        ("A dog is there", "D"),
        ("red or dark red", None),
        ("A is right", "A"),
        ("A or B", None),
        ("Both (A) and (B)", None),
        ("A. red B. dark red", None),
        ("B. red", None),
        ("E", None),
        ("green", None),
        ("reddish", None),
        ("", None),
    ],
)
def test_option_that_an_answer_names(text, expected):
    assert parse_choice(text, OPTIONS) == expected


def test_options_with_the_same_text_are_told_apart_by_letter_only():
    options = {"A": "red", "B": "red"}
    assert (parse_choice("red", options), parse_choice("B", options)) == (None, "B")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The man wears a T-shirt", "A"),
        ("It is an X-ray image", "C"),
        ("Answer: A hat", "B"),
        ("Answer: A is right", "A"),
        ("The answer is A because", "A"),
        ("It contains vitamin E.", "D"),
        ("It is B - a hat", "B"),
        ("B and C", None),
    ],
)
def test_letters_of_words_are_no_choices(text, expected):
    assert parse_choice(text, {"A": "a T-shirt", "B": "a hat", "C": "an X-ray", "D": "vitamin E"}) == expected


def test_open_questions_among_multiple_choice():
    references = [{"answer": ["2.50", "two"], "options": {}}] * 4 + [{"answer": "B", "options": OPTIONS}]
    scores, _ = scored(MultipleChoice(), references, ["2.5", "Two.", "2.51", None, "dark red"])
    assert [each["accuracy"] for each in scores] == [1, 1, 0, 0, 1]


def test_a_pair_counts_if_both_answers_are_right():
    references = [{"answer": letter, "options": OPTIONS} for letter in "ABABCD"]
    scores, summary = scored(PairedChoice(), references, ["A", "B", "A", "A", None, "D"], "112233")
    assert scores[0] == {"accuracy": 1, "pair_accuracy": 1}
    assert scores[1] == {"accuracy": 1}
    assert summary == pytest.approx({"accuracy": 4 / 6, "pair_accuracy": 1 / 3})


def test_circular_evaluation_wants_every_rotation_right():
    references = [{"answer": letter, "options": OPTIONS} for letter in "ADCB" + "BA" + "C"]
    scores, summary = scored(CircularChoice(), references, ["A", "D", "C", "A", "B", "A", "D"], "1111" + "22" + "3")
    # vanilla: questions 1 and 2 of three; rotations: 3 of 4; circular: only question 2
    assert summary == pytest.approx({"accuracy": 2 / 3, "circular_accuracy": 1 / 3, "rotated_accuracy": 3 / 4})
    assert scores[3] == {"rotated_accuracy": 0.0}


def test_questions_about_an_image_and_groups_are_units():
    sample = Sample("7", {}, {"answer": "A", "options": OPTIONS, "group": "4"}, images=("x.png",))
    assert (PairedChoice().unit(sample), MultipleChoice().unit(sample)) == ("4", "x.png")
    assert YesNo().unit(Sample("7", {}, "no")) == "7"


@pytest.mark.parametrize(
    ("metric", "reference", "message"),
    [
        (ExactMatch(), {"answer": "A"}, "sample 0 needs a right answer"),
        (Anls(), [], "sample 0 needs a right answer"),
        (VqaAccuracy(), ["red"], "1 right answers, but vqa_accuracy compares with those of more than three people"),
        (YesNo(), "maybe", "must be yes or no, not 'maybe'"),
        (MultipleChoice(), "red", "sample 0 has none: name the columns"),
        (CircularChoice(), {"answer": "A", "options": OPTIONS}, "sample 0 has none: take multiple_choice"),
        (PairedChoice(), {"answer": "A", "options": OPTIONS, "group": "1"}, "the group 1 has 1 questions"),
    ],
)
def test_samples_that_do_not_fit_are_refused(metric, reference, message):
    with pytest.raises(ValueError, match=message):
        metric.check([Sample("0", {}, reference)])
