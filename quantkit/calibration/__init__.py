"""Calibration text: documents, chats, and the token sequences made from them."""
