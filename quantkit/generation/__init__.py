"""Letting a repo speak, through stock mlx-lm."""
