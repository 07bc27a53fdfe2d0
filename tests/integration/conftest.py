"""Fixtures of the tests that train."""

from pathlib import Path

import pytest
from training_parts import make_language_model, make_records, make_vision_tower


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny language model `llm`, a vision tower `tower`, `data.jsonl` and `images`. Read only."""
    folder = tmp_path_factory.mktemp("parts")
    make_language_model(folder / "llm")
    make_vision_tower(folder / "tower")
    make_records(folder)
    return folder
