"""The tokens that stand for images, added to any tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from metamorph.models.sequence.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_PATCH_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
)


@dataclass(frozen=True)
class ImageTokens:
    """Ids of the image tokens in one tokenizer."""

    image: int
    """Id of the placeholder; it is repeated `num_image_tokens` times for each image."""
    image_start: int | None
    """Id of `<image_start>`, or None when images are not wrapped."""
    image_end: int | None
    """Id of `<image_end>`, or None when images are not wrapped."""
    new: list[str]
    """The tokens that the tokenizer did not know before the first call, in the order of their ids."""


def add_image_tokens(
    tokenizer: PreTrainedTokenizerBase,
    *,
    mm_use_im_start_end: bool,
    mm_use_im_patch_token: bool,
) -> ImageTokens:
    """Make sure that `tokenizer` has the image tokens, and return their ids.

    The tokenizer is changed in place. Tokens that it already has keep their ids, so a second call adds nothing, and
    returns the same: the language model has not seen these tokens, whoever adds them first. `<image_start>` and
    `<image_end>` come first: their embedding rows are trained. The placeholder's row means nothing: visual tokens
    overwrite what is looked up there.

    Args:
        tokenizer: Any tokenizer of Transformers.
        mm_use_im_start_end: Whether images stand between `<image_start>` and `<image_end>`.
        mm_use_im_patch_token: Whether the placeholder is `<im_patch>` instead of `<image>`.

    Returns:
        The ids, and the list of the tokens that are new.
    """
    wanted = image_token_names(mm_use_im_start_end=mm_use_im_start_end, mm_use_im_patch_token=mm_use_im_patch_token)
    vocabulary = tokenizer.get_vocab()
    # Kept with the tokenizer object, not in its files: in a finished model these tokens are known.
    added: set[str] = vars(tokenizer).setdefault("_added_image_tokens", set())
    added.update(token for token in wanted if token not in vocabulary)
    # Known tokens are passed too: one that is an ordinary word so far becomes a special token.
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in wanted], special_tokens=True)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in wanted}
    return ImageTokens(
        image=ids[wanted[-1]],
        image_start=ids.get(DEFAULT_IM_START_TOKEN),
        image_end=ids.get(DEFAULT_IM_END_TOKEN),
        new=[token for token in wanted if token in added],
    )


def image_token_names(*, mm_use_im_start_end: bool, mm_use_im_patch_token: bool) -> list[str]:
    """The image tokens as they are spelt: `<image_start>` and `<image_end>` if images are wrapped, and the placeholder.

    Args:
        mm_use_im_start_end: Whether images stand between `<image_start>` and `<image_end>`.
        mm_use_im_patch_token: Whether the placeholder is `<im_patch>` instead of `<image>`.
    """
    wrappers = [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN] if mm_use_im_start_end else []
    return [*wrappers, DEFAULT_IM_PATCH_TOKEN if mm_use_im_patch_token else DEFAULT_IMAGE_TOKEN]
