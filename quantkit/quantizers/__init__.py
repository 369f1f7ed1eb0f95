"""Calibrated rounding: how a weight's numbers are chosen inside its tier, from its own inputs."""
