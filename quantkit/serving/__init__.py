"""A server for one repo: OpenAI's Chat Completions and Responses, over mlx-lm's generation."""
