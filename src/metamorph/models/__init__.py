"""The network: configuration, vision tower, connector, vision head, losses, decoding and the processor."""
