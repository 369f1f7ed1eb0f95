"""Sensitivity: the KL cost of every weight in every tier, predicted or measured."""
