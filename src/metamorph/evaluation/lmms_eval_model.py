"""The model of `lmms_eval --model metamorph`: answers, drawings, several rounds, losses of choices.

Only lmms-eval imports this file, through the entry point `lmms_eval.models`.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from metamorph.data.records import IMAGE_SUFFIXES
from metamorph.flags.parser import unknown_choice
from metamorph.inference.answer_files import AnswerFiles, drawing_metadata
from metamorph.inference.draw import SamplerSettings
from metamorph.inference.media import load_video
from metamorph.inference.prompt import Prompt
from metamorph.inference.reply import Reply
from metamorph.inference.sampling import Sampling
from metamorph.inference.session import open_session
from metamorph.models.processing_metamorph import ImagePart
from metamorph.runs.progress import Progress


logger = logging.getLogger(__name__)

_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_OPTIONS = ("until", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams")
"""Keys of `generation_kwargs` that this model knows."""
_DELIMITER = "\n\n"
"""lmms-eval adds this to `until` of every task that has none; its own models leave it out, too."""
_VISUAL_COT = "Draw an image that helps to answer this question: {question}"
"""Prompt for the image of tasks that bring none."""
_REPEAT = 1_000_003
"""Step of the seeds of repeated answers, far above the number of documents."""

Messages = list[dict[str, Any]]


def manifest() -> ModelManifest:
    """What the entry point `lmms_eval.models` registers."""
    name = f"{__name__}.{MetaMorph.__name__}"
    return ModelManifest("metamorph", chat_class_path=name, simple_class_path=f"{name}Simple")


@dataclass(frozen=True)
class _Question:
    """A request in one form, whether its task wrote messages, or text and media."""

    task: str
    doc_id: int
    options: Mapping[str, Any]
    """The `generation_kwargs` of the task."""
    ask: Callable[..., Any]
    """Returns the messages of the first round; with `round_idx`, those of a later one, and whether there is none."""
    repeat: int = 0
    """How often the same document came before."""


@dataclass
class _Rounds:
    """A conversation by rounds, in which the task reads the answers before it asks on."""

    question: _Question
    outputs: list[str] = field(default_factory=list)
    info: Any = None

    def next_messages(self) -> Messages | None:
        """What to ask now; None at the end."""
        if not self.outputs:
            return self.question.ask()
        payload = self.question.ask(
            round_idx=len(self.outputs), previous_output=[*self.outputs], previous_round_info=self.info
        )
        if not isinstance(payload, tuple):  # a task of one round
            return None
        messages, is_over, _, self.info = payload
        return None if is_over else messages


class _Scored(tuple, GenerationResult):
    """A loss and whether the continuation is greedy: a tuple, as lmms-eval documents.

    The evaluator of lmms-eval 0.7.3 makes text of a mere tuple, with which its multiple choice fails (`evaluator.py`,
    line 1232); the `text` of a `GenerationResult` it takes as it is.
    """


class MetaMorph(lmms):
    """A MetaMorph model for lmms-eval, which passes the constructor's arguments as `--model_args name=value,…`.

    An answer is its text. If it has images, it is JSON: `{"text": …, "images": [paths]}`. Answers do not depend on
    `batch_size` or the number of processes.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        visualizer: str | None = None,
        *,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        draw: bool = False,
        seed: int = 0,
        guidance_scale: float = 3.0,
        steps: int = 20,
        fps: float = 1.0,
        max_frames: int = 8,
        output_image_dir: str = "lmms_eval_images",
    ) -> None:
        """Load the model.

        Args:
            pretrained: Folder or Hub id of the model or adapter, or `mini`.
            visualizer: The same of its visualizer. Without one, images of answers are left out.
            device: By default the accelerator if there is one. Each of several processes takes its own.
            device_map: Such as `auto`, to spread the model over all devices.
            draw: Begin every answer with an image.
            seed: Document `i` is sampled and drawn from `seed + i`.
            fps: Frames per second of videos, at most `max_frames`.
            output_image_dir: Folder of the images, which are overwritten by a later run.
        """
        super().__init__()
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: {unknown_choice(dtype, _DTYPES)}")
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ValueError(f"batch_size must be a whole number from 1, not {batch_size}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device_map is None and (device is None or self._world_size > 1):
            device = str(self.accelerator.device)
        self.session = open_session(pretrained, visualizer, device, _DTYPES[dtype], device_map=device_map)
        self.device = self.session.model.device
        self.batch_size = int(batch_size)
        self.draw = draw
        self.settings = SamplerSettings(guidance_scale, steps, seed)
        self.fps, self.max_frames = fps, max_frames
        self.names = (str(pretrained), visualizer)
        self.folder = Path(output_image_dir).resolve()
        self._mentioned: set[str] = set()

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer each request."""
        found = []
        for questions in self._batches(requests):
            prompts = [self._prompt(question, question.ask(), self.draw) for question in questions]
            found += self._answer(questions, prompts)
        return found

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers of all rounds of each request. A round has no memory: its messages say what it needs to know."""
        found: list[list[str]] = []
        for questions in self._batches(requests):
            conversations = open_ones = [_Rounds(question) for question in questions]
            while open_ones:
                turns = [(each, messages) for each in open_ones if (messages := each.next_messages()) is not None]
                open_ones = [each for each, _ in turns]
                prompts = [self._prompt(each.question, messages, self.draw) for each, messages in turns]
                suffix = f"-round{len(open_ones[0].outputs) + 1}" if open_ones else ""
                answers = self._answer([each.question for each in open_ones], prompts, suffix)
                for each, answer in zip(open_ones, answers, strict=True):
                    each.outputs.append(answer)
            found += [each.outputs for each in conversations]
        return found

    def generate_visual_cot(self, requests: Sequence[Instance]) -> list[str]:
        """Draw an image that helps, then answer with it in context, as visual tokens.

        The prompt of the image stands between `[GEN_PROMPT]` and `[/GEN_PROMPT]` in the task's text, the question
        between `[QUESTION]` and `[/QUESTION]`. The result is the answer only, which tasks compare with the right one;
        with a visualizer the image is in `output_image_dir`.
        """
        found = []
        for questions in self._batches(requests):
            first, second = zip(*(_visual_cot_turns(question.ask()) for question in questions), strict=True)
            prompts = [self._prompt(*each, True, 0) for each in zip(questions, first, strict=True)]
            replies = self._reply(questions, prompts)
            for question, prompt, reply in zip(questions, prompts, replies, strict=True):
                self._save(question, prompt, reply, "-cot")
            prompts = []
            for question, before, reply, after in zip(questions, first, replies, second, strict=True):
                image = [part for part in reply.parts if isinstance(part, ImagePart)]
                context = [*self._messages(before), {"role": "assistant", "content": image}]
                prompts.append(self._prompt(question, after, False, context=context))
            found += self._answer(questions, prompts)
        return found

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """For each request the loss of its continuation as the answer, and whether greedy decoding would give it.

        The loss is the mean negative log-likelihood of the continuation's tokens, in nats: lmms-eval documents a
        log-likelihood, but takes the choice with the *lowest* value, as its own models return losses.
        """
        found: list[tuple[float, bool]] = []
        with Progress(desc="lmms-eval", total=len(requests), unit="request") as progress:
            for start in range(0, len(requests), self.batch_size):
                batch = requests[start : start + self.batch_size]
                found += self._score([self._continuation(request.args) for request in batch])
                progress.update(len(batch))
        return found

    def clean(self) -> None:
        """Free the memory of the model: lmms-eval may load a judge next."""
        del self.session
        super().clean()

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[_Question]]:
        seen: Counter[tuple[str, int]] = Counter()
        with Progress(desc="lmms-eval", total=len(requests), unit="request") as progress:
            for start in range(0, len(requests), self.batch_size):
                batch = []
                for request in requests[start : start + self.batch_size]:
                    key = request.args[-2], request.args[-3]
                    batch.append(self._read(request.args, seen[key]))
                    seen[key] += 1
                yield batch
                progress.update(len(batch))

    def _read(self, args: tuple[Any, ...], repeat: int) -> _Question:
        """Arguments of chat models: context, doc_to_messages, options; of simple ones: context, options, doc_to_visual,
        and doc_to_text if there are several rounds. Document, task and split follow.
        """
        context, *rest, doc_id, task, split = args
        doc = self.task_dict[task][split][doc_id]
        if callable(rest[0]):
            to_messages, options = rest
            return _Question(task, doc_id, options, partial(to_messages, doc), repeat)
        options, to_visual, *to_text = rest

        def ask(**rounds: Any) -> Any:
            if not rounds:
                return _user_turn(to_visual(doc) if to_visual else None, context)
            visuals, text, is_over, outputs, info = to_text[0](doc, **rounds)
            return (None if is_over else _user_turn(visuals, text)), is_over, outputs, info

        return _Question(task, doc_id, options, ask, repeat)

    def _prompt(
        self,
        question: _Question,
        messages: Messages,
        draw: bool,
        max_new_tokens: int | None = None,
        context: Sequence[Mapping[str, Any]] = (),
    ) -> Prompt:
        """The prompt of a question; its limit does not count the image of an answer that begins with one."""
        options = question.options
        for name in options.keys() - _OPTIONS - self._mentioned:
            self._mentioned.add(name)
            logger.warning("%s has %s in generation_kwargs, which MetaMorph does not use", question.task, name)
        if (options.get("num_beams") or 1) > 1:
            raise ValueError(f"{question.task} asks for beam search, which cannot draw: add --gen_kwargs num_beams=1")
        limit = options.get("max_new_tokens") if max_new_tokens is None else max_new_tokens
        if limit is not None and draw:
            limit += self.session.processor.num_image_tokens + 2
        until = options.get("until") or ()
        try:
            written = [*context, *self._messages(messages)]
        except ValueError as error:
            raise ValueError(f"document {question.doc_id} of {question.task}: {error}") from error
        return Prompt(
            written,
            draw=draw,
            sampling=_sampling(options, self._seed(question)),
            max_new_tokens=limit,
            stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text != _DELIMITER),
        )

    def _messages(self, messages: Messages) -> Messages:
        """Messages for the processor, videos as frames. In the user's, media are on own lines, as in training data."""
        written = []
        for message in messages:
            content = message["content"]
            parts: list[dict[str, Any]] = []
            before = "text"
            for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if parts and message["role"] == "user" and {before, item["type"]} != {"text"}:
                    parts.append({"type": "text", "text": "\n"})
                parts += self._parts(item)
                before = item["type"]
            written.append({"role": message["role"], "content": parts})
        return written

    def _parts(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        kind = item["type"]
        if kind == "text":
            return [dict(item)]
        if kind == "image":
            return [{"type": "image", "image": item["url"]}]
        if kind == "video" and isinstance(item["url"], str) and not (item.keys() & {"start_time", "end_time"}):
            frames = load_video(item["url"], self.fps, self.max_frames)
            return [{"type": "image", "image": frame} for frame in frames]
        raise ValueError(f"MetaMorph reads text, images, and entire videos from files, not {dict(item)!r:.120}")

    def _seed(self, question: _Question) -> int:
        return self.settings.seed + question.doc_id + _REPEAT * question.repeat

    def _reply(self, questions: Sequence[_Question], prompts: Sequence[Prompt]) -> list[Reply]:
        return self.session.answer_all(
            prompts, self.settings, seeds=list(map(self._seed, questions)), batch_size=self.batch_size
        )

    def _answer(self, questions: Sequence[_Question], prompts: Sequence[Prompt], suffix: str = "") -> list[str]:
        """What lmms-eval gets as the answers, their images saved."""
        texts = []
        for question, prompt, reply in zip(questions, prompts, self._reply(questions, prompts), strict=True):
            images = self._save(question, prompt, reply, suffix)
            texts.append(json.dumps({"text": reply.text, "images": images}) if images else reply.text)
        return texts

    def _save(self, question: _Question, prompt: Prompt, reply: Reply, suffix: str) -> list[str]:
        """Save the drawn images of an answer; returns their paths."""
        if not reply.images:
            if reply.num_images and "visualizer" not in self._mentioned:
                self._mentioned.add("visualizer")
                logger.warning("answers of %s have images: visualizer=… in --model_args draws them", question.task)
            return []
        texts = [part["text"] for part in prompt.messages[-1]["content"] if part["type"] == "text"]
        sampling = prompt.sampling or Sampling()
        metadata = drawing_metadata(*self.names, "".join(texts).strip(), sampling, self.settings)
        repeat = f"-repeat{question.repeat + 1}" if question.repeat else ""
        output = self.folder / question.task / f"{question.doc_id:06}{repeat}{suffix}.png"
        files = AnswerFiles(output, metadata, replace(self.settings, seed=self._seed(question)), overwrite=True)
        drawn = (part for part in reply.parts if isinstance(part, ImagePart))
        return [str(file) for part in drawn for file in files.add(part)]

    def _continuation(self, args: tuple[Any, ...]) -> Messages:
        """The conversation whose last message is scored, for (context, continuation, doc_to_visual, document, …)."""
        context, continuation, *rest = args
        visuals = None
        if rest:  # without an image lmms-eval asks how likely a choice is by itself
            to_visual, doc_id, task, split = rest
            doc = self.task_dict[task][split][doc_id]
            continuation = continuation(doc) if callable(continuation) else continuation
            visuals = to_visual(doc) if to_visual else None
        question = self._messages(_user_turn(visuals, context))
        return [*question, {"role": "assistant", "content": [{"type": "text", "text": continuation}]}]

    def _score(self, conversations: Sequence[Messages]) -> list[tuple[float, bool]]:
        model = self.session.model
        encoded: Any = self.session.processor.apply_chat_template(
            conversations, tokenize=True, continue_final_message=True, return_assistant_tokens_mask=True
        )
        inputs = encoded.to(model.device)
        is_answer = inputs.pop("assistant_masks").bool()
        longest = int((is_answer.shape[1] - is_answer.int().argmax(dim=1)).max())  # rows are padded on the left
        logits = model(**inputs, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1].float()
        targets, is_answer = inputs["input_ids"][:, -longest:], is_answer[:, -longest:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        loss = losses.masked_fill(~is_answer, 0).sum(dim=1) / is_answer.sum(dim=1).clamp(min=1)
        is_greedy = ((logits.argmax(dim=-1) == targets) | ~is_answer).all(dim=1)
        return list(map(_Scored, zip(loss.tolist(), is_greedy.tolist(), strict=True)))


class MetaMorphSimple(MetaMorph):
    """The same with `--force_simple`, which tasks of multiple choice and visual chain of thought need."""

    is_simple = True


def _user_turn(visuals: Sequence[Any] | None, text: str) -> Messages:
    """A user's message: images, files of images or videos, then text."""
    content = []
    for visual in visuals or ():
        is_image = isinstance(visual, Image.Image) or Path(str(visual)).suffix.lower() in IMAGE_SUFFIXES
        content.append({"type": "image" if is_image else "video", "url": visual})
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _visual_cot_turns(messages: Messages) -> tuple[Messages, Messages]:
    """The request for an image, with the media of the question, and the question."""
    content = messages[-1]["content"]
    text = "".join(item["text"] for item in content if item["type"] == "text")
    media = [item for item in content if item["type"] != "text"]
    found = [re.search(rf"\[{tag}\](.*?)\[/{tag}\]", text, re.DOTALL) for tag in ("GEN_PROMPT", "QUESTION")]
    wish, question = (match and match[1].strip() for match in found)
    if wish is None or question is None:
        wish, question = _VISUAL_COT, text
    wish = wish.replace("{question}", question)
    first = {"role": "user", "content": [*media, {"type": "text", "text": wish}]}
    return [*messages[:-1], first], _user_turn(None, question)


def _sampling(options: Mapping[str, Any], seed: int) -> Sampling:
    """How text is chosen: greedily without a temperature, unless `do_sample` asks for sampling."""
    do_sample, temperature = options.get("do_sample"), options.get("temperature")
    if temperature is None:
        temperature = 1.0 if do_sample else 0.0
    if do_sample is False or not temperature:
        return Sampling()
    return Sampling(temperature, options.get("top_p") or 1.0, options.get("top_k") or 0, seed)
