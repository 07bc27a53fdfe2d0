"""Text to ids: names of control tokens count in the text of a template, and are plain text in contents."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from metamorph.models.sequence.chat_template import ChatTemplate, any_of, common_length


_BREAK = "\ue002"
"""Private-use character in contents: no control token here. It breaks a name, or precedes one of a single character."""
_ITSELF, _NOTHING = "\ue003", "\ue004"  # after `_BREAK`: the content itself has that character; it precedes nothing
_BREAKS = re.compile(f"{_BREAK}([{_ITSELF}{_NOTHING}]?)")
_WORDS = re.compile(r"\A.*\S", re.DOTALL)  # a text without the white space at its end, which templates strip
_CONTEXT = 64  # characters at the end of a text that are searched for a control token; no name is longer


class TextEncoder:
    """Encodes text in which contents cannot forge control tokens. Threads may share it.

    A tokenizer finds control tokens wherever their names occur. A content is therefore hidden before it is put into a
    template: a character of our own breaks the names. Text between two control tokens that contains this character is
    then spelt by the parts of the tokenizer (normalizer, pre-tokenizer, model), which know no added tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # None for tokenizers in Python
        controls = template.control_tokens
        self._controls = frozenset(tokenizer.convert_tokens_to_ids(sorted(controls))) - {tokenizer.unk_token_id}
        self._forbidden = {False: _starts(controls), True: _starts(controls - template.thought_tokens)}
        added = {token.content for token in tokenizer.added_tokens_decoder.values()} | controls
        short = any_of({name for name in added if len(name) == 1}).pattern
        self._added = re.compile(
            f"({any_of({name for name in added if len(name) > 1}).pattern}|(?<!{_BREAK})(?:{short}))"
        )
        beginnings = {name[:length] for name in controls for length in range(1, len(name))}
        self._begun = {
            last: tuple(begun for begun in beginnings if begun[-1] == last) for last in {b[-1] for b in beginnings}
        }
        self._context_ids: dict[str, list[int]] = {}
        # The tokenizer finds these in normalised text: <|user|> in "<|USER|>", for example.
        late = {token.content for token in tokenizer.added_tokens_decoder.values() if token.normalized} & controls
        self._late = {
            is_answer: any_of({self._normalized(name) for name in names}) if names else None
            for is_answer, names in ((False, late), (True, late - template.thought_tokens))
        }

    def hide(self, content: str, is_answer: bool) -> str:
        """Break the names of control tokens in a content; an answer may contain those of its thoughts."""
        hidden = self._forbidden[is_answer].sub(_break, self.escape(content))
        late = self._late[is_answer]
        if late is not None and late.search(self._normalized(hidden)):
            # The tokenizer would normalise each piece, so each is spelt.
            pieces = self._added.split(hidden)
            pieces[::2] = [_WORDS.sub(rf"\g<0>{_BREAK}{_NOTHING}", piece) for piece in pieces[::2]]
            hidden = "".join(pieces)
        if hidden.endswith(self._begun.get(hidden[-1:], ())):
            hidden += _BREAK + _NOTHING  # the template must not complete the name
        return hidden

    @staticmethod
    def escape(text: str) -> str:
        """Keep a literal `_BREAK` in the text. Control tokens count."""
        return text.replace(_BREAK, _BREAK + _ITSELF)

    @staticmethod
    def reveal(text: str) -> str:
        """Undo `hide` or `escape`."""
        return _BREAKS.sub(lambda found: _BREAK if found[1] == _ITSELF else "", text) if _BREAK in text else text

    def encode_after(self, before: str, text: str) -> tuple[list[int], int, int]:
        """Ids of text with hidden contents that follows `before`: joined, they are the ids of both texts together.

        Also returns how many of the last ids of `before` they replace, and how many of them begin in `before`. Some
        tokenizers put a space before the first word of a text, and some tokens include the white space after them.
        """
        context = self._context(before)
        if not context:
            return self.encode(text), 0, 0
        known = self._context_ids.get(context)
        if known is None:
            known = self._context_ids[context] = self.encode(context)
        ids = self.encode(context + text)
        return (ids[len(known) :], 0, 0) if ids[: len(known)] == known else self._joined(before, text)

    def _joined(self, before: str, text: str) -> tuple[list[int], int, int]:
        """For a tokenizer that joins the end of one text and the beginning of the next in a token."""
        last = next(reversed(list(self._added.finditer(before))), None)
        before = before if last is None else before[last.start() :]
        old, new = self.encode(before), self.encode(before + text)
        common = common_length(old, new)
        length = len(self._decode(old))
        stop = next((stop for stop in range(common, len(new)) if len(self._decode(new[:stop])) >= length), len(new))
        return new[common:], len(old) - common, stop - common

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _context(self, before: str) -> str:
        """The control token at the end of a text, else its last character."""
        end = before[-_CONTEXT:]
        if not end or end.endswith((_BREAK, _ITSELF, _NOTHING)):
            return ""
        match = next((match for match in self._added.finditer(end) if match.end() == len(end)), None)
        return end[-1] if match is None else match[0]

    def encode(self, text: str) -> list[int]:
        """Ids of text with hidden contents."""
        if _BREAK not in text:
            return self._tokenize(text)
        ids: list[int] = []
        for piece in self._added.split(text):
            if _BREAK in piece:
                ids += self._spell(self.reveal(piece))
            elif piece:
                ids += self._tokenize(piece)
        return ids

    def _tokenize(self, text: str) -> list[int]:
        backend = self._backend
        if backend is None or backend.truncation or backend.padding or backend.encode_special_tokens:
            # A switch of the tokenizer is on, which this call does not use.
            return self._tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False).input_ids
        return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _spell(self, text: str) -> list[int]:
        """Ids of plain text. Not by `split_special_tokens=True`, which is a switch of the shared tokenizer."""
        if self._backend is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        else:
            normal = self._normalized(text)
            splitter = self._backend.pre_tokenizer
            words = [normal] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(normal)]
            ids = [token.id for word in words for token in self._backend.model.tokenize(word)]
        if self._controls.isdisjoint(ids):
            return ids
        # A word-level tokenizer cannot spell the name of a control token: it is an unknown word.
        unknown = self._tokenizer.unk_token_id
        replaced = (unknown if token in self._controls else token for token in ids)
        return [token for token in replaced if token is not None]

    def _normalized(self, text: str) -> str:
        normalizer = None if self._backend is None else self._backend.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)


def _starts(names: frozenset[str]) -> re.Pattern[str]:
    """Matches the first character of each name in a text, also of overlapping ones; group 1 is a one-character name."""
    single = any_of({name for name in names if len(name) == 1}).pattern
    return re.compile(f"({single})|(?={any_of({name for name in names if len(name) > 1}).pattern}).", re.DOTALL)


def _break(start: re.Match[str]) -> str:
    return _BREAK + start[0] if start[1] else start[0] + _BREAK
