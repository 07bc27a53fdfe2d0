"""One process of `test_bad_records_processes.py`: meets its own bad records, and adds up the counts twice."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from metamorph.data.bad_records import BadRecordLimit, RecordCounts, TooManyBadRecordsError
from metamorph.training.callbacks import StopOnBadRecords


NUM_RECORDS = 20


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    limit, log = BadRecordLimit("skip", max_bad_fraction=0.2), RecordCounts(NUM_RECORDS)
    limit.add(log, NUM_RECORDS)
    callback = StopOnBadRecords(limit)
    counts = []
    log.note_bad(0, "missing_image")  # found by both before training
    log.note_bad(1 + rank, "unsupervised")
    callback.check(torch.device("cpu"))
    counts.append(limit.num_bad)
    callback.check(torch.device("cpu"))  # nothing is new
    counts.append(limit.num_bad)
    if rank == 0:  # 5 of 20 are too many, but rank 0 knows 5 of them and rank 1 only 3
        log.note_bad(10, "image_count")
        log.note_bad(11, "image_count")
    error = None
    try:
        callback.check(torch.device("cpu"))
    except TooManyBadRecordsError as raised:
        error = str(raised)
    result = {"counts": counts, "error": error, "bad": limit.bad_by_kind()}
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
