"""What the files of a processor may hold, checked before Transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metamorph.files.model_files import read_json_object
from metamorph.models.pretrained import find_file


PROCESSOR_FILE = "processor_config.json"
_AUDIO_FILE = "audio_tokenizer_config.json"
_FIELDS = (
    "chat_template",
    "image_aspect_ratio",
    "image_processor",
    "mm_use_im_patch_token",
    "mm_use_im_start_end",
    "num_image_tokens",
    "processor_class",
    "version",
)
"""What `processor_config.json` may hold."""


def check_processor_files(name_or_path: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse what makes Transformers load more than a tokenizer and an image processor: any model, unchecked."""
    if find_file(name_or_path, _AUDIO_FILE, **kwargs) is not None:
        raise ValueError(f"{name_or_path} holds {_AUDIO_FILE}, which names a model to load: remove it")
    file = find_file(name_or_path, PROCESSOR_FILE, **kwargs)
    unknown = set() if file is None else read_json_object(file).keys() - set(_FIELDS)
    if unknown:
        raise ValueError(f"{file}: {min(unknown)} is not a field of a MetaMorphProcessor: remove it")
