"""Visualizer training."""
