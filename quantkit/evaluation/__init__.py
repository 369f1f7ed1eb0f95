"""Judging a repo from the repo alone: nothing the writer remembers is trusted."""
