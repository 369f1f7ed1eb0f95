"""Run any mlx-lm model a layer at a time."""
