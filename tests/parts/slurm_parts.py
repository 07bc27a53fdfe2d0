"""Jobs for tests: submit a script, wait for something to happen, read what it left."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds until a test gives up; nothing is concluded from how long a job takes
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def why_not() -> str:
    """Why the tests of this folder cannot run here; empty if they can."""
    if shutil.which("sbatch") is None:
        return "no Slurm on this machine: there is no sbatch (Debian: apt-get install slurm-wlm munge)"
    if "SLURM_CONF" not in os.environ:
        return "no Slurm is running for the tests: `make test-slurm` starts one and runs them"
    return ""


needs_slurm = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]


@dataclass
class Job:
    """A submitted job."""

    number: str
    log: Path
    """What the job writes, over all its starts."""

    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def story(self) -> str:
        """What Slurm and the job say about it, for messages."""
        return run("scontrol", "show", "job", self.number) + self.text()

    def field(self, name: str) -> str:
        """A field of `scontrol show job`, for example JobState."""
        shown = run("scontrol", "show", "job", "--oneliner", self.number)
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found, f"{name} is not in {shown}"
        return found[1]

    def wait_for(self, what: str, happened: Callable[[], bool]) -> None:
        """Wait until `happened()`; fails when the job ends before, or when patience does."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            state = self.field("JobState")
            assert state not in ENDED or happened(), f"job {state} before {what}:\n{self.story()}"
            assert time.monotonic() < deadline, f"{what} did not happen in {PATIENCE} s; job {state}:\n{self.story()}"
            time.sleep(0.2)

    def wait_for_end(self) -> str:
        """Wait until it has ended; its last state."""
        self.wait_for("the end", lambda: self.field("JobState") in ENDED)
        return self.field("JobState")

    def reach_time_limit(self) -> None:
        """Do what Slurm does shortly before the time limit, as `#SBATCH --signal=B:USR1@600` asks it to."""
        run("scancel", "--batch", "--signal=USR1", self.number)

    def give_way(self) -> None:
        """Let a job that takes both nodes and goes before this one come."""
        run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")

    def cancel(self) -> None:
        """Cancel it, as its owner would."""
        run("scancel", self.number)

    def wait_for_requeue(self) -> None:
        """Wait until it is back in the queue; Slurm starts it again by itself."""
        self.wait_for("its return to the queue", lambda: self.field("JobState") == "PENDING")


def run(*command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command of Slurm's; its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, cwd=cwd, check=False)
    assert done.returncode == 0, f"{command} failed: {done.stderr}"
    return done.stdout


def submit(script: str, folder: Path, variables: dict[str, object], *flags: str) -> Job:
    """Submit a script of the repository to both nodes, from `folder`, where its log comes to lie.

    Args:
        script: Path in the repository.
        folder: Folder of the job.
        variables: Its environment variables.
        flags: Arguments of the script.
    """
    env = os.environ | {
        "METAMORPH_HOME": str(ROOT),
        "PYTHON": sys.executable,
        "MASTER_ADDR": "127.0.0.1",  # virtual nodes have no host names
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in variables.items()},
    }
    command = ["sbatch", "--parsable", "--nodes=2", str(ROOT / script), *flags]
    number = run(*command, env=env, cwd=folder).strip()
    name = re.search(r"--job-name=(\S+)", (ROOT / script).read_text())
    assert name
    return Job(number, folder / f"{name[1]}-{number}.log")


def losses(output_dir: Path) -> list[tuple[int, float]]:
    """Step and loss of each training log line of a run."""
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [(line["step"], line["loss"]) for line in state["log_history"] if "loss" in line]
