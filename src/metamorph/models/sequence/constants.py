"""Tokens and values that several modules must agree on.

Token *ids* are never constants: they come from the tokenizer.
"""

IGNORE_INDEX = -100
"""Label of positions that carry no text loss (the value `torch.nn.functional.cross_entropy` ignores)."""

ASPECT_RATIOS = ("square", "pad")
"""The values of `--image_aspect_ratio`: stretch to a square, or pad to a square first."""

DEFAULT_IMAGE_TOKEN = "<image>"
"""Marks an image in text and data; also the placeholder token unless `mm_use_im_patch_token` is set."""

DEFAULT_IM_PATCH_TOKEN = "<im_patch>"
"""The placeholder token with `mm_use_im_patch_token=True`."""

DEFAULT_IM_START_TOKEN = "<image_start>"
DEFAULT_IM_END_TOKEN = "<image_end>"

ROLES = ("system", "user", "assistant")
"""The roles that a message may have."""

VERSIONS = ("llama3", "llama3_original", "chatml", "plain", "auto")
"""The values of `--version`."""
