"""Files that safetensors writes get the permissions of other new files."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from metamorph.files.permissions import save_file


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_and_stays(umask: int, expected: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors", {"format": "pt"})
    finally:
        assert os.umask(before) == umask
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == expected
    assert load_file(tmp_path / "a.safetensors")["weight"].tolist() == [1, 1]
