"""Read checkpoints: headers first, values on demand, never a whole model."""
