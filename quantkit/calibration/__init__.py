"""Calibration text: documents, chats and their tokens."""
