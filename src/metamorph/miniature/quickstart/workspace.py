"""The folder of a quickstart run, and what is checked before anything heavy is imported."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from metamorph.flags.checks import check_output_folder
from metamorph.flags.extras import install_command
from metamorph.mini import PARTS, asset_path


OWN_FOLDERS = ("data", "recipes", "connector", "model", "visualizer", "pictures")
"""Folders that a run creates, and replaces when it is repeated."""
MARKER_FILE = ".metamorph-quickstart"
"""Written first, so that only a folder of the quickstart is ever cleared."""
METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
EXTRAS = ("diffusers", "matplotlib")
"""Libraries that only the extra `quickstart` installs."""
MAX_THREADS = 4
"""Models this small do not gain from more."""


class Workspace:
    """The folders of one run in `root`; `assets` are those of mini-siglip, mini-llama and mini-sd."""

    def __init__(self, root: Path, assets: dict[str, Path], seed: int) -> None:
        self.root, self.assets, self.seed = root, assets, seed
        self.data = root / "data"
        self.connector = root / "connector"  # result of stage 1
        self.model = root / "model"  # result of stage 2
        self.visualizer = root / "visualizer"
        self.figures = root / "pictures"  # PNG files of the report

    def clear(self) -> None:
        """Create the folder and remove the results of an earlier run, whose checkpoint would be resumed."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / MARKER_FILE).touch()
        for name in OWN_FOLDERS:
            shutil.rmtree(self.root / name, ignore_errors=True)
        for name in (METRICS_FILE, REPORT_FILE):
            (self.root / name).unlink(missing_ok=True)


def open_workspace(output_dir: Path, assets_dir: Path | None = None, seed: int = 0) -> Workspace:
    """The workspace in `output_dir`, with the assets of `assets_dir` or by default of the package.

    Raises a `FileNotFoundError` for a missing asset, and a `NotADirectoryError` if `output_dir` is a file or holds
    something that the quickstart did not create.
    """
    assets = {name: assets_dir / name if assets_dir else asset_path(name) for name in PARTS}
    if missing := [name for name, folder in assets.items() if not folder.is_dir()]:
        raise FileNotFoundError(f"--assets-dir {assets_dir} lacks {', '.join(missing)}")
    check_output_folder(str(output_dir), "--output-dir")
    found = sorted(path.name for path in output_dir.glob("*"))
    foreign = [name for name in found if name not in (*OWN_FOLDERS, METRICS_FILE, REPORT_FILE, MARKER_FILE)]
    if foreign or (found and not (output_dir / MARKER_FILE).is_file()):
        raise NotADirectoryError(
            f"--output-dir {output_dir} holds {', '.join((foreign or found)[:3])}, which the quickstart did not "
            "create; give a new folder"
        )
    return Workspace(output_dir, assets, seed)


def require_extras() -> None:
    """Raise a `ValueError` with the command to run if libraries of the extra `quickstart` are missing."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the quickstart needs {' and '.join(missing)}: {install_command('quickstart')}")


def thread_count() -> int:
    """Threads to compute with: `OMP_NUM_THREADS` if set, else the number of cores, at most `MAX_THREADS`."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else min(MAX_THREADS, os.cpu_count() or 1)
