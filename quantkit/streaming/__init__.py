"""Running any mlx-lm model a layer at a time."""
