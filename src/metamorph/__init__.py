"""MetaMorph: unified multimodal models by Visual-Predictive Instruction Tuning."""
