"""Storage formats of weights: sizes (without mlx), encoding and decoding."""
