"""Bad pictures of all processes are counted together, and too many stop all of them at the same point."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from metamorph.data.bad_records import TooManyBadRecordsError
from metamorph.models.image_files import MediaError
from metamorph.visualizer_training.pictures.bad_pictures import BadPictures


pytestmark = pytest.mark.distributed


def count(rank: int, folder: str) -> None:
    """Both processes meet picture 0 of ten, the second 5, too, and later the first 7; two may be bad."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    bad, device = BadPictures(10, "skip", 0.2), torch.device("cpu")
    bad.merge(device)
    for index in (0, 5):
        if index <= 5 * rank:
            bad.note(index, MediaError("unreadable_image", f"{index}.png"))
    bad.merge(device)
    first = bad.num_bad
    third = MediaError("unreadable_image", "7.png")
    if rank == 0:
        with pytest.raises(TooManyBadRecordsError):  # alone, too: it knows of the others
            bad.note(7, third)
    stopped = False
    try:
        bad.merge(device)
    except TooManyBadRecordsError:
        stopped = True
    torch.save([first, bad.num_bad, stopped], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_bad_pictures_of_two_processes_are_counted_together(tmp_path: Path) -> None:
    multiprocessing.spawn(count, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        # Of the second process none is new where the first has met it: 0 is counted once.
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == [2, 3, True]
