"""The tokens for images, added to any tokenizer."""

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
    """Id of the placeholder, which is repeated `num_image_tokens` times for each image."""
    image_start: int | None
    """Id of `<image_start>`, or None when images are not wrapped."""
    image_end: int | None
    """Id of `<image_end>`, or None when images are not wrapped."""
    new: list[str]
    """Tokens that the tokenizer lacked before the first call, in the order of their ids."""


def add_image_tokens(
    tokenizer: PreTrainedTokenizerBase,
    *,
    mm_use_im_start_end: bool,
    mm_use_im_patch_token: bool,
) -> ImageTokens:
    """Add the image tokens to `tokenizer` (in place) if it lacks them, and return their ids.

    A second call adds nothing and returns the same, including the new tokens: the language model has never seen them,
    whoever adds them first. `<image_start>` and `<image_end>` come first, because their embedding rows are trained. The
    placeholder's row is unused: visual tokens replace its embedding.
    """
    wanted = image_token_names(mm_use_im_start_end=mm_use_im_start_end, mm_use_im_patch_token=mm_use_im_patch_token)
    vocabulary = tokenizer.get_vocab()
    # Stored on the object, not in its files: a finished model knows these tokens.
    added: set[str] = vars(tokenizer).setdefault("_added_image_tokens", set())
    added.update(token for token in wanted if token not in vocabulary)
    # Known tokens too: one that is an ordinary word becomes a special token.
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in wanted], special_tokens=True)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in wanted}
    return ImageTokens(
        image=ids[wanted[-1]],
        image_start=ids.get(DEFAULT_IM_START_TOKEN),
        image_end=ids.get(DEFAULT_IM_END_TOKEN),
        new=[token for token in wanted if token in added],
    )


def image_token_names(*, mm_use_im_start_end: bool, mm_use_im_patch_token: bool) -> list[str]:
    """Names of the image tokens: `<image_start>` and `<image_end>` if images are wrapped, and the placeholder."""
    wrappers = [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN] if mm_use_im_start_end else []
    return [*wrappers, DEFAULT_IM_PATCH_TOKEN if mm_use_im_patch_token else DEFAULT_IMAGE_TOKEN]
