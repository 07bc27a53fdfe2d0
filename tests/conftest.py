"""The environment of all tests, and a fresh small model."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path


# Before torch is imported: on busy shared cores two threads are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from model_parts import build_tiny_model
from training_parts import make_language_model, make_records, make_vision_tower

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration


@pytest.fixture(scope="session", autouse=True)
def _interrupts_are_not_ignored() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, and processes inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tiny_model() -> MetaMorphForConditionalGeneration:
    """A fresh small model in evaluation mode."""
    return build_tiny_model()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads to compute with, which may add in any order."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny language model `llm`, a vision tower `tower`, `data.jsonl` and `images`. Read only."""
    folder = tmp_path_factory.mktemp("parts")
    make_language_model(folder / "llm")
    make_vision_tower(folder / "tower")
    make_records(folder)
    return folder
