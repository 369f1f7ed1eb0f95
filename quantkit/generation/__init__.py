"""Generation with a repo, through stock mlx-lm."""
