"""The environment of all tests, and a fresh small model."""

import os
from collections.abc import Iterator


# Before torch is imported: on busy shared cores two threads are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from model_parts import build_tiny_model


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
