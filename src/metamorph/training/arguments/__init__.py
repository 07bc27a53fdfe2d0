"""The flags of `metamorph train`, checked before anything is loaded.

What is the network, and what of it is trained?   `model.py`
Which data does it train on?                      `data.py`
How is it trained?                                `training.py`; flags shared with the visualizer: `shared.py`
All of them, and values derived from several?     `run.py`
Which flags of Transformers are refused?          `unsupported.py`
How do several GPUs share the work?               `sharding.py`
"""

from metamorph.training.arguments.data import DataArguments
from metamorph.training.arguments.model import ModelArguments
from metamorph.training.arguments.run import RunArguments
from metamorph.training.arguments.training import MetaMorphTrainingArguments


__all__ = ["DataArguments", "MetaMorphTrainingArguments", "ModelArguments", "RunArguments"]
