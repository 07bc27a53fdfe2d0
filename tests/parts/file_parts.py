"""What files look like on disk."""

import os
import stat
from pathlib import Path


def other_permissions(folder: Path) -> dict[str, str]:
    """The files below `folder` that have not the permissions that the umask gives, with those they have."""
    umask = os.umask(0o077)
    os.umask(umask)
    modes = {file: stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*") if file.is_file()}
    return {str(file): oct(mode) for file, mode in modes.items() if mode != 0o666 & ~umask}
