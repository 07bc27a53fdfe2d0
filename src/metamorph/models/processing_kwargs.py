"""Keyword arguments of the processor, in the groups of Transformers' processors; one without effect is refused."""

# No `from __future__ import annotations` here: Transformers reads the groups off the annotations.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import ProcessorMixin
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, TextKwargs

from metamorph.flags.parser import nearest


class MetaMorphImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments for images."""

    allow_urls: bool
    """Whether images may be http(s) addresses, which are fetched; False by default."""


class MetaMorphProcessingKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of [`MetaMorphProcessor`], flat or in their groups."""

    images_kwargs: MetaMorphImagesKwargs


_GROUPS: Mapping[str, Any] = {"text_kwargs": TextKwargs, "images_kwargs": MetaMorphImagesKwargs}
_OTHERS = ("common_kwargs", "return_mm_token_type_ids")
_ACTING = (
    *("add_special_tokens", "allow_urls", "input_data_format", "max_length", "pad_to_multiple_of", "padding"),
    *("padding_side", "return_attention_mask", "return_mm_token_type_ids", "return_tensors", "truncation"),
)
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "data_format": ("channels_first",),
    "device": ("cpu",),
    "disable_grouping": (True,),
    "do_convert_rgb": (True,),
    "verbose": (True,),
}
"""Values that ask for what happens anyway, besides the image processor's own."""
_UNLIMITED = 10**6  # tokenizers without a maximum length have a `model_max_length` above this


def is_processor_argument(name: str) -> bool:
    """Whether a keyword argument belongs to the processor, not to a chat template."""
    return name in (*_GROUPS, *_OTHERS) or any(name in group.__annotations__ for group in _GROUPS.values())


@dataclass(frozen=True)
class ProcessorOptions:
    """The keyword arguments of one call, merged and checked."""

    padding: bool | str | None = None
    padding_side: str = "left"
    pad_to_multiple_of: int | None = None
    max_length: int | None = None
    limit: int | None = None
    """Most tokens of a row."""
    add_special_tokens: bool = True
    return_attention_mask: bool = True
    return_mm_token_type_ids: bool = False
    return_tensors: str | None = None
    allow_urls: bool = False
    input_data_format: str | None = None

    def __post_init__(self) -> None:
        if self.padding not in (True, False, None, "longest", "max_length", "do_not_pad"):
            raise ValueError(f"padding={self.padding!r} is unknown; use True, 'longest', 'max_length' or False")
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={self.padding_side!r} is unknown; use 'left' or 'right'")
        if self.padding == "max_length" and self.max_length is None:
            raise ValueError("padding='max_length' needs max_length")

    @classmethod
    def of(cls, processor: ProcessorMixin, arguments: Mapping[str, Any]) -> "ProcessorOptions":
        """Merge flat and grouped keyword arguments; refuse those that do not exist or have no effect."""
        known = {name: value for name, value in arguments.items() if is_processor_argument(name)}
        if unknown := [name for name, value in arguments.items() if value is not None and name not in known]:
            near = nearest(unknown[0], {*_GROUPS, *_OTHERS, *_ACTING})
            hint = f"; is {near} meant?" if near else ""
            raise TypeError(f"{type(processor).__name__} takes no argument {unknown[0]!r}{hint}")
        merged = processor._merge_kwargs(MetaMorphProcessingKwargs, **known)
        text, images = merged["text_kwargs"], merged["images_kwargs"]
        for name, value in images.items():
            _check_acts(name, value, getattr(processor.image_processor, name, None))
        for name, value in text.items():
            _check_acts(name, value, own=False)
        fields = {name: value for name, value in {**images, **text}.items() if name in _ACTING and value is not None}
        if known.get("return_mm_token_type_ids"):
            fields["return_mm_token_type_ids"] = True
        tokenizer = processor.tokenizer
        truncation = fields.pop("truncation", None)
        return cls(
            limit=_limit(truncation, fields.get("max_length"), fields.get("padding"), tokenizer.model_max_length),
            **{"padding_side": tokenizer.padding_side, **fields},
        )

    def pad(self, rows: Sequence[list[int]], value: int) -> list[list[int]]:
        """Pad rows to equal length, if padding is asked for."""
        # Not `tokenizer.pad`: it refuses tokenizers without a pad token, and does not pad `assistant_masks`.
        if self.padding in (None, False, "do_not_pad"):
            return list(rows)
        length = max(map(len, rows), default=0)
        if self.padding == "max_length":
            length = max(length, self.max_length or 0)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        fills = ([value] * (length - len(row)) for row in rows)
        is_left = self.padding_side == "left"
        return [[*fill, *row] if is_left else [*row, *fill] for fill, row in zip(fills, rows, strict=True)]


def _check_acts(name: str, value: Any, own: Any) -> None:
    """Refuse a value without effect, unless it asks for what happens anyway: `own`, or nothing."""
    if name in _ACTING or value is None or value == (own or False) or value in _HARMLESS.get(name, ()):
        return
    raise ValueError(f"{name}={value!r} is not supported by MetaMorph's processor: leave it out")


def _limit(truncation: Any, max_length: int | None, padding: Any, longest: int) -> int | None:
    if truncation in (None, False, "do_not_truncate"):
        if max_length is not None and padding != "max_length":
            raise ValueError(f"max_length={max_length} does nothing without truncation=True or padding='max_length'")
        return None
    if truncation not in (True, "longest_first", "only_first"):
        raise ValueError(f"truncation={truncation!r} is unknown; use True, 'longest_first' or False")
    if max_length is None and longest > _UNLIMITED:
        raise ValueError("truncation needs max_length: the tokenizer has no maximum length")
    return longest if max_length is None else max_length
