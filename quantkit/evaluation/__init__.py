"""Evaluation of written repos: fidelity, integrity, and speed."""
