"""The commands that install optional dependencies, for error messages."""


def install_command(extra: str) -> str:
    """The command that installs an extra of `pyproject.toml`.

    MetaMorph is not on PyPI yet (`metamorph` there is another project), so extras are installed from a clone.
    """
    return f'pip install -e ".[{extra}]" in the clone of MetaMorph'
