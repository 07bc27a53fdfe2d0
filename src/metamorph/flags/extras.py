"""How errors tell what to install: the optional dependencies of the package, by the name of their extra."""


def install_command(extra: str) -> str:
    """The command that installs an extra, to be quoted in an error.

    The package is not on PyPI yet, and `metamorph` there is another project: extras are installed from a clone.

    Args:
        extra: A name from `[project.optional-dependencies]` of `pyproject.toml`.
    """
    return f'pip install -e ".[{extra}]" in the clone of MetaMorph'
