"""Mixed-precision MLX quants, chosen under a budget and checked."""

__version__ = "0.1.0"
