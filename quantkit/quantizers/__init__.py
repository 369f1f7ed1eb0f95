"""Quantizers: how integers, scales and biases are chosen inside a tier, from calibration text."""
