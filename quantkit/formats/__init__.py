"""How a weight can be stored: sizes (no mlx needed), encoding and decoding."""
