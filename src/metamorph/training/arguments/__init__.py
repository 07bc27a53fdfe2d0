"""The flags of `metamorph train`, by what they decide; checked before anything is loaded.

What the network is, and what is trained?  `model.py`
What does it learn from?                   `data.py`
How does it learn?                         `training.py`; what the visualizer shares: `shared.py`
Which flags of Transformers do nothing?    `unsupported.py`
How do several GPUs share the work?        `sharding.py`
"""

from metamorph.training.arguments.data import DataArguments
from metamorph.training.arguments.model import ModelArguments
from metamorph.training.arguments.training import MetaMorphTrainingArguments


__all__ = ["DataArguments", "MetaMorphTrainingArguments", "ModelArguments"]
