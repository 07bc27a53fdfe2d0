"""`metamorph data cache-features [PATH] --feature_cache DIR --config recipe.yaml`: compute visual tokens once."""

import re
from collections.abc import Sequence

from metamorph.recipes import config_flag


def main(argv: Sequence[str]) -> None:
    """Run the frozen tower over all images of the training data, and save the visual tokens.

    The flags are those of `metamorph train`; the value of `--data_path` may come first.
    """
    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--data_path")
    # The output folder is the cache. In a recipe `output_dir` belongs to the training and is not written to.
    words = [re.sub("^--output[-_]dir(?==|$)", "--feature_cache", word) for word in words]
    config_flag(words)  # before the imports below, which take seconds
    from metamorph.flags.recipes import parse_arguments
    from metamorph.training.arguments import DataArguments, ModelArguments
    from metamorph.training.features import FeatureArguments

    types = (ModelArguments, DataArguments, FeatureArguments)
    arguments = parse_arguments(types, words, prog="metamorph data cache-features")
    from metamorph.training.features import cache_features  # after the arguments are known to be good: takes seconds

    folder, count = cache_features(*arguments)
    print(f"visual tokens of {count} images: {folder}")
