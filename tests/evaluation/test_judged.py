"""Judges at endpoints: what is asked, what is kept, what goes wrong, and what scores follow."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from judge_parts import judge_server, says, text_of
from PIL import Image
from serving_parts import served

import metamorph
from metamorph.evaluation.endpoint import ANSWERS_FILE, Endpoint, Question
from metamorph.evaluation.loaders.edits import EditsLoader
from metamorph.evaluation.loaders.generation import DpgLoader, WiseLoader
from metamorph.evaluation.metrics.base import Tools
from metamorph.evaluation.metrics.judged import Dpg, EditJudge, Wise
from metamorph.evaluation.samples import Answer, Sample
from metamorph.runs.progress import Progress


KEY = "sk-very-secret"
DPG_COLUMNS = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def tools(folder: Path) -> Tools:
    return Tools(torch.device("cpu"), lambda: pytest.fail("no model is needed"), Progress(), folder)


def test_a_question_is_asked_once_with_image_and_key(image, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    questions = [Question("what is it?", (image,)), Question("why?"), Question("what is it?", (image,))]
    with judge_server(lambda body: says(f"answer to {text_of(body)}")) as (url, requests):
        judge = Endpoint(url, "gpt", "JUDGE_KEY", workers=1)
        assert list(judge.ask(questions, tmp_path)) == [
            "answer to what is it?",
            "answer to why?",
            "answer to what is it?",
        ]
        assert len(requests) == 2
        (part, _), body = requests[0]["body"]["messages"][0]["content"], requests[0]["body"]
        assert part["image_url"]["url"].startswith("data:image/png;base64,")
        assert (body["model"], body["temperature"], requests[0]["path"]) == ("gpt", 0, "/v1/chat/completions")
        headers = {name.lower(): value for name, value in requests[0]["headers"].items()}
        assert headers["authorization"] == f"Bearer {KEY}"
        assert list(judge.ask(questions[:2], tmp_path)) == ["answer to what is it?", "answer to why?"]
        assert len(requests) == 2
        # Another image, model or server is another question.
        Image.new("RGB", (64, 64), "blue").save(image)
        list(judge.ask(questions[:1], tmp_path))
        list(Endpoint(url, "other", workers=1).ask(questions[1:2], tmp_path))
        assert len(requests) == 4
    assert KEY not in caplog.text
    assert KEY not in (tmp_path / ANSWERS_FILE).read_text()


def test_answers_before_a_failure_are_kept_and_a_cut_line_is_asked_again(tmp_path):
    def reply(body: dict) -> tuple[int, object]:
        return (400, {"error": "too dark"}) if text_of(body) == "three" else says(text_of(body).upper())

    questions = [Question(text) for text in ("one", "two", "three")]
    with judge_server(reply) as (url, requests):
        judge = Endpoint(url, "gpt", workers=1)
        with pytest.raises(ValueError, match=r"refuses a question: HTTP 400: .*too dark"):
            list(judge.ask(questions, tmp_path))
        file = tmp_path / ANSWERS_FILE
        file.write_bytes(file.read_bytes().rstrip(b"\n")[:-3])  # killed while writing
        asked = len(requests)
        assert list(judge.ask(questions[:2], tmp_path)) == ["ONE", "TWO"]
        assert len(requests) - asked == 1
        assert all(json.loads(line) for line in file.read_text().splitlines())


@pytest.mark.parametrize("status", [429, 503])
def test_busy_servers_are_asked_again(status, tmp_path):
    seen: Counter[str] = Counter()

    def reply(body: dict) -> tuple[int, object]:
        seen[text_of(body)] += 1
        return (status, {}) if seen[text_of(body)] < 3 else says("yes")

    with judge_server(reply) as (url, _):
        assert list(Endpoint(url, "gpt", backoff=0.001, retries=2).ask([Question("a")], tmp_path)) == ["yes"]
        with pytest.raises(ValueError, match=rf"did not answer in 2 attempts \(HTTP {status}"):
            list(Endpoint(url, "gpt", backoff=0.001, retries=1).ask([Question("b")], tmp_path))


@pytest.mark.parametrize(
    "content", [{"choices": []}, {"choices": [{"message": None}]}, [], {"choices": [{"message": {"content": 3}}]}]
)
def test_other_answers_are_errors(content, tmp_path):
    with (
        judge_server(lambda _: (200, content)) as (url, _),
        pytest.raises(ValueError, match="no answer in OpenAI's style"),
    ):
        list(Endpoint(url, "gpt").ask([Question("a")], tmp_path))


def test_a_key_that_the_server_repeats_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    wrong = 401, {"error": f"wrong key {KEY}"}
    with judge_server(lambda _: wrong) as (url, _), pytest.raises(ValueError, match="HTTP 401") as error:
        list(Endpoint(url, "gpt", "JUDGE_KEY").ask([Question("a")], tmp_path))
    assert KEY not in str(error.value)


def test_judges_that_cannot_be_asked_are_refused_first(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="workers must be a whole number"):
        Dpg("http://127.0.0.1:9/v1", "gpt", workers=0)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="NO_SUCH_KEY is not set"):
        Wise("http://127.0.0.1:9/v1", "gpt", "NO_SUCH_KEY").check([])
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/v1 cannot be reached"):
        Dpg("http://127.0.0.1:9/v1", "gpt").check([])
    with judge_server(lambda _: says(""), (200, {"data": [{"id": "gpt"}]})) as (url, _):
        Wise(url, "gpt").check([])
        with pytest.raises(ValueError, match="has no model 'gtp': set model to one of gpt"):
            Wise(url, "gtp").check([])
        with pytest.raises(ValueError, match=r"judge_prompt no.txt does not exist"):
            Wise(url, "gpt", judge_prompt="no.txt").check([])
        with pytest.raises(ValueError, match=r"quality_prompt no.txt does not exist"):
            EditJudge(url, "gpt", quality_prompt="no.txt").check([])
        (tmp_path / "own.txt").write_text("{promt}")
        with pytest.raises(ValueError, match=r"own.txt names \{promt\}, but there is only prompt, explanation"):
            Wise(url, "gpt", judge_prompt=str(tmp_path / "own.txt")).check([])
    refused = pytest.raises(ValueError, match=r"refuses the key \(HTTP 401\)")
    with judge_server(lambda _: says(""), (401, {})) as (url, _), refused:
        Wise(url, "gpt").check([])


def write_dpg(folder: Path, *rows: str) -> Path:
    (folder / "dpg_bench.csv").write_text("\n".join((DPG_COLUMNS, *rows)) + "\n")
    return folder


DPG_ROWS = (
    'a1,"a red cat, asleep",,1,0,entity,whole,entity - whole (cat),Is there a cat?',
    'a1,"a red cat, asleep",,2,1,attribute,color,"attribute - color (cat, red)",Is the cat red?',
    'a1,"a red cat, asleep",,3,"1, 2",attribute,state,"attribute - state (cat, asleep)",Is the red cat asleep?',
    "b2,a house,,1,0,entity,whole,entity - whole (house),Is there a house?",
)


def test_dpg_counts_a_question_only_with_its_parents(image, tmp_path):
    samples = DpgLoader().load(write_dpg(tmp_path, *DPG_ROWS))
    assert [(sample.id, sample.fields["prompt"]) for sample in samples] == [
        ("a1", "a red cat, asleep"),
        ("b2", "a house"),
    ]
    replies = {"Is there a cat?": "Yes.", "Is the cat red?": "No, blue", "Is the red cat asleep?": "yes"}
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 8)).save(other)
    with judge_server(lambda body: says(replies[text_of(body).split("?")[0] + "?"])) as (url, requests):
        metric = Dpg(url, "gpt")
        answers = [Answer(images=(image, other)), Answer(error="out of memory")]
        scores = metric.score(samples, answers, tools(tmp_path))
        assert len(requests) == 6
        del answers
    assert [(each["score"], each["judged"]) for each in scores] == [(pytest.approx(1 / 3), 1.0), (0.0, 1.0)]
    # Shares of categories are over questions as answered; b2 has no image and one question.
    assert metric.summarise(samples, scores) == {
        "score": pytest.approx(1 / 6),
        "judged": 1.0,
        "entity": pytest.approx(2 / 3),
        "attribute": pytest.approx(2 / 4),
    }


def test_dpg_reads_other_forms_of_yes_and_counts_what_it_cannot_read(image, tmp_path, caplog):
    samples = DpgLoader().load(write_dpg(tmp_path, *DPG_ROWS))
    replies = {"there a cat": "**Yes**", "the cat red": "Answer: yes.", "cat asleep": "The cat"}

    def reply(body: dict) -> tuple[int, object]:
        return says(next(text for words, text in replies.items() if words in text_of(body)))

    with judge_server(reply) as (url, _):
        (scores,) = Dpg(url, "gpt").score(samples[:1], [Answer(images=(image,))], tools(tmp_path))
    assert (scores["score"], scores["judged"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert "about 1 of 1 samples cannot be read" in caplog.text


def test_long_prompts_of_dpg(tmp_path):
    csv.field_size_limit(131_072)  # as in a new process
    (sample,) = DpgLoader().load(write_dpg(tmp_path, f"a1,{'long ' * 40_000}.,,1,0,entity,whole,t,Is it?"))
    assert len(sample.fields["prompt"]) == 200_001


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a1,text,,one,0,entity,whole,t,Is it?", "must be numbers"),
        ("a1,text,,1,7,entity,whole,t,Is it?", "depends on 7"),
    ],
)
def test_wrong_questions_are_refused(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DpgLoader().load(write_dpg(tmp_path, row))


def test_other_tables_are_refused_with_the_columns_expected(tmp_path):
    (tmp_path / "dpg_bench.csv").write_text("prompt,question\na,b\n")
    with pytest.raises(ValueError, match=r"has no column 'item_id'.*proposition_id, dependency"):
        DpgLoader().load(tmp_path)


def wise_samples(folder: Path) -> list[Sample]:
    (folder / "data").mkdir()
    records = [
        {"prompt_id": 12, "Prompt": "the plant of Mother's Day", "Explanation": "a carnation", "Subcategory": "Plant"},
        {"prompt_id": 500, "Prompt": "noon", "Explanation": "the sun is high", "Subcategory": "Horizontal time"},
        {"prompt_id": 650, "Prompt": "the far side", "Explanation": "…", "Subcategory": "Different view"},
        {"prompt_id": 701, "Prompt": "a leaf", "Explanation": "…", "Subcategory": "State"},
    ]
    (folder / "data" / "all.json").write_text(json.dumps([{"Category": "any", **record} for record in records]))
    return list(WiseLoader().load(folder / "data"))


def test_the_wiscore(image, tmp_path, caplog):
    samples = wise_samples(tmp_path)
    assert [sample.categories["area"] for sample in samples] == ["cultural", "time", "space", "biology"]
    replies = {
        "carnation": "Consistency: 2\nRealism: 1\nAesthetic Quality: 0",
        "sun": "**Consistency:** 1\n**Realism:** 2\n**Aesthetic Quality:** 2",
        "far": "It is a nice image.",
    }

    def reply(body: dict) -> tuple[int, object]:
        return says(next(text for word, text in replies.items() if word in text_of(body)))

    with judge_server(reply) as (url, requests):
        answers = [*[Answer(images=(image,))] * 3, Answer()]
        scores = Wise(url, "gpt").score(samples, answers, tools(tmp_path))
        assert [each["wiscore"] for each in scores] == [pytest.approx(0.8), pytest.approx(0.65), 0.0, 0.0]
        assert [each["judged"] for each in scores] == [1.0, 1.0, 0.0, 1.0]
        assert scores[1]["aesthetic_quality"] == 2.0
        assert "about 1 of 4 samples cannot be read" in caplog.text
        (tmp_path / "own.txt").write_text("Score {prompt}, that is {explanation}; the carnation")
        Wise(url, "gpt", judge_prompt=str(tmp_path / "own.txt")).score(samples[:1], answers[:1], tools(tmp_path))
        assert text_of(requests[-1]["body"]) == "Score the plant of Mother's Day, that is a carnation; the carnation"


def test_edits_are_judged_by_the_lower_scores_and_their_geometric_mean(image, tmp_path):
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")
    (tmp_path / "edits.jsonl").write_text(
        json.dumps({"image": "blue.png", "instruction": "make it red", "task": "color"})
    )
    (sample,) = EditsLoader().load(tmp_path)
    assert (sample.categories, sample.images) == ({"task": "color"}, (str(tmp_path / "blue.png"),))

    def reply(body: dict) -> tuple[int, object]:
        return says("[9, 4]" if "make it red" in text_of(body) else '{"score": [8, 9.5], "reasoning": "[1]"}')

    with judge_server(reply) as (url, requests):
        (scores,) = EditJudge(url, "gpt", workers=1).score([sample], [Answer(images=(image,))], tools(tmp_path))
        parts = [len(request["body"]["messages"][0]["content"]) for request in requests]
        assert parts == [3, 2]  # original, result and text; result and text
    expected = {"semantic_consistency": 4.0, "perceptual_quality": 8.0, "judged": 1.0}
    assert scores == {**expected, "overall": pytest.approx(math.sqrt(32))}


def test_ones_own_server_is_a_judge(tmp_path, image):
    """mini, served by MetaMorph's own server, answers DPG's questions; asked again it is not needed any more."""
    samples = DpgLoader().load(write_dpg(tmp_path, *DPG_ROWS))
    answers = [Answer(images=(image,))] * 2
    with served(metamorph.load("mini", device="cpu", dtype=torch.float32)) as url:
        metric = Dpg(f"{url}/v1", "mini", max_tokens=8)
        metric.check(samples)
        scores = metric.score(samples, answers, tools(tmp_path))
    records = [json.loads(line) for line in (tmp_path / ANSWERS_FILE).read_text().splitlines()]
    assert {record["images"][0] for record in records} == {"red.png"}
    assert all(record["answer"] for record in records)
    assert metric.score(samples, answers, tools(tmp_path)) == scores
