"""A Jinja chat template, taken apart into what is learnt and what is only read."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from metamorph.models.sequence.bounded_jinja import render, variables_of
from metamorph.models.sequence.constants import VERSIONS
from metamorph.models.sequence.template_date import name_of, with_fixed_date


logger = logging.getLogger(__name__)

_SYSTEM_IN_FIRST_TURN = (
    "{% set messages = [{'role': 'user', 'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']}] "
    "+ messages[2:] if messages | length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user' "
    "else messages %}"
)
"""Goes before a template that cannot write a system message."""

_LAST_TOKEN = "{{ %r if not add_generation_prompt and messages and messages[-1]['role'] == 'assistant' else '' }}"
"""Goes after a template that ends an answer with nothing."""

_SHORT_PROMPT = (
    "{%% set rendered %%}{{ '' }}%s{{ '' }}{%% endset %%}{{ rendered.rstrip() if add_generation_prompt else rendered }}"
)
"""Around a template whose prompts end in white space that belongs to the answer's first token."""

_RENDERING_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a faulty template raises: Jinja's own errors and those of the expressions in it."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a written conversation."""

    text: str
    """Text of the template and contents of messages."""
    supervised: bool
    """Whether it is learnt, that is, whether the assistant writes it."""


class ChatTemplate:
    """A Jinja chat template, taken apart into what is learnt and what is only read.

    A conversation is written once as a whole, and once up to each answer with a generation prompt, which must be a
    prefix of the whole: the model sees the same text when it is trained and when it is asked. An answer is learnt from
    there up to the token that ends the turn.

    Where the template's text depends on the roles alone, all this is done once for each order of roles, with marks in
    place of the contents. A template that looks at contents (it moves thoughts, say) gets them.

    Four things are changed in the source, so that the folder of a trained model holds what it was trained on: a
    system message that the template refuses, drops or puts after a later turn goes to the start of the first user
    message; an answer that nothing ends gets a token that ends it; a prompt does not end in white space that the
    tokenizer joins with the first word of an answer, which is learnt with the answer then; and a date is that of the
    day on which this object was made.

    Args:
        tokenizer: Has the tokens that the template writes.
        source: The Jinja template.
        reads_contents: Whether the template may look at contents. False saves the time to find out.
        controls: Tokens that the template writes, for a tokenizer that has them as ordinary words.

    Raises:
        ValueError: If the template is faulty, or cannot be used for training.
    """

    _MAX_CACHED = 1024
    """Conversations of a data set have few different orders of roles."""
    _MAX_WORDS = 64
    """Tokens that are tried as the beginning of an answer; the most frequent ones come first in a vocabulary."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        reads_contents: bool = True,
        controls: Sequence[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._reads_contents = reads_contents
        self._layouts: dict[tuple[tuple[str, ...], bool], tuple[_Layout, ...]] = {}
        # Some tokenizers have white space as added tokens: that is ordinary text.
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        self._control = any_of({*added, *controls})
        self.source: str = with_fixed_date(source, tokenizer)
        """The Jinja template, with what was changed in it."""
        self._place_system()
        self._gap, self._tail, self._last_tail = self._find_ends()
        self._shorten_prompts()
        ends = [self._control.findall(tail)[-1] for tail in (self._last_tail, self._tail) if tail]
        self.end_tokens: tuple[str, ...] = tuple(dict.fromkeys(ends))
        """The tokens with which an answer ends: the last one of a conversation, and earlier ones if they differ."""
        prompt = self._render(_marked(("system", "user")), True)
        self.writes_bos: bool = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        """Whether a conversation starts with the BOS token."""
        lead = self._before_answer()
        text = prompt + lead + self._gap + self._last_tail
        written = {name for name in added if name in self.source} | set(self._control.findall(text))
        plain = {name for name, token in added.items() if not token.special}
        self.control_tokens: frozenset[str] = frozenset({*added, *controls} - (plain - written))
        """Names of the tokens that contents must not give: the special ones, and all that the template writes."""
        begun = self._control.findall(lead)
        thoughts = {name for name in plain & written if name in begun or _is_sought(name, self.source)}
        self.thought_tokens: frozenset[str] = frozenset(thoughts)
        """Those that answers may give: the template begins an answer with them or looks for them, as `</think>`."""
        own = {"messages", "tools", "documents", "add_generation_prompt"}
        self._variables = variables_of(self.source) - own

    def __deepcopy__(self, memo: dict) -> ChatTemplate:
        """A template never changes, and a copy of its tokenizer would be large."""
        return self

    @property
    def end_of_turn(self) -> str:
        """The token with which the last answer of a conversation ends."""
        return self.end_tokens[0]

    def write(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[Segment]:
        """Write a conversation.

        The text for `messages[:-1]` with a generation prompt is a prefix of that for `messages` if the last one is
        the assistant's.

        Args:
            messages: `{"role": one of ROLES, "content": text}`. Names of control tokens in the contents must be hidden
                from the template.
            add_generation_prompt: Whether to end with what precedes an answer of the assistant.
            variables: What else the template may read, as `enable_thinking`. One that it does not read must be None
                or false. With such variables the text is not taken apart: training has none of them.

        Returns:
            Segments with text, by turns supervised and not.

        Raises:
            ValueError: If the template cannot express this conversation, or reads no such variable.
        """
        variables = {name: value for name, value in (variables or {}).items() if value is not None}
        known = {name: value for name, value in variables.items() if name in self._variables}
        for name in sorted(variables.keys() - known.keys()):
            if variables[name]:
                raise ValueError(
                    f"the chat template of {name_of(self._tokenizer)} does not read {name!r}: leave it out"
                )
        if known:
            return [Segment(self._render(messages, add_generation_prompt, **known), False)]
        roles = tuple(message["role"] for message in messages)
        contents = [message["content"] for message in messages]
        segments = [
            Segment(
                "".join(piece if isinstance(piece, str) else contents[piece] for piece in layout.pieces),
                layout.supervised,
            )
            for layout in self._layout(roles, add_generation_prompt)
        ]
        if self._reads_contents:
            text = self._render(messages, add_generation_prompt)
            if text != "".join(segment.text for segment in segments):
                segments = self._take_apart(text, messages, add_generation_prompt)
        return [segment for segment in segments if segment.text]

    def _layout(self, roles: tuple[str, ...], add_generation_prompt: bool) -> tuple[_Layout, ...]:
        """The segments of a conversation with marks in place of the contents."""
        key = (roles, add_generation_prompt)
        layouts = self._layouts.get(key)
        if layouts is None:
            messages = _marked(roles)
            text = self._render(messages, add_generation_prompt)
            self._check_marks(text, roles)
            segments = self._take_apart(text, messages, add_generation_prompt)
            layouts = tuple(_Layout(_split_at_marks(segment.text), segment.supervised) for segment in segments)
            if len(self._layouts) >= self._MAX_CACHED:
                self._layouts.clear()
            self._layouts[key] = layouts
        return layouts

    def _take_apart(
        self, text: str, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
    ) -> list[Segment]:
        """Find the answers in the text of a conversation."""
        segments: list[Segment] = []
        position = 0
        for index, message in enumerate(messages):
            is_last = index + 1 == len(messages)
            if message["role"] != "assistant" or (is_last and add_generation_prompt):
                continue
            prompt = self._render(messages[:index], True)
            if len(prompt) < position or not text.startswith(prompt):
                raise ValueError(
                    f"the chat template of {name_of(self._tokenizer)} prompts for an answer with text that is missing "
                    f"from finished conversations ({prompt[-40:]!r}), so training and use would differ; choose "
                    f"another --version ({', '.join(VERSIONS[:-1])})"
                )
            tail = self._last_tail if is_last else self._tail
            end = text.find(tail or self._gap, len(prompt))
            if end < 0:
                raise ValueError(
                    f"the chat template of {name_of(self._tokenizer)} ends the answer of turn {index + 1} with "
                    f"something other than {tail or self._gap!r}; choose another --version ({', '.join(VERSIONS[:-1])})"
                )
            end += len(tail)
            segments += [Segment(text[position : len(prompt)], False), Segment(text[len(prompt) : end], True)]
            position = end
        return [*segments, Segment(text[position:], False)]

    def _place_system(self) -> None:
        """Let a template that cannot write a system message write it with the first user message."""
        try:
            for roles in (("system", "user"), ("system", "user", "assistant", "user", "assistant")):
                self._check_marks(self._render(_marked(roles), False), roles)
            prompt = self._render(_marked(("system", "user")), True)
            if self._render(_marked(("system", "user", "assistant", "user", "assistant")), False).startswith(prompt):
                return
        except ValueError:
            pass
        self.source = _SYSTEM_IN_FIRST_TURN + self.source

    def _find_ends(self) -> tuple[str, str, str]:
        """What stands between an answer and the next question, and what of it is learnt there and after the last one.

        Raises:
            ValueError: If nothing can end an answer.
        """
        alone = self._after_answer(("user", "assistant"))
        try:
            gap = self._after_answer(("user", "assistant", "user"))
        except ValueError:  # a template for a single question
            gap = alone
        if self._control.search(alone) is None:
            # The model has to learn to stop: with the token that begins the next turn, else with the tokenizer's.
            following = self._control.match(gap.removeprefix(alone))
            end = following[0] if following else self._tokenizer.eos_token
            if end is None:
                raise ValueError(
                    f"the chat template of {name_of(self._tokenizer)} ends an answer with no token, and there is no "
                    "end-of-sequence token: the model would never learn to stop. Set eos_token in "
                    f"tokenizer_config.json, or choose another --version ({', '.join(VERSIONS[:-1])})"
                )
            logger.info("the chat template of %s does not end an answer: %r will", name_of(self._tokenizer), end)
            self.source = self.source.removesuffix("\n") + _LAST_TOKEN % end
            alone += end
        last = list(self._control.finditer(alone))[-1].end()
        return gap, self._end_of_turn(gap, alone), alone[:last]

    def _before_answer(self) -> str:
        """What the template writes between the prompt and the content of an answer."""
        answer = next(layout for layout in self._layout(("user", "assistant"), False) if layout.supervised)
        return answer.pieces[0] if isinstance(answer.pieces[0], str) else ""

    def _shorten_prompts(self) -> None:
        """Let prompts end before white space if the tokenizer joins it with what follows.

        The last token of "assistant: " is a space, but the first one of the answer in "assistant: the" may be " the":
        a prompt must have the ids with which the answer was trained.
        """
        prompt = self._render(_marked(("user",)), True)
        if not prompt[-1:].isspace():
            return
        ids = self._tokenizer.encode(prompt, add_special_tokens=False)
        if not ids:
            return
        lead = self._before_answer()
        for start in [lead] if lead else self._first_words(self._tokenizer.convert_ids_to_tokens(ids[-1])):
            if self._tokenizer.encode(prompt + start, add_special_tokens=False)[: len(ids)] != ids:
                logger.info(
                    "the chat template of %s ends a prompt in %r, which the tokenizer joins with the answer: prompts "
                    "will end before it",
                    name_of(self._tokenizer),
                    prompt[len(prompt.rstrip()) :],
                )
                self.source = _SHORT_PROMPT % self.source.removesuffix("\n")
                self._layouts.clear()
                return

    def _first_words(self, last_token: str) -> list[str]:
        """Beginnings of answers, above all those of tokens that begin as the last token of a prompt ends."""
        vocabulary = self._tokenizer.get_vocab()
        longer = sorted(
            (token for token in vocabulary if token[1:] and token[0] == last_token[-1]), key=vocabulary.__getitem__
        )
        words = (self._tokenizer.convert_tokens_to_string([token]).strip() for token in longer)
        return ["a", *islice(filter(None, words), self._MAX_WORDS)]

    def _end_of_turn(self, following: str, alone: str) -> str:
        """How much of the text between an answer and the next question the assistant writes.

        Args:
            following: That text.
            alone: What follows the last answer of a conversation.
        """
        pairs = zip(following, alone, strict=False)
        common = next((place for place, (one, other) in enumerate(pairs) if one != other), len(alone))
        ends = [match.end() for match in self._control.finditer(following) if match.end() <= common]
        if ends:
            return following[: ends[-1]]
        # Some end the last answer with another token than earlier ones.
        earlier, last = self._control.search(following), self._control.search(alone)
        if earlier and last and following[: earlier.start()] == alone[: last.start()]:
            return following[: earlier.end()]
        return ""

    def _after_answer(self, roles: tuple[str, ...]) -> str:
        """The text between the answer in message 1 and what comes next."""
        text = self._render(_marked(roles), False)
        self._check_marks(text, roles)
        pieces = _split_at_marks(text)
        place = pieces.index(1) + 1
        return str(pieces[place]) if place < len(pieces) else ""

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, **variables: Any) -> str:
        try:
            return render(
                self.source,
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._tokenizer.special_tokens_map, **variables},
            )
        except _RENDERING_ERRORS as error:
            raise ValueError(
                f"the chat template of {name_of(self._tokenizer)} cannot render the roles "
                f"{[message['role'] for message in messages]}: {error}; correct the order of the turns, or choose "
                "--version llama3 or chatml"
            ) from error

    def _check_marks(self, text: str, roles: Sequence[str]) -> None:
        if [int(match[1]) for match in _MARK.finditer(text)] != list(range(len(roles))):
            raise ValueError(
                f"the chat template of {name_of(self._tokenizer)} drops, repeats or reorders messages with the roles "
                f"{list(roles)}; choose another --version ({', '.join(VERSIONS[:-1])})"
            )


@dataclass(frozen=True)
class _Layout:
    """A segment before the contents are known."""

    pieces: tuple[str | int, ...]
    """Text of the template, and numbers of messages whose contents belong there."""
    supervised: bool


def any_of(names: set[str] | frozenset[str]) -> re.Pattern[str]:
    """Matches any of the names, the longest first; nothing if there are none."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")


_MARK = re.compile("\ue000([0-9]+)\ue001")  # private-use characters: no template tests for them or strips them


def _marked(roles: Sequence[str]) -> list[dict[str, str]]:
    """Messages with marks in place of their contents."""
    return [{"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(roles)]


def _split_at_marks(text: str) -> tuple[str | int, ...]:
    pieces = _MARK.split(text)  # text, number, text, number, …, text
    return tuple(int(piece) if place % 2 else piece for place, piece in enumerate(pieces) if piece)


def _is_sought(name: str, source: str) -> bool:
    """Whether a template looks for a name in its contents: `name in …`, or the first argument of a method."""
    quoted = rf"""['"]{re.escape(name)}['"]"""
    return re.search(rf"{quoted}\s+in\b|\.\w+\(\s*{quoted}", source) is not None
