"""Saying what a repo is: its report and its model card."""
