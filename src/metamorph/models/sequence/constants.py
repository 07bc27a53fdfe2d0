"""Tokens and values that several modules share. Token *ids* are never constants: they come from the tokenizer."""

IGNORE_INDEX = -100  # label of positions without text loss, as in `torch.nn.functional.cross_entropy`

ASPECT_RATIOS = ("square", "pad")  # values of `--image_aspect_ratio`: stretch to a square, or pad to a square first

DEFAULT_IMAGE_TOKEN = "<image>"
"""Marks an image in text and data; also the placeholder token unless `mm_use_im_patch_token` is set."""

DEFAULT_IM_PATCH_TOKEN = "<im_patch>"  # placeholder token with `mm_use_im_patch_token=True`

DEFAULT_IM_START_TOKEN = "<image_start>"
DEFAULT_IM_END_TOKEN = "<image_end>"

ROLES = ("system", "user", "assistant")  # roles of messages

VERSIONS = ("llama3", "llama3_original", "chatml", "plain", "auto")  # values of `--version`

OTHER_VERSION = f"choose another --version ({', '.join(VERSIONS[:-1])})"
"""Advice in errors about a tokenizer's own template."""
