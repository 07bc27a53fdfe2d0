"""One process of `metamorph …` under torchrun, with an engine that compiles nothing."""

import sys

import deepspeed

from metamorph import cli


# Its shared-memory communication is compiled at first use, for a minute or more, by all processes at once.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

if __name__ == "__main__":
    sys.exit(cli.main())
