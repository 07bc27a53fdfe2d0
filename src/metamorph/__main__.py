"""`python -m metamorph …` and `torchrun -m metamorph …` are the `metamorph` command."""

import sys

from metamorph.cli import main


if __name__ == "__main__":
    sys.exit(main())
