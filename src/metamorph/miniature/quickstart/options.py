"""What `metamorph quickstart` can be asked for, and what is checked before anything heavy is imported."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from metamorph.flags.checks import check_output_folder
from metamorph.flags.extras import install_command
from metamorph.mini import PARTS, asset_path


OWN_FOLDERS = ("data", "recipes", "connector", "model", "visualizer", "pictures")
"""Folders that a run makes in `output_dir`, and makes anew when it is repeated."""
MARKER_FILE = ".metamorph-quickstart"
"""Written first, so that only a folder of the quickstart's own is ever cleared."""
METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
EXTRAS = ("diffusers", "matplotlib")
"""Libraries that only the extra `quickstart` installs."""
MAX_THREADS = 4
"""Models as small as these do not gain from more."""


@dataclass(frozen=True)
class QuickstartOptions:
    """The flags of `metamorph quickstart`.

    Raises:
        ValueError: for a negative seed.
        FileNotFoundError: if `assets_dir` lacks an asset.
        NotADirectoryError: if `output_dir` is a file, or holds something that is not the quickstart's.
    """

    output_dir: Path = Path("out")
    """Gets data, models, pictures, metrics.json and report.html."""
    seed: int = 0
    """Seed of data, weights and noise."""
    fast: bool = False
    """Run every part with a few steps only, to see that it works; nothing is learnt."""
    assets_dir: Path | None = None
    """Folder with mini-siglip, mini-llama and mini-sd; by default those of the package."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} must be 0 or more")
        if self.assets_dir is not None:
            missing = [name for name in PARTS if not (self.assets_dir / name).is_dir()]
            if missing:
                raise FileNotFoundError(f"--assets-dir {self.assets_dir} lacks {', '.join(missing)}")
        self._check_output_dir()

    @property
    def assets(self) -> dict[str, Path]:
        """Folder of each asset by name.

        Raises:
            AssetError: if the package was installed without one.
        """
        return {name: self.assets_dir / name if self.assets_dir else asset_path(name) for name in PARTS}

    def _check_output_dir(self) -> None:
        folder = self.output_dir
        check_output_folder(str(folder), "--output-dir")
        found = sorted(path.name for path in folder.glob("*"))
        is_own = (folder / MARKER_FILE).is_file()
        strangers = [name for name in found if name not in (*OWN_FOLDERS, METRICS_FILE, REPORT_FILE, MARKER_FILE)]
        if strangers or (found and not is_own):
            raise NotADirectoryError(
                f"--output-dir {folder} holds {', '.join((strangers or found)[:3])}, which the quickstart did not "
                "make; give a new folder"
            )


def require_extras() -> None:
    """Check that the libraries of the extra `quickstart` are installed.

    Raises:
        ValueError: naming those that are missing, and the command that installs them.
    """
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the quickstart needs {' and '.join(missing)}: {install_command('quickstart')}")


def clear_output(folder: Path) -> None:
    """Make `folder`, and remove what an earlier run left in it: a checkpoint there would be resumed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER_FILE).touch()
    for name in OWN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (METRICS_FILE, REPORT_FILE):
        (folder / name).unlink(missing_ok=True)


def thread_count() -> int:
    """Threads to compute with: `OMP_NUM_THREADS` if it is set, else the cores up to `MAX_THREADS`."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else min(MAX_THREADS, os.cpu_count() or 1)
