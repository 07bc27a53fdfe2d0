"""`metamorph lr --base-lr 6.93e-5 --base-batch 1536 --batch 768`: the square-root rule of the training guide."""

from collections.abc import Sequence

from metamorph.flags.parser import FlagParser, at_least
from metamorph.training.optimizer import scale_learning_rate


def main(argv: Sequence[str]) -> None:
    """Print the scaled learning rate."""
    parser = FlagParser(
        prog="metamorph lr", description="Scale a learning rate with the square root of the batch size."
    )
    parser.add_argument("--base-lr", type=float, default=6.93e-5, help="known learning rate")
    parser.add_argument("--base-batch", type=at_least(1), default=1536, help="global batch size of --base-lr")
    batch_help = "new global batch size: batch per device x gradient accumulation x GPUs x nodes"
    parser.add_argument("--batch", type=at_least(1), required=True, help=batch_help)
    flags = parser.parse_args(argv)
    print(f"{scale_learning_rate(flags.base_lr, flags.base_batch, flags.batch):.3g}")
