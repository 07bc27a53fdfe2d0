"""How the model learns: flags, stages, trainer, checkpoints."""
