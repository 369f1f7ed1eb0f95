"""Carrying a plan out: source in, repo out, a block at a time, resumable and atomic."""
