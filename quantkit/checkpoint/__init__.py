"""Reading checkpoints: headers first, values only when asked for, never a whole model."""
