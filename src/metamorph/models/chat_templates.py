"""Conversation templates: from the roles of a conversation to segments of text, each supervised or not."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


ROLES = ("system", "user", "assistant")
"""The roles that a message may have."""

VERSIONS = ("llama3", "llama3_original", "chatml", "plain", "auto")
"""The values of `--version`."""


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation: text of the template itself, or the content of one message."""

    text: str
    """The template's own text. For a content segment: text that belongs right before the content (often "")."""
    supervised: bool
    """Whether the tokens of the segment are learnt, that is, whether the assistant writes them."""
    message: int | None = None
    """Index of the message whose content stands here; None for the template's own text."""


class ChatTemplate(Protocol):
    """What the processor needs to know about a conversation format."""

    @property
    def end_of_turn(self) -> str | None:
        """The token with which an assistant turn ends, None when the format has none."""

    def layout(self, roles: Sequence[str], *, add_generation_prompt: bool = False) -> tuple[Segment, ...]:
        """Lay out a conversation whose messages have these roles.

        The layout does not depend on what the messages say. The layout of `roles[:-1]` with a generation prompt
        is a prefix of the layout of `roles` when the last role is the assistant, so that a model sees the same
        ids when it is trained and when it is asked.

        Args:
            roles: One of `ROLES` for each message.
            add_generation_prompt: Whether to end with what precedes an answer of the assistant.

        Raises:
            ValueError: If the format cannot express this order of roles.
        """


def get_chat_template(
    version: str, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> ChatTemplate:
    """Return the conversation template that `--version` names.

    Args:
        version: One of `VERSIONS`.
        tokenizer: Decides whether conversations start with a BOS token; must know the format's control tokens.
        chat_template: A Jinja template to use with `version="auto"` instead of the tokenizer's own.

    Raises:
        ValueError: For an unknown version, or a version that this tokenizer cannot express.
    """
    if version in ("llama3", "llama3_original"):
        _require_tokens(version, tokenizer, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
        newlines = "\n\n" if version == "llama3" else "\n"
        return HeaderTemplate(
            bos=tokenizer.bos_token or "",
            header="<|start_header_id|>{role}<|end_header_id|>" + newlines,
            end_of_turn="<|eot_id|>",
        )
    if version == "chatml":
        _require_tokens(version, tokenizer, ("<|im_start|>", "<|im_end|>"))
        return HeaderTemplate(
            bos=_automatic_bos(tokenizer),
            header="<|im_start|>{role}\n",
            end_of_turn="<|im_end|>",
            after_turn="\n",
        )
    if version == "plain":
        if tokenizer.eos_token is None:
            raise ValueError(
                f"--version plain ends an answer with the end-of-sequence token, but {_name(tokenizer)} has none; "
                "set eos_token in its tokenizer_config.json"
            )
        return PlainTemplate(bos=_automatic_bos(tokenizer), end_of_turn=tokenizer.eos_token)
    if version == "auto":
        return TokenizerTemplate(tokenizer, chat_template)
    raise ValueError(f"--version {version!r} is unknown; use one of {', '.join(VERSIONS)}")


@dataclass(frozen=True)
class HeaderTemplate:
    """A header with the role before each turn and an end-of-turn token after it (Llama 3, ChatML)."""

    bos: str
    """Text of the BOS token, "" for none."""
    header: str
    """What precedes the content, with `{role}` in it."""
    end_of_turn: str
    """The token after the content; the assistant learns to write it."""
    after_turn: str = ""
    """Text between two turns; nobody learns to write it."""

    def layout(self, roles: Sequence[str], *, add_generation_prompt: bool = False) -> tuple[Segment, ...]:
        """See [`ChatTemplate.layout`]."""
        segments = [Segment(self.bos, supervised=False)]
        for index, role in enumerate(roles):
            answer = role == "assistant"
            segments += [
                Segment(self.header.format(role=role), supervised=False),
                Segment("", supervised=answer, message=index),
                Segment(self.end_of_turn, supervised=answer),
                Segment(self.after_turn, supervised=False),
            ]
        if add_generation_prompt:
            segments.append(Segment(self.header.format(role="assistant"), supervised=False))
        return _joined(segments)


@dataclass(frozen=True)
class PlainTemplate:
    """No roles at all: each turn on its own line, answers end with the end-of-sequence token.

    This is the format of caption data in stage 1, where the prompt is no more than an image.
    """

    bos: str
    """Text of the BOS token, "" for none."""
    end_of_turn: str
    """The token after an answer."""

    def layout(self, roles: Sequence[str], *, add_generation_prompt: bool = False) -> tuple[Segment, ...]:
        """See [`ChatTemplate.layout`]. A generation prompt is empty: the question's line end is always there."""
        segments = [Segment(self.bos, supervised=False)]
        for index, role in enumerate(roles):
            answer = role == "assistant"
            segments.append(Segment("", supervised=answer, message=index))
            if answer:
                segments.append(Segment(self.end_of_turn, supervised=True))
            segments.append(Segment("\n", supervised=False))
        return _joined(segments)


@dataclass(eq=False)
class TokenizerTemplate:
    """The tokenizer's own Jinja chat template, taken apart into segments.

    The template is rendered with marks in place of the contents. What a prompt for the assistant's next answer
    contains is not supervised; what stands between that prompt and the content is; and so is what follows the
    content up to the last control token of the turn. A system message that the template refuses, drops or puts
    after a later turn is placed at the start of the first user message instead.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    end_of_turn: str | None = field(init=False)
    _layouts: dict[tuple[tuple[str, ...], bool], tuple[Segment, ...]] = field(init=False, default_factory=dict)

    _MAX_CACHED = 1024
    """Layouts depend on the roles only; conversations of a data set have few different sequences of roles."""

    def __post_init__(self) -> None:
        if self.chat_template is None and self.tokenizer.chat_template is None:
            raise ValueError(
                f"--version auto uses the tokenizer's own chat template, but {_name(self.tokenizer)} has none; "
                f"choose one of {', '.join(VERSIONS[:-1])} with --version, or put a chat_template.jinja into the "
                "tokenizer's folder"
            )
        self._controls = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        ending = self.layout(("user", "assistant"))
        after_answer = "".join(segment.text for segment in ending if segment.message is None and segment.supervised)
        self.end_of_turn = next((token for token in self._controls if after_answer.endswith(token)), None)

    def __deepcopy__(self, memo: dict) -> TokenizerTemplate:
        """A template never changes, and a copy of its tokenizer would be large."""
        return self

    def layout(self, roles: Sequence[str], *, add_generation_prompt: bool = False) -> tuple[Segment, ...]:
        """See [`ChatTemplate.layout`]."""
        key = (tuple(roles), add_generation_prompt)
        if key not in self._layouts:
            if len(self._layouts) >= self._MAX_CACHED:
                self._layouts.clear()
            self._layouts[key] = self._build(key[0], add_generation_prompt)
        return self._layouts[key]

    def _build(self, roles: tuple[str, ...], add_generation_prompt: bool) -> tuple[Segment, ...]:
        if "system" not in roles:
            return _joined(self._take_apart(roles, add_generation_prompt))
        try:
            return _joined(self._take_apart(roles, add_generation_prompt))
        except ValueError:
            if roles[:2] != ("system", "user") or "system" in roles[1:]:
                raise
        return _joined(_with_folded_system(self._take_apart(roles[1:], add_generation_prompt)))

    def _take_apart(self, roles: tuple[str, ...], add_generation_prompt: bool) -> list[Segment]:
        """Render the whole conversation once, and each of its prefixes to learn where answers begin and end."""
        full = self._render(roles, add_generation_prompt)
        spans = self._find_marks(full, roles)
        segments: list[Segment] = []
        position = 0
        for index, (role, (start, end)) in enumerate(zip(roles, spans, strict=True)):
            if role != "assistant":
                head = full[position:start]
                stem = head.rstrip(" ")
                # "[INST] Hi" is spelt "[INST]", " Hi" by tokenizers that keep the space with the word after it.
                segments += [Segment(stem, False), Segment(head[len(stem) :], False, message=index)]
                position = end
                continue
            prompt = self._render(roles[:index], True)
            if not (full.startswith(prompt) and position <= len(prompt) <= start):
                raise ValueError(
                    f"the chat template of {_name(self.tokenizer)} prompts for an answer with text that is missing "
                    f"from finished conversations ({prompt[-40:]!r}), so training and use would differ; choose "
                    f"another --version ({', '.join(VERSIONS[:-1])})"
                )
            segments.append(Segment(full[position : len(prompt)], False))
            lead = full[len(prompt) : start]
            if lead.strip(" "):
                segments.append(Segment(lead, True))
                lead = ""
            segments.append(Segment(lead, True, message=index))
            tail = self._answer_tail(roles[: index + 1], following=full[end:])
            segments.append(Segment(tail, True))
            position = end + len(tail)
        segments.append(Segment(full[position:], False))
        return segments

    def _answer_tail(self, roles: tuple[str, ...], following: str) -> str:
        """The text after an answer that the assistant itself writes: up to the last control token of the turn."""
        rendered = self._render(roles, False)
        after = rendered[self._find_marks(rendered, roles)[-1][1] :]
        same = next((n for n, pair in enumerate(zip(after, following, strict=False)) if pair[0] != pair[1]), None)
        tail = after[: min(len(after), len(following)) if same is None else same]
        ends = [tail.rfind(token) + len(token) for token in self._controls if token in tail]
        return tail[: max(ends)] if ends else tail

    def _render(self, roles: tuple[str, ...], add_generation_prompt: bool) -> str:
        messages = [{"role": role, "content": _mark(index)} for index, role in enumerate(roles)]
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except TemplateError as error:
            raise ValueError(
                f"the chat template of {_name(self.tokenizer)} cannot render the roles {list(roles)}: {error}; "
                "correct the order of the turns, or choose --version llama3 or chatml"
            ) from error

    def _find_marks(self, rendered: str, roles: tuple[str, ...]) -> list[tuple[int, int]]:
        found = [(int(match[1]), match.span()) for match in _MARK.finditer(rendered)]
        if [index for index, _ in found] != list(range(len(roles))):
            raise ValueError(
                f"the chat template of {_name(self.tokenizer)} drops, repeats or reorders messages with the roles "
                f"{list(roles)}; choose another --version ({', '.join(VERSIONS[:-1])})"
            )
        return [span for _, span in found]


_MARK = re.compile("\ue000([0-9]+)\ue001")  # private-use characters: no template tests for them or strips them


def _mark(index: int) -> str:
    return f"\ue000{index}\ue001"


def _with_folded_system(segments: list[Segment]) -> list[Segment]:
    """Put the content of message 0 (system) in front of the first user message of a layout made without it."""
    shifted = [
        segment if segment.message is None else Segment(segment.text, segment.supervised, segment.message + 1)
        for segment in segments
    ]
    first = next(place for place, segment in enumerate(shifted) if segment.message == 1)
    system = [Segment(shifted[first].text, False, message=0), Segment("\n\n", False)]
    return [*shifted[:first], *system, Segment("", False, message=1), *shifted[first + 1 :]]


def _joined(segments: list[Segment]) -> tuple[Segment, ...]:
    """Drop empty template text and join neighbours of the same kind, so that it is tokenized in one piece."""
    result: list[Segment] = []
    for segment in segments:
        if segment.message is None and not segment.text:
            continue
        last = result[-1] if result else None
        if (
            last is not None
            and last.message is None
            and segment.message is None
            and last.supervised == segment.supervised
        ):
            result[-1] = Segment(last.text + segment.text, segment.supervised)
        else:
            result.append(segment)
    return tuple(result)


def _automatic_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The BOS token if the tokenizer starts its sequences with one, else "" (ChatML tokenizers mostly do not)."""
    if tokenizer.bos_token is None or tokenizer("").input_ids[:1] != [tokenizer.bos_token_id]:
        return ""
    return tokenizer.bos_token


def _require_tokens(version: str, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    encode: Callable[[str], list[int]] = lambda token: tokenizer.encode(token, add_special_tokens=False)  # noqa: E731
    missing = [token for token in tokens if len(ids := encode(token)) != 1 or ids[0] == tokenizer.unk_token_id]
    if missing:
        raise ValueError(
            f"--version {version} needs the tokens {', '.join(missing)}, which {_name(tokenizer)} does not have; use "
            "--version auto (the tokenizer's own chat template) or plain"
        )


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer.name_or_path!r}" if tokenizer.name_or_path else "this tokenizer"
