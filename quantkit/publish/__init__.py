"""Publish a repo: its report, model card, pictures, and upload."""
