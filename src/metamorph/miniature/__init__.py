"""The whole system in miniature: a small drawn world, small pretrained models, and one command that runs it all."""
