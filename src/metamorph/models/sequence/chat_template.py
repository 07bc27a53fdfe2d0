"""A Jinja chat template, divided into text that is learned and text that is only read."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from metamorph.models.sequence.bounded_jinja import render, variables_of
from metamorph.models.sequence.constants import OTHER_VERSION
from metamorph.models.sequence.template_date import name_of, with_fixed_date


logger = logging.getLogger(__name__)

_SYSTEM_IN_FIRST_TURN = (
    "{% set messages = [{'role': 'user', 'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']}] "
    "+ messages[2:] if messages | length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user' "
    "else messages %}"
)
"""Prepended to a template that cannot write a system message."""

_LAST_TOKEN = "{{ %r if not add_generation_prompt and messages and messages[-1]['role'] == 'assistant' else '' }}"
"""Appended to a template that does not end an answer."""

_SHORT_PROMPT = (
    "{%% set rendered %%}{{ '' }}%s{{ '' }}{%% endset %%}{{ rendered.rstrip() if add_generation_prompt else rendered }}"
)
"""Wraps a template whose prompts end in white space that belongs to the answer's first token."""

_RENDERING_ERRORS = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError),
    *(SyntaxError, TypeError, ValueError),
)
"""Errors of a faulty template: Jinja's own and those of the expressions in it."""


_Layout = tuple[tuple[str | int, ...], bool]  # a segment with text and indices of messages, whose contents go there


@dataclass(frozen=True)
class Segment:
    """A part of the text of a conversation; `supervised` if the assistant writes it."""

    text: str
    supervised: bool


class ChatTemplate:
    """A Jinja chat template, divided into text that is learned and text that is only read.

    The full conversation is rendered once, and once up to each answer with a generation prompt. That prompt must be a
    prefix of the full text: the model sees the same text in training and in use. An answer is learned from there up to
    the token that ends the turn.

    If the text depends on the roles alone, this is done once for each order of roles, with marks instead of contents. A
    template that looks at contents (to move thoughts, for example) is rendered with them; `reads_contents=False` says
    that it does not. `controls` are tokens that the template writes, for a tokenizer that has them as ordinary words.

    Four things are changed in the source, and saved with a trained model: a system message that the template refuses,
    drops or puts after a later turn goes to the start of the first user message; an answer without an end gets a token
    that ends it; white space at the end of a prompt, which the tokenizer would join with the first word of an answer,
    is learned with the answer instead; and a date is that of the day on which this object was made. A template that is
    faulty, or cannot be used for training, is a `ValueError`.
    """

    _MAX_CACHED = 1024  # orders of roles; a data set has few
    _MAX_WORDS = 64  # tokens tried as the beginning of an answer; a vocabulary starts with the most frequent ones

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        reads_contents: bool = True,
        controls: Sequence[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._name = f"the chat template of {name_of(tokenizer)}"
        self._reads_contents = reads_contents
        self._layouts: dict[tuple[tuple[str, ...], bool], list[_Layout]] = {}
        # Not white space, which some tokenizers have as added tokens.
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        self._control = any_of({*added, *controls})
        self.source: str = with_fixed_date(source, tokenizer)
        """The Jinja template as changed."""
        self._place_system()
        self._gap, self._tail, self._last_tail = self._find_ends()
        self._shorten_prompts()
        ends = [self._control.findall(tail)[-1] for tail in (self._last_tail, self._tail) if tail]
        self.end_tokens: tuple[str, ...] = tuple(dict.fromkeys(ends))
        """Tokens that end an answer: the last one of a conversation, and earlier ones if they differ."""
        prompt = self._render(_marked(("system", "user")), True)
        self.writes_bos: bool = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        """Whether a conversation starts with the BOS token."""
        lead = self._before_answer()
        text = prompt + lead + self._gap + self._last_tail
        written = {name for name in added if name in self.source} | set(self._control.findall(text))
        plain = {name for name, token in added.items() if not token.special}
        self.control_tokens: frozenset[str] = frozenset({*added, *controls} - (plain - written))
        """Names of tokens that contents must not give: the special ones, and all that the template writes."""
        begun = self._control.findall(lead)
        thoughts = {name for name in plain & written if name in begun or _is_sought(name, self.source)}
        self.thought_tokens: frozenset[str] = frozenset(thoughts)
        """Those that answers may give, such as `</think>`: the template begins answers with them or looks for them."""
        own = {"messages", "tools", "documents", "add_generation_prompt"}
        self._variables = variables_of(self.source) - own

    def __deepcopy__(self, memo: dict) -> "ChatTemplate":
        """Not copied: it never changes, and a copy of its tokenizer would be large."""
        return self

    def write(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[Segment]:
        """Write a conversation as segments of text, alternately supervised and not.

        The text for `messages[:-1]` with a generation prompt is a prefix of that for `messages` if the last one is the
        assistant's.

        Names of control tokens in the contents must be hidden. With `add_generation_prompt` the text ends with what
        precedes an answer. `variables` are further ones of the template, such as `enable_thinking`; one that it does
        not read must be None or false. With variables nothing is supervised: training has none.
        """
        variables = {name: value for name, value in (variables or {}).items() if value is not None}
        known = {name: value for name, value in variables.items() if name in self._variables}
        for name in sorted(variables.keys() - known.keys()):
            if variables[name]:
                raise ValueError(f"{self._name} does not read {name!r}: leave it out")
        if known:
            return [Segment(self._render(messages, add_generation_prompt, **known), False)]
        roles = tuple(message["role"] for message in messages)
        contents = [message["content"] for message in messages]
        segments = [
            Segment("".join(piece if isinstance(piece, str) else contents[piece] for piece in pieces), supervised)
            for pieces, supervised in self._layout(roles, add_generation_prompt)
        ]
        if self._reads_contents:
            text = self._render(messages, add_generation_prompt)
            if text != "".join(segment.text for segment in segments):
                segments = self._take_apart(text, messages, add_generation_prompt)
        return [segment for segment in segments if segment.text]

    def _layout(self, roles: tuple[str, ...], add_generation_prompt: bool) -> list[_Layout]:
        """Segments of a conversation with marks instead of contents."""
        key = (roles, add_generation_prompt)
        layout = self._layouts.get(key)
        if layout is None:
            messages = _marked(roles)
            text = self._render(messages, add_generation_prompt)
            self._check_marks(text, roles)
            segments = self._take_apart(text, messages, add_generation_prompt)
            layout = [(_split_at_marks(segment.text), segment.supervised) for segment in segments]
            if len(self._layouts) >= self._MAX_CACHED:
                self._layouts.clear()
            self._layouts[key] = layout
        return layout

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
                    f"{self._name} prompts for an answer with text that is missing from finished conversations "
                    f"({prompt[-40:]!r}), so training and use would differ; {OTHER_VERSION}"
                )
            tail = self._last_tail if is_last else self._tail
            end = text.find(tail or self._gap, len(prompt))
            if end < 0:
                raise ValueError(
                    f"{self._name} ends the answer of turn {index + 1} with something other than "
                    f"{tail or self._gap!r}; {OTHER_VERSION}"
                )
            end += len(tail)
            segments += [Segment(text[position : len(prompt)], False), Segment(text[len(prompt) : end], True)]
            position = end
        return [*segments, Segment(text[position:], False)]

    def _place_system(self) -> None:
        """Change a template that cannot write a system message: it goes with the first user message."""
        short, long = ("system", "user"), ("system", "user", "assistant", "user", "assistant")
        try:
            for roles in (short, long):
                self._check_marks(self._render(_marked(roles), False), roles)
            if self._render(_marked(long), False).startswith(self._render(_marked(short), True)):
                return
        except ValueError:
            pass
        self.source = _SYSTEM_IN_FIRST_TURN + self.source

    def _find_ends(self) -> tuple[str, str, str]:
        """Text between an answer and the next question, and what of it is learned there and after the last answer."""
        alone = self._after_answer(("user", "assistant"))
        try:
            gap = self._after_answer(("user", "assistant", "user"))
        except ValueError:  # a template for a single question
            gap = alone
        if self._control.search(alone) is None:
            # The model must learn to stop: at the token that begins the next turn, else at the tokenizer's own.
            following = self._control.match(gap.removeprefix(alone))
            end = following[0] if following else self._tokenizer.eos_token
            if end is None:
                raise ValueError(
                    f"{self._name} ends an answer with no token, and there is no end-of-sequence token: the model "
                    f"would never learn to stop. Set eos_token in tokenizer_config.json, or {OTHER_VERSION}"
                )
            logger.info("%s does not end an answer: %r will", self._name, end)
            self.source = self.source.removesuffix("\n") + _LAST_TOKEN % end
            alone += end
        last = list(self._control.finditer(alone))[-1].end()
        return gap, self._end_of_turn(gap, alone), alone[:last]

    def _before_answer(self) -> str:
        """Text between the prompt and the content of an answer."""
        pieces = next(pieces for pieces, supervised in self._layout(("user", "assistant"), False) if supervised)
        return pieces[0] if isinstance(pieces[0], str) else ""

    def _shorten_prompts(self) -> None:
        """End prompts before white space if the tokenizer joins it with what follows.

        The last token of "assistant: " is a space, but the first one of the answer in "assistant: the" may be " the": a
        prompt must have the ids with which the answer was trained.
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
                space = prompt[len(prompt.rstrip()) :]
                logger.info("%s: prompts end before %r, which the tokenizer joins with the answer", self._name, space)
                self.source = _SHORT_PROMPT % self.source.removesuffix("\n")
                self._layouts.clear()
                return

    def _first_words(self, last_token: str) -> list[str]:
        """Beginnings of answers, above all tokens that begin as the last token of a prompt ends."""
        vocabulary = self._tokenizer.get_vocab()
        longer = sorted(
            (token for token in vocabulary if token[1:] and token[0] == last_token[-1]), key=vocabulary.__getitem__
        )
        words = (self._tokenizer.convert_tokens_to_string([token]).strip() for token in longer)
        return ["a", *islice(filter(None, words), self._MAX_WORDS)]

    def _end_of_turn(self, following: str, alone: str) -> str:
        """What the assistant writes of `following`, the text before the next question; `alone` ends the last answer."""
        common = common_length(following, alone)
        ends = [match.end() for match in self._control.finditer(following) if match.end() <= common]
        if ends:
            return following[: ends[-1]]
        # Some end the last answer with another token than earlier ones.
        earlier, last = self._control.search(following), self._control.search(alone)
        if earlier and last and following[: earlier.start()] == alone[: last.start()]:
            return following[: earlier.end()]
        return ""

    def _after_answer(self, roles: tuple[str, ...]) -> str:
        """Text between the answer in message 1 and what comes next."""
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
                f"{self._name} cannot render the roles {[message['role'] for message in messages]}: {error}; correct "
                "the order of the turns, or choose --version llama3 or chatml"
            ) from error

    def _check_marks(self, text: str, roles: Sequence[str]) -> None:
        if [int(match[1]) for match in _MARK.finditer(text)] != list(range(len(roles))):
            raise ValueError(
                f"{self._name} drops, repeats or reorders messages with the roles {list(roles)}; {OTHER_VERSION}"
            )


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common prefix of two sequences."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


def any_of(names: set[str] | frozenset[str]) -> re.Pattern[str]:
    """Matches any of the names, the longest first."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")


_MARK = re.compile("\ue000([0-9]+)\ue001")  # private-use characters: no template tests for them or strips them


def _marked(roles: Sequence[str]) -> list[dict[str, str]]:
    """Messages with marks in place of their contents."""
    return [{"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(roles)]


def _split_at_marks(text: str) -> tuple[str | int, ...]:
    pieces = _MARK.split(text)  # text, number, text, number, …, text
    return tuple(int(piece) if place % 2 else piece for place, piece in enumerate(pieces) if piece)


def _is_sought(name: str, source: str) -> bool:
    """Whether a template searches contents for a name: `name in …`, or the first argument of a method."""
    quoted = rf"""['"]{re.escape(name)}['"]"""
    return re.search(rf"{quoted}\s+in\b|\.\w+\(\s*{quoted}", source) is not None
