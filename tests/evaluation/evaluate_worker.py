"""One process of `metamorph evaluate SPEC …` that knows the loader and the metrics of the tests."""

import sys

import benchmark_parts

from metamorph import cli


if __name__ == "__main__":
    benchmark_parts.register()
    sys.exit(cli.main(["evaluate", *sys.argv[1:]]))
