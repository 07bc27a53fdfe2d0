"""A judge at an endpoint in OpenAI's style: asked about images, its answers kept so that none is paid for twice."""

from __future__ import annotations

import base64
import hashlib
import json
import mimetypes
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from metamorph.data.tasks.base import check_count, check_positive
from metamorph.flags.checks import printable


ANSWERS_FILE = "judge.jsonl"
_LONGEST_PAUSE = 60.0
"""Seconds between two attempts."""


@dataclass(frozen=True)
class Question:
    """What a judge is asked."""

    text: str
    images: tuple[Path, ...] = ()
    """Shown before the text."""


@dataclass(frozen=True)
class Endpoint:
    """A chat model that sees images: one of a provider, or your own server such as `metamorph serve` or vLLM."""

    base_url: str
    """Up to and with the version, such as `http://127.0.0.1:8000/v1`."""
    model: str
    """Its name on the server."""
    api_key_env: str | None = None
    """The environment variable that holds the key; the key itself is in no file."""
    timeout: float = 120.0
    """Seconds that an answer may take."""
    retries: int = 5
    """Further attempts after HTTP 429, HTTP 5xx or a broken connection."""
    backoff: float = 1.0
    """Seconds before the first of them; each later pause is twice as long, unless the server asks for a longer one."""
    max_tokens: int = 512
    """Of an answer."""
    workers: int = 8
    """Questions that are asked at the same time."""

    def __post_init__(self) -> None:
        for name, least in (("retries", 0), ("max_tokens", 1), ("workers", 1)):
            check_count(name, getattr(self, name), least)
        check_positive("timeout", self.timeout)
        check_positive("backoff", self.backoff)

    def check_reachable(self) -> None:
        """Raise a `ValueError` that says what to do if the server cannot be asked, or lacks the model."""
        with self._client() as client:
            try:
                response = client.get("models")
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise ValueError(
                    f"{self._name} cannot be reached ({error}): start the server, or fix base_url"
                ) from error
            if response.status_code in (401, 403):
                raise ValueError(
                    f"{self._name} refuses the key (HTTP {response.status_code}): set api_key_env to the name of the "
                    "environment variable that holds it"
                )
        try:
            served = [model["id"] for model in response.raise_for_status().json()["data"]]
        except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
            return  # not every server lists its models
        if self.model not in served:
            raise ValueError(f"{self._name} has no model {self.model!r}: set model to one of {', '.join(served[:20])}")

    def ask(self, questions: Sequence[Question], folder: Path) -> Iterator[str]:
        """Yield the answers in the order of the questions.

        Answers are appended to `judge.jsonl` in `folder` as they come. Those that it holds are not asked for again.
        """
        answers = _Answers(folder / ANSWERS_FILE)

        def answer(question: Question) -> str:
            request = self._request(question)
            key = hashlib.sha256(json.dumps([self.base_url, request], sort_keys=True).encode()).hexdigest()
            if (known := answers.get(key)) is not None:
                return known
            found = self._post(client, request)
            answers.add(key, question, found)
            return found

        with self._client() as client, ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(answer, questions)

    @property
    def _name(self) -> str:
        return f"the judge at {self.base_url}"

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        if not (key := os.environ.get(self.api_key_env)):
            raise ValueError(f"{self._name} needs a key, but {self.api_key_env} is not set: export it")
        return key

    def _client(self) -> httpx.Client:
        key = self._key()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.base_url.rstrip("/") + "/", headers=headers, timeout=self.timeout)

    def _request(self, question: Question) -> dict[str, Any]:
        images = [{"type": "image_url", "image_url": {"url": _data_url(file)}} for file in question.images]
        content = [*images, {"type": "text", "text": question.text}]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }

    def _post(self, client: httpx.Client, request: dict[str, Any]) -> str:
        for attempt in range(self.retries + 1):
            wait = 0.0
            try:
                response = client.post("chat/completions", json=request)
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            else:
                if response.status_code != 429 and response.status_code < 500:
                    return self._text(response)
                reason = self._reason(response)
                asked = response.headers.get("retry-after", "")
                wait = float(asked) if asked.isdigit() else 0.0
            if attempt < self.retries:
                time.sleep(min(max(self.backoff * 2**attempt, wait), _LONGEST_PAUSE))
        raise ValueError(
            f"{self._name} did not answer in {self.retries + 1} attempts ({reason}): the same command asks only what "
            "is still open"
        )

    def _text(self, response: httpx.Response) -> str:
        try:
            content = response.raise_for_status().json()["choices"][0]["message"]["content"]
        except httpx.HTTPStatusError:
            raise ValueError(f"{self._name} refuses a question: {self._reason(response)}") from None
        except (ValueError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise ValueError(f"{self._name} gave no answer in OpenAI's style: {self._reason(response)}")
        return content

    def _reason(self, response: httpx.Response) -> str:
        """Status and text of a response, without the key if the server repeats it."""
        text = response.text.replace(self._key() or "\0", "…")
        return f"HTTP {response.status_code}: {printable(text[:300])}"


class _Answers:
    """The answers in a file, by the hash of their requests; safe for threads."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        if file.is_file():
            content = file.read_bytes()
            complete = content[: content.rfind(b"\n") + 1]
            if len(complete) < len(content):  # a kill cut the last line
                os.truncate(file, len(complete))
            for line in complete.splitlines():
                record = json.loads(line)
                self._known[record["key"]] = record["answer"]

    def get(self, key: str) -> str | None:
        return self._known.get(key)

    def add(self, key: str, question: Question, answer: str) -> None:
        record = {
            "key": key,
            "images": [file.name for file in question.images],
            "question": question.text,
            "answer": answer,
        }
        with self._lock:
            self._known[key] = answer
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _data_url(file: Path) -> str:
    kind = mimetypes.guess_type(file.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
